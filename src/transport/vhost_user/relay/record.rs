//! The record of a VMM's connection: what the VMM has said, and how far the answer to its last message has come.
//!
//! It is read like any hostile bytes; see [`process::record`](crate::process::record).

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::message::MAX_MESSAGE;
use super::state::VmmState;
use crate::process::record::{Record, RecordFormat, refused};

/// The version of the contents.
pub const VERSION: u64 = 1;
const FORMAT: RecordFormat = RecordFormat {
    magic: *b"iovavmm\0",
    version: VERSION,
    oldest: VERSION,
    name: "viommu-vmm",
};

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
pub(super) struct VmmRecord(Record);

impl VmmRecord {
    /// Makes an empty record.
    ///
    /// # Errors
    /// The system refuses the memfd.
    pub(super) fn new() -> io::Result<Self> {
        Record::new(&FORMAT).map(Self)
    }

    /// Reads the record that an earlier process has left, and goes on with its memfd. `None` as the contents if that process
    /// has recorded nothing.
    ///
    /// # Errors
    /// The record does not add up. It is then refused as a whole.
    pub(super) fn adopt(file: OwnedFd) -> io::Result<(Self, Option<(Recorded, ReplyProgress)>)> {
        let (record, left) = Record::adopt(&FORMAT, file)?;
        let Some(left) = left else {
            return Ok((Self(record), None));
        };
        let recorded: Recorded = serde_json::from_slice(&left.bytes)
            .map_err(|cause| refused(&format!("it cannot be decoded: {cause}")))?;
        recorded.check().map_err(refused)?;
        let progress = match left.mark {
            1 => ReplyProgress::Sending,
            2 => ReplyProgress::Done,
            _ => ReplyProgress::Accepted,
        };
        Ok((Self(record), Some((recorded, progress))))
    }

    /// The memfd.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.0.file()
    }

    /// Writes a record. A process that dies meanwhile leaves the one before.
    ///
    /// # Errors
    /// It is too long.
    pub(super) fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        let json = serde_json::to_vec(recorded).map_err(io::Error::other)?;
        self.0.write(&json)
    }

    /// Marks how far the answer to the last message has come.
    ///
    /// # Errors
    /// The system refuses the write.
    pub(super) fn mark(&self, progress: ReplyProgress) -> io::Result<()> {
        self.0.mark(match progress {
            ReplyProgress::Accepted => 0,
            ReplyProgress::Sending => 1,
            ReplyProgress::Done => 2,
        })
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

    fn adopted(record: &VmmRecord) -> io::Result<Option<(Recorded, ReplyProgress)>> {
        let copy = record.file().try_clone_to_owned()?;
        VmmRecord::adopt(copy).map(|(_, recorded)| recorded)
    }

    #[test]
    fn the_newest_record_counts_with_its_mark() {
        let mut record = VmmRecord::new().expect("a memfd");
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
    }

    #[test]
    fn the_largest_state_fits() {
        let mut record = VmmRecord::new().expect("a memfd");
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

    proptest! {
        /// Whatever the record has, it is refused or is within all bounds.
        #[test]
        fn any_bytes_are_refused_or_plausible(
            at in 0usize..200, bytes in prop::collection::vec(any::<u8>(), 1..60),
        ) {
            let mut record = VmmRecord::new().expect("a memfd");
            let mut json = serde_json::to_vec(&recorded(1)).expect("encoded");
            for (byte, new) in json.iter_mut().skip(at).zip(&bytes) {
                *byte = *new;
            }
            record.0.write(&json).expect("written");
            if let Ok(Some((found, _))) = adopted(&record) {
                prop_assert!(found.check().is_ok());
            }
        }
    }
}
