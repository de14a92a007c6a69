//! Planning and committing changes: the one writer of a table.
//!
//! A plan decides every refusal and alters nothing. A commit cannot fail. Between the two nothing
//! else may be committed to the same table.

use thiserror::Error;

use super::arena::Arena;
use super::layout::{
    Entry, FRAME_BYTES, FRAME_WORDS, GPA_LIMIT, Levels, TOP_LEAF_LEVEL, TableOffset, entry_bytes,
    index,
};
use super::reader::{Leaf, Leaves, Mappings, Translation, find_leaf_below, walk};
use crate::address::{Gpa, Iova, IovaRange, Mapping};

/// The arena has not enough frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{needed} page table frames needed, {free} free; raise the arena limit")]
pub struct OutOfFrames {
    /// Frames the request takes.
    pub needed: u64,
    /// Frames that can be had now; retired ones are not among them.
    pub free: u64,
}

/// Why a MAP is refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapRefusal {
    /// The range or the guest-physical address is not made of whole 4 KiB pages.
    #[error("the range or the guest-physical address is not a multiple of 4 KiB")]
    Misaligned,
    /// The range passes the last address of the table, or the guest-physical range 2^52.
    #[error("the range passes the end of the table, or the guest-physical one 2^52")]
    OutOfRange,
    /// Part of the range is mapped already: by the mapping this leaf belongs to, the first in the
    /// range.
    #[error("{0} is mapped already")]
    Overlap(IovaRange),
    /// The arena is full.
    #[error(transparent)]
    OutOfFrames(OutOfFrames),
}

/// An UNMAP is refused: it would cut a mapping at this leaf of it. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it would split the mapping at {0}")]
pub struct WouldSplit(pub IovaRange);

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

/// The smallest table there is that covers the whole range of a plan.
#[derive(Clone, Copy, Debug)]
struct Place {
    table: TableOffset,
    level: u32,
    /// The entry that leads to it; `None` for the root.
    parent: Option<usize>,
}

/// A place, and the entry there for the first address of the range.
struct Found {
    place: Place,
    slot: usize,
    entry: Entry,
    /// The range is all that the entry covers.
    is_whole: bool,
}

/// How many tables of level 1 are remembered.
const RECENT_TABLES: usize = 8;

/// Where tables of level 1 are that were used lately: most mappings of a guest's driver are near
/// others. Each has one place it can be in, so that of two that are a multiple of [`RECENT_TABLES`]
/// apart the later one is remembered. Those that leave the tree are forgotten.
#[derive(Debug)]
struct Recent([RecentTable; RECENT_TABLES]);

#[derive(Clone, Copy, Debug)]
struct RecentTable {
    /// What it covers: addresses without the bits a table of level 1 translates.
    tag: u64,
    table: TableOffset,
    parent: usize,
}

impl RecentTable {
    const NONE: Self = Self {
        // No address has one as high.
        tag: u64::MAX,
        table: TableOffset(0),
        parent: 0,
    };
}

impl Recent {
    const NONE: Self = Self([RecentTable::NONE; RECENT_TABLES]);

    /// Where the table with this tag can be.
    fn index(tag: u64) -> usize {
        usize::try_from(tag % RECENT_TABLES as u64).unwrap_or(0)
    }

    fn tag(iova: u64) -> u64 {
        iova / entry_bytes(2)
    }

    /// The table for `iova`.
    fn get(&self, iova: u64) -> Option<Place> {
        let tag = Self::tag(iova);
        let recent = self.0[Self::index(tag)];
        (recent.tag == tag).then_some(Place {
            table: recent.table,
            level: 1,
            parent: Some(recent.parent),
        })
    }

    /// Notes the table at `place`, if it is one for `iova` at level 1.
    fn note(&mut self, iova: u64, place: &Place) {
        if let (1, Some(parent)) = (place.level, place.parent) {
            let tag = Self::tag(iova);
            let recent = &mut self.0[Self::index(tag)];
            if recent.tag != tag {
                *recent = RecentTable {
                    tag,
                    table: place.table,
                    parent,
                };
            }
        }
    }

