//! The protocol between the daemon and its readers: frames of 40 bytes on a stream socket, in the host's byte
//! order. `docs/shadow.md` has the order of frames.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::Access;
use crate::ids::{EndpointId, list_variants};

/// First number of a HELLO frame.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iommushd");
/// The version of this protocol. Each side refuses every other version.
pub const VERSION: u32 = 1;
/// Length of a frame. Bytes.
pub const FRAME_LEN: usize = 40;
/// Epoch words of a reader: the number of accesses that it can have in progress at once.
pub const EPOCH_WORDS: usize = 64;
/// Distance of two epoch words, in words: each epoch word has a cache line to itself.
pub const EPOCH_STRIDE: usize = 8;
/// Feature bit of a HELLO frame: the reader looks at the revocation word when an access begins, see [`revocation_word`].
pub const REVOCABLE: u64 = 1;
/// Length of a reader's epoch memory. Bytes.
pub const EPOCH_BYTES: usize = EPOCH_WORDS * EPOCH_STRIDE * 8;

/// A frame: a kind, and numbers whose meaning depends on the kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// The kind, see [`kind`].
    pub kind: u32,
    /// The first number.
    pub value: u32,
    /// Four more numbers.
    pub numbers: [u64; 4],
}

/// An endpoint's number in a frame as messages name it: by the function's address, if it is one.
pub(super) fn endpoint_text(number: u64) -> String {
    match u32::try_from(number) {
        Ok(number) => format!("endpoint {}", EndpointId(number)),
        Err(_) => format!("endpoint {number:#x}"),
    }
}

/// Kinds of frames: the sender, then the frame's value and numbers.
pub mod kind {
    /// Reader: version; magic, endpoint, feature bits ([`super::REVOCABLE`]; a daemon ignores those that it does not know).
    pub const HELLO: u32 = 1;
    /// Daemon: version; index of the endpoint slot's word, number of epoch words, number of RESERVED frames
    /// that follow. Carries the descriptors of the arena and of the epoch memory.
    pub const WELCOME: u32 = 2;
    /// Daemon: a [`super::Refusal`]; a number whose meaning depends on it.
    pub const REFUSED: u32 = 3;
    /// Daemon: no value; first and last address of a range that bypass mode does not reach.
    pub const RESERVED: u32 = 4;
    /// Daemon: no value; guest-physical address, bytes, and offset in the file of a region that the reader must map.
    /// Carries the file's descriptor.
    pub const MEMORY_ADDED: u32 = 5;
    /// Daemon: no value; guest-physical address of the region that the reader must unmap.
    pub const MEMORY_REMOVED: u32 = 6;
    /// Daemon: no value; the generation of guest memory that is complete with this frame.
    pub const MEMORY_COMPLETE: u32 = 7;
    /// Reader: no value; a generation. No access of the reader uses memory removed in it or before.
    pub const MEMORY_ACK: u32 = 8;
    /// Reader: the access, bit 0 for a read and bit 1 for a write; the address that was refused.
    pub const FAULT: u32 = 9;
}

impl Frame {
    /// A frame of this kind with these numbers.
    pub fn new(kind: u32, value: u32, numbers: [u64; 4]) -> Self {
        Self {
            kind,
            value,
            numbers,
        }
    }

    /// The frame in `bytes`.
    pub fn from_wire(bytes: &[u8; FRAME_LEN]) -> Self {
        let (halves, words) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<8>().0);
        let half = |index: usize| halves.get(index).map_or(0, |h| u32::from_ne_bytes(*h));
        let word = |index: usize| words.get(index).map_or(0, |w| u64::from_ne_bytes(*w));
        Self {
            kind: half(0),
            value: half(1),
            numbers: [1, 2, 3, 4].map(word),
        }
    }

    /// The bytes of this frame.
    pub fn to_wire(self) -> [u8; FRAME_LEN] {
        let head = [self.kind, self.value].into_iter();
        let head = head.flat_map(u32::to_ne_bytes);
        let numbers = self.numbers.into_iter().flat_map(u64::to_ne_bytes);
        let mut bytes = [0; FRAME_LEN];
        for (to, from) in bytes.iter_mut().zip(head.chain(numbers)) {
            *to = from;
        }
        bytes
    }
}

