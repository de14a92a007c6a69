//! The guest RAM that a reader has mapped.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::error::ConnectError;

/// A piece of guest RAM.
pub(super) type Region = Arc<GuestRegionMmap>;

#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pub(super) generation: u64,
    pub(super) regions: GuestMemoryMmap,
}

/// What the thread that listens knows of guest memory.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) regions: Vec<Region>,
    /// Some has gone that accesses in progress may still use.
    pub(super) some_went: bool,
}

pub(super) fn map_region(
    file: File,
    first: u64,
    length: u64,
    offset: u64,
) -> Result<Region, ConnectError> {
    let refuse = |why: String| {
        ConnectError::Memory(format!(
            "{length:#x} bytes at guest-physical {first:#x}: {why}"
        ))
    };
    let size = usize::try_from(length).map_err(|e| refuse(e.to_string()))?;
    let memory = MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|e| refuse(e.to_string()))?;
    GuestRegionMmap::new(memory, GuestAddress(first))
        .map(Arc::new)
        .ok_or_else(|| refuse("it passes the last address".into()))
}