    /// Forgets the table for `iova`.
    fn forget(&mut self, iova: u64) {
        let tag = Self::tag(iova);
        let recent = &mut self.0[Self::index(tag)];
        if recent.tag == tag {
            *recent = RecentTable::NONE;
        }
    }
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

// Apart from `commits`, and the two that every MAP adds to apart from each other: neighbours are added
// to as a pair, which is slower where one of them was stored just before.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    bytes: u64,
    frames: u64,
    mappings: u64,
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

/// The level of the largest leaf for addresses that differ from where they lead in the bits of
/// `difference`.
fn largest_leaf(difference: u64) -> u32 {
    let fits = |level: &u32| difference & (entry_bytes(*level) - 1) == 0;
    (1..=TOP_LEAF_LEVEL).rev().find(fits).unwrap_or(1)
}

/// Whether `first..=last`, a part of one entry at `level`, is all of it.
fn is_whole_entry(level: u32, first: u64, last: u64) -> bool {
    last - first == entry_bytes(level) - 1
}

/// A leaf lies at this address or in the rest of the entry that covers it.
struct Occupied(u64);

/// Counting what a mapping takes.
struct Survey<'a> {
    arena: &'a Arena,
    leaf_level: u32,
}

impl Survey<'_> {
    /// Frames to be added below `table`, at `level`, for leaves all over `first..=last`.
    ///
    /// Only the first and the last entry can be covered in part, so that this goes down at most
    /// twice on each level.
    fn frames_for(
        &self,
        table: TableOffset,
        level: u32,
        first: u64,
        last: u64,
    ) -> Result<u64, Occupied> {
        let mut needed = 0;
        let mut at = first;
        loop {
            let until = last.min(at | (entry_bytes(level) - 1));
            let entry = self.arena.load(table.slot(index(at, level)));
            if entry.is_free() {
                needed += self.frames_below_free(level, at, until);
            } else if entry.is_table(level) && !is_whole_entry(level, at, until) {
                needed += self.frames_for(entry.next_table(), level - 1, at, until)?;
            } else {
                return Err(Occupied(at));
            }
            if until == last {
                return Ok(needed);
            }
            at = until + 1;
        }
    }

    /// Frames to be added below a free entry at `level` for leaves all over `first..=last`.
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

    /// Frames to be added below a free entry at `level` for leaves all over it.
    fn frames_below_whole(&self, level: u32) -> u64 {
        (self.leaf_level..level).fold(0, |below, _| 1 + below * FRAME_WORDS as u64)
    }
}

/// Filling in a mapping whose leaves `leaf` makes, given a level and an address.
struct Fill<'a, F> {
    arena: &'a mut Arena,
    leaf: F,
    leaf_level: u32,
}

impl<F: Fn(u32, u64) -> Entry> Fill<'_, F> {
    /// Fills `first..=last` of `table`, at `level`, and says how many entries are no longer free.
    fn table(&mut self, table: TableOffset, level: u32, first: u64, last: u64) -> u64 {
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
                added += self.below(slot, level, at, until);
            }
            if until == last {
                return added;
            }
            at = until + 1;
        }
    }

    /// Fills a part of the entry in `slot`, and says whether it was free: 1, or 0.
    fn below(&mut self, slot: usize, level: u32, first: u64, last: u64) -> u64 {
        let entry = self.arena.load(slot);
        if !entry.is_free() {
            let used = self.table(entry.next_table(), level - 1, first, last);
            self.arena.store(slot, entry.with_used(entry.used() + used));
            return 0;
        }
        let Some(table) = self.arena.allocate() else {
            unreachable!("the plan counted every frame");
        };
        // The way to the new table is stored last: whoever finds it finds it filled.
        let used = self.table(table, level - 1, first, last);
        self.arena.store(slot, Entry::table(table, used));
        1
    }
}

/// Taking leaves away, and the tables that get empty by it.
struct Clear<'a> {
    arena: &'a mut Arena,
    totals: Counters,
}

impl<'a> Clear<'a> {
    fn new(arena: &'a mut Arena) -> Self {
        Self {
            arena,
            totals: Counters::default(),
        }
    }

    /// Clears `first..=last` of `table`, at `level`, where it cuts no leaf, and says how many
    /// entries are free now that were not.
    fn part(&mut self, table: TableOffset, level: u32, first: u64, last: u64) -> u64 {
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
    fn whole(&mut self, table: TableOffset, level: u32, used: u64) {
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
    fn shrink_entry(&mut self, slot: usize, entry: Entry, removed: u64) -> u64 {
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
