//! Walkers written from the architectures' documents, which share no code with the crate.
//!
//! - [`Hardware::x86_first_stage`]: Intel VT-d, "First-Stage Paging Entries", with legacy requests: user privilege, no
//!   execution, no updates of accessed and dirty bits expected.
//! - [`Hardware::vmsav8_stage_1`]: Arm ARM, "VMSAv8-64 translation table format descriptors", and SMMUv3's context descriptor
//!   with T0SZ = 16, TG0 = 4 KiB, HA = HD = 0, no 52-bit addresses: unprivileged requests for data.

use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::page_table::layout::vmsav8::MAIR;
use vhost_device_iommu::page_table::{Encoding, Format, Levels, Table, Translation};

use crate::audit::raw_words;
use crate::pair::Pair;
use crate::random::{Random, RequestSpace};
use crate::{GIB, MIB2, PAGE, encodings};

/// A request that hardware lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    pub address: u64,
    pub read: bool,
    pub write: bool,
    /// The memory type is that of device memory; `None` in a format whose entries do not say that.
    pub device: Option<bool>,
}

/// Memory that hardware reads tables from: `words`, from the physical address `base` on.
pub struct Hardware<'a> {
    pub words: &'a [u64],
    pub base: u64,
}

impl Hardware<'_> {
    /// What hardware does with `iova`; `None` if it reports a fault.
    pub fn walk(&self, format: Format, root: u64, levels: Levels, iova: u64) -> Option<Reached> {
        match (format, levels) {
            (Format::X86FirstStage, Levels::Four) => self.x86_first_stage(root, 4, iova),
            (Format::X86FirstStage, Levels::Five) => self.x86_first_stage(root, 5, iova),
            (Format::Vmsav8Stage1, Levels::Four) => self.vmsav8_stage_1(root, iova),
            (Format::Vmsav8Stage1, Levels::Five) => panic!("the format has no such tables"),
        }
    }

    fn fetch(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.base)?;
        assert_eq!(offset % 8, 0, "an entry is a word");
        self.words.get((offset / 8) as usize).copied()
    }

    fn x86_first_stage(&self, root: u64, levels: u32, iova: u64) -> Option<Reached> {
        const P: u64 = 1;
        const RW: u64 = 1 << 1;
        const US: u64 = 1 << 2;
        const A: u64 = 1 << 5;
        const D: u64 = 1 << 6;
        const PS: u64 = 1 << 7;
        const XD: u64 = 1 << 63;
        let width = if levels == 5 { 57 } else { 48 };
        if iova >> width != 0 {
            return None;
        }
        let (mut table, mut write) = (root, true);
        for level in (1..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = self.fetch(table + (iova >> shift) % 512 * 8)?;
            if entry & P == 0 {
                return None;
            }
            assert_eq!(entry & XD, 0, "reserved where execution is not enabled");
            assert_ne!(entry & A, 0, "hardware would write to the table");
            if entry & US == 0 {
                return None;
            }
            write &= entry & RW != 0;
            let is_leaf = level == 1 || entry & PS != 0;
            let address = entry & 0x000f_ffff_ffff_f000;
            if !is_leaf {
                table = address;
                continue;
            }
            assert!(level <= 3, "PS is reserved in PML4E and PML5E");
            assert!(
                !write || entry & D != 0,
                "hardware would write to the table"
            );
            let inside = (1u64 << shift) - 1;
            assert_eq!(address & inside, 0, "reserved bits, or PAT");
            return Some(Reached {
                address: address | iova & inside,
                read: true,
                write,
                device: None,
            });
        }
        None
    }

    fn vmsav8_stage_1(&self, ttb0: u64, iova: u64) -> Option<Reached> {
        if iova >> 48 != 0 {
            return None;
        }
        let (mut table, mut is_writable, mut is_unprivileged) = (ttb0, true, true);
        for lookup_level in 0..=3 {
            let lsb = 39 - 9 * lookup_level;
            let descriptor = self.fetch(table + (iova >> lsb) % 512 * 8)?;
            match (lookup_level, descriptor & 0b11) {
                (0..=2, 0b11) => {
                    // NSTable, APTable, UXNTable, PXNTable.
                    is_writable &= descriptor >> 62 & 1 == 0;
                    is_unprivileged &= descriptor >> 61 & 1 == 0;
                    assert_eq!(descriptor >> 48 & 0xf, 0, "RES0 with 48-bit addresses");
                    table = descriptor & 0x0000_ffff_ffff_f000;
                }
                (1 | 2, 0b01) | (3, 0b11) => {
                    assert_eq!(descriptor >> 48 & 0x1f, 0, "RES0, GP, DBM, Contiguous");
                    assert_eq!(descriptor >> 59, 0, "ignored, or PBHA");
                    assert_eq!(descriptor >> 53 & 0b11, 0b11, "UXN and PXN");
                    let inside = (1u64 << lsb) - 1;
                    let output = descriptor & 0x0000_ffff_ffff_f000;
                    assert_eq!(output & inside, 0, "nT, or RES0");
                    if descriptor >> 10 & 1 == 0 {
                        return None; // An Access flag fault.
                    }
                    let access_permissions = descriptor >> 6 & 0b11;
                    if access_permissions & 0b01 == 0 || !is_unprivileged {
                        return None;
                    }
                    let attributes = MAIR >> (8 * (descriptor >> 2 & 0b111)) & 0xff;
                    let device = match attributes {
                        0x04 => true,
                        0xff => false,
                        other => panic!("no attributes of ours: {other:#x}"),
                    };
                    assert_eq!(descriptor >> 8 & 0b11, 0b11, "inner shareable");
                    assert_eq!(descriptor >> 11 & 1, 1, "nG");
                    return Some(Reached {
                        address: output | iova & inside,
                        read: true,
                        write: is_writable && access_permissions & 0b10 == 0,
                        device: Some(device),
                    });
                }
                _ => return None,
            }
        }
        None
    }
}

