//! The record of a VMM's connection, in a sealed memfd that outlives the process.
//!
//! ```text
//! | header: magic, version, mark |  ...  | slot 0 | slot 1 |
//!                                           each: number, length, check, JSON
//! ```
//!
//! A record is written into the slot of the older one, with the next number. The newest whole slot counts, so a process
//! that dies while it writes leaves the record before. The mark says how far the answer to the last message has come; it
//! has the number of its record, and counts for no other.
//!
//! The record is read like any hostile bytes. The check protects against damage, not against a process that writes on
//! purpose: only the daemon and its keeper have the memfd.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::{Deserialize, Serialize};

use super::message::{MAX_MESSAGE, word64};
use super::state::VmmState;

/// `iovavmm`.
const MAGIC: u64 = u64::from_le_bytes(*b"iovavmm\0");
/// The version of the slots and of their contents.
pub const VERSION: u64 = 1;
const MARK_AT: u64 = 16;
const SLOTS_AT: u64 = 4096;
/// A state with [`MAX_REGIONS`](super::state::MAX_REGIONS) regions takes half of it.
const SLOT_BYTES: usize = 256 << 10;
const SLOT_HEADER: usize = 24;
const FILE_BYTES: u64 = SLOTS_AT + 2 * SLOT_BYTES as u64;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// What is recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recorded {
    /// The number of the connection, which the name of the kept socket has, too.
    pub connection: u64,
    /// The connection has ended.
    pub is_over: bool,
    /// What the VMM has said. It includes the last message.
    pub state: VmmState,
    /// The last message, which the crate has accepted.
    pub last: Option<LastMessage>,
}

/// A message that the crate has accepted, with the crate's reply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LastMessage {
    /// The bytes in the VMM's socket.
    pub message: Vec<u8>,
    /// The bytes that the VMM must get.
    pub reply: Option<Vec<u8>>,
}

/// How far the answer to the last message has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplyProgress {
    /// The VMM has no reply, and the message may still be in its socket.
    Accepted,
    /// The reply is being sent: what the VMM does not have is in the pipe.
    Sending,
    /// There is nothing left to do.
    Done,
}

/// The memfd of the record.
#[derive(Debug)]
pub(super) struct Record {
    file: File,
    /// The number of the last record; 0 before the first.
    number: u64,
}

impl Record {
    /// Makes an empty record.
    ///
    /// # Errors
    /// The system refuses the memfd.
    pub(super) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("viommu-vmm", flags)?);
        file.set_len(FILE_BYTES)?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        file.write_all_at(&VERSION.to_ne_bytes(), 8)?;
        file.write_all_at(&MAGIC.to_ne_bytes(), 0)?;
        Ok(Self { file, number: 0 })
    }

    /// Reads the record that an earlier process has left, and goes on with its memfd. `None` as the contents if that process
    /// has recorded nothing.
    ///
    /// # Errors
    /// The record does not add up. It is then refused as a whole.
    pub(super) fn adopt(file: OwnedFd) -> io::Result<(Self, Option<(Recorded, ReplyProgress)>)> {
        let refused = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let file = File::from(file);
        let seals = fcntl_get_seals(&file).map_err(|_| refused("it is not a memfd"))?;
        if !seals.contains(SEALS) || file.metadata()?.len() != FILE_BYTES {
            return Err(refused("its memfd has another size or is not sealed"));
        }
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0)?;
        if word64(&header, 0) != Some(MAGIC) {
            return Err(refused("it is not a record"));
        }
        if word64(&header, 8) != Some(VERSION) {
            return Err(refused("another version of the daemon has written it"));
        }
        let slots = [0, 1].into_iter().filter_map(|slot| read_slot(&file, slot));
        let newest = slots.max_by_key(|(number, _)| *number);
        let mark = word64(&header, 16).unwrap_or(0);
        // The mark is written after its record, so that record must be there.
        if mark >> 2 > newest.as_ref().map_or(0, |(number, _)| *number) {
            return Err(refused("its newest slot is damaged"));
        }
        let Some((number, bytes)) = newest else {
            return Ok((Self { file, number: 0 }, None));
        };
        let recorded: Recorded = serde_json::from_slice(&bytes)
            .map_err(|cause| refused(&format!("it cannot be decoded: {cause}")))?;
        recorded.check().map_err(refused)?;
        let progress = match mark.checked_sub(number << 2) {
            Some(1) => ReplyProgress::Sending,
            Some(2) => ReplyProgress::Done,
            _ => ReplyProgress::Accepted,
        };
        Ok((Self { file, number }, Some((recorded, progress))))
    }

    /// The memfd.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes a record. A process that dies meanwhile leaves the one before.
    ///
    /// # Errors
    /// It is too long.
    pub(super) fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        let number = self.number + 1;
        let json = serde_json::to_vec(recorded).map_err(io::Error::other)?;
        if json.len() > SLOT_BYTES - SLOT_HEADER {
            return Err(io::Error::other("the record of its connection is too long"));
        }
        let len = json.len() as u64;
        let mut bytes = Vec::with_capacity(SLOT_HEADER + json.len());
        for word in [number, len, check(number, &json)] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(json);
        self.file.write_all_at(&bytes, slot_at(number))?;
        self.number = number;
        Ok(())
    }

    /// Marks how far the answer to the last message has come.
    ///
    /// # Errors
    /// The system refuses the write.
    pub(super) fn mark(&self, progress: ReplyProgress) -> io::Result<()> {
        let progress = match progress {
            ReplyProgress::Accepted => 0,
            ReplyProgress::Sending => 1,
            ReplyProgress::Done => 2,
        };
        let mark: u64 = self.number << 2 | progress;
        self.file.write_all_at(&mark.to_ne_bytes(), MARK_AT)
    }
}

