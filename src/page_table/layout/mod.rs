//! The layout of the arena: header words, table entries, levels and endpoint slots.

mod entry;
mod format;
mod header;
pub mod vmsav8;
pub mod x86;

pub use self::entry::Entry;
pub use self::format::{Encoding, Format, WrongBase};
pub use self::header::{
    ABI_VERSION, ENCODED_VERSION, HEADER_BASE, HEADER_FORMAT, HEADER_FRAMES, HEADER_LEVELS,
    HEADER_MAGIC, HEADER_VERSION, MAGIC,
};
pub(super) use self::header::{first_words, read as read_header};

use crate::address::{Iova, IovaRange};

/// Bytes of a frame. The header is one frame, and so is every table.
pub const FRAME_BYTES: u64 = 4096;
/// Words of 8 bytes in a frame: the entries of one table.
pub const FRAME_WORDS: usize = 512;

/// The largest level whose entries may be leaves: 1 GiB.
pub const TOP_LEAF_LEVEL: u32 = 3;

const PAGE_BITS: u32 = 12;
const INDEX_BITS: u32 = 9;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

/// The depth of a table: the number of tables a walk passes from the root to a 4 KiB leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 48 bits of address.
    Four,
    /// 57 bits of address.
    Five,
}

impl Levels {
    /// The fewest levels that reach `bits` bits of address, or `None` if `bits` is above 57.
    pub fn for_width(bits: u32) -> Option<Self> {
        match bits {
            0..=48 => Some(Self::Four),
            49..=57 => Some(Self::Five),
            _ => None,
        }
    }

    /// The number of levels, which is also the level of the root. Level 1 holds the 4 KiB leaves.
    pub fn count(self) -> u32 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// The width of the I/O virtual addresses that the table translates, in bits.
    pub fn address_bits(self) -> u32 {
        PAGE_BITS + INDEX_BITS * self.count()
    }

    /// The last address that the table translates.
    pub fn last_address(self) -> Iova {
        Iova((1 << self.address_bits()) - 1)
    }

    /// All addresses that the table translates.
    pub fn range(self) -> IovaRange {
        let whole = IovaRange::new(Iova(0), self.last_address());
        whole.unwrap_or(IovaRange::ALL)
    }
}

/// The offset of a table in the arena in bytes, a multiple of [`FRAME_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableOffset(pub u64);

impl TableOffset {
    /// The offset of a table at `address` in an arena at `base`. Outside every arena if `address` is below `base`: the
    /// difference then wraps to 2^64 less at most 2^52, and no arena has 2^45 bytes.
    #[inline(always)]
    pub(in crate::page_table) fn from_address(address: u64, base: u64) -> Self {
        Self(address.wrapping_sub(base))
    }

    /// Index of the arena word that holds entry `index` of this table.
    ///
    /// The result may lie outside the arena if the offset was read from untrusted memory.
    pub(in crate::page_table) fn slot(self, index: u64) -> usize {
        let word = (self.0 & !(FRAME_BYTES - 1)) >> 3 | index & INDEX_MASK;
        usize::try_from(word).unwrap_or(usize::MAX)
    }
}

/// The bytes that one entry of a table at `level` covers.
pub(in crate::page_table) fn entry_bytes(level: u32) -> u64 {
    1 << shift(level)
}

/// The index of the entry that covers `iova` in a table at `level`.
pub(in crate::page_table) fn index(iova: u64, level: u32) -> u64 {
    iova >> shift(level) & INDEX_MASK
}

/// Whether `first..=last`, which lies within one entry at `level`, is the whole entry.
pub(in crate::page_table) fn is_whole_entry(level: u32, first: u64, last: u64) -> bool {
    last - first == entry_bytes(level) - 1
}

/// The level of the largest leaf that can translate between two addresses which differ in the bits
/// of `difference`.
pub(in crate::page_table) fn largest_leaf(difference: u64) -> u32 {
    let fits = |level: &u32| difference & (entry_bytes(*level) - 1) == 0;
    (1..=TOP_LEAF_LEVEL).rev().find(fits).unwrap_or(1)
}

fn shift(level: u32) -> u32 {
    // The mask is a no-op for valid levels; it lets the compiler drop the overflow check of the
    // shift.
    (PAGE_BITS + INDEX_BITS * level.wrapping_sub(1)) & 63
}

/// The contents of an endpoint slot: where the DMA of an endpoint goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointWord {
    /// DMA is blocked.
    Blocked,
    /// Addresses are guest-physical, except in the endpoint's reserved regions.
    Bypass,
    /// The table at `root` translates.
    Domain {
        /// The root of the table.
        root: TableOffset,
        /// The depth of the table.
        levels: Levels,
    },
}

impl EndpointWord {
    const KIND: u64 = 0b11;
    const BYPASS: u64 = 1;
    const DOMAIN: u64 = 2;
    /// The table has five levels.
    const FIVE: u64 = 1 << 2;

    /// The word in memory.
    pub fn bits(self) -> u64 {
        match self {
            Self::Blocked => 0,
            Self::Bypass => Self::BYPASS,
            Self::Domain { root, levels } => {
                let five = match levels {
                    Levels::Four => 0,
                    Levels::Five => Self::FIVE,
                };
                root.0 & Entry::ADDRESS | five | Self::DOMAIN
            }
        }
    }

    /// Decodes a word. An unknown kind blocks.
    pub fn from_bits(bits: u64) -> Self {
        match bits & Self::KIND {
            Self::BYPASS => Self::Bypass,
            Self::DOMAIN => Self::Domain {
                root: TableOffset(bits & Entry::ADDRESS),
                levels: if bits & Self::FIVE == 0 {
                    Levels::Four
                } else {
                    Levels::Five
                },
            },
            _ => Self::Blocked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_word_survives_a_round_trip() {
        let domain = |root, levels| EndpointWord::Domain {
            root: TableOffset(root),
            levels,
        };
        for (word, bits) in [
            (EndpointWord::Blocked, 0),
            (EndpointWord::Bypass, 1),
            (domain(0x5000, Levels::Four), 0x5002),
            (domain(0xf_ffff_ffff_f000, Levels::Five), 0xf_ffff_ffff_f006),
        ] {
            assert_eq!(word.bits(), bits);
            assert_eq!(EndpointWord::from_bits(bits), word);
        }
        assert_eq!(EndpointWord::from_bits(3), EndpointWord::Blocked);
    }

    #[test]
    fn levels_follow_the_width() {
        assert_eq!(Levels::for_width(48), Some(Levels::Four));
        assert_eq!(Levels::for_width(49), Some(Levels::Five));
        assert_eq!(Levels::for_width(58), None);
        assert_eq!(Levels::Four.last_address(), Iova(0xffff_ffff_ffff));
        assert_eq!(Levels::Five.address_bits(), 57);
        assert_eq!(index(Levels::Five.last_address().0, 5), 511);
        assert_eq!(entry_bytes(TOP_LEAF_LEVEL), 1 << 30);
    }
}
