//! Removing mappings, and the tables that become empty.

use super::arena::Arena;
use super::layout::{
    Entry, FRAME_BYTES, FRAME_WORDS, TableOffset, entry_bytes, index, is_whole_entry,
};

/// Mappings, bytes and frames of a table, or of the part removed from it.
//
// Not fields of `Table` beside its `commits`, and `frames` separates the two fields that every MAP
// adds to. The compiler updates neighbouring fields as a pair, and loading the pair stalls if one
// of them was stored just before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) bytes: u64,
    pub(super) frames: u64,
    pub(super) mappings: u64,
}

/// Removes leaves, and the tables that become empty, and counts both.
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

    /// Clears `first..=last` of `table`, at `level`. The range must split no leaf. Returns how many
    /// entries of `table` became free.
    pub(super) fn part(&mut self, table: TableOffset, level: u32, first: u64, last: u64) -> u64 {
        let encoding = self.arena.encoding();
        let mut removed = 0;
        let mut at = first;
        loop {
            let until = last.min(at | (entry_bytes(level) - 1));
            let slot = table.slot(index(at, level));
            let entry = self.arena.load(slot);
            if entry.is_leaf(encoding.format, level) {
                self.arena.store(slot, Entry::FREE);
                self.count(entry, level);
                removed += 1;
            } else if entry.is_table(encoding.format, level) {
                let below = entry.next_table(encoding);
                if is_whole_entry(level, at, until) {
                    self.arena.store(slot, Entry::FREE);
                    self.whole(below, level - 1, entry.used(encoding.format));
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

    /// Clears all of `table`, at `level`. At most `used` entries may be in use.
    pub(super) fn whole(&mut self, table: TableOffset, level: u32, used: u64) {
        let encoding = self.arena.encoding();
        let format = encoding.format;
        if level == 1 {
            let (mut leaves, mut mappings) = (0, 0);
            self.arena.clear(table, used, |leaf| {
                leaves += 1;
                mappings += u64::from(leaf.is_last(format));
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
            if entry.is_table(format, level) {
                let below = entry.next_table(encoding);
                self.whole(below, level - 1, entry.used(format));
                self.retire(below);
            } else {
                self.count(entry, level);
            }
        }
    }

    /// Updates `entry`, in `slot`, after its table lost `removed` entries, and retires the table if it
    /// is empty. Returns 1 if the entry became free, and 0 otherwise.
    pub(super) fn shrink_entry(&mut self, slot: usize, entry: Entry, removed: u64) -> u64 {
        if removed == 0 {
            return 0;
        }
        let encoding = self.arena.encoding();
        let used = entry.used(encoding.format);
        if removed < used {
            let less = entry.with_used(encoding.format, used - removed);
            self.arena.store(slot, less);
            return 0;
        }
        self.arena.store(slot, Entry::FREE);
        self.retire(entry.next_table(encoding));
        1
    }

    fn retire(&mut self, table: TableOffset) {
        self.arena.retire(table);
        self.totals.frames += 1;
    }

    fn count(&mut self, leaf: Entry, level: u32) {
        self.totals.bytes += entry_bytes(level);
        self.totals.mappings += u64::from(leaf.is_last(self.arena.format()));
    }
}
