//! Making a mapping: counting the frames it needs, and storing its leaves.

use super::arena::Arena;
use super::layout::{Entry, FRAME_WORDS, TableOffset, entry_bytes, index, is_whole_entry};

/// The range holds a leaf already: at this address, or after it within the entry that covers the
/// address.
pub(super) struct Occupied(pub(super) u64);

/// Counts the frames that a mapping needs.
pub(super) struct FrameCount<'a> {
    pub(super) arena: &'a Arena,
    pub(super) leaf_level: u32,
}

impl FrameCount<'_> {
    /// The frames to add below `table`, at `level`, to fill `first..=last` with leaves.
    ///
    /// Only the first and the last entry can be covered in part, so the recursion descends at most
    /// twice on each level.
    pub(super) fn frames_for(
        &self,
        table: TableOffset,
        level: u32,
        first: u64,
        last: u64,
    ) -> Result<u64, Occupied> {
        let encoding = self.arena.encoding();
        let mut needed = 0;
        let mut at = first;
        loop {
            let until = last.min(at | (entry_bytes(level) - 1));
            let entry = self.arena.load(table.slot(index(at, level)));
            if entry.is_free() {
                needed += self.frames_below_free(level, at, until);
            } else if entry.is_table(encoding.format, level) && !is_whole_entry(level, at, until) {
                needed += self.frames_for(entry.next_table(encoding), level - 1, at, until)?;
            } else {
                return Err(Occupied(at));
            }
            if until == last {
                return Ok(needed);
            }
            at = until + 1;
        }
    }

    /// The frames to add below a free entry at `level` to fill `first..=last` with leaves.
    fn frames_below_free(&self, level: u32, first: u64, last: u64) -> u64 {
        if is_whole_entry(level, first, last) {
            return self.frames_below_whole(level);
        }
        let below = level - 1;
        let (low, high) = (index(first, below), index(last, below));
        if low == high {
            return 1 + self.frames_below_free(below, first, last);
        }
        let mask = entry_bytes(below) - 1;
        1 + self.frames_below_free(below, first, first | mask)
            + self.frames_below_free(below, last & !mask, last)
            + (high - low - 1) * self.frames_below_whole(below)
    }

    /// The frames to add below a free entry at `level` to fill the whole entry with leaves.
    fn frames_below_whole(&self, level: u32) -> u64 {
        (self.leaf_level..level).fold(0, |below, _| 1 + below * FRAME_WORDS as u64)
    }
}

/// Stores the leaves of a mapping. `leaf` makes the leaf for a level and an address.
pub(super) struct Fill<'a, F> {
    pub(super) arena: &'a mut Arena,
    pub(super) leaf: F,
    pub(super) leaf_level: u32,
}

impl<F: Fn(u32, u64) -> Entry> Fill<'_, F> {
    /// Fills `first..=last` of `table`, at `level`. Returns how many of its entries came into use.
    pub(super) fn table(&mut self, table: TableOffset, level: u32, first: u64, last: u64) -> u64 {
        let mut added = 0;
        let mut at = first;
        loop {
            let until = last.min(at | (entry_bytes(level) - 1));
            let slot = table.slot(index(at, level));
            if level <= self.leaf_level && is_whole_entry(level, at, until) {
                let leaf = (self.leaf)(level, at);
                self.arena.store(slot, leaf);
                added += 1;
            } else {
                added += self.part_of_entry(slot, level, at, until);
            }
            if until == last {
                return added;
            }
            at = until + 1;
        }
    }

    /// Fills a part of the entry in `slot`. Returns 1 if the entry was free, and 0 otherwise.
    fn part_of_entry(&mut self, slot: usize, level: u32, first: u64, last: u64) -> u64 {
        let encoding = self.arena.encoding();
        let entry = self.arena.load(slot);
        if !entry.is_free() {
            let used = self.table(entry.next_table(encoding), level - 1, first, last);
            let used = entry.used(encoding.format) + used;
            self.arena
                .store(slot, entry.with_used(encoding.format, used));
            return 0;
        }
        let Some(table) = self.arena.allocate() else {
            unreachable!("the plan counted every frame");
        };
        // Store the pointer last, so that a reader that follows it finds the new table filled.
        let used = self.table(table, level - 1, first, last);
        self.arena.store(slot, Entry::table(encoding, table, used));
        1
    }
}
