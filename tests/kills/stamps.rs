//! The contents of guest pages. They show whether an access was legal when it happened.
//!
//! While a page is mapped, its first word is the stamp of its I/O virtual address. Devices read that word and write
//! it to another place in the page. After the reply to UNMAP both words are poison: a device that still reads finds
//! the poison, and a device that still writes overwrites it.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes in a page.
pub const PAGE: u64 = 4096;
/// Number of guest pages that mappings lead to.
pub const PAGES: u64 = 64;
/// The offset in a page at which devices write.
pub const WRITE_OFFSET: u64 = 64;
/// The words of a page that no mapping leads to.
pub const POISON: u64 = 0xdead_dead_dead_dead;
/// The value with which the test fills the pages of a killed VM.
pub const KILLED_VM_FILL: u64 = 0x6666_6666_6666_6666;
/// The number of I/O virtual addresses that the guest maps and unmaps.
pub const IOVAS: u64 = 16;
/// The distance of two of these addresses in bytes.
const STEP: u64 = 2 << 20;
/// The first of these addresses.
const FIRST: u64 = 0x1_0000_0000;

/// The I/O virtual address with this number, which wraps at [`IOVAS`].
pub fn iova(number: u64) -> u64 {
    FIRST + number % IOVAS * STEP
}

/// The first word of a page while it is mapped at `iova`.
pub fn stamp(iova: u64) -> u64 {
    iova | 1
}

/// Fails the test if `value`, which `device` has read at `iova`, is not the stamp.
pub fn check_stamp(value: u64, iova: u64, device: &str) {
    assert_eq!(
        value,
        stamp(iova),
        "{device} has read {value:#x} at {iova:#x}: the mapping was gone"
    );
}

/// The guest pages, accessed through their file.
pub struct Pages<'a>(pub &'a File);

impl Pages<'_> {
    pub fn read(&self, page: u64, at: u64) -> u64 {
        let mut bytes = [0; 8];
        let place = page * PAGE + at;
        self.0.read_exact_at(&mut bytes, place).expect("memory");
        u64::from_le_bytes(bytes)
    }

    fn write(&self, page: u64, at: u64, value: u64) {
        let place = page * PAGE + at;
        let done = self.0.write_all_at(&value.to_le_bytes(), place);
        done.expect("memory");
    }

    /// Stamps a page that the guest is about to map at `iova`.
    pub fn stamp(&self, page: u64, iova: u64) {
        self.write(page, 0, stamp(iova));
    }

    /// Fills a page that no device may reach from now on.
    pub fn fill(&self, page: u64, value: u64) {
        self.write(page, 0, value);
        self.write(page, WRITE_OFFSET, value);
    }

    /// Fails the test if a device has written to a page since [`Self::fill`].
    pub fn check_untouched(&self, page: u64, value: u64) {
        let found = (self.read(page, 0), self.read(page, WRITE_OFFSET));
        assert_eq!(
            found,
            (value, value),
            "a device has written to page {page}, which no mapping leads to"
        );
    }
}
