//! Guest memory through mappings of the client's descriptors.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::RwLock;
use vhost_device_iommu::vfio_user::message::{
    DMA_MAP_READ, DMA_MAP_WRITE, DMA_UNMAP_ALL, DMA_UNMAP_DIRTY, DmaMapBody, DmaUnmapBody,
};
use vhost_device_iommu::warn_limited;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::{DmaError, Gate, Memory, Messages, PIECE, Segment};

/// The maximum number of windows. The kernel limits a process to 65530 mappings, and this process needs
/// some for itself.
pub const MAX_WINDOWS: usize = 60_000;

/// The granularity of windows.
const PAGE: usize = 4096;

/// The client's windows. If no mapped window permits an access, the server sends the access to the client
/// as a message: some of the client's memory may have no descriptor. The client refuses other accesses.
pub struct Mapped {
    /// Disjoint windows by first address. The lock is held for writing while a window is removed.
    windows: RwLock<BTreeMap<u64, Window>>,
    messages: Arc<Messages>,
}

struct Window {
    last: u64,
    /// `DMA_MAP_*`.
    rights: u32,
    /// `None` if the client passed no descriptor.
    memory: Option<MappedWindow>,
}

/// The memory of a window: a part of a mapping, which may begin before the window and end after it.
struct MappedWindow {
    mapping: MmapRegion,
    /// The offset of the window in the mapping.
    skipped: usize,
    /// The length of the window.
    len: usize,
}

impl Mapped {
    /// Memory without windows.
    pub fn new(messages: Arc<Messages>) -> Self {
        Self {
            windows: RwLock::default(),
            messages,
        }
    }

    /// Splits segments into pieces. `copy` gets the memory of a window, the offset in it and the range of
    /// the data; `request` gets a piece that no mapped window permits.
    fn for_each_piece(
        &self,
        gate: &Gate,
        segments: &[Segment],
        right: u32,
        mut copy: impl FnMut(&MmapRegion, usize, Range<usize>),
        mut request: impl FnMut(Segment, Range<usize>) -> Result<(), DmaError>,
    ) -> Result<(), DmaError> {
        let mut done = 0;
        for segment in segments {
            let end = done + segment.len;
            let mut address = segment.address;
            while done < end {
                let open = gate.enter()?;
                // No window is removed while this guard is held.
                let windows = self.windows.read();
                let left = (end - done).min(PIECE);
                let len = if let Some((memory, at, room)) = find(&windows, address, right) {
                    let len = left.min(room);
                    copy(memory, at, done..done + len);
                    len
                } else {
                    drop(windows);
                    drop(open);
                    let page_left = PAGE - usize::try_from(address % PAGE as u64).unwrap_or(0);
                    let len = left.min(page_left);
                    request(Segment { address, len }, done..done + len)?;
                    len
                };
                done += len;
                address = address.wrapping_add(len as u64);
            }
        }
        Ok(())
    }
}

impl Memory for Mapped {
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError> {
        let into = RefCell::new(into);
        self.for_each_piece(
            gate,
            from,
            DMA_MAP_READ,
            |memory, at, bytes| {
                let mut into = into.borrow_mut();
                if let (Some(into), Ok(from)) = (
                    into.get_mut(bytes.clone()),
                    memory.get_slice(at, bytes.len()),
                ) {
                    from.copy_to(into);
                }
            },
            |piece, bytes| {
                let mut into = into.borrow_mut();
                let into = into.get_mut(bytes).unwrap_or_default();
                self.messages.read(gate, &[piece], into)
            },
        )
    }

    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError> {
        self.for_each_piece(
            gate,
            to,
            DMA_MAP_WRITE,
            |memory, at, bytes| {
                if let (Some(from), Ok(to)) =
                    (from.get(bytes.clone()), memory.get_slice(at, bytes.len()))
                {
                    to.copy_from(from);
                }
            },
            |piece, bytes| {
                let from = from.get(bytes).unwrap_or_default();
                self.messages.write(gate, &[piece], from)
            },
        )
    }

