//! The structures that an SMMUv3 reads, as far as software may give them to iommufd: the two words of a stream table entry,
//! a context descriptor, and commands of invalidation. The names of fields are those of the specification (Arm IHI 0070,
//! "Stream Table Entry", "Context Descriptor", "TLB invalidation").
//!
//! Everything here is pure: the kernel checks entries and commands once more.

use crate::address::{Gpa, IovaRange};

/// The first two words of a stream table entry (STE): how the SMMU translates a stream. The kernel adds the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamEntry([u64; 2]);

impl StreamEntry {
    const VALID: u64 = 1;
    const BYPASS: u64 = 4 << 1;
    const STAGE_1: u64 = 5 << 1;
    /// S1ContextPtr: bits 51 to 6.
    const CONTEXT: u64 = 0x000f_ffff_ffff_ffc0;
    /// The SMMU reads the context descriptor through write-back caches, inner shareable: S1CIR, S1COR, S1CSH.
    const CACHED: u64 = 1 << 2 | 1 << 4 | 3 << 6;

    /// An entry that refuses all DMA, without an event.
    pub const ABORT: Self = Self([Self::VALID, 0]);
    /// An entry without a first stage: the device's addresses are guest-physical.
    pub const IDENTITY: Self = Self([Self::VALID | Self::BYPASS, 0]);

    /// An entry whose first stage is the one context descriptor at `context`; `None` unless the address is a multiple of
    /// 64 bytes below 2^52.
    pub fn translated(context: Gpa) -> Option<Self> {
        let is_pointer = context.0 & !Self::CONTEXT == 0;
        is_pointer.then_some(Self([
            Self::VALID | Self::STAGE_1 | context.0,
            Self::CACHED,
        ]))
    }

    /// The words, in the processor's byte order.
    pub fn words(self) -> [u64; 2] {
        self.0
    }
}

/// A context descriptor (CD) with one table of 4 KiB pages for the lower addresses (TTB0). It has no table for the upper
/// addresses (EPD1), and a fault ends the device's access with an event (R, A, no stall).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextDescriptor {
    /// The address of the root table: a multiple of 4 KiB below 2^48.
    pub table: Gpa,
    /// The tag of all cached translations.
    pub asid: u16,
    /// The width of an input address in bits: 25 to 48. It sets the level of the root: 4 levels for 40 to 48 bits, 3 for 31 to
    /// 39.
    pub input_bits: u8,
    /// The width of an output address in bits, of `SMMU_IDR5.OAS`. A descriptor for 4 KiB pages has at
    /// most 48.
    pub output_bits: u8,
}

impl ContextDescriptor {
    /// The size in bytes, and the alignment.
    pub const BYTES: usize = 64;
    /// The index of the memory attributes of RAM in a leaf (AttrIndx): normal memory, write-back.
    pub const ATTRIBUTES_OF_MEMORY: u8 = 0;
    /// The index of the memory attributes of registers in a leaf: Device-nGnRE.
    pub const ATTRIBUTES_OF_DEVICES: u8 = 1;
    /// MAIR: the attributes by index.
    const ATTRIBUTES: u64 = 0xff | 0x04 << 8;
    /// The table is read through write-back caches, inner shareable: IR0, OR0, SH0.
    const CACHED: u64 = 1 << 8 | 1 << 10 | 3 << 12;
    /// EPD1.
    const NO_UPPER_TABLE: u64 = 1 << 30;
    const VALID: u64 = 1 << 31;
    /// AFFD: a leaf whose access flag is 0 is no fault.
    const NO_ACCESS_FLAG_FAULTS: u64 = 1 << 35;
    const AA64: u64 = 1 << 41;
    /// R: faults are recorded. A: they abort the access.
    const RECORD_AND_ABORT: u64 = 1 << 45 | 1 << 46;
    /// ASET: the ASID is not the processors', so their broadcast invalidations do not concern it.
    const OWN_ASID: u64 = 1 << 47;

