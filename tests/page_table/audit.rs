//! The arena's words, compared with the written layout.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::page_table::layout::{FRAME_BYTES, FRAME_WORDS};
use vhost_device_iommu::page_table::{Arena, Encoding, Format, Table};

use crate::hardware;
use crate::model::{Model, leaves};

/// Reads the arena's bytes through the file descriptor, without any code of the crate.
pub fn raw_words(arena: &Arena) -> Vec<u64> {
    let fd = arena.fd().try_clone_to_owned().expect("a descriptor");
    let bytes = usize::try_from(arena.limit_bytes()).expect("a size");
    let mut contents = vec![0; bytes];
    let read = File::from(fd).read_exact_at(&mut contents, 0);
    read.expect("readable");
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    contents.chunks(8).map(word).collect()
}

/// Compares every word of the arena with the value that the written layout requires.
pub fn audit(arena: &Arena, table: &Table, model: &Model) {
    let words = raw_words(arena);
    assert_eq!(words[0].to_le_bytes(), *b"iova\0tbl");
    let levels = u64::from(model.levels.count());
    let Encoding { format, base } = model.encoding;
    let is_first_version = format == Format::X86FirstStage && base == 0;
    let version = if is_first_version { 1 } else { 2 };
    assert_eq!(words[1..4], [version, levels, model.frames_total]);
    let number = u64::from(format == Format::Vmsav8Stage1);
    assert_eq!(words[4..6], [number, base]);
    assert!(words[6..FRAME_WORDS].iter().all(|word| *word == 0));

    let mut expected = BTreeMap::new();
    for mapping in model.mappings.values() {
        let last = leaves(mapping).last();
        for (i, (level, iova)) in leaves(mapping).enumerate() {
            let gpa = mapping.gpa.0 + (iova - mapping.range.first().0);
            let leaf = ExpectedLeaf {
                level,
                access: mapping.access,
                mmio: mapping.mmio,
                is_first: i == 0,
                is_last: last == Some((level, iova)),
            };
            let bits = match format {
                Format::X86FirstStage => leaf.x86(),
                Format::Vmsav8Stage1 => leaf.vmsav8(),
            };
            expected.insert(iova, (level, gpa | bits));
        }
    }
    let mut seen = vec![false; usize::try_from(model.frames_total).expect("a count")];
    seen[0] = true;
    let mut found = BTreeMap::new();
    audit_table(
        &words,
        model.encoding,
        table.root().0,
        model.levels.count(),
        0,
        &mut seen,
        &mut found,
    );
    assert_eq!(found, expected);
    let tables = seen.iter().filter(|seen| **seen).count() as u64 - 1;
    assert_eq!(tables, table.frames());
    for (frame, contents) in words.chunks(FRAME_WORDS).enumerate() {
        let zero = contents.iter().all(|word| *word == 0);
        assert!(seen[frame] || zero, "frame {frame} is not in the tree");
    }
    for mapping in model.mappings.values() {
        let (first, last) = (mapping.range.first().0, mapping.range.last().0);
        for iova in [
            first.wrapping_sub(1),
            first,
            first + (last - first) / 2,
            last,
            last.wrapping_add(1),
        ] {
            hardware::check(&words, model.encoding, table, iova, model.translate(iova));
        }
    }
}

/// The leaf that the written layout requires, without its address.
struct ExpectedLeaf {
    level: u32,
    access: Access,
    mmio: bool,
    is_first: bool,
    is_last: bool,
}

impl ExpectedLeaf {
    fn x86(&self) -> u64 {
        let mut bits = 1 << 5 | 1 << 6;
        if self.access != Access::NONE {
            bits |= 1 << 0 | 1 << 2;
        }
        bits |= u64::from(self.access.write) << 1;
        bits |= u64::from(self.level > 1) << 7;
        bits |= u64::from(self.is_first) << 52;
        bits |= u64::from(self.is_last) << 53;
        bits |= u64::from(self.mmio) << 54;
        bits | u64::from(!self.access.read) << 55
    }

    fn vmsav8(&self) -> u64 {
        let mut bits = 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11 | 3 << 53;
        bits |= u64::from(self.access != Access::NONE);
        bits |= u64::from(self.level == 1) << 1;
        bits |= u64::from(self.mmio) << 2;
        bits |= u64::from(!self.access.write) << 7;
        bits |= u64::from(!self.access.read) << 55;
        bits |= u64::from(self.mmio) << 56;
        bits |= u64::from(self.is_last) << 57;
        bits | u64::from(self.is_first) << 58
    }
}

fn audit_table(
    words: &[u64],
    encoding: Encoding,
    offset: u64,
    level: u32,
    first: u64,
    seen: &mut [bool],
    found: &mut BTreeMap<u64, (u32, u64)>,
) -> u64 {
    assert_eq!(offset % FRAME_BYTES, 0);
    let frame = usize::try_from(offset / FRAME_BYTES).expect("a frame");
    assert!(!seen[frame], "frame {frame} is in the tree twice");
    seen[frame] = true;
    let mut used = 0;
    for i in 0..FRAME_WORDS {
        let word = words[frame * FRAME_WORDS + i];
        let iova = first + ((i as u64) << (12 + 9 * (level - 1)));
        if word == 0 {
            continue;
        }
        used += 1;
        let is_leaf = match encoding.format {
            Format::X86FirstStage => word & 1 << 7 != 0,
            Format::Vmsav8Stage1 => word & 1 << 1 == 0,
        };
        if level == 1 || is_leaf {
            found.insert(iova, (level, word));
            continue;
        }
        let (used_below, rest) = match encoding.format {
            Format::X86FirstStage => (word >> 52, word & 0xfff),
            Format::Vmsav8Stage1 => (word >> 2 & 0x3ff, word & 0xffff_0000_0000_0003),
        };
        let pointer = match encoding.format {
            Format::X86FirstStage => 0x27,
            Format::Vmsav8Stage1 => 0x03,
        };
        assert_eq!(rest, pointer);
        let next = (word & 0xf_ffff_ffff_f000) - encoding.base;
        let below = audit_table(words, encoding, next, level - 1, iova, seen, found);
        assert_eq!(used_below, below, "used entries at {iova:#x}");
        assert_ne!(below, 0, "an empty table at {iova:#x}");
    }
    used
}
