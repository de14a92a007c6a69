//! The layout of the arena: header words, table entries, levels and endpoint slots.

use crate::address::{Access, Gpa, Iova, IovaRange};

/// Bytes of a frame. The header is one frame, and so is every table.
pub const FRAME_BYTES: u64 = 4096;
/// Words of 8 bytes in a frame: the entries of one table.
pub const FRAME_WORDS: usize = 512;

/// First word of the arena.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iova\0tbl");
/// The version of this layout. A reader refuses any other version.
pub const ABI_VERSION: u64 = 1;

/// Index of the header word that holds [`MAGIC`].
pub const HEADER_MAGIC: usize = 0;
/// Index of the header word that holds [`ABI_VERSION`].
pub const HEADER_VERSION: usize = 1;
/// Index of the header word that holds the levels of the deepest table made so far; 0 before the
/// first table.
pub const HEADER_LEVELS: usize = 2;
/// Index of the header word that holds the number of frames, including the header.
pub const HEADER_FRAMES: usize = 3;

/// Guest-physical addresses lie below this limit: an entry holds 52 bits of address.
pub const GPA_LIMIT: u64 = 1 << 52;

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
    /// Index of the arena word that holds entry `index` of this table.
    ///
    /// The result may lie outside the arena if the offset was read from untrusted memory.
    pub(super) fn slot(self, index: u64) -> usize {
        let word = (self.0 & Entry::ADDRESS) >> 3 | index & INDEX_MASK;
        usize::try_from(word).unwrap_or(usize::MAX)
    }
}

/// The bytes that one entry of a table at `level` covers.
pub(super) fn entry_bytes(level: u32) -> u64 {
    1 << shift(level)
}

/// The index of the entry that covers `iova` in a table at `level`.
pub(super) fn index(iova: u64, level: u32) -> u64 {
    iova >> shift(level) & INDEX_MASK
}

/// Whether `first..=last`, which lies within one entry at `level`, is the whole entry.
pub(super) fn is_whole_entry(level: u32, first: u64, last: u64) -> bool {
    last - first == entry_bytes(level) - 1
}