    /// The eight words, in the processor's byte order; `None` if a field is out of its range.
    pub fn words(&self) -> Option<[u64; 8]> {
        if self.table.0 & !0x0000_ffff_ffff_f000 != 0 || !(25..=48).contains(&self.input_bits) {
            return None;
        }
        let unused_bits = u64::from(64 - self.input_bits);
        // IPS. Wider outputs need other granules.
        let output: u64 = match self.output_bits {
            32 => 0,
            36 => 1,
            40 => 2,
            42 => 3,
            44 => 4,
            48 | 52 => 5,
            _ => return None,
        };
        let first = unused_bits
            | Self::CACHED
            | Self::NO_UPPER_TABLE
            | Self::VALID
            | output << 32
            | Self::NO_ACCESS_FLAG_FAULTS
            | Self::AA64
            | Self::RECORD_AND_ABORT
            | Self::OWN_ASID
            | u64::from(self.asid) << 48;
        Some([first, self.table.0, 0, Self::ATTRIBUTES, 0, 0, 0, 0])
    }

    /// The bytes in memory; `None` if a field is out of its range.
    pub fn bytes(&self) -> Option<[u8; Self::BYTES]> {
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(self.words()?) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Some(bytes)
    }
}

/// A command that invalidates translations or descriptors. The kernel sets the VMID and the stream ID of the hardware, and
/// waits for the end (SYNC) before it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmmuCommand([u64; 2]);

impl SmmuCommand {
    const CFGI_CD: u64 = 0x05;
    const TLBI_NH_ALL: u64 = 0x10;
    const TLBI_NH_ASID: u64 = 0x11;
    const TLBI_NH_VA: u64 = 0x12;
    /// TG: granules of 4 KiB. With it the command is one for a range.
    const RANGE_OF_4K: u64 = 1 << 10;
    const PAGE_BITS: u32 = 12;
    /// The width of NUM, whose value is less by one than the number of steps.
    const STEP_BITS: u32 = 5;
    const MAX_SCALE: u32 = 31;
    /// Ranges of so many pages take another command: 2^48 bytes.
    const TOO_MANY_PAGES: u64 = 1 << (Self::MAX_SCALE + Self::STEP_BITS);
    /// The greatest number of commands that [`Self::invalidate_range`] makes for an SMMU without ranges. Beyond it, one command
    /// for the whole ASID costs less than the commands and their time in the SMMU's queue.
    pub const MAX_SINGLE_PAGES: u64 = 64;

    /// All cached translations of the vIOMMU's first stages (`TLBI_NH_ALL`).
    pub const INVALIDATE_ALL: Self = Self([Self::TLBI_NH_ALL, 0]);

    /// All cached translations of an ASID (`TLBI_NH_ASID`).
    pub fn invalidate_asid(asid: u16) -> Self {
        Self([Self::TLBI_NH_ASID | u64::from(asid) << 48, 0])
    }

    /// The cached translations of an ASID that `range` touches (`TLBI_NH_VA`), as few commands as possible: at most 8 with
    /// `has_ranges` (`SMMU_IDR3.RIL`), else at most
    /// [`Self::MAX_SINGLE_PAGES`]. A large range becomes [`Self::invalidate_asid`].
    ///
    /// With `only_leaves` the SMMU may keep what it knows of upper tables. That is right as long as no entry that names a
    /// table has changed.
    pub fn invalidate_range(
        asid: u16,
        range: IovaRange,
        only_leaves: bool,
        has_ranges: bool,
    ) -> Vec<Self> {
        let mut page = range.first().0 >> Self::PAGE_BITS;
        let mut left = (range.last().0 >> Self::PAGE_BITS) - page + 1;
        let limit = if has_ranges {
            Self::TOO_MANY_PAGES
        } else {
            Self::MAX_SINGLE_PAGES + 1
        };
        if left >= limit {
            return vec![Self::invalidate_asid(asid)];
        }
        let mut commands = Vec::new();
        while left > 0 {
            let (done, num, scale) = if has_ranges && left > 1 {
                let scale = left.trailing_zeros().min(Self::MAX_SCALE);
                let steps = (left >> scale) & ((1 << Self::STEP_BITS) - 1);
                (steps << scale, steps - 1, scale)
            } else {
                (1, 0, 0)
            };
            // A range of one page is reserved without a hint of its level: such a command is one for a page.
            let is_range = num > 0 || scale > 0;
            let granule = if is_range { Self::RANGE_OF_4K } else { 0 };
            commands.push(Self([
                Self::TLBI_NH_VA | num << 12 | u64::from(scale) << 20 | u64::from(asid) << 48,
                page << Self::PAGE_BITS | granule | u64::from(only_leaves),
            ]));
            page += done;
            left -= done;
        }
        commands
    }

