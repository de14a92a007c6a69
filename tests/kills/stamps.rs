//! What lies in the pages that mappings lead to, so that each access tells whether it should have happened.
//!
//! While a page is mapped its first word is the stamp of the address it is mapped at. Devices read that
//! word and write it down a little further on. Once UNMAP is answered both words are poison: a device
//! that still reads finds that, and one that still writes leaves its mark in it.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Pages of guest memory that mappings lead to.
pub const PAGES: u64 = 64;
/// Where devices write in a page.
pub const SCRIBBLE: u64 = 64;
/// What lies in a page that no mapping leads to.
pub const POISON: u64 = 0xdead_dead_dead_dead;
/// What lies in the pages of a VM that is gone.
pub const GRAVE: u64 = 0x6666_6666_6666_6666;
/// Addresses that are mapped and unmapped: so many, this far apart, from this one on.
pub const SPOTS: u64 = 16;
const STEP: u64 = 2 << 20;
const FIRST: u64 = 0x1_0000_0000;

/// The I/O virtual address of a spot.
pub fn iova(spot: u64) -> u64 {
    FIRST + spot % SPOTS * STEP
}

/// What lies in the page that is mapped at `iova`.
pub fn stamp(iova: u64) -> u64 {
    iova | 1
}

/// A device has found `value` at `iova`.
pub fn check(value: u64, iova: u64, who: &str) {
    assert_eq!(
        value,
        stamp(iova),
        "{who} has reached {value:#x} at {iova:#x}: the mapping was gone"
    );
}

/// The pages, as files are written to.
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

    /// For a mapping that is about to come.
    pub fn stamp(&self, page: u64, iova: u64) {
        self.write(page, 0, stamp(iova));
    }

    /// No mapping leads there, or no VM is left: nobody may see or change this.
    pub fn fill(&self, page: u64, with: u64) {
        self.write(page, 0, with);
        self.write(page, SCRIBBLE, with);
    }

    /// Nobody has.
    pub fn check_untouched(&self, page: u64, filled: u64) {
        let found = (self.read(page, 0), self.read(page, SCRIBBLE));
        assert_eq!(
            found,
            (filled, filled),
            "somebody has written to page {page}, which no mapping leads to"
        );
    }
}