    fn map(&self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32> {
        let (first, size) = (window.address.get(), window.size.get());
        let last = size.checked_sub(1).and_then(|span| first.checked_add(span));
        let last = last.ok_or(libc::EINVAL)?;
        let rights = window.flags.get() & (DMA_MAP_READ | DMA_MAP_WRITE);
        let memory = match file {
            Some(file) => Some(map_file(file.into(), window, rights)?),
            None => None,
        };
        let mut windows = self.windows.write();
        if windows.len() >= MAX_WINDOWS {
            return Err(libc::ENOSPC);
        }
        if windows
            .range(..=last)
            .next_back()
            .is_some_and(|(_, w)| w.last >= first)
        {
            return Err(libc::EEXIST);
        }
        windows.insert(
            first,
            Window {
                last,
                rights,
                memory,
            },
        );
        Ok(())
    }

    fn unmap(&self, window: &DmaUnmapBody) -> Result<(), i32> {
        let (first, size) = (window.address.get(), window.size.get());
        let flags = window.flags.get();
        // Waits for copies that use a window.
        let mut windows = self.windows.write();
        if flags == DMA_UNMAP_ALL && first == 0 && size == 0 {
            windows.clear();
            return Ok(());
        }
        if flags & DMA_UNMAP_DIRTY != 0 {
            return Err(libc::ENOTSUP);
        }
        let last = size.checked_sub(1).and_then(|span| first.checked_add(span));
        if flags != 0 || windows.get(&first).map(|w| w.last) != last {
            return Err(libc::EINVAL);
        }
        windows.remove(&first);
        Ok(())
    }
}

/// The mapped window that has `address` and grants `right`: its mapping, the offset of the address in the
/// mapping, and the number of bytes up to the window's end.
fn find(
    windows: &BTreeMap<u64, Window>,
    address: u64,
    right: u32,
) -> Option<(&MmapRegion, usize, usize)> {
    let (first, window) = windows.range(..=address).next_back()?;
    let memory = window.memory.as_ref()?;
    if address > window.last || window.rights & right == 0 {
        return None;
    }
    let at = usize::try_from(address - first).ok()?;
    let room = memory.len.checked_sub(at).filter(|room| *room > 0)?;
    Some((&memory.mapping, memory.skipped.checked_add(at)?, room))
}

/// Maps a window of the client's file. The client must not truncate the file afterwards: an access
/// beyond its end would raise SIGBUS and end this process. The client is trusted in this.
///
/// A guest maps pages of 4 KiB, also in RAM of huge pages. The kernel maps a file of huge pages only from the
/// beginning of one and unmaps only whole ones, so there the mapping is wider than the window.
fn map_file(file: File, window: &DmaMapBody, rights: u32) -> Result<MappedWindow, i32> {
    let offset = window.offset.get();
    let end = offset.checked_add(window.size.get()).ok_or(libc::EINVAL)?;
    let size = usize::try_from(window.size.get()).map_err(|_| libc::EINVAL)?;
    if file.metadata().map_err(|_| libc::EINVAL)?.len() < end {
        return Err(libc::EINVAL);
    }
    let protection = match rights {
        0 => return Err(libc::EINVAL),
        DMA_MAP_READ => libc::PROT_READ,
        _ => libc::PROT_READ | libc::PROT_WRITE,
    };
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let (start, skipped, mapped) = widen(offset, size, huge_page(&file)).ok_or(libc::EINVAL)?;
    let file = FileOffset::new(file, start);
    let mapping = MmapRegion::build(Some(file), mapped, protection, flags).map_err(|cause| {
        warn_limited!("cannot map {mapped:#x} bytes at {start:#x} of the client's file: {cause}");
        libc::ENOMEM
    })?;
    Ok(MappedWindow {
        mapping,
        skipped,
        len: size,
    })
}

/// The page size of a file on a hugetlbfs, which includes a memfd of huge pages; `None` for other files.
fn huge_page(file: &File) -> Option<u64> {
    let found = rustix::fs::fstatfs(file).ok()?;
    let is_huge = found.f_type == libc::HUGETLBFS_MAGIC;
    let size = u64::try_from(found.f_bsize).ok()?;
    (is_huge && size.is_power_of_two()).then_some(size)
}

/// The whole huge pages around `size` bytes at `offset`: their first offset, how far `offset` is from it, and their
/// length. Without huge pages these are the bytes themselves.
pub(crate) fn widen(
    offset: u64,
    size: usize,
    huge_page: Option<u64>,
) -> Option<(u64, usize, usize)> {
    let Some(page) = huge_page else {
        return Some((offset, 0, size));
    };
    let skipped = usize::try_from(offset % page).ok()?;
    let page = usize::try_from(page).ok()?;
    let len = skipped.checked_add(size)?.checked_next_multiple_of(page)?;
    Some((offset - skipped as u64, skipped, len))
}
