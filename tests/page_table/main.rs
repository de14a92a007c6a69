//! The page table against a plain interval model, against its written layout, and under concurrent
//! readers.

#![expect(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test may stop"
)]

mod audit;
mod hardware;
mod header;
mod memory;
mod model;
mod pair;
mod properties;
mod random;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange};
use vhost_device_iommu::page_table::layout::{Entry, FRAME_BYTES};
use vhost_device_iommu::page_table::{
    Arena, Encoding, Format, Levels, MapRefusal, Mapping, OutOfFrames, ReadOnlyArena, Table,
    Unmapped, WouldSplit, reader,
};

use crate::random::Random;

const PAGE: u64 = 4 << 10;
const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
}

fn mapping(first: u64, bytes: u64, gpa: u64, access: Access) -> Mapping {
    Mapping {
        range: range(first, first + (bytes - 1)),
        gpa: Gpa(gpa),
        access,
        mmio: false,
    }
}

/// Every encoding of tables with these levels; arenas that have a base lie at `base`, or below the end of their addresses.
fn encodings(levels: Levels, base: u64) -> Vec<Encoding> {
    let [x86, arm] = [Format::X86FirstStage, Format::Vmsav8Stage1].map(|format| {
        let base = (base & !(PAGE - 1)) % format.gpa_limit().min(1 << 50);
        [0, base].map(|base| Encoding { format, base })
    });
    let all = x86.into_iter().chain(arm);
    all.filter(|encoding| encoding.format.has_levels(levels))
        .collect()
}

fn new_table(frames: u64, levels: Levels) -> (Arena, Table) {
    encoded_table(frames, levels, Encoding::default())
}

fn encoded_table(frames: u64, levels: Levels, encoding: Encoding) -> (Arena, Table) {
    let arena = Arena::with_encoding(frames * FRAME_BYTES, encoding);
    let mut arena = arena.expect("an arena");
    let table = Table::new(&mut arena, levels).expect("a root");
    (arena, table)
}

fn map(table: &mut Table, arena: &mut Arena, wanted: &Mapping) -> Result<(), MapRefusal> {
    let plan = table.plan_map(arena, wanted)?;
    assert_eq!(plan.mapping(), wanted);
    table.commit_map(arena, plan);
    Ok(())
}

fn unmap(table: &mut Table, arena: &mut Arena, range: IovaRange) -> Result<Unmapped, WouldSplit> {
    let plan = table.plan_unmap(arena, range)?;
    Ok(table.commit_unmap(arena, plan))
}

