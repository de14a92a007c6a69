//! Removing mappings, and the tables that get empty by it.

use super::arena::Arena;
use super::layout::{
    Entry, FRAME_BYTES, FRAME_WORDS, TableOffset, entry_bytes, index, is_whole_entry,
};

// Apart from `commits`, and the two that every MAP adds to apart from each other: neighbours are added
// to as a pair, which is slower where one of them was stored just before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) bytes: u64,
    pub(super) frames: u64,
    pub(super) mappings: u64,
}

/// Taking leaves away, and the tables that get empty by it.
pub(super) struct Clear<'a> {
    pub(super) arena: &'a mut Arena,
    pub(super) totals: Counters,
}

impl<'a> Clear<'a> {
    pub(super) fn new(arena: &'a mut Arena) -> Self {
        Self {
            arena,
            totals: Counters::default(),
        }
    }

    /// Clears `first..=last` of `table`, at `level`, where it cuts no leaf, and says how many
    /// entries are free now that were not.
    pub(super) fn part(&mut self, table: TableOffset, level: u32, first: u64, last: u64) -> u64 {
        let mut removed = 0;
        let mut at = first;
        loop {
            let until = last.min(at | (entry_bytes(level) - 1));
            let slot = table.slot(index(at, level));
            let entry = self.arena.load(slot);
            if entry.is_leaf(level) {
                self.arena.store(slot, Entry::FREE);
                self.count(entry, level);
                removed += 1;
            } else if entry.is_table(level) {
                let below = entry.next_table();
                if is_whole_entry(level, at, until) {
                    self.arena.store(slot, Entry::FREE);
                    self.whole(below, level - 1, entry.used());
                    self.retire(below);
                    removed += 1;
                } else {
                    let less = self.part(below, level - 1, at, until);
                    removed += self.shrink_entry(slot, entry, less);
                }
            }
            if until == last {
                return removed;
            }
            at = until + 1;
        }
    }

    /// Clears all of `table`, at `level`, which has at most `used` entries that are not free.
    pub(super) fn whole(&mut self, table: TableOffset, level: u32, used: u64) {
        if level == 1 {
            let (mut leaves, mut mappings) = (0, 0);
            self.arena.clear(table, used, |leaf| {
                leaves += 1;
                mappings += u64::from(leaf.has(Entry::LAST));
            });
            self.totals.bytes += leaves * FRAME_BYTES;
            self.totals.mappings += mappings;
            return;
        }
        let mut left = used;
        for i in 0..FRAME_WORDS as u64 {
            if left == 0 {
                return;
            }
            let slot = table.slot(i);
            let entry = self.arena.load(slot);
            if entry.is_free() {
                continue;
            }
            left -= 1;
            self.arena.store(slot, Entry::FREE);
            if entry.is_table(level) {
                self.whole(entry.next_table(), level - 1, entry.used());
                self.retire(entry.next_table());
            } else {
                self.count(entry, level);
            }
        }
    }

    /// Notes that the table behind `entry` lost `removed` entries, and says whether the entry
    /// itself got free by that: 1, or 0.
    pub(super) fn shrink_entry(&mut self, slot: usize, entry: Entry, removed: u64) -> u64 {
        if removed == 0 {
            return 0;
        }
        if removed < entry.used() {
            self.arena
                .store(slot, entry.with_used(entry.used() - removed));
            return 0;
        }
        self.arena.store(slot, Entry::FREE);
        self.retire(entry.next_table());
        1
    }

    fn retire(&mut self, table: TableOffset) {
        self.arena.retire(table);
        self.totals.frames += 1;
    }

    fn count(&mut self, leaf: Entry, level: u32) {
        self.totals.bytes += entry_bytes(level);
        self.totals.mappings += u64::from(leaf.has(Entry::LAST));
    }
}