/// The level of the largest leaf that can translate between two addresses which differ in the bits
/// of `difference`.
pub(super) fn largest_leaf(difference: u64) -> u32 {
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

/// One word of a table: free, a leaf, or a pointer to the next table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The free entry: it maps nothing.
    pub const FREE: Self = Self(0);

    /// Hardware may use the entry. Clear in a leaf without access rights.
    pub const PRESENT: u64 = 1 << 0;
    /// The endpoint may write.
    pub const WRITE: u64 = 1 << 1;
    /// Unprivileged requests may use the entry. Always set together with [`Self::PRESENT`].
    pub const USER: u64 = 1 << 2;
    /// Always set, so that hardware never writes to a table.
    pub const ACCESSED: u64 = 1 << 5;
    /// Always set in leaves, so that hardware never writes to a table.
    pub const DIRTY: u64 = 1 << 6;
    /// A leaf at level 2 or 3.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// Guest-physical address of a leaf, or arena offset of the next table.
    pub const ADDRESS: u64 = (1 << 52) - (1 << 12);
    /// First leaf of a mapping.
    pub const FIRST: u64 = 1 << 52;
    /// Last leaf of a mapping.
    pub const LAST: u64 = 1 << 53;
    /// The target is device memory.
    pub const MMIO: u64 = 1 << 54;
    /// The endpoint may not read. Hardware cannot express this right; software readers must obey it.
    pub const NO_READ: u64 = 1 << 55;

    const USED_SHIFT: u32 = 52;
    const USED_MASK: u64 = (1 << 10) - 1;

    /// An entry with these bits.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits in memory.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether the entry is free.
    pub fn is_free(self) -> bool {
        self.0 == 0
    }

    /// Whether the entry, at `level`, points to another table.
    pub fn is_table(self, level: u32) -> bool {
        level > 1 && self.0 & (Self::PRESENT | Self::PAGE_SIZE) == Self::PRESENT
    }

    /// Whether the entry, at `level`, is a leaf.
    pub fn is_leaf(self, level: u32) -> bool {
        match level {
            1 => !self.is_free(),
            2..=TOP_LEAF_LEVEL => self.0 & Self::PAGE_SIZE != 0,
            _ => false,
        }
    }

    /// Whether all bits of `bits` are set.
    pub fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// A leaf at `level` without [`Self::FIRST`] and [`Self::LAST`]. Never zero.
    pub(super) fn leaf(level: u32, gpa: u64, access: Access, mmio: bool) -> Self {
        let mut bits = gpa & Self::ADDRESS | Self::ACCESSED | Self::DIRTY;
        if access.read || access.write {
            bits |= Self::PRESENT | Self::USER;
        }
        if access.write {
            bits |= Self::WRITE;
        }
        if !access.read {
            bits |= Self::NO_READ;
        }
        if mmio {
            bits |= Self::MMIO;
        }
        if level > 1 {
            bits |= Self::PAGE_SIZE;
        }
        Self(bits)
    }

    /// This leaf with `bits` set in addition.
    pub(super) fn with(self, bits: u64) -> Self {
        Self(self.0 | bits)
    }

    /// A pointer to `table`, which has `used` entries in use.
    pub(super) fn table(table: TableOffset, used: u64) -> Self {
        let bits = Self::PRESENT | Self::WRITE | Self::USER | Self::ACCESSED;
        Self(table.0 & Self::ADDRESS | bits).with_used(used)
    }

    /// The table this entry points to.
    pub(super) fn next_table(self) -> TableOffset {
        TableOffset(self.0 & Self::ADDRESS)
    }

    /// The number of entries in use in the table that this entry points to: 1 to 512.
    pub fn used(self) -> u64 {
        self.0 >> Self::USED_SHIFT & Self::USED_MASK
    }

    /// This pointer with `used` as the number of entries in use in its table.
    pub(super) fn with_used(self, used: u64) -> Self {
        let kept = self.0 & !(Self::USED_MASK << Self::USED_SHIFT);
        Self(kept | (used & Self::USED_MASK) << Self::USED_SHIFT)
    }

    /// The first guest-physical address of a leaf at `level`.
    pub fn gpa(self, level: u32) -> Gpa {
        Gpa(self.0 & Self::ADDRESS & !(entry_bytes(level) - 1))
    }

    /// The access rights of a leaf.
    pub fn access(self) -> Access {
        Access {
            read: self.0 & (Self::PRESENT | Self::NO_READ) == Self::PRESENT,
            write: self.has(Self::PRESENT | Self::WRITE),
        }
    }

    /// Whether the target of a leaf is device memory.
    pub fn mmio(self) -> bool {
        self.has(Self::MMIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_decodes_to_the_parts_it_was_encoded_from() {
        for level in 1..=TOP_LEAF_LEVEL {
            for (access, hardware) in [
                (Access::NONE, 0x60),
                (Access::READ, 0x65),
                (Access::WRITE, 0x67),
                (Access::READ_WRITE, 0x67),
            ] {
                for mmio in [false, true] {
                    for gpa in [0, GPA_LIMIT - entry_bytes(level)] {
                        let leaf = Entry::leaf(level, gpa, access, mmio);
                        let size = if level > 1 { 0x80 } else { 0 };
                        assert_eq!(leaf.bits() & 0xfff, hardware | size);
                        assert!(!leaf.is_free() && leaf.is_leaf(level));
                        assert!(!leaf.is_table(level));
                        assert_eq!(leaf.gpa(level), Gpa(gpa));
                        assert_eq!((leaf.access(), leaf.mmio()), (access, mmio));
                        assert_eq!(leaf.bits() >> 63, 0, "bit 63 forbids execution");
                    }
                }
            }
        }
    }

    #[test]
    fn a_table_pointer_counts_up_to_all_its_entries() {
        for used in [1, 511, 512] {
            let entry = Entry::table(TableOffset(0x7_f000), used);
            assert_eq!(entry.used(), used);
            assert_eq!(entry.next_table(), TableOffset(0x7_f000));
            assert!(entry.is_table(2) && entry.is_table(5) && !entry.is_leaf(2));
            assert_eq!(entry.with_used(3), Entry::table(TableOffset(0x7_f000), 3));
        }
    }

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