    /// The cached context descriptor of a stream, by the stream ID of its vDEVICE (`CFGI_CD`). There is no command for the
    /// stream's entry (`CFGI_STE`): the kernel refuses it, and invalidates the entry itself when a device is attached.
    pub fn invalidate_context(stream: u32) -> Self {
        Self([Self::CFGI_CD | u64::from(stream) << 32, 1])
    }

    /// The words, in the processor's byte order.
    pub fn words(self) -> [u64; 2] {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Iova;

    #[test]
    fn stream_entries_have_the_bits_of_the_specification() {
        assert_eq!(StreamEntry::ABORT.words(), [0b0001, 0]);
        assert_eq!(StreamEntry::IDENTITY.words(), [0b1001, 0]);
        let entry = StreamEntry::translated(Gpa(0x70_0000_0040)).expect("aligned");
        // Config 0b101, S1Fmt and S1CDMax 0; S1CIR and S1COR write-back, S1CSH inner shareable.
        assert_eq!(entry.words(), [0x70_0000_004b, 0xd4]);
        for wrong in [0x20, 1 << 52, 0x7_0000_0001] {
            assert_eq!(StreamEntry::translated(Gpa(wrong)), None, "{wrong:#x}");
        }
    }

    const DESCRIPTOR: ContextDescriptor = ContextDescriptor {
        table: Gpa(0x12_3456_7000),
        asid: 0xabcd,
        input_bits: 48,
        output_bits: 44,
    };

    #[test]
    fn a_context_descriptor_has_the_bits_of_the_specification() {
        let [first, table, upper, attributes, rest @ ..] = DESCRIPTOR.words().expect("in range");
        let field = |at: u32, bits: u32| first >> at & ((1 << bits) - 1);
        let fields = [
            ("T0SZ", field(0, 6), 16),
            ("TG0", field(6, 2), 0),
            ("IR0", field(8, 2), 1),
            ("OR0", field(10, 2), 1),
            ("SH0", field(12, 2), 3),
            ("EPD0 to EPD1", field(14, 16), 0),
            ("EPD1", field(30, 1), 1),
            ("V", field(31, 1), 1),
            ("IPS", field(32, 3), 4),
            ("AFFD", field(35, 1), 1),
            ("WXN to TBI, PAN", field(36, 5), 0),
            ("AA64", field(41, 1), 1),
            ("HD, HA, S", field(42, 3), 0),
            ("R, A, ASET", field(45, 3), 7),
            ("ASID", field(48, 16), 0xabcd),
        ];
        for (name, found, expected) in fields {
            assert_eq!(found, expected, "{name}");
        }
        assert_eq!((table, upper, attributes), (0x12_3456_7000, 0, 0x04ff));
        assert_eq!(rest, [0; 4]);
        let bytes = DESCRIPTOR.bytes().expect("in range");
        assert_eq!(bytes[8..16], 0x12_3456_7000_u64.to_le_bytes());
    }

    #[test]
    fn a_context_descriptor_with_a_field_out_of_range_is_none() {
        let wrong = [
            ContextDescriptor {
                table: Gpa(0x800),
                ..DESCRIPTOR
            },
            ContextDescriptor {
                table: Gpa(1 << 48),
                ..DESCRIPTOR
            },
            ContextDescriptor {
                input_bits: 24,
                ..DESCRIPTOR
            },
            ContextDescriptor {
                input_bits: 49,
                ..DESCRIPTOR
            },
            ContextDescriptor {
                output_bits: 45,
                ..DESCRIPTOR
            },
        ];
        for descriptor in wrong {
            assert_eq!(descriptor.words(), None, "{descriptor:?}");
        }
        let wide = ContextDescriptor {
            output_bits: 52,
            ..DESCRIPTOR
        };
        let [first, ..] = wide.words().expect("in range");
        assert_eq!(first >> 32 & 7, 5, "48 bits");
    }

    /// The pages that commands invalidate, in order.
    fn pages_of(commands: &[SmmuCommand], asid: u16, leaf: bool) -> Vec<(u64, u64)> {
        let page_of = |command: &SmmuCommand| {
            let [first, second] = command.words();
            assert_eq!(first & 0xff, 0x12);
            assert_eq!(
                (first >> 17 & 7, first >> 25 & 0x7f),
                (0, 0),
                "no VMID, no bit 25"
            );
            assert_eq!(first >> 48, u64::from(asid));
            assert_eq!(second & 1, u64::from(leaf));
            let (num, scale) = (first >> 12 & 0x1f, first >> 20 & 0x1f);
            let (granule, level) = (second >> 10 & 3, second >> 8 & 3);
            assert_eq!(level, 0);
            // What the kernel refuses, as reserved.
            assert_eq!(granule != 0, num != 0 || scale != 0, "{command:?}");
            (second >> 12, (num + 1) << scale)
        };
        commands.iter().map(page_of).collect()
    }

    fn range(first: u64, pages: u64) -> IovaRange {
        IovaRange::from_len(Iova(first << 12), pages << 12).expect("a range")
    }

    #[test]
    fn ranges_are_covered_exactly_and_by_few_commands() {
        let counts = [
            1,
            2,
            3,
            31,
            32,
            33,
            63,
            64,
            512,
            0x1_2345,
            (1 << 36) - 1,
            5 << 33,
        ];
        for pages in counts {
            let commands = SmmuCommand::invalidate_range(7, range(5, pages), true, true);
            assert!(commands.len() <= 8, "{pages:#x}: {}", commands.len());
            let mut next = 5;
            for (page, count) in pages_of(&commands, 7, true) {
                assert_eq!(page, next, "{pages:#x}");
                next += count;
            }
            assert_eq!(next, 5 + pages);
        }
        let one = SmmuCommand::invalidate_range(7, range(5, 32), false, true);
        assert_eq!(pages_of(&one, 7, false), [(5, 32)]);
        // A part of a page is a page.
        let part = IovaRange::from_len(Iova(0x5fff), 2).expect("a range");
        let commands = SmmuCommand::invalidate_range(7, part, true, true);
        assert_eq!(pages_of(&commands, 7, true), [(5, 2)]);
    }

    #[test]
    fn an_smmu_without_ranges_gets_a_bounded_number_of_pages() {
        let few = SmmuCommand::invalidate_range(9, range(1 << 35, 64), true, false);
        let expected: Vec<_> = (0..64).map(|page| ((1 << 35) + page, 1)).collect();
        assert_eq!(pages_of(&few, 9, true), expected);
        let all = [SmmuCommand::invalidate_asid(9)];
        assert_eq!(all[0].words(), [0x0009_0000_0000_0011, 0]);
        let of = |range, has_ranges| SmmuCommand::invalidate_range(9, range, true, has_ranges);
        assert_eq!(of(range(1, 65), false), all);
        assert_eq!(of(range(0, 1 << 36), true), all);
        assert_eq!(of(IovaRange::ALL, true), all);
    }

    #[test]
    fn the_other_commands_have_the_bits_of_the_specification() {
        assert_eq!(SmmuCommand::INVALIDATE_ALL.words(), [0x10, 0]);
        let context = SmmuCommand::invalidate_context(0x42);
        assert_eq!(context.words(), [0x42_0000_0005, 1]);
    }
}
