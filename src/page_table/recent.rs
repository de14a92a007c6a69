//! The cache of recently used tables of level 1. It saves most walks from the root.

use super::layout::{TableOffset, entry_bytes};

/// A table in the tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct TableRef {
    pub(super) offset: TableOffset,
    pub(super) level: u32,
    /// The slot of the entry that points to it; `None` for the root.
    pub(super) parent: Option<usize>,
}

/// The size of the cache in tables.
const CACHED_TABLES: usize = 8;

/// A direct-mapped cache of tables of level 1. It hits because a guest's driver makes most mappings
/// near earlier ones.
///
/// Two tables whose tags differ by a multiple of [`CACHED_TABLES`] share a line, and the later one
/// evicts the other. The writer must drop a table from the cache when the table leaves the tree.
#[derive(Debug)]
pub(super) struct RecentTables([CachedTable; CACHED_TABLES]);

#[derive(Clone, Copy, Debug)]
struct CachedTable {
    /// The addresses it covers, without the bits that a table of level 1 translates.
    tag: u64,
    table: TableOffset,
    parent: usize,
}

impl CachedTable {
    const NONE: Self = Self {
        // Above the tag of every address.
        tag: u64::MAX,
        table: TableOffset(0),
        parent: 0,
    };
}

impl RecentTables {
    pub(super) const NONE: Self = Self([CachedTable::NONE; CACHED_TABLES]);

    /// The line for this tag.
    fn index(tag: u64) -> usize {
        usize::try_from(tag % CACHED_TABLES as u64).unwrap_or(0)
    }

    fn tag(iova: u64) -> u64 {
        iova / entry_bytes(2)
    }

    /// The table of level 1 that covers `iova`, if it is cached.
    pub(super) fn get(&self, iova: u64) -> Option<TableRef> {
        let tag = Self::tag(iova);
        let line = self.0[Self::index(tag)];
        (line.tag == tag).then_some(TableRef {
            offset: line.table,
            level: 1,
            parent: Some(line.parent),
        })
    }

    /// Caches `table`, which covers `iova`, if it is at level 1.
    pub(super) fn insert(&mut self, iova: u64, table: &TableRef) {
        if let (1, Some(parent)) = (table.level, table.parent) {
            let tag = Self::tag(iova);
            let line = &mut self.0[Self::index(tag)];
            if line.tag != tag {
                *line = CachedTable {
                    tag,
                    table: table.offset,
                    parent,
                };
            }
        }
    }

    /// Drops the table that covers `iova`.
    pub(super) fn remove(&mut self, iova: u64) {
        let tag = Self::tag(iova);
        let line = &mut self.0[Self::index(tag)];
        if line.tag == tag {
            *line = CachedTable::NONE;
        }
    }
}
