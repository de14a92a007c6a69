//! Lock-free reading of tables, given a view of the arena and the offset of a root.
//!
//! A reader may live in another process and must not trust the contents of the arena: it checks
//! every offset against the arena's size, and never walks deeper than the table.

use std::iter::FusedIterator;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{
    Encoding, EndpointWord, Entry, Format, Levels, TableOffset, entry_bytes, index,
};
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};

/// The translation of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address of the requested byte.
    pub gpa: Gpa,
    /// The last address of the leaf. Up to there guest-physical addresses are contiguous, and rights
    /// and kind are the same. The addresses after it may belong to the same mapping.
    pub contiguous_last: Iova,
    /// The endpoint's access rights.
    pub access: Access,
    /// The target is device memory.
    pub mmio: bool,
}

/// A read-only view of an arena's words.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    words: &'a [AtomicU64],
    encoding: Encoding,
}

impl<'a> View<'a> {
    /// A view of `words`, which begin with the first word of the header. `encoding` is that of the header.
    pub fn new(words: &'a [AtomicU64], encoding: Encoding) -> Self {
        Self { words, encoding }
    }

    /// The endpoint slot at the index `word`; [`EndpointWord::Blocked`] outside the arena, and if the arena's format has no
    /// tables of that depth.
    pub fn endpoint(self, word: usize) -> EndpointWord {
        // Acquire pairs with the writer's release: a reader that sees the root sees its table filled.
        let bits = self.words.get(word).map(|w| w.load(Ordering::Acquire));
        match EndpointWord::from_bits(bits.unwrap_or(0)) {
            EndpointWord::Domain { levels, .. } if !self.encoding.format.has_levels(levels) => {
                EndpointWord::Blocked
            }
            word => word,
        }
    }

    /// The entry at `index` of `table`, or `None` outside the arena.
    fn entry(self, table: TableOffset, index: u64) -> Option<Entry> {
        // Acquire pairs with the writer's release: a reader that sees a pointer sees its table
        // filled.
        let word = self.words.get(table.slot(index))?;
        Some(Entry::from_bits(word.load(Ordering::Acquire)))
    }
}

/// Translates `iova` through the table of `levels` at `root`; `None` if it is not mapped.
pub fn walk(view: View<'_>, root: TableOffset, levels: Levels, iova: Iova) -> Option<Translation> {
    find_leaf(view, root, levels, iova).map(|leaf| leaf.translate(iova))
}

/// The leaf that covers `iova`.
pub(super) fn find_leaf(
    view: View<'_>,
    root: TableOffset,
    levels: Levels,
    iova: Iova,
) -> Option<Leaf> {
    if iova > levels.last_address() {
        return None;
    }
    find_leaf_below(view, root, levels.count(), iova)
}

/// The leaf that covers `iova`, searched for from `table`, which is at `level` and covers it.
pub(super) fn find_leaf_below(
    view: View<'_>,
    mut table: TableOffset,
    level: u32,
    iova: Iova,
) -> Option<Leaf> {
    let encoding = view.encoding;
    for level in (1..=level).rev() {
        let entry = view.entry(table, index(iova.0, level))?;
        if entry.is_table(encoding.format, level) {
            table = entry.next_table(encoding);
        } else if entry.is_leaf(encoding.format, level) {
            return Some(Leaf::new(encoding.format, entry, level, iova));
        } else {
            return None;
        }
    }
    None
}

/// A leaf and the addresses it covers: `first..=last`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    entry: Entry,
    format: Format,
    level: u32,
    first: u64,
    last: u64,
}

impl Leaf {
    fn new(format: Format, entry: Entry, level: u32, inside: Iova) -> Self {
        let mask = entry_bytes(level) - 1;
        Self {
            entry,
            format,
            level,
            first: inside.0 & !mask,
            last: inside.0 | mask,
        }
    }

    pub(super) fn first(self) -> Iova {
        Iova(self.first)
    }

    pub(super) fn last(self) -> Iova {
        Iova(self.last)
    }

