//! The arena's words, compared with the written layout.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::page_table::layout::{FRAME_BYTES, FRAME_WORDS};
use vhost_device_iommu::page_table::{Arena, Table};

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
    assert_eq!(words[1..4], [1, levels, model.frames_total]);
    assert!(words[4..FRAME_WORDS].iter().all(|word| *word == 0));

    let mut expected = BTreeMap::new();
    for mapping in model.mappings.values() {
        let last = leaves(mapping).last();
        for (i, (level, iova)) in leaves(mapping).enumerate() {
            let gpa = mapping.gpa.0 + (iova - mapping.range.first().0);
            let mut bits = gpa | 1 << 5 | 1 << 6;
            if mapping.access != Access::NONE {
                bits |= 1 << 0 | 1 << 2;
            }
            bits |= u64::from(mapping.access.write) << 1;
            bits |= u64::from(level > 1) << 7;
            bits |= u64::from(i == 0) << 52;
            bits |= u64::from(last == Some((level, iova))) << 53;
            bits |= u64::from(mapping.mmio) << 54;
            bits |= u64::from(!mapping.access.read) << 55;
            expected.insert(iova, (level, bits));
        }
    }
    let mut seen = vec![false; usize::try_from(model.frames_total).expect("a count")];
    seen[0] = true;
    let mut found = BTreeMap::new();
    audit_table(
        &words,
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
}

fn audit_table(
    words: &[u64],
    offset: u64,
    level: u32,
    base: u64,
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
        let iova = base + ((i as u64) << (12 + 9 * (level - 1)));
        if word == 0 {
            continue;
        }
        used += 1;
        if level == 1 || word & 1 << 7 != 0 {
            found.insert(iova, (level, word));
            continue;
        }
        assert_eq!(word & 0xfff, 0x27);
        let next = word & 0xf_ffff_ffff_f000;
        let below = audit_table(words, next, level - 1, iova, seen, found);
        assert_eq!(word >> 52, below, "used entries at {iova:#x}");
        assert_ne!(below, 0, "an empty table at {iova:#x}");
    }
    used
}
