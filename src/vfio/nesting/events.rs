//! The faults of nested tables: records of the SMMU's event queue, which the kernel passes on by a vEVENTQ.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use iommufd_bindings::{
    iommu_vevent_arm_smmuv3, iommu_veventq_flag_IOMMU_VEVENTQ_FLAG_LOST_EVENTS as LOST_EVENTS,
    iommufd_vevent_header,
};

use crate::address::Iova;

const HEADER: usize = size_of::<iommufd_vevent_header>();
const RECORD: usize = size_of::<iommu_vevent_arm_smmuv3>();
/// Sequence numbers have 31 bits.
const SEQUENCE: u32 = i32::MAX.cast_unsigned();

/// One event of the SMMU. The names are those of the specification (Arm IHI 0070, "Event records").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmmuEvent {
    /// What happened.
    pub kind: SmmuEventKind,
    /// The stream ID of the vDEVICE.
    pub stream: u32,
    /// The PASID, if the device sent one.
    pub substream: Option<u32>,
    /// The address that the device used. Without a meaning for configuration errors (`Bad*`, `StreamDisabled`).
    pub address: Iova,
    /// Whether the device was reading, and not writing.
    pub is_read: bool,
    /// What the SMMU accessed when the fault occurred.
    pub class: SmmuEventClass,
    /// Whether the access waits for an answer (stall), which no descriptor of this crate asks for.
    pub is_stalled: bool,
}

/// The kinds of events that the kernel passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmmuEventKind {
    /// `C_BAD_STE`: the stream's entry is invalid.
    BadStreamEntry,
    /// `F_STREAM_DISABLED`: the stream has no descriptor for accesses without a PASID.
    StreamDisabled,
    /// `C_BAD_SUBSTREAMID`: the stream has no descriptor for the PASID.
    BadSubstream,
    /// `C_BAD_CD`: the context descriptor is invalid.
    BadContext,
    /// `F_TRANSLATION`: no entry for the address.
    Translation,
    /// `F_ADDR_SIZE`: an entry leads to an address that is too wide.
    AddressSize,
    /// `F_ACCESS`: the access flag of a leaf is 0.
    AccessFlag,
    /// `F_PERMISSION`: the leaf forbids the access.
    Permission,
    /// Another number, which the kernel does not pass on today.
    Other(u8),
}

/// What the SMMU accessed when a fault occurred (`CLASS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmmuEventClass {
    /// The context descriptor.
    Context,
    /// A table of the first stage.
    Table,
    /// The device's own address.
    Input,
    /// A reserved value.
    Reserved,
}

impl SmmuEvent {
    fn decode(words: [u64; 4]) -> Self {
        let [first, second, address, _] = words;
        let [kind, ..] = first.to_le_bytes();
        let [_, _, _, _, s0, s1, s2, s3] = first.to_le_bytes();
        let has_substream = first & 1 << 11 != 0;
        let [p0, p1, p2, p3, ..] = (first >> 12 & 0xf_ffff).to_le_bytes();
        Self {
            kind: SmmuEventKind::of(kind),
            stream: u32::from_le_bytes([s0, s1, s2, s3]),
            substream: has_substream.then(|| u32::from_le_bytes([p0, p1, p2, p3])),
            address: Iova(address),
            is_read: second & 1 << 35 != 0,
            class: match second >> 40 & 3 {
                0 => SmmuEventClass::Context,
                1 => SmmuEventClass::Table,
                2 => SmmuEventClass::Input,
                _ => SmmuEventClass::Reserved,
            },
            is_stalled: second & 1 << 31 != 0,
        }
    }
}

impl SmmuEventKind {
    fn of(number: u8) -> Self {
        match number {
            0x04 => Self::BadStreamEntry,
            0x06 => Self::StreamDisabled,
            0x08 => Self::BadSubstream,
            0x0a => Self::BadContext,
            0x10 => Self::Translation,
            0x11 => Self::AddressSize,
            0x12 => Self::AccessFlag,
            0x13 => Self::Permission,
            other => Self::Other(other),
        }
    }
}

/// Events that were read in one call, and how many the kernel had no room for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SmmuEvents {
    /// The events, oldest first.
    pub events: Vec<SmmuEvent>,
    /// The number of events that were lost before or between them; at least 1 if the kernel says that some were lost.
    pub lost: u64,
}

/// The open file of a vEVENTQ. It becomes readable when there are events.
#[derive(Debug)]
pub struct SmmuEventFile {
    file: File,
    /// The sequence number of the last event.
    last: Option<u32>,
}

impl SmmuEventFile {
    /// The greatest number of events that [`Self::read`] returns.
    pub const MAX_EVENTS: usize = 64;