/// Epoch word `index` of a reader's epoch memory, or `None` past the last.
pub fn epoch_word(memory: &[AtomicU64], index: usize) -> Option<&AtomicU64> {
    memory.get(index.checked_mul(EPOCH_STRIDE)?)
}

/// All epoch words of a reader's epoch memory, in order.
pub fn epoch_words(memory: &[AtomicU64]) -> impl Iterator<Item = &AtomicU64> + Clone {
    memory.iter().step_by(EPOCH_STRIDE)
}

/// The word that revokes epoch word `index` unless it is 0: the registration has ended, and no access with that epoch word
/// may begin any more, except within another one of the same thread. It is in the same cache line, which an access loads
/// anyway. `None` past the last.
pub fn revocation_word(memory: &[AtomicU64], index: usize) -> Option<&AtomicU64> {
    memory.get(index.checked_mul(EPOCH_STRIDE)?.checked_add(1)?)
}

/// Revokes all epoch words. Accesses in progress go on: wait until they have ended
/// ([`is_idle`](crate::page_table::epoch::is_idle)).
pub fn revoke(memory: &[AtomicU64]) {
    for word in memory.iter().skip(1).step_by(EPOCH_STRIDE) {
        word.store(1, Ordering::Release);
    }
}

/// An access as bits: bit 0 for a read, bit 1 for a write.
pub fn access_bits(access: Access) -> u32 {
    u32::from(access.read) | u32::from(access.write) << 1
}

/// The access that `bits` stand for, or `None` if another bit is set.
pub fn access_of(bits: u32) -> Option<Access> {
    (bits < 4).then_some(Access {
        read: bits & 1 != 0,
        write: bits & 2 != 0,
    })
}

/// Why the daemon refuses a reader, and the number that a REFUSED frame carries with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The peer sent no greeting of this protocol, or not in time. The number is 0.
    NoGreeting,
    /// The peer has another version. The number is the daemon's version.
    Version,
    /// The peer's user may not register. The number is the daemon's user.
    User,
    /// This socket does not serve the endpoint. The number is the endpoint.
    Endpoint,
    /// The endpoint has as many readers, or the sockets as many unregistered peers, as they may have. The
    /// number is the limit.
    Full,
    /// The daemon may not kill the peer's process. The number is 0.
    Process,
    /// The daemon lacks memory or descriptors. The number is 0.
    Resources,
}

list_variants!(Refusal: NoGreeting, Version, User, Endpoint, Full, Process, Resources);

impl Refusal {
    /// Its value in a REFUSED frame.
    pub fn code(self) -> u32 {
        match self {
            Self::NoGreeting => 1,
            Self::Version => 2,
            Self::User => 3,
            Self::Endpoint => 4,
            Self::Full => 5,
            Self::Process => 6,
            Self::Resources => 7,
        }
    }

    /// The refusal that a value stands for, if any.
    pub fn of(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_codes_survive_a_round_trip() {
        let frame = Frame::new(kind::FAULT, 2, [0x1000, 2, 3, u64::MAX]);
        assert_eq!(Frame::from_wire(&frame.to_wire()), frame);
        let head = [9u32, 2].map(u32::to_ne_bytes).concat();
        let numbers = [0x1000, 2, 3, u64::MAX].map(u64::to_ne_bytes).concat();
        assert_eq!(frame.to_wire().to_vec(), [head, numbers].concat());
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::of(refusal.code()), Some(refusal));
        }
        assert_eq!(Refusal::of(0), None);
        for access in [
            Access::NONE,
            Access::READ,
            Access::WRITE,
            Access::READ_WRITE,
        ] {
            assert_eq!(access_of(access_bits(access)), Some(access));
        }
        assert_eq!(access_of(4), None);
    }
}
