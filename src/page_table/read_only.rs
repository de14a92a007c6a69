//! The arena of another process, mapped for reading.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use super::error::ArenaError;
use super::layout::{ABI_VERSION, FRAME_BYTES, HEADER_FRAMES, HEADER_MAGIC, HEADER_VERSION, MAGIC};
use super::reader::View;
use super::words::{MappedWords, sealed_size};

/// An arena made by another process, or by another part of this process, mapped read-only.
#[derive(Debug)]
pub struct ReadOnlyArena {
    memory: MappedWords,
}

impl ReadOnlyArena {
    /// Maps the arena behind `fd`. The caller may close `fd` afterwards.
    ///
    /// # Errors
    ///
    /// The descriptor is not a memfd sealed against shrinking, its header is not that of an arena of
    /// this version, or it cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, ArenaError> {
        let bytes = sealed_size(fd)?;
        let memory = MappedWords::map(fd, bytes, libc::PROT_READ)?;
        let header = |index: usize| {
            let word = memory.as_slice().get(index);
            word.map_or(0, |word| word.load(Ordering::Acquire))
        };
        if header(HEADER_MAGIC) != MAGIC {
            return Err(ArenaError::NotAnArena("the magic number is missing"));
        }
        if header(HEADER_VERSION) != ABI_VERSION {
            return Err(ArenaError::NotAnArena("it has another version"));
        }
        if header(HEADER_FRAMES).checked_mul(FRAME_BYTES) != u64::try_from(bytes).ok() {
            return Err(ArenaError::NotAnArena(
                "its size differs from that in its header",
            ));
        }
        Ok(Self { memory })
    }

    /// Keeps the mapping out of the children that this process forks.
    ///
    /// # Errors
    /// The system refuses.
    pub fn keep_from_children(&self) -> Result<(), ArenaError> {
        self.memory.keep_from_children()
    }

    /// A view of the arena.
    pub fn view(&self) -> View<'_> {
        View::new(self.memory.as_slice())
    }
}