    /// The vEVENTQ that `fd` is open on.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            file: fd.into(),
            last: None,
        }
    }

    /// Reads the waiting events, at most [`Self::MAX_EVENTS`]. Never waits: returns none if there is none.
    ///
    /// # Errors
    /// The kernel's, or `InvalidData` if it returns a part of a record.
    pub fn read(&mut self) -> io::Result<SmmuEvents> {
        let mut bytes = [0; (HEADER + RECORD) * Self::MAX_EVENTS];
        let count = match self.file.read(&mut bytes) {
            Ok(count) => count,
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => 0,
            Err(cause) => return Err(cause),
        };
        self.decode(bytes.get(..count).unwrap_or_default())
    }

    fn decode(&mut self, mut bytes: &[u8]) -> io::Result<SmmuEvents> {
        let cut = || io::Error::new(io::ErrorKind::InvalidData, "a part of an event's record");
        let mut found = SmmuEvents::default();
        while !bytes.is_empty() {
            let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or_else(cut)?;
            let [f0, f1, f2, f3, n0, n1, n2, n3] = *header;
            let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
            let sequence = u32::from_ne_bytes([n0, n1, n2, n3]) & SEQUENCE;
            let step = self
                .last
                .map_or(1, |last| sequence.wrapping_sub(last) & SEQUENCE);
            self.last = Some(sequence);
            if flags & LOST_EVENTS != 0 {
                // No record follows. The number is that of the last event that was lost.
                found.lost += u64::from(step.max(1));
                bytes = rest;
                continue;
            }
            found.lost += u64::from(step.saturating_sub(1));
            let (record, rest) = rest.split_first_chunk::<RECORD>().ok_or_else(cut)?;
            let mut words = [0; RECORD / 8];
            for (word, bytes) in words.iter_mut().zip(record.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            found.events.push(SmmuEvent::decode(words));
            bytes = rest;
        }
        Ok(found)
    }
}

impl AsFd for SmmuEventFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> SmmuEventFile {
        SmmuEventFile::new(File::open("/dev/null").expect("opened").into())
    }

    fn record(sequence: u32, words: [u64; 4]) -> Vec<u8> {
        let mut bytes = [0_u32.to_ne_bytes(), sequence.to_ne_bytes()].concat();
        bytes.extend(words.into_iter().flat_map(u64::to_le_bytes));
        bytes
    }

    fn lost(sequence: u32) -> Vec<u8> {
        [LOST_EVENTS.to_ne_bytes(), sequence.to_ne_bytes()].concat()
    }

    #[test]
    fn events_have_the_fields_of_the_specification() {
        let read = [0x42_0000_0010, 1 << 35 | 2 << 40, 0x7000, 0];
        let write = [0x42_0000_0813 | 0x12345 << 12, 1 << 31 | 1 << 40, 0x8000, 0];
        let bytes = [record(0, read), record(1, write)].concat();
        let found = file().decode(&bytes).expect("whole records");
        let expected = SmmuEvent {
            kind: SmmuEventKind::Translation,
            stream: 0x42,
            substream: None,
            address: Iova(0x7000),
            is_read: true,
            class: SmmuEventClass::Input,
            is_stalled: false,
        };
        let second = SmmuEvent {
            kind: SmmuEventKind::Permission,
            substream: Some(0x12345),
            address: Iova(0x8000),
            is_read: false,
            class: SmmuEventClass::Table,
            is_stalled: true,
            ..expected
        };
        assert_eq!(found.events, [expected, second]);
        assert_eq!(found.lost, 0);
    }

    #[test]
    fn lost_events_are_counted_from_the_sequence_and_the_flag() {
        let one = |sequence| record(sequence, [0x10, 0, 0, 0]);
        let mut file = file();
        let mut losses = |parts: &[Vec<u8>]| {
            let found = file.decode(&parts.concat()).expect("whole records");
            (found.events.len(), found.lost)
        };
        // The first number is the beginning.
        assert_eq!(losses(&[one(7), one(8), one(11)]), (3, 2));
        assert_eq!(losses(&[lost(14)]), (0, 3));
        assert_eq!(losses(&[lost(14)]), (0, 1));
        // After 2^31 - 1 comes 0.
        assert_eq!(losses(&[one(15), one(SEQUENCE), one(0)]).0, 3);
        assert_eq!(losses(&[one(2)]), (1, 1));
    }

    #[test]
    fn a_part_of_a_record_is_an_error() {
        let whole = record(0, [0; 4]);
        for len in [1, HEADER - 1, HEADER, HEADER + RECORD - 1] {
            let found = file().decode(&whole[..len]);
            assert_eq!(found.expect_err("cut").kind(), io::ErrorKind::InvalidData);
        }
        assert_eq!(file().read().expect("read"), SmmuEvents::default());
    }
}
