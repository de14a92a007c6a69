//! A table and its model, which get the same requests.

use std::collections::HashMap;

use vhost_device_iommu::address::{Iova, IovaRange};
use vhost_device_iommu::page_table::layout::FRAME_WORDS;
use vhost_device_iommu::page_table::{
    Arena, Encoding, Levels, MapRefusal, Mapping, Table, WouldSplit,
};

use crate::audit::{audit, raw_words};
use crate::model::Model;
use crate::{PAGE, encoded_table, range, unmap};

#[derive(Clone, Debug)]
pub enum Op {
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
pub struct Pair {
    pub arena: Arena,
    pub table: Table,
    pub model: Model,
    outcomes: HashMap<&'static str, u64>,
}

impl Pair {
    pub fn new(frames: u64, levels: Levels, encoding: Encoding) -> Self {
        let (arena, table) = encoded_table(frames, levels, encoding);
        let model = Model::new(encoding, levels, arena.frames_total());
        Self {
            arena,
            table,
            model,
            outcomes: HashMap::new(),
        }
    }

    pub fn apply(&mut self, op: &Op) -> bool {
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

    pub fn map(&mut self, wanted: &Mapping) -> &'static str {
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
                    MapRefusal::TargetsTables => "refused tables",
                    _ => "refused alignment",
                }
            }
            (expected, plan) => panic!("{wanted:?}: {plan:?}, expected {expected:?}"),
        }
    }

    pub fn unmap(&mut self, wanted: IovaRange) -> &'static str {
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

    pub fn check_counters(&self) {
        let (table, model) = (&self.table, &self.model);
        assert_eq!(table.mapping_count(), model.mappings.len() as u64);
        assert_eq!(table.mapped_bytes(), model.bytes);
        assert_eq!(table.frames(), model.tables.len() as u64 + 1);
        assert_eq!(self.arena.frames_free(), model.free());
        assert_eq!(self.arena.frames_retired(), model.retired);
        let used = 1 + table.frames() + model.retired;
        assert_eq!(self.arena.frames_used(), used);
    }

    pub fn check_translations(&self, touched: IovaRange) {
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

    pub fn check_listing(&self, part: IovaRange) {
        let listed = self.table.mappings_in(&self.arena, part);
        assert!(listed.eq(self.model.overlapping(part).copied()), "{part}");
        let rest = range(part.first().0, u64::MAX);
        let listed = self.table.mappings(&self.arena, part.first());
        assert!(listed.eq(self.model.overlapping(rest).copied()), "{part}");
    }

    pub fn contents(&self) -> Vec<u64> {
        raw_words(&self.arena)
    }

    /// Unmaps everything and checks that the arena is as it was at first.
    pub fn finish(mut self, with_destroy: bool) -> HashMap<&'static str, u64> {
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
