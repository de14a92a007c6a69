//! What daemon and readers say to each other: frames of 40 bytes on a stream socket, in the byte order
//! of the host. `docs/shadow.md` has the order of frames.

use std::sync::atomic::AtomicU64;

use crate::address::Access;
use crate::ids::list_variants;

/// First number of a greeting.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iommushd");
/// The version of this protocol. Each side refuses every other one.
pub const VERSION: u32 = 1;
/// Bytes of a frame.
pub const FRAME_LEN: usize = 40;
/// Epoch words a reader has: as many accesses can be in progress at once.
pub const EPOCH_WORDS: usize = 64;
/// Epoch words lie this many words apart, each in a cache line of its own.
pub const EPOCH_STRIDE: usize = 8;
/// Bytes of a reader's epoch memory.
pub const EPOCH_BYTES: usize = EPOCH_WORDS * EPOCH_STRIDE * 8;

/// A frame: a kind and numbers whose meaning depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// What it says, see [`kind`].
    pub kind: u32,
    /// A number.
    pub value: u32,
    /// More numbers.
    pub numbers: [u64; 4],
}

/// Kinds of frames.
pub mod kind {
    /// Reader: version; magic, endpoint.
    pub const HELLO: u32 = 1;
    /// Daemon: version; word of the endpoint slot, epoch words, frames RESERVED that follow. With the
    /// arena's descriptor and that of the epoch memory.
    pub const WELCOME: u32 = 2;
    /// Daemon: why, see [`super::Refusal`]; a number that explains it.
    pub const REFUSED: u32 = 3;
    /// Daemon: first and last address that bypass mode does not reach.
    pub const RESERVED: u32 = 4;
    /// Daemon: guest-physical address, bytes, offset in the file. With the file's descriptor.
    pub const MEMORY_COMES: u32 = 5;
    /// Daemon: guest-physical address.
    pub const MEMORY_GOES: u32 = 6;
    /// Daemon: the generation of guest memory that is complete now.
    pub const MEMORY: u32 = 7;
    /// Reader: no access reaches memory that has gone in this generation or before.
    pub const MEMORY_TAKEN: u32 = 8;
    /// Reader: bit 0 for a read, bit 1 for a write; the address that was refused.
    pub const FAULT: u32 = 9;
}

impl Frame {
    /// A frame of these numbers.
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

/// Epoch word `index` of a reader's epoch memory.
pub fn epoch_word(memory: &[AtomicU64], index: usize) -> Option<&AtomicU64> {
    memory.get(index.checked_mul(EPOCH_STRIDE)?)
}

/// All epoch words of a reader's epoch memory.
pub fn epoch_words(memory: &[AtomicU64]) -> impl Iterator<Item = &AtomicU64> {
    memory.iter().step_by(EPOCH_STRIDE)
}

/// Rights as bits: 0 for reading, 1 for writing.
pub fn access_bits(access: Access) -> u32 {
    u32::from(access.read) | u32::from(access.write) << 1
}

/// The rights that bits stand for, or `None` where others than these are set.
pub fn access_of(bits: u32) -> Option<Access> {
    (bits < 4).then_some(Access {
        read: bits & 1 != 0,
        write: bits & 2 != 0,
    })
}

/// Why a reader is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No greeting of this protocol.
    NoGreeting,
    /// Another version; the number is the daemon's.
    Version,
    /// The reader's user may not; the number is the daemon's user.
    User,
    /// This socket does not serve that endpoint.
    Endpoint,
    /// The endpoint, or the socket, has as many readers as it may have; the number is that.
    Full,
    /// The daemon cannot end this process, should it have to.
    Process,
    /// The daemon lacks memory or descriptors.
    Resources,
}

list_variants!(Refusal: NoGreeting, Version, User, Endpoint, Full, Process, Resources);

impl Refusal {
    /// The number that stands for it.
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

    /// What a number stands for.
    pub fn of(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_codes_give_back_what_they_were_made_of() {
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