    /// Whether it is the first of its mapping.
    pub(super) fn is_first(self) -> bool {
        self.entry.is_first(self.format)
    }

    /// Whether it is the last of its mapping.
    pub(super) fn is_last(self) -> bool {
        self.entry.is_last(self.format)
    }

    pub(super) fn range(self) -> IovaRange {
        IovaRange::new(self.first(), self.last()).unwrap_or(IovaRange::ALL)
    }

    fn gpa(self) -> Gpa {
        self.entry.gpa(self.level)
    }

    fn translate(self, iova: Iova) -> Translation {
        Translation {
            gpa: Gpa(self.gpa().0 | iova.0 & (entry_bytes(self.level) - 1)),
            contiguous_last: self.last(),
            access: self.entry.access(self.format),
            mmio: self.entry.mmio(self.format),
        }
    }
}

/// All leaves from an address on, in the order of their addresses.
#[derive(Clone, Debug)]
pub(super) struct Leaves<'a> {
    view: View<'a>,
    levels: Levels,
    /// The tables on the path from the root down to `level` that cover `next`, indexed by level.
    tables: [TableOffset; 6],
    level: u32,
    next: u64,
}

impl<'a> Leaves<'a> {
    pub(super) fn new(view: View<'a>, root: TableOffset, levels: Levels, from: Iova) -> Self {
        Self {
            view,
            levels,
            tables: [root; 6],
            level: levels.count(),
            next: from.0,
        }
    }
}

impl Iterator for Leaves<'_> {
    type Item = Leaf;

    fn next(&mut self) -> Option<Leaf> {
        while self.next <= self.levels.last_address().0 {
            let (level, at) = (self.level, self.next);
            let table = self.tables.get(level as usize)?;
            let encoding = self.view.encoding;
            let entry = self.view.entry(*table, index(at, level))?;
            if entry.is_table(encoding.format, level) {
                self.level = level - 1;
                *self.tables.get_mut(self.level as usize)? = entry.next_table(encoding);
                continue;
            }
            self.next = (at | (entry_bytes(level) - 1)) + 1;
            // After the last entry of a table, continue in the table above.
            while self.level < self.levels.count() && index(self.next, self.level) == 0 {
                self.level += 1;
            }
            if entry.is_leaf(encoding.format, level) {
                return Some(Leaf::new(encoding.format, entry, level, Iova(at)));
            }
        }
        None
    }
}

/// Whole mappings in the order of their addresses: one item for each MAP request.
#[derive(Clone, Debug)]
pub struct Mappings<'a> {
    leaves: Leaves<'a>,
    last: Iova,
}

impl<'a> Mappings<'a> {
    /// All mappings in the table at `root` that share an address with `range`.
    ///
    /// If `range` begins inside a mapping, the search for the mapping's first leaf takes time
    /// proportional to the number of the mapping's leaves. Unlike [`walk`], this must only be used on
    /// tables with trusted contents.
    pub(super) fn new(view: View<'a>, root: TableOffset, levels: Levels, range: IovaRange) -> Self {
        let mut first = range.first();
        while let Some(leaf) = find_leaf(view, root, levels, first) {
            first = leaf.first();
            if leaf.is_first() || first.0 == 0 {
                break;
            }
            first = Iova(first.0 - 1);
        }
        Self {
            leaves: Leaves::new(view, root, levels, first),
            last: range.last(),
        }
    }
}

impl Iterator for Mappings<'_> {
    type Item = Mapping;

    fn next(&mut self) -> Option<Mapping> {
        let first = self.leaves.next()?;
        if first.first() > self.last {
            // No later mapping overlaps the range: end the iteration for good.
            self.leaves.next = u64::MAX;
            return None;
        }
        let mut last = first;
        while !last.is_last() {
            last = self.leaves.next()?;
        }
        Some(Mapping {
            range: IovaRange::new(first.first(), last.last())?,
            gpa: first.gpa(),
            access: first.entry.access(first.format),
            mmio: first.entry.mmio(first.format),
        })
    }
}

impl FusedIterator for Mappings<'_> {}
