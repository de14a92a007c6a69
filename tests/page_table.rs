//! The page table against a plain interval model, against its written layout, and under concurrent
//! readers.

#![expect(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test may stop"
)]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange};
use vhost_device_iommu::page_table::layout::{Entry, FRAME_BYTES, FRAME_WORDS};
use vhost_device_iommu::page_table::{
    Arena, ArenaError, Levels, MapRefusal, Mapping, OutOfFrames, ReadOnlyArena, Table, TableOffset,
    Translation, Unmapped, View, WouldSplit, reader,
};

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

fn new_table(frames: u64, levels: Levels) -> (Arena, Table) {
    let mut arena = Arena::new(frames * FRAME_BYTES).expect("an arena");
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

/// The leaves of a mapping, as level and first address, found step by step.
fn leaves(mapping: &Mapping) -> impl Iterator<Item = (u32, u64)> {
    let (first, last, gpa) = (
        mapping.range.first().0,
        mapping.range.last().0,
        mapping.gpa.0,
    );
    let mut at = Some(first);
    std::iter::from_fn(move || {
        let iova = at?;
        let (level, bytes) = [(3, GIB), (2, MIB2), (1, PAGE)]
            .into_iter()
            .find(|(_, bytes)| {
                iova % bytes == 0 && (gpa + (iova - first)) % bytes == 0 && last - iova >= bytes - 1
            })
            .expect("whole pages");
        at = (iova + (bytes - 1) < last).then(|| iova + bytes);
        Some((level, iova))
    })
}

/// The expected state of the table: mappings by first address, and the number of mappings that use
/// each table.
struct Model {
    levels: Levels,
    mappings: BTreeMap<u64, Mapping>,
    bytes: u64,
    /// By level and by the address bits above those that the table covers; without the root.
    tables: HashMap<(u32, u64), u64>,
    retired: u64,
    frames_total: u64,
}

impl Model {
    fn new(levels: Levels, frames_total: u64) -> Self {
        Self {
            levels,
            mappings: BTreeMap::new(),
            bytes: 0,
            tables: HashMap::new(),
            retired: 0,
            frames_total,
        }
    }

    fn at(&self, iova: u64) -> Option<&Mapping> {
        let (_, found) = self.mappings.range(..=iova).next_back()?;
        found.range.contains(Iova(iova)).then_some(found)
    }

    fn overlapping(&self, wanted: IovaRange) -> impl Iterator<Item = &Mapping> {
        let (first, last) = (wanted.first().0, wanted.last().0);
        let start = self.at(first).map_or(first, |found| found.range.first().0);
        self.mappings.range(start..=last).map(|(_, found)| found)
    }

    fn tables_of(&self, mapping: &Mapping) -> Vec<(u32, u64)> {
        let mut tables = Vec::new();
        let mut newest = [u64::MAX; 6];
        for (leaf_level, iova) in leaves(mapping) {
            for level in leaf_level..self.levels.count() {
                let covered = iova >> (12 + 9 * level);
                let newest = &mut newest[level as usize];
                if *newest == covered {
                    break;
                }
                *newest = covered;
                tables.push((level, covered));
            }
        }
        tables
    }

    fn free(&self) -> u64 {
        self.frames_total - 2 - self.tables.len() as u64 - self.retired
    }

    fn map(&mut self, wanted: &Mapping) -> Result<(), MapRefusal> {
        let (first, last) = (wanted.range.first().0, wanted.range.last().0);
        let pages = |address: u64| address.is_multiple_of(PAGE);
        if !(pages(first) && pages(last.wrapping_add(1)) && pages(wanted.gpa.0)) {
            return Err(MapRefusal::Misaligned);
        }
        let gpa_last = u128::from(wanted.gpa.0) + u128::from(last - first);
        if last > self.levels.last_address().0 || gpa_last >> 52 != 0 {
            return Err(MapRefusal::OutOfRange);
        }
        if let Some(found) = self.overlapping(wanted.range).next() {
            return Err(MapRefusal::Overlap(found.range));
        }
        let tables = self.tables_of(wanted);
        let new = |table: &&(u32, u64)| !self.tables.contains_key(table);
        let (needed, free) = (tables.iter().filter(new).count() as u64, self.free());
        if needed > free {
            return Err(MapRefusal::OutOfFrames(OutOfFrames { needed, free }));
        }
        for table in tables {
            *self.tables.entry(table).or_default() += 1;
        }
        self.bytes += last - first + 1;
        self.mappings.insert(first, *wanted);
        Ok(())
    }

    fn unmap(&mut self, wanted: IovaRange) -> Result<Unmapped, WouldSplit> {
        let cut = |found: &&Mapping| !wanted.covers(found.range);
        if let Some(found) = self.overlapping(wanted).find(cut) {
            return Err(WouldSplit(found.range));
        }
        let gone: Vec<Mapping> = self.overlapping(wanted).copied().collect();
        let mut unmapped = Unmapped::default();
        for mapping in gone {
            unmapped.mappings += 1;
            unmapped.bytes += mapping.range.span() + 1;
            self.mappings.remove(&mapping.range.first().0);
            for table in self.tables_of(&mapping) {
                let users = self.tables.get_mut(&table).expect("counted");
                *users -= 1;
                if *users == 0 {
                    self.tables.remove(&table);
                    self.retired += 1;
                }
            }
        }
        self.bytes -= unmapped.bytes;
        Ok(unmapped)
    }

    fn translate(&self, iova: u64) -> Option<Translation> {
        let found = self.at(iova)?;
        let gpa = found.gpa.0 + (iova - found.range.first().0);
        let inside = |bytes: u64| {
            let (first, last) = (iova & !(bytes - 1), iova | (bytes - 1));
            (gpa ^ iova) & (bytes - 1) == 0
                && found.range.contains(Iova(first))
                && found.range.contains(Iova(last))
        };
        let bytes = [GIB, MIB2, PAGE].into_iter().find(|bytes| inside(*bytes));
        Some(Translation {
            gpa: Gpa(gpa),
            contiguous_last: Iova(iova | (bytes.expect("a page") - 1)),
            access: found.access,
            mmio: found.mmio,
        })
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map(Mapping),
    Unmap(IovaRange),
    /// From the first mapping at or after `from` to the one at or after `to`, with both ends moved
    /// by some bytes.
    UnmapLive {
        from: u64,
        to: u64,
        move_first: i64,
        move_last: i64,
    },
    Reclaim,
}

/// A table and its model; both get the same requests.
struct Pair {
    arena: Arena,
    table: Table,
    model: Model,
    outcomes: HashMap<&'static str, u64>,
}

impl Pair {
    fn new(frames: u64, levels: Levels) -> Self {
        let (arena, table) = new_table(frames, levels);
        let model = Model::new(levels, arena.frames_total());
        Self {
            arena,
            table,
            model,
            outcomes: HashMap::new(),
        }
    }

    fn apply(&mut self, op: &Op) -> bool {
        let (outcome, touched) = match *op {
            Op::Map(wanted) => (self.map(&wanted), wanted.range),
            Op::Unmap(wanted) => (self.unmap(wanted), wanted),
            Op::UnmapLive {
                from,
                to,
                move_first,
                move_last,
            } => {
                let live = |at| self.model.mappings.range(at..).next();
                let (Some((_, a)), Some((_, b))) = (live(from.min(to)), live(from.max(to))) else {
                    return false;
                };
                let first = a.range.first().0.saturating_add_signed(move_first);
                let last = b.range.last().0.saturating_add_signed(move_last);
                let wanted = range(first.min(last), last);
                (self.unmap(wanted), wanted)
            }
            Op::Reclaim => {
                self.model.retired = 0;
                self.arena.reclaim();
                ("reclaim", range(0, 0))
            }
        };
        *self.outcomes.entry(outcome).or_default() += 1;
        self.check_counters();
        self.check_translations(touched);
        outcome.starts_with("refused")
    }

    fn map(&mut self, wanted: &Mapping) -> &'static str {
        let expected = self.model.map(wanted);
        let plan = self.table.plan_map(&self.arena, wanted);
        match (expected, plan) {
            (Ok(()), Ok(plan)) => {
                let before = self.arena.frames_used();
                let needed = plan.frames_needed();
                self.table.commit_map(&mut self.arena, plan);
                assert_eq!(self.arena.frames_used(), before + needed);
                "mapped"
            }
            (Err(MapRefusal::Overlap(whole)), Err(MapRefusal::Overlap(leaf))) => {
                assert!(whole.covers(leaf) && wanted.range.overlaps(leaf), "{leaf}");
                "refused overlap"
            }
            (Err(expected), Err(refusal)) => {
                assert_eq!(refusal, expected);
                match refusal {
                    MapRefusal::OutOfFrames(_) => "refused frames",
                    MapRefusal::OutOfRange => "refused range",
                    _ => "refused alignment",
                }
            }
            (expected, plan) => panic!("{wanted:?}: {plan:?}, expected {expected:?}"),
        }
    }

    fn unmap(&mut self, wanted: IovaRange) -> &'static str {
        let expected = self.model.unmap(wanted);
        let done = unmap(&mut self.table, &mut self.arena, wanted);
        match (expected, done) {
            (Ok(expected), Ok(unmapped)) => {
                assert_eq!(unmapped, expected, "{wanted}");
                match unmapped.mappings {
                    0 => "unmapped none",
                    1 => "unmapped one",
                    _ => "unmapped many",
                }
            }
            (Err(_), Err(WouldSplit(leaf))) => {
                let whole = self.model.at(leaf.first().0).expect("mapped").range;
                assert!(whole.covers(leaf) && wanted.overlaps(leaf), "{leaf}");
                assert!(!wanted.covers(whole), "{leaf}");
                "refused split"
            }
            (expected, done) => panic!("{wanted}: {done:?}, expected {expected:?}"),
        }
    }

    fn check_counters(&self) {
        let (table, model) = (&self.table, &self.model);
        assert_eq!(table.mapping_count(), model.mappings.len() as u64);
        assert_eq!(table.mapped_bytes(), model.bytes);
        assert_eq!(table.frames(), model.tables.len() as u64 + 1);
        assert_eq!(self.arena.frames_free(), model.free());
        assert_eq!(self.arena.frames_retired(), model.retired);
        let used = 1 + table.frames() + model.retired;
        assert_eq!(self.arena.frames_used(), used);
    }

    fn check_translations(&self, touched: IovaRange) {
        let (first, last) = (touched.first().0, touched.last().0);
        let middle = first + (last - first) / 2;
        for iova in [
            first.wrapping_sub(1),
            first,
            first | (PAGE - 1),
            middle,
            last & !(PAGE - 1),
            last,
            last.wrapping_add(1),
        ] {
            let found = self.table.translate(&self.arena, Iova(iova));
            assert_eq!(found, self.model.translate(iova), "{iova:#x}");
        }
    }

    fn check_listing(&self, part: IovaRange) {
        let listed = self.table.mappings_in(&self.arena, part);
        assert!(listed.eq(self.model.overlapping(part).copied()), "{part}");
        let rest = range(part.first().0, u64::MAX);
        let listed = self.table.mappings(&self.arena, part.first());
        assert!(listed.eq(self.model.overlapping(rest).copied()), "{part}");
    }

    fn contents(&self) -> Vec<u64> {
        raw_words(&self.arena)
    }

    /// Unmaps everything and checks that the arena is as it was at first.
    fn finish(mut self, with_destroy: bool) -> HashMap<&'static str, u64> {
        self.check_listing(IovaRange::ALL);
        if self.arena.limit_bytes() <= 4 << 20 {
            audit(&self.arena, &self.table, &self.model);
        }
        if with_destroy {
            let unmapped = self.table.destroy(&mut self.arena);
            assert_eq!(unmapped.mappings, self.model.mappings.len() as u64);
            assert_eq!(unmapped.bytes, self.model.bytes);
            self.arena.reclaim();
            assert_eq!(self.arena.frames_used(), 1);
            self.table = Table::new(&mut self.arena, self.model.levels).expect("a root");
        } else {
            self.apply(&Op::Unmap(IovaRange::ALL));
            self.apply(&Op::Reclaim);
        }
        assert_eq!(self.arena.frames_used(), 2);
        assert_eq!(self.table.mappings(&self.arena, Iova(0)).next(), None);
        if self.arena.limit_bytes() <= 4 << 20 {
            let words = self.contents();
            assert!(words[FRAME_WORDS..].iter().all(|word| *word == 0));
        }
        self.outcomes
    }
}

