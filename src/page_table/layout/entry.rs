//! One word of a table.

use super::{Encoding, Format, TOP_LEAF_LEVEL, TableOffset, entry_bytes, vmsav8, x86};
use crate::address::{Access, Gpa};

/// One word of a table: free, a leaf, or a pointer to the next table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The free entry: it maps nothing.
    pub const FREE: Self = Self(0);

    /// Guest-physical address of a leaf, or of the next table: its offset in the arena, plus the arena's base.
    pub const ADDRESS: u64 = (1 << 52) - (1 << 12);

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
    #[inline(always)]
    pub fn is_table(self, format: Format, level: u32) -> bool {
        let (mask, value) = match format {
            Format::X86FirstStage => (x86::PRESENT | x86::PAGE_SIZE, x86::PRESENT),
            Format::Vmsav8Stage1 => (vmsav8::TABLE, vmsav8::TABLE),
        };
        level > 1 && self.0 & mask == value
    }

    /// Whether the entry, at `level`, is a leaf.
    #[inline(always)]
    pub fn is_leaf(self, format: Format, level: u32) -> bool {
        match (format, level) {
            (Format::X86FirstStage, 1) => !self.is_free(),
            (Format::X86FirstStage, 2..=TOP_LEAF_LEVEL) => self.has(x86::PAGE_SIZE),
            (Format::Vmsav8Stage1, 1) => self.has(vmsav8::PAGE_OR_TABLE),
            (Format::Vmsav8Stage1, 2..=TOP_LEAF_LEVEL) => {
                !self.is_free() && !self.has(vmsav8::PAGE_OR_TABLE)
            }
            _ => false,
        }
    }

    /// Whether all bits of `bits` are set.
    #[inline(always)]
    pub fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// Whether the leaf is the first of its mapping.
    #[inline(always)]
    pub fn is_first(self, format: Format) -> bool {
        self.has(format.first())
    }

    /// Whether the leaf is the last of its mapping.
    #[inline(always)]
    pub fn is_last(self, format: Format) -> bool {
        self.has(format.last())
    }

    /// A leaf at `level` that is neither the first nor the last of its mapping. Never zero.
    #[inline(always)]
    pub(in crate::page_table) fn leaf(
        format: Format,
        level: u32,
        gpa: u64,
        access: Access,
        mmio: bool,
    ) -> Self {
        let bits = match format {
            Format::X86FirstStage => x86::leaf(level, access, mmio),
            Format::Vmsav8Stage1 => vmsav8::leaf(level, access, mmio),
        };
        Self(gpa & Self::ADDRESS | bits)
    }

    /// This leaf with `bits` set in addition.
    #[inline(always)]
    pub(in crate::page_table) fn with(self, bits: u64) -> Self {
        Self(self.0 | bits)
    }

    /// A pointer to `table`, which has `used` entries in use.
    #[inline(always)]
    pub(in crate::page_table) fn table(encoding: Encoding, table: TableOffset, used: u64) -> Self {
        let bits = match encoding.format {
            Format::X86FirstStage => x86::TABLE,
            Format::Vmsav8Stage1 => vmsav8::TABLE,
        };
        let address = table.0.wrapping_add(encoding.base);
        Self(address & Self::ADDRESS | bits).with_used(encoding.format, used)
    }

    /// The table this entry points to; an offset outside every arena if it points below the base.
    #[inline(always)]
    pub(in crate::page_table) fn next_table(self, encoding: Encoding) -> TableOffset {
        TableOffset::from_address(self.0 & Self::ADDRESS, encoding.base)
    }

    /// The number of entries in use in the table that this entry points to: 1 to 512.
    #[inline(always)]
    pub fn used(self, format: Format) -> u64 {
        self.0 >> Self::used_shift(format) & Self::USED_MASK
    }

    /// This pointer with `used` as the number of entries in use in its table.
    #[inline(always)]
    pub(in crate::page_table) fn with_used(self, format: Format, used: u64) -> Self {
        let shift = Self::used_shift(format);
        Self(self.0 & !(Self::USED_MASK << shift) | (used & Self::USED_MASK) << shift)
    }

    #[inline(always)]
    fn used_shift(format: Format) -> u32 {
        match format {
            Format::X86FirstStage => x86::USED_SHIFT,
            Format::Vmsav8Stage1 => vmsav8::USED_SHIFT,
        }
    }

    /// The first guest-physical address of a leaf at `level`.
    #[inline(always)]
    pub fn gpa(self, level: u32) -> Gpa {
        Gpa(self.0 & Self::ADDRESS & !(entry_bytes(level) - 1))
    }

    /// The access rights of a leaf.
    #[inline(always)]
    pub fn access(self, format: Format) -> Access {
        match format {
            Format::X86FirstStage => Access {
                read: self.0 & (x86::PRESENT | x86::NO_READ) == x86::PRESENT,
                write: self.has(x86::PRESENT | x86::WRITE),
            },
            Format::Vmsav8Stage1 => Access {
                read: self.0 & (vmsav8::VALID | vmsav8::NO_READ) == vmsav8::VALID,
                write: self.0 & (vmsav8::VALID | vmsav8::READ_ONLY) == vmsav8::VALID,
            },
        }
    }

    /// Whether the target of a leaf is device memory.
    #[inline(always)]
    pub fn mmio(self, format: Format) -> bool {
        self.has(match format {
            Format::X86FirstStage => x86::MMIO,
            Format::Vmsav8Stage1 => vmsav8::MMIO,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_table::layout::FRAME_BYTES;

    const BOTH: [Format; 2] = [Format::X86FirstStage, Format::Vmsav8Stage1];

    /// The low 12 bits of a page with these rights.
    fn hardware_bits(format: Format, access: Access) -> u64 {
        match (format, access.read, access.write) {
            (Format::X86FirstStage, false, false) => 0x60,
            (Format::X86FirstStage, true, false) => 0x65,
            (Format::X86FirstStage, _, true) => 0x67,
            (Format::Vmsav8Stage1, false, false) => 0xfc2,
            (Format::Vmsav8Stage1, true, false) => 0xfc3,
            (Format::Vmsav8Stage1, _, true) => 0xf43,
        }
    }

    #[test]
    fn a_leaf_decodes_to_the_parts_it_was_encoded_from() {
        for (format, level) in BOTH.into_iter().flat_map(|f| (1..=3).map(move |l| (f, l))) {
            for access in [
                Access::NONE,
                Access::READ,
                Access::WRITE,
                Access::READ_WRITE,
            ] {
                for mmio in [false, true] {
                    for gpa in [0, format.gpa_limit() - entry_bytes(level)] {
                        let leaf = Entry::leaf(format, level, gpa, access, mmio);
                        let mut expected = hardware_bits(format, access);
                        if level > 1 {
                            expected ^= match format {
                                Format::X86FirstStage => 0x80,
                                Format::Vmsav8Stage1 => 0x02,
                            };
                        }
                        if mmio && format == Format::Vmsav8Stage1 {
                            expected |= 1 << 2;
                        }
                        assert_eq!(leaf.bits() & 0xfff, expected);
                        assert!(!leaf.is_free() && leaf.is_leaf(format, level));
                        assert!(!leaf.is_table(format, level));
                        assert_eq!(leaf.gpa(level), Gpa(gpa));
                        assert_eq!((leaf.access(format), leaf.mmio(format)), (access, mmio));
                        assert!(!leaf.is_first(format) && !leaf.is_last(format));
                        let forbids_execution = match format {
                            // Bit 63 is reserved unless the context enables it.
                            Format::X86FirstStage => 0,
                            Format::Vmsav8Stage1 => 3 << 53,
                        };
                        let software = match format {
                            Format::X86FirstStage => 0xf << 52,
                            Format::Vmsav8Stage1 => 0xf << 55,
                        };
                        let rest = leaf.bits() >> 48 << 48 & !software & !gpa;
                        assert_eq!(rest, forbids_execution);
                    }
                }
            }
        }
    }

    #[test]
    fn a_table_pointer_counts_up_to_all_its_entries() {
        for (format, base) in BOTH.into_iter().flat_map(|f| [(f, 0), (f, 0xff_0000_0000)]) {
            let encoding = Encoding { format, base };
            for used in [1, 511, 512] {
                let entry = Entry::table(encoding, TableOffset(0x7_f000), used);
                assert_eq!(entry.used(format), used);
                assert_eq!(entry.bits() & Entry::ADDRESS, base + 0x7_f000);
                assert_eq!(entry.next_table(encoding), TableOffset(0x7_f000));
                assert!(entry.is_table(format, 2) && entry.is_table(format, 5));
                assert!(!entry.is_leaf(format, 2));
                let three = Entry::table(encoding, TableOffset(0x7_f000), 3);
                assert_eq!(entry.with_used(format, 3), three);
            }
        }
    }

    #[test]
    fn a_pointer_below_the_base_leads_out_of_every_arena() {
        let format = Format::X86FirstStage;
        let base = (1 << 52) - FRAME_BYTES;
        for address in [0, FRAME_BYTES, base - FRAME_BYTES] {
            let pointer = Entry::from_bits(address | x86::TABLE);
            let table = pointer.next_table(Encoding { format, base });
            assert!(table.slot(0) >= 1 << 42, "{table:?}");
        }
    }
}
