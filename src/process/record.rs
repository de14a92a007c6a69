//! A record in a sealed memfd that outlives the process.
//!
//! ```text
//! | header: magic, version, mark |  words of the owner  | slot 0 | slot 1 |
//!                                                         each: number, length, check, bytes
//! ```
//!
//! A record is written into the slot of the older one, with the next number. The newest whole slot counts, so a process
//! that dies while it writes leaves the record before. The mark says how far its owner has come with what the record says;
//! it has the number of its record, and counts for no other.
//!
//! The record is read like any hostile bytes. The check protects against damage, not against a process that writes on
//! purpose: only the daemon and its keeper have the memfd.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

const VERSION_AT: u64 = 8;
const MARK_AT: u64 = 16;
const SLOTS_AT: u64 = 4096;
/// Bytes of a slot.
const SLOT_BYTES: usize = 256 << 10;
const SLOT_HEADER: usize = 24;
/// The most bytes of a record.
pub const MAX_RECORD: usize = SLOT_BYTES - SLOT_HEADER;
const FILE_BYTES: u64 = SLOTS_AT + 2 * SLOT_BYTES as u64;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Tells the records of one owner from those of others.
#[derive(Clone, Copy, Debug)]
pub struct RecordFormat {
    /// The first word of the memfd.
    pub magic: [u8; 8],
    /// The version of the bytes.
    pub version: u64,
    /// The oldest version whose bytes are read as those of `version`.
    pub oldest: u64,
    /// The memfd's name, which `/proc` shows.
    pub name: &'static str,
}

/// What an earlier process has recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftRecord {
    /// The bytes of the newest record.
    pub bytes: Vec<u8>,
    /// Its mark; 0 before the first.
    pub mark: u8,
}

/// The memfd of a record.
#[derive(Debug)]
pub struct Record {
    file: File,
    /// The number of the last record; 0 before the first.
    number: u64,
}

impl Record {
    /// Makes an empty record.
    ///
    /// # Errors
    /// The system refuses the memfd.
    pub fn new(format: &RecordFormat) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(format.name, flags)?);
        file.set_len(FILE_BYTES)?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        file.write_all_at(&format.version.to_ne_bytes(), VERSION_AT)?;
        file.write_all_at(&format.magic, 0)?;
        Ok(Self { file, number: 0 })
    }

    /// Reads the record that an earlier process has left, and goes on with its memfd. `None` as the contents if that process
    /// has recorded nothing. A memfd of an older version that can be read becomes one of this version.
    ///
    /// # Errors
    /// The record does not add up. It is then refused as a whole.
    pub fn adopt(format: &RecordFormat, file: OwnedFd) -> io::Result<(Self, Option<LeftRecord>)> {
        let file = File::from(file);
        let seals = fcntl_get_seals(&file).map_err(|_| refused("it is not a memfd"))?;
        if !seals.contains(SEALS) || file.metadata()?.len() != FILE_BYTES {
            return Err(refused("its memfd has another size or is not sealed"));
        }
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0)?;
        if word(&header, 0) != Some(u64::from_ne_bytes(format.magic)) {
            return Err(refused("it is not a record"));
        }
        let version = word(&header, VERSION_AT).unwrap_or(0);
        if !(format.oldest..=format.version).contains(&version) {
            return Err(refused("another version of the daemon has written it"));
        }
        let slots = [0, 1].into_iter().filter_map(|slot| read_slot(&file, slot));
        let newest = slots.max_by_key(|(number, _)| *number);
        let mark = word(&header, MARK_AT).unwrap_or(0);
        // The mark is written after its record, so that record must be there.
        if mark >> 2 > newest.as_ref().map_or(0, |(number, _)| *number) {
            return Err(refused("its newest slot is damaged"));
        }
        if version != format.version {
            file.write_all_at(&format.version.to_ne_bytes(), VERSION_AT)?;
        }
        let Some((number, bytes)) = newest else {
            return Ok((Self { file, number: 0 }, None));
        };
        let mark = if mark >> 2 == number { mark & 3 } else { 0 };
        let left = LeftRecord {
            bytes,
            mark: u8::try_from(mark).unwrap_or(0),
        };
        Ok((Self { file, number }, Some(left)))
    }

    /// The memfd.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes a record. A process that dies meanwhile leaves the one before.
    ///
    /// # Errors
    /// It is longer than [`MAX_RECORD`].
    pub fn write(&mut self, record: &[u8]) -> io::Result<()> {
        let number = self.number + 1;
        if record.len() > MAX_RECORD {
            return Err(io::Error::other("the record of its connection is too long"));
        }
        let len = record.len() as u64;
        let mut bytes = Vec::with_capacity(SLOT_HEADER + record.len());
        for word in [number, len, check(number, record)] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(record);
        self.file.write_all_at(&bytes, slot_at(number))?;
        self.number = number;
        Ok(())
    }

    /// Marks the last record with a number below 4.
    ///
    /// # Errors
    /// The system refuses the write.
    pub fn mark(&self, mark: u8) -> io::Result<()> {
        let mark = self.number << 2 | u64::from(mark & 3);
        self.file.write_all_at(&mark.to_ne_bytes(), MARK_AT)
    }
}

/// An error that says why a record is refused.
pub fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

fn slot_at(number: u64) -> u64 {
    SLOTS_AT + number % 2 * SLOT_BYTES as u64
}