/// Hardware that walks the table in `words` does with `iova` what the reader says, or refuses it.
pub fn check(
    words: &[u64],
    encoding: Encoding,
    table: &Table,
    iova: u64,
    found: Option<Translation>,
) {
    let Encoding { format, base } = encoding;
    let hardware = Hardware { words, base };
    let root = base + table.root().0;
    let reached = hardware.walk(format, root, table.levels(), iova);
    let usable = found.filter(|found| found.access != Access::NONE);
    let Some(found) = usable else {
        assert_eq!(reached, None, "{iova:#x}: {found:?}");
        return;
    };
    let expected = Reached {
        address: found.gpa.0,
        // Neither format has write-only leaves.
        read: true,
        write: found.access.write,
        device: (format == Format::Vmsav8Stage1).then_some(found.mmio),
    };
    assert_eq!(reached, Some(expected), "{iova:#x}: {found:?}");
}

#[test]
fn hardware_reaches_what_readers_reach() {
    for levels in [Levels::Four, Levels::Five] {
        let span = 4 * GIB;
        let space = RequestSpace {
            levels,
            frames: 2048,
            base: levels.last_address().0 + 1 - span,
            span,
            units: &[PAGE, PAGE, MIB2, GIB],
            most_units: 600,
            reclaim: 16,
        };
        for (seed, encoding) in (1..).zip(encodings(levels, space.base + span / 2)) {
            let mut random = Random(seed);
            let mut pair = Pair::new(space.frames, levels, encoding);
            let (mut mapped, mut free) = (0, 0);
            for _ in 0..20 {
                for _ in 0..100 {
                    pair.apply(&space.op(&mut random));
                }
                let words = raw_words(&pair.arena);
                for at in 0..2000 {
                    // In the requests' window, beside it, and anywhere.
                    let iova = match at % 8 {
                        0 => random.next() << random.below(8),
                        1 => (space.base + random.below(span)) ^ 1 << random.below(64),
                        _ => space.base + random.below(span),
                    };
                    let found = pair.table.translate(&pair.arena, Iova(iova));
                    check(&words, encoding, &pair.table, iova, found);
                    *if found.is_some() {
                        &mut mapped
                    } else {
                        &mut free
                    } += 1;
                }
            }
            assert!(mapped > 1000 && free > 1000, "{mapped} mapped, {free} free");
            pair.check_listing(IovaRange::ALL);
        }
    }
}