/// Reads the arena's bytes through the file descriptor, without any code of the crate.
fn raw_words(arena: &Arena) -> Vec<u64> {
    let fd = arena.fd().try_clone_to_owned().expect("a descriptor");
    let bytes = usize::try_from(arena.limit_bytes()).expect("a size");
    let mut contents = vec![0; bytes];
    let read = File::from(fd).read_exact_at(&mut contents, 0);
    read.expect("readable");
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    contents.chunks(8).map(word).collect()
}

/// Compares every word of the arena with the value that the written layout requires.
fn audit(arena: &Arena, table: &Table, model: &Model) {
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

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The addresses and the sizes of the requests of one run.
#[derive(Clone, Copy, Debug)]
struct RequestSpace {
    levels: Levels,
    frames: u64,
    /// The requests lie in `base..base + span`; some extend beyond it.
    base: u64,
    span: u64,
    /// Starts and sizes are multiples of one of these.
    units: &'static [u64],
    /// The largest number of units in a mapping.
    most_units: u64,
    /// One request in this many is a reclaim.
    reclaim: u64,
}

impl RequestSpace {
    fn mapping(&self, random: &mut Random) -> Mapping {
        let unit = self.units[random.below(self.units.len() as u64) as usize];
        let mut first = self.base + random.below(self.span) / unit * unit;
        let units = 1 + random.below(self.most_units.min((self.span / unit).max(1)));
        let mut bytes = unit * if random.one_in(3) { 1 } else { units };
        let mut gpa = match random.below(4) {
            // Aligned like the IOVA, or better.
            0 => first % (1 << 50),
            1 => random.below(1 << 10) * GIB + first % GIB,
            // Aligned to less than the IOVA: this takes many leaves, so the mapping must not be too
            // large.
            2 => {
                bytes = bytes.min(4 * GIB);
                random.below(1 << 20) * MIB2 + first % MIB2
            }
            _ => {
                bytes = bytes.min(4 * MIB2);
                random.below(1 << 36) * PAGE
            }
        };
        if unit > PAGE && random.one_in(4) {
            // A few pages off the boundaries of large leaves.
            let off = PAGE * (1 + random.below(3));
            (first, gpa) = (first + off, gpa + off);
        }
        if random.one_in(64) {
            match random.below(4) {
                0 => first += 1 + random.below(PAGE - 1),
                1 => bytes += 1 + random.below(PAGE - 1),
                2 => gpa += 1 + random.below(PAGE - 1),
                _ => gpa = (1 << 52) - PAGE * random.below(4),
            }
        }
        // Ends at the last address, or beyond it.
        let end = self.levels.last_address().0;
        let last = first.saturating_add(bytes - 1);
        let last = if last > end && !random.one_in(16) {
            end
        } else {
            last
        };
        Mapping {
            range: range(first.min(last), last),
            gpa: Gpa(gpa),
            access: Access {
                read: !random.one_in(4),
                write: !random.one_in(3),
            },
            mmio: random.one_in(8),
        }
    }

    fn op(&self, random: &mut Random) -> Op {
        if random.one_in(self.reclaim) {
            return Op::Reclaim;
        }
        if random.below(5) < 3 {
            return Op::Map(self.mapping(random));
        }
        let nearby = |random: &mut Random| self.base + random.below(self.span);
        let shift = |random: &mut Random| match random.below(8) {
            0 => PAGE as i64,
            1 => -(PAGE as i64),
            2 => random.below(2 * PAGE) as i64 - PAGE as i64,
            _ => 0,
        };
        match random.below(16) {
            0 => Op::Unmap(self.mapping(random).range),
            1 => {
                let (a, b) = (nearby(random), nearby(random));
                Op::Unmap(range(a.min(b), a.max(b)))
            }
            2 if random.one_in(16) => Op::Unmap(range(nearby(random), u64::MAX)),
            2 if random.one_in(16) => Op::Unmap(range(0, nearby(random))),
            2 if random.one_in(32) => Op::Unmap(IovaRange::ALL),
            kind => {
                let from = nearby(random);
                let reach = if kind < 6 { self.span / 16 } else { 1 };
                Op::UnmapLive {
                    from,
                    to: from + random.below(reach.max(1)),
                    move_first: shift(random),
                    move_last: shift(random),
                }
            }
        }
    }

    fn run(&self, requests: u64, seed: u64) -> HashMap<&'static str, u64> {
        let mut random = Random(seed);
        let mut pair = Pair::new(self.frames, self.levels);
        for i in 0..requests {
            let op = self.op(&mut random);
            pair.apply(&op);
            if i % 256 == 0 {
                let first = self.base + random.below(self.span);
                pair.check_listing(range(first, first + random.below(self.span / 64 + 1)));
            }
            if i % 65_536 == 0 && self.frames <= 1024 {
                audit(&pair.arena, &pair.table, &pair.model);
            }
        }
        pair.finish(seed.is_multiple_of(2))
    }
}

