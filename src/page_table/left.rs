//! The tables that an earlier process has left: read by a process that trusts nothing in them.
//!
//! The earlier process may have died between any two stores. Its last request may be half done: the caller names the
//! ranges of such requests, and they are left out. Everything else must be whole, or is refused as a whole.

use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use super::error::ArenaError;
use super::layout::{
    Encoding, Entry, FRAME_BYTES, FRAME_WORDS, Format, Levels, TOP_LEAF_LEVEL, TableOffset,
    entry_bytes, read_header,
};
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};

/// A table of an earlier process is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TornTable {
    /// An entry or a root points out of the arena, or to a frame that another entry points to.
    #[error("the table at {0:#x} is outside of the arena, or has two places in it")]
    Misplaced(u64),
    /// An entry is neither free nor a leaf nor a pointer.
    #[error("the entry for {0} is none of this version")]
    UnknownEntry(Iova),
    /// The leaves of a mapping are not side by side, or one is missing.
    #[error("the mapping at {0} is not whole")]
    BrokenMapping(Iova),
}

/// The arena that an earlier process has left.
#[derive(Debug)]
pub struct LeftArena<'a> {
    words: &'a [AtomicU64],
    encoding: Encoding,
    frames: u64,
    /// One bit for each frame: it has been read.
    seen: Vec<u64>,
}

impl<'a> LeftArena<'a> {
    /// The arena in `words`, which begin with its header.
    ///
    /// # Errors
    /// The header is not that of an arena of a known version and format, and of this size.
    pub fn new(words: &'a [AtomicU64]) -> Result<Self, ArenaError> {
        let encoding = read_header(words, size_of_val(words))?;
        let frames = (words.len() / FRAME_WORDS) as u64;
        let seen = vec![0; words.len() / FRAME_WORDS / 64 + 1];
        Ok(Self {
            words,
            encoding,
            frames,
            seen,
        })
    }

    /// Calls `each` for every mapping of the table of `levels` at `root`, in the order of addresses, without those in
    /// `left_out`. Reads each frame of the arena at most once, over all calls.
    ///
    /// # Errors
    /// The table is not whole, see [`TornTable`], or the first error of `each`.
    pub fn mappings<E: From<TornTable>>(
        &mut self,
        root: TableOffset,
        levels: Levels,
        left_out: &[IovaRange],
        each: impl FnMut(&Mapping) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut walk = LeftWalk {
            left: merged(left_out),
            each,
            open: None,
        };
        walk.table(self, root, levels.count(), 0)?;
        walk.close(Iova(0))?;
        Ok(())
    }

    /// Marks a frame as read.
    fn enter(&mut self, table: TableOffset) -> Result<usize, TornTable> {
        let misplaced = TornTable::Misplaced(table.0);
        let frame = table.0 / FRAME_BYTES;
        if !table.0.is_multiple_of(FRAME_BYTES) || frame == 0 || frame >= self.frames {
            return Err(misplaced);
        }
        let frame = usize::try_from(frame).map_err(|_| misplaced)?;
        let word = self.seen.get_mut(frame / 64).ok_or(misplaced)?;
        let bit = 1 << (frame % 64);
        if *word & bit != 0 {
            return Err(misplaced);
        }
        *word |= bit;
        Ok(frame * FRAME_WORDS)
    }
}

