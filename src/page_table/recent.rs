//! Where tables of level 1 lie that were used lately.

use super::layout::{TableOffset, entry_bytes};

/// The smallest table there is that covers the whole range of a plan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) table: TableOffset,
    pub(super) level: u32,
    /// The entry that leads to it; `None` for the root.
    pub(super) parent: Option<usize>,
}

/// How many tables of level 1 are remembered.
const RECENT_TABLES: usize = 8;

/// Where tables of level 1 are that were used lately: most mappings of a guest's driver are near
/// others. Each has one place it can be in, so that of two that are a multiple of [`RECENT_TABLES`]
/// apart the later one is remembered. Those that leave the tree are forgotten.
#[derive(Debug)]
pub(super) struct Recent([RecentTable; RECENT_TABLES]);

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
    pub(super) const NONE: Self = Self([RecentTable::NONE; RECENT_TABLES]);

    /// Where the table with this tag can be.
    fn index(tag: u64) -> usize {
        usize::try_from(tag % RECENT_TABLES as u64).unwrap_or(0)
    }

    fn tag(iova: u64) -> u64 {
        iova / entry_bytes(2)
    }

    /// The table for `iova`.
    pub(super) fn get(&self, iova: u64) -> Option<Place> {
        let tag = Self::tag(iova);
        let recent = self.0[Self::index(tag)];
        (recent.tag == tag).then_some(Place {
            table: recent.table,
            level: 1,
            parent: Some(recent.parent),
        })
    }

    /// Notes the table at `place`, if it is one for `iova` at level 1.
    pub(super) fn note(&mut self, iova: u64, place: &Place) {
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
    pub(super) fn forget(&mut self, iova: u64) {
        let tag = Self::tag(iova);
        let recent = &mut self.0[Self::index(tag)];
        if recent.tag == tag {
            *recent = RecentTable::NONE;
        }
    }
}