const REQUESTS: u64 = 450_000;
const TOP_FOUR: u64 = 1 << 48;
const TOP_FIVE: u64 = 1 << 57;

fn assert_each_occurred(outcomes: &HashMap<&'static str, u64>, which: &[&str]) {
    for outcome in which {
        let count = outcomes.get(outcome).copied().unwrap_or(0);
        assert!(count > 20, "{outcome} came up {count} times: {outcomes:?}");
    }
}

const USUAL: &[&str] = &[
    "mapped",
    "refused overlap",
    "refused alignment",
    "refused range",
    "refused split",
    "unmapped none",
    "unmapped one",
    "unmapped many",
];

#[test]
fn random_pages_in_a_crowded_window() {
    let terrain = RequestSpace {
        levels: Levels::Four,
        frames: 256,
        base: 0x7f_ffe0_0000 - 77 * PAGE,
        span: 300 * PAGE,
        units: &[PAGE],
        most_units: 12,
        reclaim: 8,
    };
    assert_each_occurred(&terrain.run(REQUESTS, 1), USUAL);
}

#[test]
fn random_pages_over_many_tables() {
    let terrain = RequestSpace {
        levels: Levels::Four,
        frames: 4096,
        base: 0,
        span: 64 * GIB,
        units: &[PAGE],
        most_units: 3000,
        reclaim: 2,
    };
    assert_each_occurred(&terrain.run(REQUESTS, 2), USUAL);
}

