//! Guest memory from the client's DMA_MAP and DMA_UNMAP.
//!
//! A window that the device may read and write, with a file behind it, is a slot of guest memory, as a region of the
//! vhost-user table is. Others are recorded, so that DMA_UNMAP finds them, and no endpoint reaches them: this device
//! sends no DMA_READ, and a window that the device may only read is not RAM. Clients map ROMs and device memory like
//! this. QEMU maps RAM like this, too, where the guest's firmware has locked it. The files of such windows are kept in
//! the BIOS area alone, where the guest's firmware has its root pointer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use super::record::WindowRecord;
use crate::address::PageMask;
use crate::device::Device;
use crate::device::acpi::ReadOnlyWindows;
use crate::vfio_user::ClientWindows;
use crate::vfio_user::message::{
    DMA_MAP_READ, DMA_MAP_WRITE, DMA_UNMAP_ALL, DmaMapBody, DmaUnmapBody,
};
use crate::vfio_user::server::{ClientFiles, DescriptorKeeping};
use crate::{info_limited, warn_limited};

/// The maximum number of slots, as that of vhost-user: each is a mapping in this process.
pub(super) const MAX_SLOTS: usize = 509;
const RAM: u32 = DMA_MAP_READ | DMA_MAP_WRITE;

/// The windows of one client, and the guest memory in them.
#[derive(Default)]
pub(super) struct ClientMemory {
    windows: ClientWindows,
    slots: GuestMemoryMmap,
    read_only: ReadOnlyWindows,
    /// What a later process must know, by address; empty without a keeper.
    records: BTreeMap<u64, WindowRecord>,
}

impl ClientMemory {
    /// The windows for a later process.
    pub(super) fn records(&self) -> Vec<WindowRecord> {
        self.records.values().cloned().collect()
    }

    /// The windows of a client of an earlier process, with `files` by their names.
    ///
    /// # Errors
    /// A window is refused, or its file is missing. The device then has no memory.
    pub(super) fn resume(
        device: &Device,
        records: &[WindowRecord],
        files: &ClientFiles,
    ) -> io::Result<Self> {
        let mut memory = Self::default();
        let mut slots = GuestMemoryMmap::default();
        for record in records {
            let refused = |errno| {
                let cause = io::Error::from_raw_os_error(errno);
                let text = format!("the window at {:#x} is refused: {cause}", record.address);
                io::Error::other(text)
            };
            let file = record.file.as_ref().map(|name| {
                let file = files.get(name);
                let file = file.ok_or_else(|| io::Error::other("a descriptor is missing"));
                file.and_then(|file| file.try_clone())
            });
            let window = record.body();
            memory.windows.map(&window).map_err(refused)?;
            let region = memory.region(device, &window, file.transpose()?, slots.num_regions());
            if let Some(region) = region.map_err(refused)? {
                let more = slots.insert_region(Arc::new(region));
                slots = more.map_err(|_| refused(libc::EINVAL))?;
            }
            memory.records.insert(record.address, record.clone());
        }
        memory
            .replace(device, slots)
            .map_err(io::Error::from_raw_os_error)?;
        Ok(memory)
    }

    /// The BIOS area as far as the client has mapped it read-only.
    pub(super) fn read_only(&self) -> &ReadOnlyWindows {
        &self.read_only
    }

    /// DMA_MAP. On an error, the window does not exist.
    ///
    /// # Errors
    /// An errno: the window is invalid or overlaps another (`EINVAL`, `EEXIST`), there are too many (`ENOSPC`), or its
    /// file cannot be mapped as the client says.
    pub(super) fn map(
        &mut self,
        device: &Device,
        window: &DmaMapBody,
        file: Option<OwnedFd>,
        keeping: &DescriptorKeeping,
    ) -> Result<(), i32> {
        self.windows.map(window)?;
        let name = file.as_ref().and_then(|file| keeping.keep(file.as_fd()));
        let done = self.add_slot(device, window, file);
        if done.is_ok() && keeping.is_present() {
            // The server releases the descriptor of a window that is in no record.
            let record = WindowRecord::new(window, name);
            self.records.insert(record.address, record);
        }
        if done.is_err() {
            let undo = DmaUnmapBody {
                argsz: DmaUnmapBody::BYTES.into(),
                flags: 0.into(),
                address: window.address,
                size: window.size,
            };
            // It has just been recorded.
            let _ = self.windows.unmap(&undo);
        }
        done
    }

