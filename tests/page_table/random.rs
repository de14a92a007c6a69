//! Long runs of random requests.

use std::collections::HashMap;

use vhost_device_iommu::address::{Access, Gpa, IovaRange};
use vhost_device_iommu::page_table::{Encoding, Levels, Mapping};

use crate::audit::audit;
use crate::pair::{Op, Pair};
use crate::{GIB, MIB2, PAGE, encodings, range};

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The addresses and the sizes of the requests of one run.
#[derive(Clone, Copy, Debug)]
pub struct RequestSpace {
    pub levels: Levels,
    pub frames: u64,
    /// The requests lie in `base..base + span`; some extend beyond it.
    pub base: u64,
    pub span: u64,
    /// Starts and sizes are multiples of one of these.
    pub units: &'static [u64],
    /// The largest number of units in a mapping.
    pub most_units: u64,
    /// One request in this many is a reclaim.
    pub reclaim: u64,
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
                // Around the end of a format's addresses.
                _ => gpa = (1 << (48 + 4 * random.below(2))) - PAGE * random.below(4),
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

    pub fn op(&self, random: &mut Random) -> Op {
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

    /// Makes `requests` in tables of all encodings together. Returns how many had each outcome.
    fn run(&self, requests: u64, seed: u64) -> HashMap<&'static str, u64> {
        let mut outcomes: HashMap<&'static str, u64> = HashMap::new();
        // Some requests have the same address as guest-physical address: these lead to the arena.
        let encodings = encodings(self.levels, self.base + self.span / 2);
        let each = requests / encodings.len() as u64;
        for (more, encoding) in (0..).zip(encodings) {
            let part = self.run_in(encoding, each, seed + 100 * more);
            let is_refused = part.contains_key("refused tables");
            assert_eq!(is_refused, encoding.base != 0, "{encoding:?}: {part:?}");
            for (outcome, count) in part {
                *outcomes.entry(outcome).or_default() += count;
            }
        }
        outcomes
    }

    fn run_in(&self, encoding: Encoding, requests: u64, seed: u64) -> HashMap<&'static str, u64> {
        let mut random = Random(seed);
        let mut pair = Pair::new(self.frames, self.levels, encoding);
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
    let base = TOP_FIVE - GIB;
    let all = |levels, base| {
        encodings(levels, base + GIB / 2)
            .into_iter()
            .map(move |e| (levels, base, e))
    };
    for (levels, base, encoding) in all(Levels::Four, 0).chain(all(Levels::Five, base)) {
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
            let mut pair = Pair::new(frames, levels, encoding);
            let mut before = pair.contents();
            let mut refused = 0;
            for _ in 0..300 {
                let changed_nothing = pair.apply(&terrain.op(&mut random));
                let after = pair.contents();
                if changed_nothing {
                    assert_eq!(after, before);
                    refused += 1;
                }
                before = after;
            }
            assert!(refused > 25, "{refused} refused in {frames} frames");
            pair.finish(frames.is_multiple_of(2));
        }
    }
}