#[test]
fn random_large_leaves() {
    let terrain = RequestSpace {
        levels: Levels::Four,
        frames: 1024,
        base: 3 * GIB,
        span: 40 * GIB,
        units: &[PAGE, MIB2, MIB2, GIB],
        most_units: 1200,
        reclaim: 4,
    };
    assert_each_occurred(&terrain.run(REQUESTS, 3), USUAL);
}

#[test]
fn random_ranges_at_the_end_of_four_levels() {
    let terrain = RequestSpace {
        levels: Levels::Four,
        frames: 512,
        base: TOP_FOUR - 5 * GIB,
        span: 5 * GIB,
        units: &[PAGE, MIB2, GIB],
        most_units: 600,
        reclaim: 4,
    };
    assert_each_occurred(&terrain.run(REQUESTS, 4), USUAL);
}

#[test]
fn random_ranges_at_the_end_of_five_levels() {
    let terrain = RequestSpace {
        levels: Levels::Five,
        frames: 512,
        base: TOP_FIVE - 3 * GIB,
        span: 3 * GIB,
        units: &[PAGE, MIB2, GIB],
        most_units: 600,
        reclaim: 4,
    };
    assert_each_occurred(&terrain.run(REQUESTS, 5), USUAL);
}

#[test]
fn random_ranges_all_over_five_levels() {
    let terrain = RequestSpace {
        levels: Levels::Five,
        frames: 160,
        base: 0,
        span: TOP_FIVE,
        units: &[PAGE, MIB2, GIB, 512 * GIB],
        most_units: 6,
        reclaim: 4,
    };
    let outcomes = terrain.run(REQUESTS, 6);
    assert_each_occurred(&outcomes, &["mapped", "refused frames", "unmapped many"]);
}

