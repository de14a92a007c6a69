//! Planning and committing changes: the one writer of a table.
//!
//! A plan decides every refusal and alters nothing. A commit cannot fail. Between the two nothing
//! else may be committed to the same table.

use super::arena::Arena;
use super::clear::{Clear, Counters};
use super::error::{MapRefusal, OutOfFrames, WouldSplit};
use super::fill::{Fill, Occupied, Survey};
use super::layout::{
    Entry, FRAME_BYTES, FRAME_WORDS, GPA_LIMIT, Levels, TableOffset, entry_bytes, index,
    is_whole_entry, largest_leaf,
};
use super::reader::{Leaf, Leaves, Mappings, Translation, find_leaf_below, walk};
use super::recent::{Place, Recent};
use crate::address::{Gpa, Iova, IovaRange, Mapping};

/// What an UNMAP removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Whole mappings.
    pub mappings: u64,
    /// The bytes they covered.
    pub bytes: u64,
}

/// A MAP that will succeed.
#[derive(Clone, Debug)]
#[must_use = "nothing is mapped before the plan is committed"]
pub struct MapPlan<'a> {
    mapping: &'a Mapping,
    frames: u64,
    place: Place,
    /// Its slot and all of it, where it is one leaf of the table at `place`.
    leaf: Option<(usize, Entry)>,
    ticket: Ticket,
}

impl MapPlan<'_> {
    /// Frames the commit will take from the arena.
    pub fn frames_needed(&self) -> u64 {
        self.frames
    }

    /// The mapping that the commit will make.
    pub fn mapping(&self) -> &Mapping {
        self.mapping
    }
}

/// An UNMAP that will succeed.
#[derive(Clone, Debug)]
#[must_use = "nothing is unmapped before the plan is committed"]
pub struct UnmapPlan {
    /// The part of the range the table reaches.
    range: Option<IovaRange>,
    place: Place,
    /// The slot of all that is there, where it is one leaf of the table at `place`.
    leaf: Option<usize>,
    ticket: Ticket,
}

/// A place, and the entry there for the first address of the range.
struct Found {
    place: Place,
    slot: usize,
    entry: Entry,
    /// The range is all that the entry covers.
    is_whole: bool,
}

/// The state of the table a plan was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticket {
    root: TableOffset,
    commits: u64,
}

/// The I/O page table of one domain.
///
/// Its frames lie in the arena it was made in, which every call wants to see again. They are
/// lost until the arena's end where a table is dropped without [`Self::destroy`].
#[derive(Debug)]
pub struct Table {
    root: TableOffset,
    levels: Levels,
    commits: u64,
    recent: Recent,
    counters: Counters,
}

