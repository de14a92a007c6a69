//! The one writer of a table, which plans changes and commits them.
//!
//! A plan decides every refusal and changes nothing. A commit cannot fail. No other change may be
//! committed to the same table between a plan and its commit.

use super::arena::Arena;
use super::clear::{Clear, Counters};
use super::error::{MapRefusal, OutOfFrames, TableRefusal, WouldSplit};
use super::fill::{Fill, FrameCount, Occupied};
use super::layout::{
    Entry, FRAME_BYTES, FRAME_WORDS, Levels, TableOffset, entry_bytes, index, is_whole_entry,
    largest_leaf,
};
use super::reader::{Leaf, Leaves, Mappings, Translation, find_leaf_below, walk};
use super::recent::{RecentTables, TableRef};
use super::table_reader::TableReader;
use crate::address::{Iova, IovaRange, Mapping};

/// The mappings that an UNMAP removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Their number.
    pub mappings: u64,
    /// The bytes they covered.
    pub bytes: u64,
}

/// A planned MAP, which will succeed.
#[derive(Clone, Debug)]
#[must_use = "nothing is mapped before the plan is committed"]
pub struct MapPlan<'a> {
    mapping: &'a Mapping,
    frames: u64,
    table: TableRef,
    /// The leaf and its slot, if the mapping is a single leaf of `table`.
    leaf: Option<(usize, Entry)>,
    generation: Generation,
}

impl MapPlan<'_> {
    /// Frames the commit will take from the arena.
    pub fn frames_needed(&self) -> u64 {
        self.frames
    }

    /// The planned mapping.
    pub fn mapping(&self) -> &Mapping {
        self.mapping
    }
}

/// A planned UNMAP, which will succeed.
#[derive(Clone, Debug)]
#[must_use = "nothing is unmapped before the plan is committed"]
pub struct UnmapPlan {
    /// The part of the range that the table translates.
    range: Option<IovaRange>,
    table: TableRef,
    /// The slot of the only leaf in the range, if it is a whole mapping in `table`.
    leaf: Option<usize>,
    generation: Generation,
}

/// The smallest table that covers a range, and its entry for the first address.
struct Lookup {
    table: TableRef,
    slot: usize,
    entry: Entry,
    /// The range is the whole entry.
    is_whole: bool,
}

/// The state of a table for which a plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Generation {
    root: TableOffset,
    commits: u64,
}

/// The I/O page table of one domain.
///
/// Its frames lie in the arena it was made in; every call must get the same arena. A table dropped
/// without [`Self::destroy`] leaks its frames for the lifetime of the arena.
#[derive(Debug)]
pub struct Table {
    root: TableOffset,
    levels: Levels,
    commits: u64,
    recent: RecentTables,
    counters: Counters,
}

impl Table {
    /// Makes an empty table.
    ///
    /// # Errors
    ///
    /// The arena has no free frame for the root, or its format has no tables of this depth.
    pub fn new(arena: &mut Arena, levels: Levels) -> Result<Self, TableRefusal> {
        if !arena.format().has_levels(levels) {
            return Err(TableRefusal::TooDeep(levels));
        }
        let free = arena.frames_free();
        let root = (free > 0).then(|| arena.allocate()).flatten();
        let Some(root) = root else {
            return Err(OutOfFrames { needed: 1, free }.into());
        };
        arena.note_levels(levels);
        Ok(Self {
            root,
            levels,
            commits: 0,
            counters: Counters {
                frames: 1,
                ..Counters::default()
            },
            recent: RecentTables::NONE,
        })
    }

    /// Unmaps everything and retires all frames, including the root. Takes time proportional to the
    /// number of frames.
    ///
    /// The caller must have made the root unreachable for new readers.
    pub fn destroy(mut self, arena: &mut Arena) -> Unmapped {
        let unmapped = self.clear_all(arena);
        arena.retire(self.root);
        unmapped
    }

    /// The root, from which readers start.
    pub fn root(&self) -> TableOffset {
        self.root
    }

    /// The depth of the table.
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// The number of live mappings.
    pub fn mapping_count(&self) -> u64 {
        self.counters.mappings
    }