#[test]
fn random_requests_in_a_full_arena() {
    let terrain = RequestSpace {
        levels: Levels::Four,
        frames: 24,
        base: 511 * GIB,
        span: 3 * GIB,
        units: &[PAGE, MIB2],
        most_units: 2000,
        reclaim: 16,
    };
    let outcomes = terrain.run(REQUESTS, 7);
    assert_each_occurred(&outcomes, USUAL);
    assert_each_occurred(&outcomes, &["refused frames"]);
}

/// In arenas of every size from the smallest on, a refused request changes no word.
#[test]
fn refusals_change_nothing_in_arenas_of_every_small_size() {
    for (levels, base) in [(Levels::Four, 0), (Levels::Five, TOP_FIVE - GIB)] {
        for frames in 1..=24 {
            let terrain = RequestSpace {
                levels,
                frames,
                base,
                span: GIB,
                units: &[PAGE, PAGE, MIB2],
                most_units: 1100,
                reclaim: 3,
            };
            let mut random = Random(frames + 99);
            let mut pair = Pair::new(frames, levels);
            let mut before = pair.contents();
            let mut refused = 0;
            for _ in 0..600 {
                let changed_nothing = pair.apply(&terrain.op(&mut random));
                let after = pair.contents();
                if changed_nothing {
                    assert_eq!(after, before);
                    refused += 1;
                }
                before = after;
            }
            assert!(refused > 50, "{refused} refused in {frames} frames");
            pair.finish(frames.is_multiple_of(2));
        }
    }
}