impl Table {
    /// An empty table.
    ///
    /// # Errors
    ///
    /// The arena has no frame left for the root.
    pub fn new(arena: &mut Arena, levels: Levels) -> Result<Self, OutOfFrames> {
        let Some(root) = arena.allocate() else {
            return Err(OutOfFrames { needed: 1, free: 0 });
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
            recent: Recent::NONE,
        })
    }

    /// Unmaps everything and retires all frames, the root's too. Takes time in proportion to
    /// the number of frames.
    ///
    /// The caller has taken the root away from new readers.
    pub fn destroy(mut self, arena: &mut Arena) -> Unmapped {
        let unmapped = self.clear_all(arena);
        arena.retire(self.root);
        unmapped
    }

    /// Where readers start.
    pub fn root(&self) -> TableOffset {
        self.root
    }

    /// How deep the table is.
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// Mappings that are live.
    pub fn mapping_count(&self) -> u64 {
        self.counters.mappings
    }

    /// Bytes of I/O virtual address that are mapped.
    pub fn mapped_bytes(&self) -> u64 {
        self.counters.bytes
    }

    /// Frames in the tree, the root included.
    pub fn frames(&self) -> u64 {
        self.counters.frames
    }

    /// Where `iova` leads, or `None` where nothing is mapped.
    pub fn translate(&self, arena: &Arena, iova: Iova) -> Option<Translation> {
        walk(arena.view(), self.root, self.levels, iova)
    }

    /// All mappings from the one that covers `from`, or follows it, in the order of their
    /// addresses.
    pub fn mappings<'a>(&self, arena: &'a Arena, from: Iova) -> Mappings<'a> {
        let range = IovaRange::new(from, Iova(u64::MAX)).unwrap_or(IovaRange::ALL);
        self.mappings_in(arena, range)
    }

    /// All mappings that share an address with `range`, in the order of their addresses.
    pub fn mappings_in<'a>(&self, arena: &'a Arena, range: IovaRange) -> Mappings<'a> {
        Mappings::new(arena.view(), self.root, self.levels, range)
    }

    // Planning and committing are inlined: otherwise copying the plan out of the result costs as
    // much as the work itself.

    /// Decides whether `mapping` can be made, and how. Takes time in proportion to the depth of
    /// the table, not to the size of the mapping.
    ///
    /// # Errors
    ///
    /// The reason why it cannot be made, where several apply the first in the order of
    /// [`MapRefusal`].
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
        let gpa_last = mapping.gpa.checked_add(mapping.range.span());
        let gpa_fits = gpa_last.is_some_and(|last| last < Gpa(GPA_LIMIT));
        if last > self.levels.last_address().0 || !gpa_fits {
            return Err(MapRefusal::OutOfRange);
        }
        let found = self.find(arena, first, last);
        let place = found.place;
        let fits = |level| level == 1 || level <= largest_leaf(first ^ mapping.gpa.0);
        // Nearly every mapping of a guest's driver is one leaf, in a table that is there.
        let leaf = (found.entry.is_free() && found.is_whole && fits(place.level)).then(|| {
            let leaf = Entry::leaf(place.level, mapping.gpa.0, mapping.access, mapping.mmio);
            (found.slot, leaf.with(Entry::FIRST | Entry::LAST))
        });
        let mut needed = 0;
        if leaf.is_none() {
            let leaf_level = largest_leaf(first ^ mapping.gpa.0);
            let job = Survey { arena, leaf_level };
            needed = match job.frames_for(place.table, place.level, first, last) {
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
            place,
            leaf,
            ticket: self.ticket(),
        })
    }

    /// Makes the mapping of `plan`. Takes time in proportion to its leaves.
    ///
    /// # Panics
    ///
    /// Something else was committed since the plan was made, or it is of another table.
    #[inline(always)]
    pub fn commit_map(&mut self, arena: &mut Arena, plan: MapPlan<'_>) {
        assert_eq!(plan.ticket, self.ticket(), "the plan is out of date");
        let (mapping, place) = (plan.mapping, &plan.place);
        let (first, last) = (mapping.range.first().0, mapping.range.last().0);
        let added = if let Some((slot, leaf)) = plan.leaf {
            arena.store(slot, leaf);
            1
        } else {
            assert!(
                plan.frames <= arena.frames_free(),
                "the frames went elsewhere"
            );
            let mut fill = Fill {
                arena,
                leaf: |level, iova| {
                    // Cannot wrap: the plan saw to it that the whole range fits.
                    let gpa = mapping.gpa.0.wrapping_add(iova - first);
                    let mut leaf = Entry::leaf(level, gpa, mapping.access, mapping.mmio);
                    if iova == first {
                        leaf = leaf.with(Entry::FIRST);
                    }
                    if iova | (entry_bytes(level) - 1) == last {
                        leaf = leaf.with(Entry::LAST);
                    }
                    leaf
                },
                leaf_level: largest_leaf(first ^ mapping.gpa.0),
            };
            fill.table(place.table, place.level, first, last)
        };
        if let Some(parent) = place.parent {
            let entry = arena.load(parent);
            arena.store(parent, entry.with_used(entry.used() + added));
        }
        self.recent.note(first, place);
        self.commits = self.commits.wrapping_add(1);
        self.counters.mappings += 1;
        self.counters.bytes += mapping.range.span() + 1;
        // Without the condition all three would be added to together; see `Counters`.
        if plan.frames > 0 {
            self.counters.frames += plan.frames;
        }
    }

    /// Decides whether everything in `range` can be unmapped. The range may begin and end
    /// anywhere, cover holes, and pass the end of the table. Takes time in proportion to the
    /// depth of the table.
    ///
    /// # Errors
    ///
    /// The range covers part of a mapping only.
    #[inline(always)]
    pub fn plan_unmap(&self, arena: &Arena, range: IovaRange) -> Result<UnmapPlan, WouldSplit> {
        let plan = |range, place, leaf| UnmapPlan {
            range,
            place,
            leaf,
            ticket: self.ticket(),
        };
        let Some(range) = range.intersection(self.levels.range()) else {
            return Ok(plan(None, self.root_place(), None));
        };
        let (first, last) = (range.first().0, range.last().0);
        let found = self.find(arena, first, last);
        let place = found.place;
        // Nearly every mapping of a guest's driver is one leaf.
        let is_mapping = found.entry.has(Entry::FIRST | Entry::LAST);
        if found.is_whole && found.entry.is_leaf(place.level) && is_mapping {
            return Ok(plan(Some(range), place, Some(found.slot)));
        }
        let leaf_at = |iova| find_leaf_below(arena.view(), place.table, place.level, iova);
        if let Some(leaf) = leaf_at(range.first())
            && !(leaf.first() == range.first() && leaf.entry.has(Entry::FIRST))
        {
            return Err(WouldSplit(leaf.range()));
        }
        if let Some(leaf) = leaf_at(range.last())
            && !(leaf.last() == range.last() && leaf.entry.has(Entry::LAST))
        {
            return Err(WouldSplit(leaf.range()));
        }
        Ok(plan(Some(range), place, None))
    }

    /// Unmaps everything in the range of `plan`. Takes time in proportion to the frames and the
    /// leaves that it visits. Tables that get empty are retired at once.
    ///
    /// # Panics
    ///
    /// Something else was committed since the plan was made, or it is of another table.
    #[inline(always)]
    pub fn commit_unmap(&mut self, arena: &mut Arena, plan: UnmapPlan) -> Unmapped {
        assert_eq!(plan.ticket, self.ticket(), "the plan is out of date");
        self.commits = self.commits.wrapping_add(1);
        let Some(range) = plan.range else {
            return Unmapped::default();
        };
        if range == self.levels.range() {
            return self.clear_all(arena);
        }
        let place = &plan.place;
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
            let removed = clear.part(place.table, place.level, first, last);
            (removed, clear.totals)
        };
        if let Some(parent) = place.parent {
            let entry = arena.load(parent);
            if removed < entry.used() {
                let less = entry.with_used(entry.used() - removed);
                arena.store(parent, less);
                self.recent.note(first, place);
            } else {
                gone.frames += self.retire_up(arena, place, first, removed);
            }
        }
        match gone.frames {
            0 => {}
            1 if place.level == 1 => self.recent.forget(first),
            _ => self.recent = Recent::NONE,
        }
        self.subtract(gone)
    }

    /// Retires the table at `place`, which covers `iova` and has become empty by the last `removed`
    /// entries, and those above that become empty by it. Returns how many.
    #[cold]
    fn retire_up(&self, arena: &mut Arena, place: &Place, iova: u64, mut removed: u64) -> u64 {
        let mut path = [0; 4];
        let mut table = self.root;
        let above = (place.level + 1..=self.levels.count()).rev();
        let depth = above.clone().count();
        for (slot, level) in path.iter_mut().zip(above) {
            *slot = table.slot(index(iova, level));
            table = arena.load(*slot).next_table();
        }
        let mut clear = Clear::new(arena);
        for slot in path.iter().take(depth).rev() {
            let entry = clear.arena.load(*slot);
            removed = clear.shrink_entry(*slot, entry, removed);
        }
        clear.totals.frames
    }

    fn root_place(&self) -> Place {
        Place {
            table: self.root,
            level: self.levels.count(),
            parent: None,
        }
    }

    /// The smallest table there is that covers all of `first..=last`, which lie within the table.
    #[inline(always)]
    fn find(&self, arena: &Arena, first: u64, last: u64) -> Found {
        let apart = first ^ last;
        if apart < entry_bytes(2)
            && let Some(place) = self.recent.get(first)
        {
            let slot = place.table.slot(index(first, 1));
            return Found {
                place,
                slot,
                entry: arena.load(slot),
                is_whole: apart < FRAME_BYTES && is_whole_entry(1, first, last),
            };
        }
        let mut place = self.root_place();
        loop {
            let slot = place.table.slot(index(first, place.level));
            let entry = arena.load(slot);
            let in_one = apart < entry_bytes(place.level);
            if !in_one || !entry.is_table(place.level) {
                return Found {
                    place,
                    slot,
                    entry,
                    is_whole: in_one && is_whole_entry(place.level, first, last),
                };
            }
            place = Place {
                table: entry.next_table(),
                level: place.level - 1,
                parent: Some(slot),
            };
        }
    }

    fn clear_all(&mut self, arena: &mut Arena) -> Unmapped {
        let mut clear = Clear::new(arena);
        clear.whole(self.root, self.levels.count(), FRAME_WORDS as u64);
        let totals = clear.totals;
        self.recent = Recent::NONE;
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

    fn ticket(&self) -> Ticket {
        Ticket {
            root: self.root,
            commits: self.commits,
        }
    }
}