/// Number and bytes of a slot; `None` if it is empty or not whole.
fn read_slot(file: &File, slot: u64) -> Option<(u64, Vec<u8>)> {
    let mut bytes = vec![0; SLOT_BYTES];
    file.read_exact_at(&mut bytes, slot_at(slot)).ok()?;
    let (number, len) = (word(&bytes, 0)?, word(&bytes, 8)?);
    let end = usize::try_from(len).ok()?.checked_add(SLOT_HEADER)?;
    let record = bytes.get(SLOT_HEADER..end)?;
    // The highest numbers leave no room for the mark.
    let is_number = number > 0 && number >> 60 == 0 && number % 2 == slot;
    let is_whole = is_number && word(&bytes, 16) == Some(check(number, record));
    is_whole.then(|| (number, record.to_vec()))
}

/// The word of 64 bits at this byte.
fn word(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*word))
}

/// FNV-1a over the number and the bytes.
fn check(number: u64, bytes: &[u8]) -> u64 {
    let number = number.to_ne_bytes();
    number
        .iter()
        .chain(bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMAT: RecordFormat = RecordFormat {
        magic: *b"iovatest",
        version: 7,
        oldest: 6,
        name: "viommu-test",
    };

    fn record() -> Record {
        Record::new(&FORMAT).expect("a memfd")
    }

    fn adopted(record: &Record) -> io::Result<Option<LeftRecord>> {
        let copy = record.file().try_clone_to_owned()?;
        Record::adopt(&FORMAT, copy).map(|(_, left)| left)
    }

    fn left(bytes: &[u8], mark: u8) -> Option<LeftRecord> {
        let bytes = bytes.to_vec();
        Some(LeftRecord { bytes, mark })
    }

    #[test]
    fn the_newest_record_counts_with_its_mark() {
        let mut record = record();
        assert_eq!(adopted(&record).expect("empty"), None);
        for number in 1..5 {
            record.write(&[number; 40]).expect("written");
            assert_eq!(adopted(&record).expect("whole"), left(&[number; 40], 0));
            for mark in [1, 2] {
                record.mark(mark).expect("marked");
                assert_eq!(adopted(&record).expect("whole"), left(&[number; 40], mark));
            }
        }
        let copy = record.file().try_clone_to_owned().expect("a copy");
        let (mut next, _) = Record::adopt(&FORMAT, copy).expect("whole");
        next.write(&[9]).expect("written");
        assert_eq!(adopted(&record).expect("whole"), left(&[9], 0));
    }

    #[test]
    fn a_write_that_was_cut_short_leaves_the_record_before() {
        let mut record = record();
        record.write(b"the first").expect("written");
        let read = |record: &Record| {
            let mut bytes = vec![0; SLOT_BYTES];
            let read = record.file.read_exact_at(&mut bytes, slot_at(2));
            read.expect("read");
            bytes
        };
        let before = read(&record);
        record.write(b"the second").expect("written");
        let after = read(&record);
        let end = after.iter().rposition(|byte| *byte != 0).expect("written") + 1;
        for cut in 0..end {
            let torn = [&after[..cut], &before[cut..]].concat();
            record
                .file
                .write_all_at(&torn, slot_at(2))
                .expect("written");
            let found = adopted(&record).expect("whole");
            assert_eq!(found, left(b"the first", 0), "cut at {cut}");
        }
    }

    #[test]
    fn a_first_write_that_was_cut_short_leaves_nothing() {
        let record = record();
        record
            .file
            .write_all_at(&[1; 9], slot_at(1))
            .expect("written");
        assert_eq!(adopted(&record).expect("nothing"), None);
    }

    #[test]
    fn an_older_version_becomes_this_one() {
        let mut record = record();
        record.write(b"as before").expect("written");
        let version = |record: &Record| {
            let mut bytes = [0; 8];
            let read = record.file.read_exact_at(&mut bytes, VERSION_AT);
            read.expect("read");
            u64::from_ne_bytes(bytes)
        };
        for older in [6u64, 5, 8] {
            let written = record.file.write_all_at(&older.to_ne_bytes(), VERSION_AT);
            written.expect("written");
            let found = adopted(&record);
            if older == 6 {
                assert_eq!(found.expect("read"), left(b"as before", 0));
                assert_eq!(version(&record), 7, "older programs refuse it");
            } else {
                found.expect_err("another version");
                assert_eq!(version(&record), older, "it stays as it was");
            }
        }
    }

    #[test]
    fn a_record_has_its_bounds() {
        let mut record = record();
        record.write(&vec![5; MAX_RECORD]).expect("room");
        assert_eq!(
            adopted(&record).expect("whole"),
            left(&vec![5; MAX_RECORD], 0)
        );
        record
            .write(&vec![5; MAX_RECORD + 1])
            .expect_err("too long");
    }

    #[test]
    fn other_files_and_other_versions_are_refused() {
        let pipe = io::pipe().expect("a pipe").0;
        Record::adopt(&FORMAT, pipe.into()).expect_err("a pipe");
        let plain = memfd_create("plain", MemfdFlags::ALLOW_SEALING).expect("a memfd");
        Record::adopt(&FORMAT, plain).expect_err("not sealed");
        for (at, expected) in [(0, "not a record"), (VERSION_AT, "version")] {
            let record = record();
            record.file.write_all_at(&[99], at).expect("written");
            let refused = adopted(&record).expect_err("another").to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    proptest! {
        /// Whatever the memfd has, it is refused or is one of the records, or one with a valid check.
        #[test]
        fn damage_is_noticed(
            at in 0u64..60, bytes in prop::collection::vec(any::<u8>(), 1..60), slot in 1u64..3,
        ) {
            let mut record = record();
            record.write(&[1; 50]).expect("written");
            record.write(&[2; 50]).expect("written");
            record.file.write_all_at(&bytes, slot_at(slot) + at).expect("written");
            if let Ok(Some(found)) = adopted(&record) {
                prop_assert!(found.bytes == [1; 50] || found.bytes == [2; 50]);
            }
        }
    }
}
