//! Guest memory as the frontend describes it.

use std::io;
use std::os::unix::fs::MetadataExt;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::address::{Gpa, GpaRange};
use crate::backends::MemorySlot;

/// Refuses regions that reach past the end of their file: touching those would be fatal.
///
/// A file that shrinks later still is; sealed memfds, which VMMs use, cannot.
///
/// # Errors
/// Names the region.
pub fn check_regions(memory: &GuestMemoryMmap) -> io::Result<()> {
    for region in memory.iter() {
        let Some(backing) = region.file_offset() else {
            continue;
        };
        let size = backing.file().metadata()?.len();
        let fits = backing
            .start()
            .checked_add(region.len())
            .is_some_and(|end| end <= size);
        if !fits {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "memory region of {:#x} bytes at guest-physical {:#x} reaches past the end of \
                     its file of {size:#x} bytes",
                    region.len(),
                    region.start_addr().0
                ),
            ));
        }
    }
    Ok(())
}

/// Whether there is memory at every address of `len` bytes from `at`.
pub fn is_backed(memory: &GuestMemoryMmap, at: Gpa, len: usize) -> bool {
    GuestMemoryBackend::check_range(memory, GuestAddress(at.0), len)
}

/// The slots that DMA may reach: all that the frontend shares as a file.
///
/// # Errors
/// Where the system will not tell which file it is.
pub fn slots(memory: &GuestMemoryMmap) -> io::Result<Vec<MemorySlot>> {
    let mut slots = Vec::new();
    for region in memory.iter() {
        let (Some(backing), Some(range)) = (
            region.file_offset(),
            GpaRange::from_len(Gpa(region.start_addr().0), region.len()),
        ) else {
            continue;
        };
        let metadata = backing.file().metadata()?;
        slots.push(MemorySlot {
            range,
            memory: region.get_mmap(),
            file: backing.arc().clone(),
            offset: backing.start(),
            identity: (metadata.dev(), metadata.ino()),
        });
    }
    Ok(slots)
}