    /// The number of mapped bytes.
    pub fn mapped_bytes(&self) -> u64 {
        self.counters.bytes
    }

    /// The number of frames in the tree, including the root.
    pub fn frames(&self) -> u64 {
        self.counters.frames
    }

    /// A handle through which other threads read the table.
    pub fn reader(&self, arena: &Arena) -> TableReader {
        TableReader::new(arena, self.root, self.levels)
    }

    /// Translates `iova`; `None` if it is not mapped.
    pub fn translate(&self, arena: &Arena, iova: Iova) -> Option<Translation> {
        walk(arena.view(), self.root, self.levels, iova)
    }

    /// All mappings from the one that covers or follows `from`, in the order of their addresses.
    pub fn mappings<'a>(&self, arena: &'a Arena, from: Iova) -> Mappings<'a> {
        let range = IovaRange::new(from, Iova(u64::MAX)).unwrap_or(IovaRange::ALL);
        self.mappings_in(arena, range)
    }

    /// All mappings that overlap `range`, in the order of their addresses.
    pub fn mappings_in<'a>(&self, arena: &'a Arena, range: IovaRange) -> Mappings<'a> {
        Mappings::new(arena.view(), self.root, self.levels, range)
    }

    // `inline(always)` on plans and commits: as a call, copying the plan out of the result would
    // cost as much as the work itself.

    /// Plans a mapping, or refuses it. Takes time proportional to the depth of the table, not to the
    /// size of the mapping.
    ///
    /// # Errors
    ///
    /// The refusal. If several apply, it is the first in the order of [`MapRefusal`].
    #[inline(always)]
    pub fn plan_map<'a>(
        &self,
        arena: &Arena,
        mapping: &'a Mapping,
    ) -> Result<MapPlan<'a>, MapRefusal> {
        let (first, last) = (mapping.range.first().0, mapping.range.last().0);
        let page = FRAME_BYTES - 1;
        if (first | mapping.gpa.0 | !last) & page != 0 {
            return Err(MapRefusal::Misaligned);
        }
        let format = arena.format();
        let gpa_last = mapping.gpa.checked_add(mapping.range.span());
        let gpa_last = gpa_last.filter(|last| last.0 < format.gpa_limit());
        let Some(gpa_last) = gpa_last.filter(|_| last <= self.levels.last_address().0) else {
            return Err(MapRefusal::OutOfRange);
        };
        if arena.lies_in(mapping.gpa.0, gpa_last.0) {
            return Err(MapRefusal::TargetsTables);
        }
        let found = self.look_up(arena, first, last);
        let table = found.table;
        let fits = |level| level == 1 || level <= largest_leaf(first ^ mapping.gpa.0);
        // Nearly every mapping of a guest's driver is a single leaf in a table that exists.
        let leaf = (found.entry.is_free() && found.is_whole && fits(table.level)).then(|| {
            let (gpa, level) = (mapping.gpa.0, table.level);
            let leaf = Entry::leaf(format, level, gpa, mapping.access, mapping.mmio);
            (found.slot, leaf.with(format.first() | format.last()))
        });
        let mut needed = 0;
        if leaf.is_none() {
            let leaf_level = largest_leaf(first ^ mapping.gpa.0);
            let count = FrameCount { arena, leaf_level };
            needed = match count.frames_for(table.offset, table.level, first, last) {
                Ok(needed) => needed,
                Err(Occupied(at)) => {
                    let mut leaves = Leaves::new(arena.view(), self.root, self.levels, Iova(at));
                    let leaf = leaves.next().map(Leaf::range);
                    return Err(MapRefusal::Overlap(leaf.unwrap_or(mapping.range)));
                }
            };
            let free = arena.frames_free();
            if needed > free {
                return Err(MapRefusal::OutOfFrames(OutOfFrames { needed, free }));
            }
        }
        Ok(MapPlan {
            mapping,
            frames: needed,
            table,
            leaf,
            generation: self.generation(),
        })
    }

    /// Makes the mapping of `plan`. Takes time proportional to its leaves.
    ///
    /// # Panics
    ///
    /// Another change was committed since the plan was made, or the plan is for another table.
    #[inline(always)]
    pub fn commit_map(&mut self, arena: &mut Arena, plan: MapPlan<'_>) {
        assert_eq!(
            plan.generation,
            self.generation(),
            "the plan is out of date"
        );
        let format = arena.format();
        let (mapping, table) = (plan.mapping, &plan.table);
        let (first, last) = (mapping.range.first().0, mapping.range.last().0);
        let added = if let Some((slot, leaf)) = plan.leaf {
            arena.store(slot, leaf);
            1
        } else {
            assert!(
                plan.frames <= arena.frames_free(),
                "the arena no longer has the frames that the plan counted"
            );
            let mut fill = Fill {
                arena,
                leaf: |level, iova| {
                    // Cannot wrap: the plan checked the last guest-physical address.
                    let gpa = mapping.gpa.0.wrapping_add(iova - first);
                    let mut leaf = Entry::leaf(format, level, gpa, mapping.access, mapping.mmio);
                    if iova == first {
                        leaf = leaf.with(format.first());
                    }
                    if iova | (entry_bytes(level) - 1) == last {
                        leaf = leaf.with(format.last());
                    }
                    leaf
                },
                leaf_level: largest_leaf(first ^ mapping.gpa.0),
            };
            fill.table(table.offset, table.level, first, last)
        };
        if let Some(parent) = table.parent {
            let entry = arena.load(parent);
            let used = entry.used(format) + added;
            arena.store(parent, entry.with_used(format, used));
        }
        self.recent.insert(first, table);
        self.commits = self.commits.wrapping_add(1);
        self.counters.mappings += 1;
        self.counters.bytes += mapping.range.span() + 1;
        // Without the condition, the compiler updates all three counters together; see `Counters`.
        if plan.frames > 0 {
            self.counters.frames += plan.frames;
        }
    }

    /// Plans the removal of every mapping in `range`, or refuses it. The range may begin and end
    /// anywhere, cover holes, and pass the end of the table. Takes time proportional to the depth of
    /// the table.
    ///
    /// # Errors
    ///
    /// The range covers only a part of a mapping.
    #[inline(always)]
    pub fn plan_unmap(&self, arena: &Arena, range: IovaRange) -> Result<UnmapPlan, WouldSplit> {
        let plan = |range, table, leaf| UnmapPlan {
            range,
            table,
            leaf,
            generation: self.generation(),
        };
        let Some(range) = range.intersection(self.levels.range()) else {
            return Ok(plan(None, self.root_ref(), None));
        };
        let (first, last) = (range.first().0, range.last().0);
        let found = self.look_up(arena, first, last);
        let table = found.table;
        // Nearly every mapping of a guest's driver is a single leaf.
        let format = arena.format();
        let is_mapping = found.entry.has(format.first() | format.last());
        if found.is_whole && found.entry.is_leaf(format, table.level) && is_mapping {
            return Ok(plan(Some(range), table, Some(found.slot)));
        }
        let leaf_at = |iova| find_leaf_below(arena.view(), table.offset, table.level, iova);
        if let Some(leaf) = leaf_at(range.first())
            && !(leaf.first() == range.first() && leaf.is_first())
        {
            return Err(WouldSplit(leaf.range()));
        }
        if let Some(leaf) = leaf_at(range.last())
            && !(leaf.last() == range.last() && leaf.is_last())
        {
            return Err(WouldSplit(leaf.range()));
        }
        Ok(plan(Some(range), table, None))
    }

    /// Unmaps everything in the range of `plan` and retires every table that becomes empty. Takes time
    /// proportional to the frames and leaves that it visits.
    ///
    /// # Panics
    ///
    /// Another change was committed since the plan was made, or the plan is for another table.
    #[inline(always)]
    pub fn commit_unmap(&mut self, arena: &mut Arena, plan: UnmapPlan) -> Unmapped {
        assert_eq!(
            plan.generation,
            self.generation(),
            "the plan is out of date"
        );
        self.commits = self.commits.wrapping_add(1);
        let Some(range) = plan.range else {
            return Unmapped::default();
        };
        if range == self.levels.range() {
            return self.clear_all(arena);
        }
        let table = &plan.table;
        let (first, last) = (range.first().0, range.last().0);
        let (removed, mut gone) = if let Some(slot) = plan.leaf {
            arena.store(slot, Entry::FREE);
            let gone = Counters {
                mappings: 1,
                bytes: last - first + 1,
                frames: 0,
            };
            (1, gone)
        } else {
            let mut clear = Clear::new(arena);
            let removed = clear.part(table.offset, table.level, first, last);
            (removed, clear.totals)
        };
        if let Some(parent) = table.parent {
            let (entry, format) = (arena.load(parent), arena.format());
            let used = entry.used(format);
            if removed < used {
                let less = entry.with_used(format, used - removed);
                arena.store(parent, less);
                self.recent.insert(first, table);
            } else {
                gone.frames += self.retire_up(arena, table, first, removed);
            }
        }
        match gone.frames {
            0 => {}
            1 if table.level == 1 => self.recent.remove(first),
            _ => self.recent = RecentTables::NONE,
        }
        self.subtract(gone)
    }

    /// Retires `empty`, a table that covers `iova` and just lost its last `removed` entries, and every
    /// table above it that becomes empty. Returns the number of retired tables.
    #[cold]
    fn retire_up(&self, arena: &mut Arena, empty: &TableRef, iova: u64, mut removed: u64) -> u64 {
        let mut path = [0; 4];
        let mut table = self.root;
        let above = (empty.level + 1..=self.levels.count()).rev();
        let depth = above.clone().count();
        for (slot, level) in path.iter_mut().zip(above) {
            *slot = table.slot(index(iova, level));
            table = arena.load(*slot).next_table(arena.encoding());
        }
        let mut clear = Clear::new(arena);
        for slot in path.iter().take(depth).rev() {
            let entry = clear.arena.load(*slot);
            removed = clear.shrink_entry(*slot, entry, removed);
        }
        clear.totals.frames
    }

    fn root_ref(&self) -> TableRef {
        TableRef {
            offset: self.root,
            level: self.levels.count(),
            parent: None,
        }
    }

    /// Looks up the smallest table that covers all of `first..=last`. This table must translate
    /// these addresses.
    #[inline(always)]
    fn look_up(&self, arena: &Arena, first: u64, last: u64) -> Lookup {
        let apart = first ^ last;
        if apart < entry_bytes(2)
            && let Some(table) = self.recent.get(first)
        {
            let slot = table.offset.slot(index(first, 1));
            return Lookup {
                table,
                slot,
                entry: arena.load(slot),
                is_whole: apart < FRAME_BYTES && is_whole_entry(1, first, last),
            };
        }
        let encoding = arena.encoding();
        let mut table = self.root_ref();
        loop {
            let slot = table.offset.slot(index(first, table.level));
            let entry = arena.load(slot);
            let in_one = apart < entry_bytes(table.level);
            if !in_one || !entry.is_table(encoding.format, table.level) {
                return Lookup {
                    table,
                    slot,
                    entry,
                    is_whole: in_one && is_whole_entry(table.level, first, last),
                };
            }
            table = TableRef {
                offset: entry.next_table(encoding),
                level: table.level - 1,
                parent: Some(slot),
            };
        }
    }

    fn clear_all(&mut self, arena: &mut Arena) -> Unmapped {
        let mut clear = Clear::new(arena);
        clear.whole(self.root, self.levels.count(), FRAME_WORDS as u64);
        let totals = clear.totals;
        self.recent = RecentTables::NONE;
        self.subtract(totals)
    }

    fn subtract(&mut self, gone: Counters) -> Unmapped {
        self.counters.mappings -= gone.mappings;
        self.counters.bytes -= gone.bytes;
        self.counters.frames -= gone.frames;
        Unmapped {
            mappings: gone.mappings,
            bytes: gone.bytes,
        }
    }

    fn generation(&self) -> Generation {
        Generation {
            root: self.root,
            commits: self.commits,
        }
    }
}