fn any_mapping(levels: Levels) -> impl Strategy<Value = Mapping> {
    let end = levels.last_address().0;
    let anchor = prop_oneof![
        Just(0u64),
        Just(GIB),
        Just(512 * GIB),
        Just(end - GIB + 1),
        Just(end - 4 * MIB2 + 1),
    ];
    let steps = prop_oneof![
        (0..16u64, 1..16u64).prop_map(|(at, len)| (at * PAGE, len * PAGE)),
        (0..4u64, 1..4u64).prop_map(|(at, len)| (at * MIB2, len * MIB2)),
        (508..516u64, 1..1030u64).prop_map(|(at, len)| (at * PAGE, len * PAGE)),
        (0..3u64, 1..3u64).prop_map(|(at, len)| (at * GIB, len * GIB)),
        (0..8 * PAGE, 1..3 * PAGE),
    ];
    let skew = prop_oneof![
        3 => Just(0u64),
        1 => Just(GIB),
        1 => Just(MIB2),
        1 => Just(PAGE),
        1 => Just(1u64 << 51),
    ];
    (anchor, steps, skew, any::<(bool, bool, bool)>()).prop_map(
        move |(anchor, (at, bytes), skew, (read, write, mmio))| {
            let first = (anchor + at).min(end);
            let bytes = if skew == PAGE {
                bytes.min(8 * MIB2)
            } else {
                bytes
            };
            Mapping {
                range: range(first, first + (bytes - 1)),
                gpa: Gpa(first % (1 << 50) + skew),
                access: Access { read, write },
                mmio,
            }
        },
    )
}

fn any_op(levels: Levels) -> impl Strategy<Value = Op> {
    let end = levels.last_address().0;
    let anchor = || prop_oneof![Just(0u64), 0..GIB, Just(512 * GIB), (end - GIB)..end];
    let shift = || {
        prop_oneof![
            4 => Just(0i64),
            1 => Just(1),
            1 => Just(-1),
            1 => Just(PAGE as i64),
            1 => Just(-(MIB2 as i64)),
        ]
    };
    prop_oneof![
        6 => any_mapping(levels).prop_map(Op::Map),
        1 => any_mapping(levels).prop_map(|mapping| Op::Unmap(mapping.range)),
        1 => anchor().prop_map(|first| Op::Unmap(range(first, u64::MAX))),
        3 => (anchor(), anchor(), shift(), shift()).prop_map(|(from, to, move_first, move_last)| {
            Op::UnmapLive { from, to, move_first, move_last }
        }),
        1 => Just(Op::Reclaim),
    ]
}

