//! One word of a table.

use super::{TOP_LEAF_LEVEL, TableOffset, entry_bytes};
use crate::address::{Access, Gpa};

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
    pub(in crate::page_table) fn leaf(level: u32, gpa: u64, access: Access, mmio: bool) -> Self {
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
    pub(in crate::page_table) fn with(self, bits: u64) -> Self {
        Self(self.0 | bits)
    }

    /// A pointer to `table`, which has `used` entries in use.
    pub(in crate::page_table) fn table(table: TableOffset, used: u64) -> Self {
        let bits = Self::PRESENT | Self::WRITE | Self::USER | Self::ACCESSED;
        Self(table.0 & Self::ADDRESS | bits).with_used(used)
    }

    /// The table this entry points to.
    pub(in crate::page_table) fn next_table(self) -> TableOffset {
        TableOffset(self.0 & Self::ADDRESS)
    }

    /// The number of entries in use in the table that this entry points to: 1 to 512.
    pub fn used(self) -> u64 {
        self.0 >> Self::USED_SHIFT & Self::USED_MASK
    }

    /// This pointer with `used` as the number of entries in use in its table.
    pub(in crate::page_table) fn with_used(self, used: u64) -> Self {
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
    use crate::page_table::layout::GPA_LIMIT;

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
}
