//! Guest RAM for tests.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

use super::MemorySlot;
use crate::address::{Gpa, GpaRange};
use crate::vfio::fake::{identity, memfd};

/// A memory slot in a new file, from byte `offset` on.
pub(crate) fn slot(gpa: u64, len: u64, offset: u64) -> MemorySlot {
    slot_of(memfd(offset + len), gpa, len, offset)
}

/// A memory slot in `file`, from byte `offset` on.
pub(crate) fn slot_of(file: File, gpa: u64, len: u64, offset: u64) -> MemorySlot {
    let file = Arc::new(file);
    let backing = FileOffset::from_arc(file.clone(), offset);
    let size = usize::try_from(len).expect("small");
    MemorySlot {
        range: GpaRange::from_len(Gpa(gpa), len).expect("not empty"),
        memory: Arc::new(MmapRegion::from_file(backing, size).expect("mapped")),
        offset,
        block_len: 4096,
        is_shared_memory: true,
        identity: identity(&file),
        file,
    }
}