    /// DMA_UNMAP. When it returns, nobody uses the memory through this daemon any more.
    ///
    /// # Errors
    /// An errno: there is no such window.
    pub(super) fn unmap(&mut self, device: &Device, window: &DmaUnmapBody) -> Result<(), i32> {
        self.windows.unmap(window)?;
        if window.flags.get() & DMA_UNMAP_ALL != 0 {
            self.records.clear();
        } else {
            self.records.remove(&window.address.get());
        }
        let left = if window.flags.get() & DMA_UNMAP_ALL != 0 {
            self.read_only.clear();
            if self.slots.num_regions() == 0 {
                return Ok(());
            }
            GuestMemoryMmap::default()
        } else {
            self.read_only.remove(window.address.get());
            let at = GuestAddress(window.address.get());
            match self.slots.remove_region(at, window.size.get()) {
                Ok((left, _)) => left,
                // A window without a slot.
                Err(_) => return Ok(()),
            }
        };
        self.replace(device, left)
    }

    fn add_slot(
        &mut self,
        device: &Device,
        window: &DmaMapBody,
        file: Option<OwnedFd>,
    ) -> Result<(), i32> {
        let region = self.region(device, window, file, self.slots.num_regions())?;
        let Some(region) = region else {
            return Ok(());
        };
        let more = self.slots.insert_region(Arc::new(region));
        self.replace(device, more.map_err(|_| libc::EINVAL)?)
    }

    /// Maps the memory of a window, beside `slots` others; `None` if the window has none that counts as RAM.
    fn region(
        &mut self,
        device: &Device,
        window: &DmaMapBody,
        file: Option<OwnedFd>,
        slots: usize,
    ) -> Result<Option<GuestRegionMmap>, i32> {
        let (address, size) = (window.address.get(), window.size.get());
        if window.flags.get() & RAM != RAM {
            if window.flags.get() & RAM == DMA_MAP_READ
                && let Some(file) = file
            {
                let offset = window.offset.get();
                self.read_only.add(address, size, offset, file.into());
            }
            return Ok(None);
        }
        let Some(file) = file.map(File::from) else {
            info_limited!(
                "window {address:#x} of {size:#x} bytes has no descriptor: no device reaches it through this \
                 daemon; if it is RAM, give the VMM's RAM share=on"
            );
            device.metrics().windows_without_memory.inc();
            return Ok(None);
        };
        let metadata = file.metadata().map_err(|cause| errno(&cause))?;
        if !metadata.is_file() {
            info_limited!(
                "window {address:#x} of {size:#x} bytes is not of a regular file: no device reaches it through \
                 this daemon"
            );
            device.metrics().windows_without_memory.inc();
            return Ok(None);
        }
        let offset = window.offset.get();
        let fits = offset
            .checked_add(size)
            .is_some_and(|end| end <= metadata.len());
        if !fits || !PageMask::TABLE.is_aligned(offset) {
            warn_limited!(
                "window {address:#x} of {size:#x} bytes is refused: offset {offset:#x} is within a page, or the \
                 file ends before it, with {:#x} bytes",
                metadata.len()
            );
            return Err(libc::EINVAL);
        }
        if slots >= MAX_SLOTS {
            warn_limited!("window {address:#x} is refused: there are {MAX_SLOTS} with memory");
            return Err(libc::ENOSPC);
        }
        let len = usize::try_from(size).map_err(|_| libc::EINVAL)?;
        let mapped = MmapRegion::from_file(FileOffset::new(file, offset), len);
        let mapped = mapped.map_err(|cause| {
            warn_limited!("window {address:#x} of {size:#x} bytes cannot be mapped: {cause}");
            match cause {
                MmapRegionError::Mmap(cause) => errno(&cause),
                _ => libc::EINVAL,
            }
        })?;
        let region = GuestRegionMmap::new(mapped, GuestAddress(address));
        region.ok_or(libc::EINVAL).map(Some)
    }

    /// The device has these slots from now on; on an error it keeps the present ones.
    fn replace(&mut self, device: &Device, slots: GuestMemoryMmap) -> Result<(), i32> {
        if let Err(cause) = device.set_memory(Arc::new(slots.clone())) {
            // The device has no memory now.
            if let Err(cause) = device.set_memory(Arc::new(self.slots.clone())) {
                warn_limited!("guest memory cannot be restored: {cause}");
            }
            return Err(errno(&cause));
        }
        self.slots = slots;
        Ok(())
    }
}

fn errno(cause: &io::Error) -> i32 {
    cause.raw_os_error().unwrap_or(libc::EINVAL)
}