/// The example of the UNMAP section in the virtio specification, in pages.
#[test]
fn the_unmap_example_of_the_specification() {
    type Case = (&'static [(u64, u64)], (u64, u64), Option<u64>);
    let cases: [Case; 7] = [
        (&[], (0, 4), Some(0)),
        (&[(0, 9)], (0, 9), Some(1)),
        (&[(0, 4), (5, 9)], (0, 9), Some(2)),
        (&[(0, 9)], (0, 4), None),
        (&[(0, 4), (5, 9)], (0, 4), Some(1)),
        (&[(0, 4)], (0, 9), Some(1)),
        (&[(0, 4), (10, 14)], (0, 14), Some(2)),
    ];
    let pages = |(first, last): (u64, u64)| range(first * PAGE, last * PAGE + PAGE - 1);
    for (number, (mapped, wanted, removed)) in (1..).zip(cases) {
        let (mut arena, mut table) = new_table(8, Levels::Four);
        for part in mapped {
            let wanted = Mapping {
                range: pages(*part),
                gpa: Gpa(0x10_0000),
                access: Access::READ,
                mmio: false,
            };
            map(&mut table, &mut arena, &wanted).expect("free");
        }
        let unmapped = unmap(&mut table, &mut arena, pages(wanted));
        assert_eq!(
            unmapped.ok().map(|gone| gone.mappings),
            removed,
            "case {number}"
        );
        let left = mapped.len() as u64 - removed.unwrap_or(0);
        assert_eq!(table.mapping_count(), left, "case {number}");
    }
}

#[test]
fn large_leaves_are_used_where_alignment_allows() {
    let (mut arena, mut table) = new_table(64, Levels::Four);
    // From one page before a 2 MiB boundary to one page after a 1 GiB boundary.
    let first = GIB - MIB2 - PAGE;
    let bytes = PAGE + MIB2 + GIB + PAGE;
    let wanted = mapping(first, bytes, 5 * GIB + first, Access::READ_WRITE);
    let plan = table.plan_map(&arena, &wanted).expect("free");
    // Below the root: one table of 1 GiB entries, and at each end one table of 2 MiB entries and
    // one of pages.
    assert_eq!(plan.frames_needed(), 5);
    table.commit_map(&mut arena, plan);
    for (at, last) in [
        (first, first + PAGE - 1),
        (GIB - MIB2 + 5, GIB - 1),
        (GIB + 5, 2 * GIB - 1),
        (2 * GIB, 2 * GIB + PAGE - 1),
    ] {
        let found = table.translate(&arena, Iova(at)).expect("mapped");
        assert_eq!(found.gpa, Gpa(5 * GIB + at));
        assert_eq!(found.contiguous_last, Iova(last));
    }
    assert_eq!(
        table.mappings(&arena, Iova(GIB)).collect::<Vec<_>>(),
        [wanted]
    );
    assert_eq!(
        table.plan_unmap(&arena, range(GIB, u64::MAX)).err(),
        Some(WouldSplit(range(GIB, 2 * GIB - 1)))
    );
}

#[test]
fn planning_the_largest_mapping_takes_no_longer_than_a_small_one() {
    let (arena, table) = new_table(64, Levels::Five);
    let almost_all = range(PAGE, (1 << 52) - PAGE - 1);
    let wanted = Mapping {
        range: almost_all,
        gpa: Gpa(2 * PAGE),
        access: Access::READ,
        mmio: false,
    };
    for _ in 0..100_000 {
        // 2^40 pages: 2^31 tables of pages, 2^22 above them, 2^13 above those, and 16.
        let tables = (1 << 31) + (1 << 22) + (1 << 13) + 16;
        let refusal = table.plan_map(&arena, &wanted).expect_err("too much");
        let expected = OutOfFrames {
            needed: tables,
            free: 62,
        };
        assert_eq!(refusal, MapRefusal::OutOfFrames(expected));
    }
}

#[test]
fn an_unaligned_range_as_long_as_a_leaf_is_no_leaf() {
    let (mut arena, mut table) = new_table(16, Levels::Four);
    // Keeps the table in use, so that the second walk finds it in the cache.
    let beside = mapping(GIB + 8 * PAGE, PAGE, 0, Access::READ);
    map(&mut table, &mut arena, &beside).expect("free");
    for _ in 0..2 {
        for (first, bytes) in [(GIB, PAGE), (GIB + PAGE, PAGE), (0, MIB2), (MIB2, MIB2)] {
            let wanted = mapping(first, bytes, first, Access::READ);
            map(&mut table, &mut arena, &wanted).expect("free");
        }
        for (first, bytes) in [(GIB, PAGE), (0, MIB2)] {
            for moved in [1, bytes / 2, bytes - 1] {
                let across = range(first + moved, first + moved + (bytes - 1));
                let refused = unmap(&mut table, &mut arena, across);
                let whole = range(first, first + (bytes - 1));
                assert_eq!(refused, Err(WouldSplit(whole)), "{across}");
            }
            let both = range(first, first + (2 * bytes - 1));
            let unmapped = unmap(&mut table, &mut arena, both).expect("whole mappings");
            assert_eq!((unmapped.mappings, unmapped.bytes), (2, 2 * bytes));
        }
        assert_eq!(table.mapping_count(), 1);
        arena.reclaim();
    }
}

/// The table caches a few tables of level 1; tables that share a line of the cache evict each other.
/// The test maps, lists and unmaps pages of many tables of level 1, with and without shared lines.
#[test]
fn cached_tables_are_never_confused() {
    let (mut arena, mut table) = new_table(64, Levels::Four);
    let page = |n: u64, at: u64| {
        mapping(
            n * MIB2 + at * PAGE,
            PAGE,
            (n * 8 + at) * PAGE,
            Access::READ,
        )
    };
    let check = |table: &Table, arena: &Arena, live: &[Mapping]| {
        let mut expected = live.to_vec();
        expected.sort_by_key(|m| m.range);
        let there: Vec<_> = table.mappings(arena, Iova(0)).collect();
        assert_eq!(there, expected);
    };
    for stride in [1, 7, 8, 16, 512] {
        let mut live = Vec::new();
        for at in 0..2 {
            for n in 0..20 {
                let wanted = page(n * stride, at);
                map(&mut table, &mut arena, &wanted).expect("free");
                live.push(wanted);
            }
        }
        check(&table, &arena, &live);
        // Consecutive pages lie in different tables first, then in the same one.
        while let Some(gone) = live.pop() {
            let unmapped = unmap(&mut table, &mut arena, gone.range).expect("whole");
            assert_eq!(unmapped.mappings, 1, "{gone}");
            arena.reclaim();
            check(&table, &arena, &live);
            if live.len() % 3 == 0 {
                map(&mut table, &mut arena, &gone).expect("free again");
                let refused = map(&mut table, &mut arena, &gone);
                assert_eq!(refused, Err(MapRefusal::Overlap(gone.range)));
                unmap(&mut table, &mut arena, gone.range).expect("whole");
                arena.reclaim();
            }
        }
        assert_eq!((table.mapping_count(), table.frames()), (0, 1));
    }
}

#[test]
#[should_panic(expected = "out of date")]
fn a_plan_is_refused_once_the_table_has_changed() {
    let (mut arena, mut table) = new_table(16, Levels::Four);
    let wanted = mapping(0, PAGE, 0, Access::READ);
    let first = table.plan_map(&arena, &wanted).expect("free");
    let second = table.plan_map(&arena, &wanted).expect("free");
    table.commit_map(&mut arena, first);
    table.commit_map(&mut arena, second);
}

#[test]
#[should_panic(expected = "the arena no longer has the frames that the plan counted")]
fn a_plan_needs_the_frames_it_counted() {
    let (mut arena, mut table) = new_table(5, Levels::Four);
    let page = mapping(0, PAGE, 0, Access::READ);
    let plan = table.plan_map(&arena, &page);
    let _other = Table::new(&mut arena, Levels::Four).expect("a root");
    table.commit_map(&mut arena, plan.expect("free"));
}

#[test]
fn tables_share_an_arena_and_nothing_else() {
    let mut arena = Arena::new(32 * FRAME_BYTES).expect("an arena");
    let mut one = Table::new(&mut arena, Levels::Four).expect("a root");
    let mut two = Table::new(&mut arena, Levels::Five).expect("a root");
    let here = mapping(0x1000, PAGE, 0x5000, Access::WRITE);
    let there = mapping(0x1000, PAGE, 0x9000, Access::READ);
    map(&mut one, &mut arena, &here).expect("free");
    map(&mut two, &mut arena, &there).expect("free");
    assert_eq!(
        one.mappings(&arena, Iova(0)).collect::<Vec<_>>(),
        [here],
        "a table must list only its own mappings"
    );
    let gone = one.destroy(&mut arena);
    assert_eq!((gone.mappings, gone.bytes), (1, PAGE));
    assert_eq!(arena.frames_retired(), 4);
    let found = two.translate(&arena, Iova(0x1fff)).expect("mapped");
    assert_eq!((found.gpa, found.access), (Gpa(0x9fff), Access::READ));
    arena.reclaim();
    assert_eq!(arena.frames_used(), 1 + two.frames());
}

/// Every mapping of this test leads from an IOVA to that IOVA plus a multiple of 2^40. The multiple
/// also encodes the rights.
fn tagged(first: u64, bytes: u64, tag: u64) -> Mapping {
    let access = match tag {
        1 => Access::READ,
        2 => Access::WRITE,
        _ => Access::READ_WRITE,
    };
    mapping(first, bytes, first + (tag << 40), access)
}

#[test]
fn readers_see_only_what_was_mapped_while_the_writer_works() {
    const SPAN: u64 = 2 * GIB;
    let (mut arena, mut table) = new_table(32 << 10, Levels::Four);
    // The anchor is never unmapped, so readers must always see it.
    let anchor = tagged(SPAN, MIB2 + PAGE, 3);
    map(&mut table, &mut arena, &anchor).expect("free");
    let (root, levels) = (table.root(), table.levels());
    let shared = ReadOnlyArena::map(arena.fd()).expect("an arena");
    let stop = AtomicBool::new(false);
    let hits = AtomicU64::new(0);

    std::thread::scope(|scope| {
        for seed in 1..=3 {
            let (shared, stop, hits) = (&shared, &stop, &hits);
            scope.spawn(move || {
                let mut random = Random(seed);
                while !stop.load(Ordering::Relaxed) {
                    let iova = random.below(SPAN);
                    // Near the addresses at which leaves and tables are made and freed.
                    let iova = if seed == 1 { iova % (8 * MIB2) } else { iova };
                    if let Some(found) = reader::walk(shared.view(), root, levels, Iova(iova)) {
                        let tag = found.gpa.0 >> 40;
                        let real = tagged(iova & !(PAGE - 1), PAGE, tag);
                        assert!((1..=3).contains(&tag), "{iova:#x}: {found:?}");
                        assert_eq!(found.gpa.0, iova + (tag << 40));
                        assert_eq!(found.access, real.access);
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                    let inside = Iova(SPAN + random.below(MIB2 + PAGE));
                    let found = reader::walk(shared.view(), root, levels, inside);
                    let found = found.expect("the anchor stays");
                    assert_eq!(found.gpa.0, inside.0 + (3 << 40));
                }
            });
        }
        let mut random = Random(77);
        let mut changes = 0u64;
        // The table does not reuse retired frames while readers run, so their number bounds the
        // test.
        while arena.frames_free() > 1024 && changes < 400_000 {
            let unit = [PAGE, PAGE, MIB2][random.below(3) as usize];
            let within = if random.one_in(2) { 8 * MIB2 } else { SPAN };
            let first = random.below(within) / unit * unit;
            let bytes = (unit * (1 + random.below(9))).min(SPAN - first);
            let wanted = tagged(first, bytes, 1 + random.below(3));
            if map(&mut table, &mut arena, &wanted).is_err() {
                let live: Vec<Mapping> = table.mappings_in(&arena, wanted.range).collect();
                for mapping in live {
                    unmap(&mut table, &mut arena, mapping.range).expect("whole mappings");
                }
            }
            changes += 1;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(changes > 10_000, "{changes} changes are too few");
    });
    assert!(
        hits.load(Ordering::Relaxed) > 1000,
        "{hits:?} hits are too few"
    );
    arena.reclaim();
    assert_eq!(arena.frames_used(), 1 + table.frames());
}

/// Readers must not take a leaf without rights for a free entry, nor grant it any right.
#[test]
fn translations_return_every_kind_of_rights() {
    let (mut arena, mut table) = new_table(16, Levels::Four);
    let mut first = 0;
    for read in [false, true] {
        for write in [false, true] {
            for mmio in [false, true] {
                for pages in [1, 3] {
                    let access = Access { read, write };
                    let wanted = Mapping {
                        mmio,
                        ..mapping(first, pages * PAGE, 0, access)
                    };
                    map(&mut table, &mut arena, &wanted).expect("free");
                    let last = Iova(first + pages * PAGE - 1);
                    let found = table.translate(&arena, last).expect("mapped");
                    assert_eq!((found.access, found.mmio), (access, mmio));
                    assert_eq!(table.mappings_in(&arena, wanted.range).next(), Some(wanted));
                    first += pages * PAGE;
                }
            }
        }
    }
    assert_eq!(table.mapping_count(), 16);
    assert!(Entry::from_bits(0).is_free());
}