/// The ranges in ascending order; those that overlap are one.
fn merged(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<IovaRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if last.last().0.saturating_add(1) >= range.first().0 => {
                let end = last.last().max(range.last());
                *last = IovaRange::new(last.first(), end).unwrap_or(*last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// A mapping whose last leaf has not come yet.
struct OpenMapping {
    first: u64,
    /// The first address after the leaves so far.
    next: u64,
    gpa: Gpa,
    access: Access,
    mmio: bool,
}

struct LeftWalk<F> {
    left: Vec<IovaRange>,
    each: F,
    open: Option<OpenMapping>,
}

impl<F> LeftWalk<F> {
    /// Reads a table at `level`, whose first address is `base`. The recursion is as deep as the table has levels.
    fn table<E: From<TornTable>>(
        &mut self,
        arena: &mut LeftArena<'_>,
        table: TableOffset,
        level: u32,
        base: u64,
    ) -> Result<(), E>
    where
        F: FnMut(&Mapping) -> Result<(), E>,
    {
        let start = arena.enter(table)?;
        let encoding = arena.encoding;
        let words = arena.words.get(start..start + FRAME_WORDS).unwrap_or(&[]);
        for (index, word) in (0u64..).zip(words) {
            let entry = Entry::from_bits(word.load(Ordering::Acquire));
            if entry.is_free() {
                continue;
            }
            let first = base | (index * entry_bytes(level));
            if entry.is_table(encoding.format, level) {
                let below = entry.next_table(encoding);
                if Entry::table(encoding, below, entry.used(encoding.format)) != entry {
                    return Err(TornTable::UnknownEntry(Iova(first)).into());
                }
                self.table(arena, below, level - 1, first)?;
            } else if entry.is_leaf(encoding.format, level) && level <= TOP_LEAF_LEVEL {
                self.leaf(encoding.format, entry, level, first)?;
            } else {
                return Err(TornTable::UnknownEntry(Iova(first)).into());
            }
        }
        Ok(())
    }

    fn leaf<E: From<TornTable>>(
        &mut self,
        format: Format,
        entry: Entry,
        level: u32,
        first: u64,
    ) -> Result<(), E>
    where
        F: FnMut(&Mapping) -> Result<(), E>,
    {
        let last = first | (entry_bytes(level) - 1);
        let broken = TornTable::BrokenMapping(Iova(first));
        if self.is_left_out(first, last).map_err(|()| broken)? {
            // A range that is left out splits no mapping.
            return self.close(Iova(first)).map_err(E::from);
        }
        let (gpa, access, mmio) = (entry.gpa(level), entry.access(format), entry.mmio(format));
        let marks = entry.bits() & (format.first() | format.last());
        if Entry::leaf(format, level, gpa.0, access, mmio).with(marks) != entry {
            return Err(TornTable::UnknownEntry(Iova(first)).into());
        }
        if entry.is_first(format) {
            self.close(Iova(first))?;
            self.open = Some(OpenMapping {
                first,
                next: last + 1,
                gpa,
                access,
                mmio,
            });
        } else {
            let Some(open) = &mut self.open else {
                return Err(broken.into());
            };
            let follows = open.next == first
                && open.gpa.checked_add(first - open.first) == Some(gpa)
                && (open.access, open.mmio) == (access, mmio);
            if !follows {
                return Err(broken.into());
            }
            open.next = last + 1;
        }
        if entry.is_last(format)
            && let Some(open) = self.open.take()
        {
            let range = IovaRange::new(Iova(open.first), Iova(last)).ok_or(broken)?;
            (self.each)(&Mapping {
                range,
                gpa: open.gpa,
                access,
                mmio,
            })?;
        }
        Ok(())
    }

    /// No mapping may be open here.
    fn close(&self, at: Iova) -> Result<(), TornTable> {
        match &self.open {
            Some(open) => Err(TornTable::BrokenMapping(Iova(open.first.max(at.0)))),
            None => Ok(()),
        }
    }

    /// Whether a leaf is in a range that is left out. `Err` if only a part of it is.
    fn is_left_out(&self, first: u64, last: u64) -> Result<bool, ()> {
        let after = self.left.partition_point(|range| range.last().0 < first);
        match self.left.get(after) {
            Some(range) if range.first().0 > last => Ok(false),
            Some(range) if range.first().0 <= first && last <= range.last().0 => Ok(true),
            Some(_) => Err(()),
            None => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_table::{Arena, Table};

    const PAGE: u64 = FRAME_BYTES;

    fn range(first: u64, pages: u64) -> IovaRange {
        IovaRange::from_len(Iova(first * PAGE), pages * PAGE).expect("a range")
    }

    fn mapping(first: u64, pages: u64) -> Mapping {
        Mapping {
            range: range(first, pages),
            gpa: Gpa(first * PAGE),
            access: Access::READ,
            mmio: false,
        }
    }

    fn filled(mappings: &[Mapping]) -> (Arena, Table) {
        let mut arena = Arena::new(1 << 20).expect("an arena");
        let mut table = Table::new(&mut arena, Levels::Four).expect("a frame");
        for mapping in mappings {
            let plan = table.plan_map(&arena, mapping).expect("planned");
            table.commit_map(&mut arena, plan);
        }
        (arena, table)
    }

    fn read(
        arena: &Arena,
        root: TableOffset,
        left_out: &[IovaRange],
    ) -> Result<Vec<Mapping>, TornTable> {
        let mut left = LeftArena::new(arena.memory().words()).expect("an arena");
        let mut found = Vec::new();
        left.mappings(root, Levels::Four, left_out, |mapping| {
            found.push(*mapping);
            Ok::<_, TornTable>(())
        })?;
        Ok(found)
    }

    #[test]
    fn whole_mappings_are_found_without_those_that_are_left_out() {
        let all = [
            mapping(1, 1),
            mapping(2, 3),
            mapping(510, 1030),
            mapping(1 << 27, 2),
        ];
        let (arena, table) = filled(&all);
        assert_eq!(read(&arena, table.root(), &[]).expect("whole"), all);
        // The ranges may overlap, and cover holes.
        let left_out = [range(400, 2000), range(300, 400), range(1, 1)];
        let rest = read(&arena, table.root(), &left_out).expect("whole");
        assert_eq!(rest, [all[1], all[3]]);
        let split = read(&arena, table.root(), &[range(3, 1)]);
        assert_eq!(split, Err(TornTable::BrokenMapping(Iova(3 * PAGE))));
    }

    #[test]
    fn a_mapping_without_one_of_its_leaves_is_refused_unless_it_is_left_out() {
        for missing in 4..8 {
            let (mut arena, table) = filled(&[mapping(1, 1), mapping(4, 4)]);
            let leaf = range(missing, 1);
            let format = arena.format();
            // The same leaves as single mappings tell where each leaf is.
            let words = arena.memory().words().iter();
            let place = words.enumerate().find(|(_, word)| {
                let entry = Entry::from_bits(word.load(Ordering::Relaxed));
                entry.is_leaf(format, 1)
                    && !entry.access(format).write
                    && entry.gpa(1).0 == missing * PAGE
            });
            let (place, _) = place.expect("a leaf");
            arena.store(place, Entry::FREE);
            assert!(read(&arena, table.root(), &[]).is_err(), "{leaf}");
            let rest = read(&arena, table.root(), &[range(4, 4)]).expect("explained");
            assert_eq!(rest, [mapping(1, 1)]);
        }
    }

    #[test]
    fn a_frame_has_one_place() {
        let (mut arena, table) = filled(&[mapping(1, 1)]);
        let pointer = arena.load(table.root().slot(0));
        arena.store(table.root().slot(1), pointer);
        let refused = read(&arena, table.root(), &[]).expect_err("two places");
        assert!(matches!(refused, TornTable::Misplaced(_)), "{refused}");
        // A table that leads to itself.
        let itself = Entry::table(arena.encoding(), table.root(), 1);
        arena.store(table.root().slot(1), itself);
        let refused = read(&arena, table.root(), &[]).expect_err("a loop");
        assert_eq!(refused, TornTable::Misplaced(table.root().0));
        for offset in [0, arena.limit_bytes(), u64::MAX - 4095] {
            let refused = read(&arena, TableOffset(offset), &[]);
            assert_eq!(refused, Err(TornTable::Misplaced(offset)));
        }
    }
}
