//! The windows that a client grants a device: all RAM of its guest.
//!
//! The daemon gets that memory, with its descriptors, from the VMM's memory table. Only the ranges are
//! kept here, to answer DMA_MAP and DMA_UNMAP as a server of the device does.

use std::collections::BTreeMap;

use super::message::{DMA_UNMAP_ALL, DMA_UNMAP_DIRTY, DmaMapBody, DmaUnmapBody};
use crate::address::{Iova, IovaRange};

/// A client has at most this many windows.
const MAX_WINDOWS: usize = 65535;

/// The windows, by first address.
#[derive(Debug, Default)]
pub(crate) struct ClientWindows {
    windows: BTreeMap<Iova, IovaRange>,
    /// The client has told an earlier process of others.
    is_incomplete: bool,
}

impl ClientWindows {
    /// The windows of a client of an earlier process. They are not known, and protect nothing: any may be removed.
    pub(crate) fn unknown() -> Self {
        Self {
            is_incomplete: true,
            ..Self::default()
        }
    }

    /// Records a DMA_MAP.
    ///
    /// # Errors
    /// The errno of the refusal.
    pub(crate) fn map(&mut self, body: &DmaMapBody) -> Result<(), i32> {
        let range = range(body.address.get(), body.size.get())?;
        let before = self.windows.range(..=range.last()).next_back();
        if before.is_some_and(|(_, other)| other.overlaps(range)) {
            return Err(libc::EEXIST);
        }
        if self.windows.len() >= MAX_WINDOWS {
            return Err(libc::ENOSPC);
        }
        self.windows.insert(range.first(), range);
        Ok(())
    }

    /// The first and the last address of each window, for a later process.
    pub(crate) fn record(&self) -> Vec<(u64, u64)> {
        let windows = self.windows.values();
        windows
            .map(|range| (range.first().0, range.last().0))
            .collect()
    }

    /// The windows that an earlier process has recorded; `None` if they do not add up.
    pub(crate) fn resumed(record: &[(u64, u64)]) -> Option<Self> {
        let mut windows = Self::default();
        for &(first, last) in record {
            let range = IovaRange::new(Iova(first), Iova(last))?;
            let before = windows.windows.last_key_value();
            if before.is_some_and(|(_, before)| before.last() >= range.first())
                || windows.windows.len() >= MAX_WINDOWS
            {
                return None;
            }
            windows.windows.insert(range.first(), range);
        }
        Some(windows)
    }

    /// Records a DMA_UNMAP.
    ///
    /// # Errors
    /// The errno of the refusal.
    pub(crate) fn unmap(&mut self, body: &DmaUnmapBody) -> Result<(), i32> {
        let flags = body.flags.get();
        if flags & DMA_UNMAP_DIRTY != 0 {
            return Err(libc::ENOTSUP);
        }
        if flags & DMA_UNMAP_ALL != 0 {
            if body.address.get() != 0 || body.size.get() != 0 {
                return Err(libc::EINVAL);
            }
            self.windows.clear();
            return Ok(());
        }
        let range = range(body.address.get(), body.size.get())?;
        if self.windows.get(&range.first()) != Some(&range) {
            return if self.is_incomplete {
                Ok(())
            } else {
                Err(libc::ENOENT)
            };
        }
        self.windows.remove(&range.first());
        Ok(())
    }
}

fn range(address: u64, size: u64) -> Result<IovaRange, i32> {
    IovaRange::from_len(Iova(address), size).ok_or(libc::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(windows: &mut ClientWindows, address: u64, size: u64) -> Result<(), i32> {
        windows.map(&DmaMapBody {
            argsz: 32.into(),
            flags: 3.into(),
            offset: 0.into(),
            address: address.into(),
            size: size.into(),
        })
    }

    fn unmap(windows: &mut ClientWindows, flags: u32, address: u64, size: u64) -> Result<(), i32> {
        windows.unmap(&DmaUnmapBody {
            argsz: 24.into(),
            flags: flags.into(),
            address: address.into(),
            size: size.into(),
        })
    }

    #[test]
    fn windows_do_not_overlap_and_are_removed_whole() {
        let w = &mut ClientWindows::default();
        assert_eq!(map(w, 0x1000, 0x2000), Ok(()));
        assert_eq!(map(w, 0x3000, 0x1000), Ok(()));
        assert_eq!(map(w, u64::MAX - 0xfff, 0x1000), Ok(()));
        for (address, size) in [(0, 0x1001), (0x2fff, 1), (0x2000, 0x1000), (0, u64::MAX)] {
            assert_eq!(map(w, address, size), Err(libc::EEXIST), "{address:#x}");
        }
        assert_eq!(map(w, 0, 0), Err(libc::EINVAL));
        assert_eq!(map(w, 2, u64::MAX), Err(libc::EINVAL));
        assert_eq!(unmap(w, 0, 0x1000, 0x1000), Err(libc::ENOENT));
        assert_eq!(unmap(w, 0, 0x1000, 0x3000), Err(libc::ENOENT));
        assert_eq!(
            unmap(w, DMA_UNMAP_DIRTY, 0x1000, 0x2000),
            Err(libc::ENOTSUP)
        );
        assert_eq!(unmap(w, 0, 0x1000, 0x2000), Ok(()));
        assert_eq!(map(w, 0, 0x1001), Ok(()));
        assert_eq!(unmap(w, DMA_UNMAP_ALL, 0, 1), Err(libc::EINVAL));
        assert_eq!(unmap(w, DMA_UNMAP_ALL, 0, 0), Ok(()));
        assert_eq!(map(w, 0, u64::MAX), Ok(()));
    }
}