fn any_run() -> impl Strategy<Value = (Levels, u64, Vec<Op>)> {
    let levels = prop_oneof![Just(Levels::Four), Just(Levels::Five)];
    let frames = prop_oneof![2..16u64, Just(200)];
    (levels, frames).prop_flat_map(|(levels, frames)| {
        let ops = prop::collection::vec(any_op(levels), 1..40);
        (Just(levels), Just(frames), ops)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_table_agrees_with_the_model((levels, frames, ops) in any_run()) {
        compare_with_the_model(levels, frames, &ops);
    }
}

/// Applies `ops` to a table and to the model, and compares the two after each.
fn compare_with_the_model(levels: Levels, frames: u64, ops: &[Op]) {
    let mut pair = Pair::new(frames, levels);
    for op in ops {
        let before = pair.contents();
        if pair.apply(op) {
            assert_eq!(pair.contents(), before);
        }
        pair.check_listing(IovaRange::ALL);
        audit(&pair.arena, &pair.table, &pair.model);
    }
    pair.finish(ops.len().is_multiple_of(2));
}

/// A mapping without rights, as in the counterexamples below.
fn without_rights(range: IovaRange, gpa: u64) -> Op {
    Op::Map(Mapping {
        range,
        gpa: Gpa(gpa),
        access: Access {
            read: false,
            write: false,
        },
        mmio: false,
    })
}

// Counterexamples that proptest found. They stand here by their values. A regression file holds
// seeds, and a seed gives another value as soon as `any_run` changes.

#[test]
fn regression_unmap_inside_a_mapping_of_one_gib() {
    let ops = [
        without_rights(range(0, GIB - 1), 0),
        Op::UnmapLive {
            from: 0,
            to: 0,
            move_first: 1,
            move_last: 1,
        },
    ];
    compare_with_the_model(Levels::Four, 3, &ops);
}

#[test]
fn regression_unmaps_beside_and_over_a_lone_page() {
    let page = 0xffff_ff80_0000;
    let ops = [
        without_rights(range(page, page + PAGE - 1), page),
        Op::Unmap(range(page + PAGE, page + 2 * PAGE - 1)),
        Op::Unmap(IovaRange::ALL),
        Op::Unmap(range(0xffff_ff80_4646, 0xffff_ff80_7121)),
    ];
    compare_with_the_model(Levels::Four, 5, &ops);
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

#[test]
fn the_memfd_is_sealed_and_costs_nothing_while_idle() {
    let mut arena = Arena::new(64 * GIB).expect("an arena");
    let table = Table::new(&mut arena, Levels::Four).expect("a root");
    assert_eq!(arena.limit_bytes(), 64 * GIB);
    let file = File::from(arena.fd().try_clone_to_owned().expect("a descriptor"));
    assert!(file.metadata().expect("readable").blocks() * 512 <= 2 * PAGE);
    assert!(file.set_len(64 * GIB - 1).is_err());
    assert!(file.set_len(64 * GIB + 1).is_err());
    assert_eq!(table.destroy(&mut arena), Unmapped::default());
}

/// Whether `fd` can be mapped with these rights; `then` are the rights that the mapping is changed
/// to.
#[expect(unsafe_code, reason = "tries what a hostile reader would")]
fn try_map(fd: &OwnedFd, protection: libc::c_int, then: libc::c_int) -> bool {
    // SAFETY:
    // - the address argument is null, so no existing mapping is replaced
    let at = unsafe {
        let fd = fd.as_raw_fd();
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return false;
    }
    // SAFETY:
    // - the page was just mapped, and there is no reference into it
    let allowed = unsafe { libc::mprotect(at, 4096, then) == 0 };
    // SAFETY:
    // - this function mapped the page and does not use it any more
    unsafe { libc::munmap(at, 4096) };
    allowed
}

#[test]
fn a_shared_arena_can_be_written_to_by_its_owner_only() {
    let (mut arena, mut table) = new_table(64, Levels::Four);
    let before = arena.fd().try_clone_to_owned().expect("a descriptor");
    assert!(try_map(&before, libc::PROT_WRITE, libc::PROT_WRITE));
    let shared = arena.share().expect("sealed");
    let again = arena.share().expect("sealed already");
    let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
    let reopened = File::options().read(true).write(true).open(path);
    let mut all = vec![before, shared, again];
    all.extend(reopened.map(OwnedFd::from));
    assert_eq!(all.len(), 4, "the file itself could be opened again");
    for fd in all {
        assert!(!try_map(&fd, libc::PROT_WRITE, libc::PROT_WRITE));
        let both = libc::PROT_READ | libc::PROT_WRITE;
        assert!(!try_map(&fd, both, both));
        assert!(!try_map(&fd, libc::PROT_READ, both), "made writable later");
        assert!(try_map(&fd, libc::PROT_READ, libc::PROT_READ));
        let file = File::from(fd);
        assert!(file.write_all_at(&[0; 8], 0).is_err());
        assert!(file.set_len(0).is_err());
    }
    // The owner can still change the table, and can still return memory to the system.
    let reader = ReadOnlyArena::map(arena.fd()).expect("an arena");
    for _ in 0..3 {
        let one = mapping(0, PAGE, PAGE, Access::READ);
        map(&mut table, &mut arena, &one).expect("free");
        assert!(reader::walk(reader.view(), table.root(), Levels::Four, Iova(0)).is_some());
        unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
        assert!(reader::walk(reader.view(), table.root(), Levels::Four, Iova(0)).is_none());
        arena.reclaim();
    }
}

#[test]
fn memory_is_returned_when_many_frames_are_freed() {
    let (mut arena, mut table) = new_table(16 << 10, Levels::Four);
    let file = File::from(arena.fd().try_clone_to_owned().expect("a descriptor"));
    let in_use = || file.metadata().expect("readable").blocks() * 512;
    let large = mapping(0, 16 * GIB, PAGE, Access::READ_WRITE);
    for _ in 0..3 {
        map(&mut table, &mut arena, &large).expect("free");
        assert!(in_use() > 8192 * FRAME_BYTES);
        unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
        arena.reclaim();
        assert!(in_use() < 1024 * FRAME_BYTES, "{} in use", in_use());
    }
    // Frames that are freed one by one are returned as well; the frames between them stay.
    let pages = || (0..8 * GIB).step_by(2 << 20);
    let page = |first| mapping(first, PAGE, first + PAGE, Access::READ);
    let stays = |first: &u64| first / MIB2 % 37 == 5;
    for first in pages() {
        map(&mut table, &mut arena, &page(first)).expect("free");
    }
    assert!(in_use() > 4096 * FRAME_BYTES);
    for first in pages().filter(|first| !stays(first)) {
        unmap(&mut table, &mut arena, range(first, first + PAGE - 1)).expect("whole");
        arena.reclaim();
    }
    assert!(in_use() < 1300 * FRAME_BYTES, "{} in use", in_use());
    let live = table.mappings(&arena, Iova(0));
    assert!(live.eq(pages().filter(stays).map(page)));
    unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
    arena.reclaim();
    assert_eq!(arena.frames_used(), 2);
}

#[expect(
    unsafe_code,
    reason = "memfd_create has no safe wrapper among our dependencies"
)]
fn memfd() -> File {
    // SAFETY: the name is a string with a final zero that outlives the call.
    let fd = unsafe { libc::memfd_create(c"not-an-arena".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a memfd");
    // SAFETY: the descriptor was just made and has no other owner.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[test]
fn a_reader_refuses_files_that_are_no_arena() {
    let (arena, _table) = new_table(4, Levels::Four);
    // These files are right but for their seals: files on disk have none, and the memfd has others.
    for file in [tempfile::tempfile().expect("a file"), memfd()] {
        let bytes = raw_words(&arena).into_iter().flat_map(u64::to_le_bytes);
        let written = file.write_all_at(&bytes.collect::<Vec<u8>>(), 0);
        written.expect("writable");
        let refused = ReadOnlyArena::map(file.as_fd());
        assert!(matches!(refused, Err(ArenaError::NotAnArena(_))));
    }

    let copy = File::from(arena.fd().try_clone_to_owned().expect("a descriptor"));
    for (word, value) in [(0, 1u64), (1, 2), (3, 5)] {
        let mut good = [0; 8];
        copy.read_exact_at(&mut good, word * 8).expect("readable");
        let written = copy.write_all_at(&value.to_le_bytes(), word * 8);
        written.expect("writable");
        let refused = ReadOnlyArena::map(arena.fd());
        assert!(matches!(refused, Err(ArenaError::NotAnArena(_))), "{word}");
        copy.write_all_at(&good, word * 8).expect("writable");
    }
    ReadOnlyArena::map(arena.fd()).expect("an arena");
}

#[test]
fn a_reader_survives_any_contents() {
    let mut random = Random(0xfeed);
    for _ in 0..300 {
        let words: Vec<AtomicU64> = (0..8 * FRAME_WORDS)
            .map(|_| {
                let near = random.below(10) * FRAME_BYTES;
                AtomicU64::new(match random.below(4) {
                    0 => random.next() << 8 | random.below(256),
                    // Mostly table entries, so that walks form loops and leave the arena.
                    _ => near | 0x27 | random.below(513) << 52,
                })
            })
            .collect();
        let view = View::new(&words);
        for levels in [Levels::Four, Levels::Five] {
            for _ in 0..500 {
                let root = TableOffset(random.below(12) * FRAME_BYTES + random.below(2) * 8);
                let iova = Iova(random.next() << random.below(20));
                if let Some(found) = reader::walk(view, root, levels, iova) {
                    assert!(found.gpa.0 < 1 << 52 && found.contiguous_last >= iova);
                }
            }
        }
    }
    let root = TableOffset(u64::MAX);
    assert_eq!(
        reader::walk(View::new(&[]), root, Levels::Four, Iova(0)),
        None
    );
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
