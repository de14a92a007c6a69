//! Open files of a VMM: an iommufd and devices that come while the VMM runs, and go with it.
//!
//! Without its file, an iommufd answers each call with ENODEV, and a device is not bound.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::{AddressSpaces, Attach, Bar, Cdev, DeviceMemory, DmaSource, IommuFd};
use crate::address::{Access, Iova, IovaRange};
use crate::locks::{Mutex, Rank};

/// The open files of a VMM, for the backend that works with them while this process has them.
pub trait VmmFiles: Send {
    /// Whether the iommufd is open.
    fn is_open(&self) -> bool;

    /// Gets the files that this process lacks from the VMM. May wait for a moment. What comes, at whatever time, is not open
    /// before [`Self::accept`].
    fn fetch(&self);

    /// Opens what has come. The caller must move the devices to their targets before it lets anybody see them: each is where
    /// the VMM has put it.
    fn accept(&self);

    /// Gives all files up, because the VMM has gone.
    fn release(&self);
}

/// The iommufd of a VMM. Clones are the same one.
#[derive(Clone, Debug)]
pub struct VmmIommufd(Arc<Mutex<Option<Arc<IommuFd>>>>);

/// A device of a VMM. Clones are the same one.
#[derive(Clone, Debug)]
pub struct VmmCdev(Arc<Mutex<VmmDeviceState>>);

/// What this process has of a device.
#[derive(Debug)]
enum VmmDeviceState {
    /// Nothing yet.
    Awaited,
    Open(Cdev),
    /// Nothing any more: its endpoint was removed.
    Ended,
}

fn absent() -> io::Error {
    io::Error::from_raw_os_error(libc::ENODEV)
}

impl Default for VmmIommufd {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Rank::VmmFiles, None)))
    }
}

impl VmmIommufd {
    /// The open file; `None` without one.
    pub fn file(&self) -> Option<Arc<IommuFd>> {
        self.0.lock().clone()
    }

    /// Replaces the open file. Returns the former one.
    pub fn set(&self, iommufd: Option<IommuFd>) -> Option<Arc<IommuFd>> {
        std::mem::replace(&mut *self.0.lock(), iommufd.map(Arc::new))
    }

    fn get(&self) -> io::Result<Arc<IommuFd>> {
        self.file().ok_or_else(absent)
    }
}

impl AddressSpaces for VmmIommufd {
    fn alloc(&self) -> io::Result<u32> {
        self.get()?.alloc()
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        self.get()?.destroy(ioas)
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        self.get()?.map(ioas, range, access, source)
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        self.get()?.copy(ioas, range, access, from, first)
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        self.get()?.unmap(ioas, range)
    }
}

impl Default for VmmCdev {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(
            Rank::VmmFiles,
            VmmDeviceState::Awaited,
        )))
    }
}

impl VmmCdev {
    /// Whether this process has the open file.
    pub fn is_open(&self) -> bool {
        matches!(*self.0.lock(), VmmDeviceState::Open(_))
    }

    /// Whether this process must not get the open file again.
    pub fn has_ended(&self) -> bool {
        matches!(*self.0.lock(), VmmDeviceState::Ended)
    }

    /// Takes the open file. Returns one that is of no use: the former one, or this one if the device has ended. It may take
    /// seconds to close: the kernel resets the device.
    pub fn open(&self, cdev: Cdev) -> Option<Cdev> {
        let mut state = self.0.lock();
        if let VmmDeviceState::Ended = *state {
            return Some(cdev);
        }
        std::mem::replace(&mut *state, VmmDeviceState::Open(cdev)).file()
    }

    /// Gives the open file up, because the VMM has gone. The next VMM may bring another one.
    pub fn give_up(&self) -> Option<Cdev> {
        let mut state = self.0.lock();
        if let VmmDeviceState::Ended = *state {
            return None;
        }
        std::mem::replace(&mut *state, VmmDeviceState::Awaited).file()
    }

    /// Gives the open file up for good.
    pub fn end(&self) -> Option<Cdev> {
        std::mem::replace(&mut *self.0.lock(), VmmDeviceState::Ended).file()
    }

    fn get(&self) -> io::Result<Cdev> {
        match &*self.0.lock() {
            VmmDeviceState::Open(cdev) => Ok(cdev.clone()),
            VmmDeviceState::Awaited | VmmDeviceState::Ended => Err(absent()),
        }
    }
}

impl VmmDeviceState {
    fn file(self) -> Option<Cdev> {
        match self {
            Self::Open(cdev) => Some(cdev),
            Self::Awaited | Self::Ended => None,
        }
    }
}

impl Attach for VmmCdev {
    fn is_bound(&self) -> bool {
        self.get().is_ok_and(|cdev| cdev.is_bound())
    }

    fn attach(&self, ioas: u32) -> io::Result<()> {
        self.get()?.attach(ioas)
    }

    fn detach(&self) -> io::Result<()> {
        self.get()?.detach()
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        self.get()?.clear_bus_master()
    }
}

impl DeviceMemory for VmmCdev {
    fn bars(&self) -> io::Result<Vec<Bar>> {
        self.get()?.bars()
    }

    fn export(&self, bar: u32, offset: u64, len: u64) -> io::Result<OwnedFd> {
        self.get()?.export(bar, offset, len)
    }

    fn map(&self, bar: u32) -> io::Result<Arc<MmapRegion>> {
        self.get()?.map(bar)
    }
}
