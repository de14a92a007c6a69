//! The memory of the BIOS area that the VMM has mapped read-only. The firmware of a PC copies its RSDP there, and locks the
//! area against writing before it starts the guest's kernel. QEMU then maps the area read-only.
//!
//! The area is read with `pread`, not mapped: a file that has become shorter would kill the daemon. Nobody writes to it
//! through this daemon.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::address::PageMask;
use crate::device::guest_memory::is_shared_memory;

/// Where a PC's firmware puts the RSDP, at a multiple of 16.
pub(super) const BIOS_AREA: Range<u64> = 0xe_0000..0x10_0000;

/// Read-only windows of guest memory that lie in the BIOS area, with their files.
///
/// Windows are whole pages and disjoint, so there are at most 32, one for each page of the area.
#[derive(Debug, Default)]
pub struct ReadOnlyWindows(BTreeMap<u64, ReadOnlyWindow>);

#[derive(Debug)]
struct ReadOnlyWindow {
    /// The first address behind it.
    end: u64,
    file: File,
    /// Where the window begins in the file.
    offset: u64,
}

impl ReadOnlyWindows {
    /// Records the window of `size` bytes from guest-physical `address` on, which begins at `offset` of `file`.
    /// Returns whether the window is kept. It is not if it lies outside the BIOS area, consists of parts of pages,
    /// overlaps another one, or if the file is neither a memfd nor on a tmpfs or hugetlbfs: a read of another
    /// file system may wait for ever.
    pub fn add(&mut self, address: u64, size: u64, offset: u64, file: File) -> bool {
        let Some(end) = address.checked_add(size) else {
            return false;
        };
        let is_aligned = [address, size, offset]
            .into_iter()
            .all(|value| PageMask::TABLE.is_aligned(value));
        let is_in_area = address < end && address < BIOS_AREA.end && end > BIOS_AREA.start;
        let is_free = self
            .0
            .range(..end)
            .next_back()
            .is_none_or(|(_, before)| before.end <= address);
        let is_kept = is_aligned
            && is_in_area
            && is_free
            && file.metadata().is_ok_and(|metadata| metadata.is_file())
            && is_shared_memory(&file).unwrap_or(false);
        if is_kept {
            self.0.insert(address, ReadOnlyWindow { end, file, offset });
        }
        is_kept
    }

    /// Removes the window that begins at guest-physical `address`, if it is kept.
    pub fn remove(&mut self, address: u64) {
        self.0.remove(&address);
    }

    /// Removes all windows.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Fills `into` with the bytes from guest-physical `at` on. Returns `false` if not all of them are in one window,
    /// or if the file has become shorter.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> bool {
        let Some(end) = at.checked_add(into.len() as u64) else {
            return false;
        };
        let Some((start, window)) = self.0.range(..=at).next_back() else {
            return false;
        };
        end <= window.end
            && window
                .offset
                .checked_add(at - start)
                .is_some_and(|from| window.file.read_exact_at(into, from).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A memfd in which each page begins with its number.
    fn memfd(pages: u8) -> File {
        let file = rustix::fs::memfd_create("read-only", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.expect("a memfd"));
        for page in 0..pages {
            file.write_all_at(&[page; 0x1000], u64::from(page) * 0x1000)
                .expect("written");
        }
        file
    }

    fn first(windows: &ReadOnlyWindows, at: u64, len: usize) -> Option<u8> {
        let mut bytes = vec![0xff; len];
        windows.read(at, &mut bytes).then(|| bytes[0])
    }

    #[test]
    fn only_whole_pages_of_the_bios_area_in_shared_memory_are_kept() {
        let mut windows = ReadOnlyWindows::default();
        let mut add = |address, size, offset| windows.add(address, size, offset, memfd(1));
        for (address, size, offset) in [
            (0xf_0000, 0, 0),
            (0xf_0000, 0xfff, 0),
            (0xf_0800, 0x1000, 0),
            (0xf_0000, 0x1000, 0x800),
            (0xd_f000, 0x1000, 0),
            (0x10_0000, 0x1000, 0),
            (u64::MAX - 0xfff, 0x2000, 0),
        ] {
            assert!(!add(address, size, offset), "{address:#x} {size:#x}");
        }
        // A window may reach beyond the area, as QEMU's does.
        assert!(add(0xd_0000, 0x1_1000, 0));
        assert!(add(0xf_0000, 0x1_0000, 0));
        for (address, size) in [(0xe_0000, 0x1000), (0xe_1000, 0x1_0000), (0xf_f000, 0x2000)] {
            assert!(!add(address, size, 0), "{address:#x} overlaps");
        }
        for page in 0..15 {
            assert!(add(0xe_1000 + page * 0x1000, 0x1000, 0));
        }
        assert!(!windows.add(0x10_0000, 0x1000, 0, memfd(1)));
        assert_eq!(windows.0.len(), 17);
        windows.remove(0xe_1000);
        windows.remove(0xe_1000);
        assert_eq!(windows.0.len(), 16);
        windows.clear();
        let (pipe, _end) = std::io::pipe().expect("a pipe");
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(!windows.add(0xf_0000, 0x1000, 0, pipe));
        let proc = File::open("/proc/self/status").expect("a file");
        assert!(!windows.add(0xf_0000, 0x1000, 0, proc), "not memory");
    }

    #[test]
    fn reads_stay_within_one_window_and_the_file() {
        let mut windows = ReadOnlyWindows::default();
        let file = memfd(4);
        assert!(windows.add(0xf_0000, 0x2000, 0x1000, file.try_clone().expect("a copy")));
        assert_eq!(first(&windows, 0xf_0000, 0x1000), Some(1));
        assert_eq!(first(&windows, 0xf_1ff0, 16), Some(2));
        for (at, len) in [(0xf_1ff0, 17), (0xe_fff0, 32), (0xf_2000, 1), (u64::MAX, 2)] {
            assert_eq!(first(&windows, at, len), None, "{at:#x}");
        }
        file.set_len(0x2000).expect("shorter");
        assert_eq!(first(&windows, 0xf_0000, 0x1000), Some(1));
        assert_eq!(first(&windows, 0xf_1000, 16), None);
    }
}
