//! Arenas for hardware: their headers, their places, and what is refused there.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use vhost_device_iommu::address::{Access, IovaRange};
use vhost_device_iommu::page_table::layout::{
    HEADER_BASE, HEADER_FORMAT, HEADER_VERSION, WrongBase,
};
use vhost_device_iommu::page_table::{
    Arena, ArenaError, Encoding, EndpointSlots, EndpointWord, Format, LeftArena, Levels,
    MapRefusal, ReadOnlyArena, Table, TableOffset, TableRefusal,
};

use crate::audit::raw_words;
use crate::{GIB, PAGE, encoded_table, encodings, map, mapping, unmap};

const FRAMES: u64 = 64;

fn file(arena: &Arena) -> File {
    File::from(arena.fd().try_clone_to_owned().expect("a descriptor"))
}

#[test]
fn the_version_keeps_earlier_readers_from_other_encodings() {
    for encoding in encodings(Levels::Four, 16 * GIB) {
        let (arena, _table) = encoded_table(FRAMES, Levels::Four, encoding);
        assert_eq!(arena.encoding(), encoding);
        let is_first = encoding == Encoding::default();
        let version = if is_first { 1 } else { 2 };
        assert_eq!(raw_words(&arena)[HEADER_VERSION], version);
        ReadOnlyArena::map(arena.fd()).expect("an arena");
    }
}

/// Both readers of foreign arenas refuse a header that they cannot follow.
#[test]
fn unknown_encodings_are_refused() {
    for encoding in encodings(Levels::Four, 16 * GIB) {
        let (arena, _table) = encoded_table(FRAMES, Levels::Four, encoding);
        let limit = encoding.format.gpa_limit();
        let copy = file(&arena);
        let is_first = encoding == Encoding::default();
        let mut changes = vec![
            (HEADER_VERSION, 0),
            (HEADER_VERSION, 3),
            (HEADER_FORMAT, 2),
            (HEADER_FORMAT, u64::MAX),
            (HEADER_BASE, 16 * GIB + 8),
            (HEADER_BASE, limit - (FRAMES - 1) * PAGE),
            (HEADER_BASE, limit),
            (HEADER_BASE, u64::MAX - (PAGE - 1)),
        ];
        if is_first {
            // Earlier readers would take it for an arena without a base.
            changes.extend([(HEADER_FORMAT, 1), (HEADER_BASE, 16 * GIB)]);
        } else {
            changes.push((HEADER_VERSION, 1));
        }
        for (word, value) in changes {
            let good = raw_words(&arena)[word];
            let write = |value: u64| copy.write_all_at(&value.to_le_bytes(), word as u64 * 8);
            write(value).expect("writable");
            let refused = ReadOnlyArena::map(arena.fd());
            assert!(
                matches!(refused, Err(ArenaError::NotAnArena(_))),
                "{encoding:?}: {value:#x} in word {word}: {refused:?}"
            );
            let left = LeftArena::new(arena.memory().words());
            assert!(left.is_err(), "{value:#x} in word {word}");
            write(good).expect("writable");
        }
        ReadOnlyArena::map(arena.fd()).expect("an arena");
        LeftArena::new(arena.memory().words()).expect("an arena");
    }
}

#[test]
fn an_arena_is_made_only_where_its_format_reaches() {
    for format in [Format::X86FirstStage, Format::Vmsav8Stage1] {
        let limit = format.gpa_limit();
        let make = |base| Arena::with_encoding(FRAMES * PAGE, Encoding { format, base });
        make(limit - FRAMES * PAGE).expect("it ends at the last address");
        for base in [limit - (FRAMES - 1) * PAGE, limit, u64::MAX - (PAGE - 1)] {
            let refused = make(base).expect_err("beyond the last address");
            let too_high = matches!(refused, ArenaError::Base(WrongBase::TooHigh { .. }));
            assert!(too_high, "{refused}");
        }
        let refused = make(PAGE + 8).expect_err("no page");
        let misaligned = matches!(refused, ArenaError::Base(WrongBase::Misaligned { .. }));
        assert!(misaligned, "{refused}");
    }
}

#[test]
fn vmsav8_has_no_fifth_level() {
    let encoding = Encoding {
        format: Format::Vmsav8Stage1,
        base: 0,
    };
    let mut arena = Arena::with_encoding(FRAMES * PAGE, encoding).expect("an arena");
    let refused = Table::new(&mut arena, Levels::Five).expect_err("five levels");
    assert_eq!(refused, TableRefusal::TooDeep(Levels::Five));
    assert_eq!(arena.frames_used(), 1);
    // A reader does not trust a slot that says otherwise.
    let slots = EndpointSlots::new(&mut arena, 1).expect("a frame");
    for (levels, is_there) in [(Levels::Four, true), (Levels::Five, false)] {
        let root = TableOffset(2 * PAGE);
        slots.set(0, EndpointWord::Domain { root, levels });
        let found = arena.view().endpoint(slots.word(0));
        assert_eq!(found != EndpointWord::Blocked, is_there, "{levels:?}");
    }
}

#[test]
fn no_mapping_leads_to_the_arena() {
    for encoding in encodings(Levels::Four, 16 * GIB) {
        let (mut arena, mut table) = encoded_table(FRAMES, Levels::Four, encoding);
        // Mappings of two pages that end before the arena, in it, begin in it, and begin after it.
        let end = 16 * GIB + FRAMES * PAGE;
        for (gpa, is_inside) in [
            (16 * GIB - 2 * PAGE, false),
            (16 * GIB - PAGE, true),
            (16 * GIB + 5 * PAGE, true),
            (end - PAGE, true),
            (end, false),
        ] {
            let before = raw_words(&arena);
            let wanted = mapping(GIB, 2 * PAGE, gpa, Access::READ);
            let done = map(&mut table, &mut arena, &wanted);
            if is_inside && encoding.base != 0 {
                assert_eq!(done, Err(MapRefusal::TargetsTables), "{gpa:#x}");
                assert_eq!(raw_words(&arena), before);
            } else {
                assert_eq!(done, Ok(()), "{gpa:#x}");
                unmap(&mut table, &mut arena, wanted.range).expect("whole");
            }
        }
        // Around the arena.
        let around = mapping(0, 32 * GIB, 0, Access::READ_WRITE);
        let done = map(&mut table, &mut arena, &around);
        assert_eq!(done.is_err(), encoding.base != 0);
    }
}

#[test]
fn a_pinned_arena_keeps_its_memory() {
    let encoding = Encoding {
        format: Format::Vmsav8Stage1,
        base: 512 * GIB,
    };
    let (mut arena, mut table) = encoded_table(16 << 10, Levels::Four, encoding);
    arena.pin();
    let file = file(&arena);
    let in_use = || file.metadata().expect("readable").blocks() * 512;
    let large = mapping(0, 16 * GIB, PAGE, Access::READ_WRITE);
    map(&mut table, &mut arena, &large).expect("free");
    let most = in_use();
    assert!(most > 8192 * PAGE);
    unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
    arena.reclaim();
    assert_eq!(in_use(), most);
    // Its frames are used again.
    map(&mut table, &mut arena, &large).expect("free");
    assert_eq!(in_use(), most);
}
