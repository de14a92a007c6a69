//! A handle to one domain's table, for readers in this process.

use std::sync::Arc;

use super::arena::Arena;
use super::layout::{Encoding, Levels, TableOffset};
use super::reader::{Mappings, Translation, View, walk};
use super::words::SharedWords;
use crate::address::{Iova, IovaRange};

/// Reads one table without the lock of its writer.
///
/// The owner of the arena must not call [`Arena::reclaim`](super::Arena::reclaim) while a call of this
/// reader may be inside a retired frame, and must take the reader away before it destroys the table.
#[derive(Clone, Debug)]
pub struct TableReader {
    memory: Arc<SharedWords>,
    encoding: Encoding,
    root: TableOffset,
    levels: Levels,
}

impl TableReader {
    /// A reader of the table of `levels` at `root` in `arena`.
    pub(super) fn new(arena: &Arena, root: TableOffset, levels: Levels) -> Self {
        Self {
            memory: arena.memory().clone(),
            encoding: arena.encoding(),
            root,
            levels,
        }
    }

    /// Translates `iova`; `None` if it is not mapped.
    pub fn translate(&self, iova: Iova) -> Option<Translation> {
        walk(self.view(), self.root, self.levels, iova)
    }

    /// All mappings that overlap `range`, in the order of their addresses. Meanwhile the writer must
    /// neither make nor remove a mapping there.
    pub fn mappings_in(&self, range: IovaRange) -> Mappings<'_> {
        Mappings::new(self.view(), self.root, self.levels, range)
    }

    fn view(&self) -> View<'_> {
        View::new(self.memory.words(), self.encoding)
    }
}
