//! The device-writable part of a request: an optional property list, zeroes, and the tail.

use zerocopy::IntoBytes;

use super::wire::ReqTail;
use crate::ids::list_variants;

/// Length of the tail in bytes.
pub const TAIL_LEN: usize = size_of::<ReqTail>();

/// The status of a request (`VIRTIO_IOMMU_S_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The request succeeded.
    Ok = 0,
    /// The request could not be read.
    IoErr = 1,
    /// The request is not supported.
    Unsupp = 2,
    /// The device failed.
    DevErr = 3,
    /// A parameter is invalid.
    Inval = 4,
    /// A parameter is out of range.
    Range = 5,
    /// The endpoint or the domain does not exist.
    NoEnt = 6,
    /// An address is not accessible.
    Fault = 7,
    /// Resources are exhausted.
    NoMem = 8,
}

list_variants!(Status: Ok, IoErr, Unsupp, DevErr, Inval, Range, NoEnt, Fault, NoMem);

impl Status {
    /// The name in lower case, as the specification spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::IoErr => "ioerr",
            Self::Unsupp => "unsupp",
            Self::DevErr => "deverr",
            Self::Inval => "inval",
            Self::Range => "range",
            Self::NoEnt => "noent",
            Self::Fault => "fault",
            Self::NoMem => "nomem",
        }
    }
}

/// Fills `writable`, the whole device-writable part: `properties` first, then zeroes, and the tail in
/// the last four bytes. If the properties do not all fit before the tail, none is written.
///
/// Returns whether there was room for the tail.
pub fn write_reply(writable: &mut [u8], properties: &[u8], status: Status) -> bool {
    let Some((body, tail)) = writable.split_last_chunk_mut::<TAIL_LEN>() else {
        return false;
    };
    body.fill(0);
    if let Some(room) = body.get_mut(..properties.len()) {
        room.copy_from_slice(properties);
    }
    tail.copy_from_slice(
        ReqTail {
            status: status as u8,
            reserved: [0; 3],
        }
        .as_bytes(),
    );
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_last_and_the_rest_is_zero() {
        let mut writable = [0xff; 12];
        assert!(write_reply(&mut writable, &[1, 2], Status::Range));
        assert_eq!(writable, [1, 2, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
        let mut writable = [0xff; 5];
        assert!(write_reply(&mut writable, &[1, 2], Status::Ok));
        assert_eq!(writable, [0; 5]);
        assert!(!write_reply(&mut [0; 3], &[], Status::Ok));
    }

    #[test]
    fn statuses_have_the_numbers_of_the_specification() {
        for (number, status) in Status::ALL.into_iter().enumerate() {
            assert_eq!(status as usize, number);
        }
    }
}