impl Recorded {
    fn check(&self) -> Result<(), &'static str> {
        let is_short = |bytes: &Vec<u8>| bytes.len() <= MAX_MESSAGE;
        let last = self.last.iter();
        let messages = last.flat_map(|last| std::iter::once(&last.message).chain(&last.reply));
        if !messages.into_iter().all(is_short) {
            return Err("it has a message that is too long");
        }
        if !self.state.is_plausible() {
            return Err("it has a state that no VMM can have made");
        }
        Ok(())
    }
}

fn slot_at(number: u64) -> u64 {
    SLOTS_AT + number % 2 * SLOT_BYTES as u64
}

/// Number and JSON of a slot; `None` if it is empty or not whole.
fn read_slot(file: &File, slot: u64) -> Option<(u64, Vec<u8>)> {
    let mut bytes = vec![0; SLOT_BYTES];
    file.read_exact_at(&mut bytes, slot_at(slot)).ok()?;
    let (number, len) = (word64(&bytes, 0)?, word64(&bytes, 8)?);
    let end = usize::try_from(len).ok()?.checked_add(SLOT_HEADER)?;
    let json = bytes.get(SLOT_HEADER..end)?;
    // The highest numbers leave no room for the mark.
    let is_number = number > 0 && number >> 60 == 0 && number % 2 == slot;
    let is_whole = is_number && word64(&bytes, 16) == Some(check(number, json));
    is_whole.then(|| (number, json.to_vec()))
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

    use super::super::state::{MAX_REGIONS, VmmRegion};
    use super::*;

    fn recorded(connection: u64) -> Recorded {
        Recorded {
            connection,
            last: Some(LastMessage {
                message: vec![1; 12],
                reply: Some(vec![2; 20]),
            }),
            ..Recorded::default()
        }
    }

    fn adopted(record: &Record) -> io::Result<Option<(Recorded, ReplyProgress)>> {
        let copy = record.file().try_clone_to_owned()?;
        Record::adopt(copy).map(|(_, recorded)| recorded)
    }

    #[test]
    fn the_newest_record_counts_with_its_mark() {
        let mut record = Record::new().expect("a memfd");
        assert_eq!(adopted(&record).expect("empty"), None);
        for connection in 1..5 {
            record.write(&recorded(connection)).expect("written");
            let found = adopted(&record).expect("whole");
            assert_eq!(found, Some((recorded(connection), ReplyProgress::Accepted)));
            for progress in [ReplyProgress::Sending, ReplyProgress::Done] {
                record.mark(progress).expect("marked");
                let found = adopted(&record).expect("whole");
                assert_eq!(found, Some((recorded(connection), progress)));
            }
        }
        let copy = record.file().try_clone_to_owned().expect("a copy");
        let (mut next, _) = Record::adopt(copy).expect("whole");
        next.write(&recorded(9)).expect("written");
        let found = adopted(&record).expect("whole");
        assert_eq!(found, Some((recorded(9), ReplyProgress::Accepted)));
    }

    #[test]
    fn a_write_that_was_cut_short_leaves_the_record_before() {
        let mut record = Record::new().expect("a memfd");
        record.write(&recorded(1)).expect("written");
        let mut before = vec![0; SLOT_BYTES];
        record
            .file
            .read_exact_at(&mut before, slot_at(2))
            .expect("read");
        record.write(&recorded(2)).expect("written");
        let mut after = vec![0; SLOT_BYTES];
        record
            .file
            .read_exact_at(&mut after, slot_at(2))
            .expect("read");
        let end = after.iter().rposition(|byte| *byte != 0).expect("written") + 1;
        for cut in 0..end {
            let torn = [&after[..cut], &before[cut..]].concat();
            record
                .file
                .write_all_at(&torn, slot_at(2))
                .expect("written");
            let (found, _) = adopted(&record).expect("whole").expect("a record");
            assert_eq!(found, recorded(1), "cut at {cut}");
        }
    }

    #[test]
    fn a_first_write_that_was_cut_short_leaves_nothing() {
        let record = Record::new().expect("a memfd");
        record
            .file
            .write_all_at(&[1; 9], slot_at(1))
            .expect("written");
        assert_eq!(adopted(&record).expect("nothing"), None);
    }

    #[test]
    fn the_largest_state_fits() {
        let mut record = Record::new().expect("a memfd");
        let region = VmmRegion {
            guest: u64::MAX,
            size: u64::MAX,
            user: u64::MAX,
            offset: u64::MAX,
            added: true,
            file: "x".repeat(64),
        };
        let mut largest = recorded(u64::MAX);
        largest.state.memory = vec![region; MAX_REGIONS];
        largest.last = Some(LastMessage {
            message: vec![255; MAX_MESSAGE],
            reply: Some(vec![255; MAX_MESSAGE]),
        });
        record.write(&largest).expect("room");
        assert_eq!(
            adopted(&record).expect("whole").map(|found| found.0),
            Some(largest)
        );
    }

    #[test]
    fn other_files_and_other_versions_are_refused() {
        let pipe = io::pipe().expect("a pipe").0;
        Record::adopt(pipe.into()).expect_err("a pipe");
        let plain = memfd_create("plain", MemfdFlags::ALLOW_SEALING).expect("a memfd");
        Record::adopt(plain).expect_err("not sealed");
        let record = Record::new().expect("a memfd");
        record.file.write_all_at(&[2], 8).expect("written");
        let refused = adopted(&record).expect_err("another version");
        assert!(refused.to_string().contains("version"), "{refused}");
    }

    proptest! {
        /// Whatever the memfd has, it is refused or is a record within all bounds.
        #[test]
        fn any_bytes_are_refused_or_plausible(
            at in 0u64..200, bytes in prop::collection::vec(any::<u8>(), 1..60), slot in 1u64..3,
            seal in any::<bool>(),
        ) {
            let mut record = Record::new().expect("a memfd");
            record.write(&recorded(1)).expect("written");
            record.write(&recorded(2)).expect("written");
            record.file.write_all_at(&bytes, slot_at(slot) + at).expect("written");
            if seal {
                // Damage that has a valid check, too.
                let mut all = vec![0; SLOT_BYTES];
                record.file.read_exact_at(&mut all, slot_at(slot)).expect("read");
                let len = usize::try_from(word64(&all, 8).unwrap_or(0)).unwrap_or(0);
                if let Some(json) = all.get(SLOT_HEADER..SLOT_HEADER.saturating_add(len)) {
                    let number = word64(&all, 0).unwrap_or(0);
                    let sum = check(number, json).to_ne_bytes();
                    record.file.write_all_at(&sum, slot_at(slot) + 16).expect("written");
                }
            }
            if let Ok(Some((found, _))) = adopted(&record) {
                prop_assert!(found.check().is_ok());
            }
        }
    }
}
