//! Guest RAM that a reader has mapped.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::error::ConnectError;
use crate::shadow::sys::keep_from_children;

/// A piece of guest RAM, mapped into this process.
pub(super) type RamRegion = Arc<GuestRegionMmap>;

#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pub(super) generation: u64,
    pub(super) regions: GuestMemoryMmap,
}

/// Guest RAM as the daemon has announced it so far. Only the session's thread uses it.
#[derive(Debug, Default)]
pub(super) struct AnnouncedMemory {
    pub(super) regions: Vec<RamRegion>,
    /// A region was removed since the last complete generation; accesses in progress may still use it.
    pub(super) has_removed: bool,
}

pub(super) fn map_region(
    file: File,
    first: u64,
    length: u64,
    offset: u64,
) -> Result<RamRegion, ConnectError> {
    let refuse = |why: String| {
        ConnectError::Memory(format!(
            "{length:#x} bytes at guest-physical {first:#x}: {why}"
        ))
    };
    let size = usize::try_from(length).map_err(|e| refuse(e.to_string()))?;
    let memory = MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|e| refuse(e.to_string()))?;
    keep_from_children(memory.as_ptr(), memory.size()).map_err(|e| refuse(e.to_string()))?;
    GuestRegionMmap::new(memory, GuestAddress(first))
        .map(Arc::new)
        .ok_or_else(|| refuse("it passes the last guest-physical address".into()))
}
