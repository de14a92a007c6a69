//! Guest RAM that a reader has mapped.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use super::error::ConnectError;
use crate::locks::{Mutex, Rank};
use crate::shadow::sys::keep_from_children;

/// A piece of guest RAM, mapped into this process.
pub(super) type RamRegion = Arc<GuestRegionMmap>;

/// Guest RAM of one generation.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Counted by this library, over all registrations: a new daemon counts anew.
    pub(super) generation: u64,
    pub(super) regions: GuestMemoryMmap,
    /// The same regions.
    list: Vec<RamRegion>,
}

/// The guest RAM that accesses see. It outlives a registration.
#[derive(Debug)]
pub(super) struct Views {
    pub(super) current: Mutex<Memory>,
    /// Views of an older generation than this hold memory that the VMM has removed.
    pub(super) valid_from: AtomicU64,
}

impl Views {
    pub(super) fn new() -> Self {
        Self {
            current: Mutex::new(Rank::ReaderMemory, Memory::default()),
            valid_from: AtomicU64::new(0),
        }
    }

    /// Ends all views taken so far: they hold a region that was removed. Accesses through them fail from now on.
    pub(super) fn outdate(&self) {
        let next = self.current.lock().generation + 1;
        self.valid_from.fetch_max(next, Ordering::Release);
    }

    /// Makes `list`, which is in order, the memory of the next generation.
    fn publish(&self, list: Vec<RamRegion>) -> Result<(), ConnectError> {
        let regions = if list.is_empty() {
            GuestMemoryMmap::new()
        } else {
            let all = GuestMemoryMmap::from_arc_regions(list.clone());
            all.map_err(|e| ConnectError::Memory(e.to_string()))?
        };
        let mut current = self.current.lock();
        *current = Memory {
            generation: current.generation + 1,
            regions,
            list,
        };
        Ok(())
    }

    /// Makes `list`, which a new daemon has announced, the memory of the next generation if it is not the present one.
    fn publish_if_new(&self, list: Vec<RamRegion>) -> Result<(), ConnectError> {
        let current = self.current.lock();
        let is_here = |old: &RamRegion| list.iter().any(|region| Arc::ptr_eq(region, old));
        let all_here = current.list.iter().all(is_here);
        // The daemon before may have announced that it removes memory, and no more.
        let is_valid = self.valid_from.load(Ordering::Acquire) <= current.generation;
        if all_here && is_valid && current.list.len() == list.len() {
            return Ok(());
        }
        drop(current);
        if !all_here {
            self.outdate();
        }
        self.publish(list)
    }

    /// The present region with these bytes of `file`, if there is one.
    fn find(&self, file: &File, first: u64, length: u64, offset: u64) -> Option<RamRegion> {
        let current = self.current.lock();
        let same = |region: &&RamRegion| is_same(region, file, first, length, offset);
        current.list.iter().find(same).cloned()
    }
}

/// Guest RAM as one daemon has announced it so far. Only the registration's thread uses it.
#[derive(Debug, Default)]
pub(super) struct AnnouncedMemory {
    regions: Vec<RamRegion>,
    /// The daemon has announced its first complete memory.
    was_complete: bool,
    /// A region was removed since the last complete generation; accesses in progress may still use it.
    has_removed: bool,
}

impl AnnouncedMemory {
    /// Adds a region that the daemon announces. A region of the daemon before is not mapped again, and views of it stay
    /// usable.
    pub(super) fn add(
        &mut self,
        views: &Views,
        file: File,
        [first, length, offset]: [u64; 3],
    ) -> Result<(), ConnectError> {
        let known = if self.was_complete {
            None
        } else {
            views.find(&file, first, length, offset)
        };
        let region = match known {
            Some(region) => region,
            None => map_region(file, first, length, offset)?,
        };
        self.regions.push(region);
        Ok(())
    }

    /// Removes the region at `first`. Accesses in progress may still use it.
    pub(super) fn remove(&mut self, first: u64) {
        let stays = |region: &RamRegion| region.start_addr() != GuestAddress(first);
        self.regions.retain(stays);
        self.has_removed = true;
    }

    /// Makes what was announced the memory of `views`. Returns whether accesses in progress may use a region that is not
    /// part of it.
    pub(super) fn publish(&mut self, views: &Views) -> Result<bool, ConnectError> {
        self.regions.sort_by_key(|region| region.start_addr());
        if self.was_complete {
            views.publish(self.regions.clone())?;
        } else {
            // No access is in progress before the end of the handshake.
            views.publish_if_new(self.regions.clone())?;
        }
        self.was_complete = true;
        Ok(std::mem::take(&mut self.has_removed))
    }
}

/// Whether `region` is the memory of these bytes of `file`, at the same place. An inode number is not used again while the
/// region holds its file open.
fn is_same(region: &RamRegion, file: &File, first: u64, length: u64, offset: u64) -> bool {
    let backing = region.file_offset().filter(|f| f.start() == offset);
    let Some(backing) = backing else {
        return false;
    };
    if region.start_addr() != GuestAddress(first) || region.len() != length {
        return false;
    }
    let (Ok(old), Ok(new)) = (backing.file().metadata(), file.metadata()) else {
        return false;
    };
    (old.dev(), old.ino()) == (new.dev(), new.ino())
}

fn map_region(file: File, first: u64, length: u64, offset: u64) -> Result<RamRegion, ConnectError> {
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
