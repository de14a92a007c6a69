//! The arena of another process, mapped for reading.

use std::os::fd::BorrowedFd;

use super::error::ArenaError;
use super::layout::{Encoding, read_header};
use super::reader::View;
use super::words::{MappedWords, sealed_size};

/// An arena made by another process, or by another part of this process, mapped read-only.
#[derive(Debug)]
pub struct ReadOnlyArena {
    memory: MappedWords,
    /// Read once: the writer never changes it.
    encoding: Encoding,
}

impl ReadOnlyArena {
    /// Maps the arena behind `fd`. The caller may close `fd` afterwards.
    ///
    /// # Errors
    ///
    /// The descriptor is not a memfd sealed against shrinking, its header is not that of an arena of a
    /// known version and format, or it cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, ArenaError> {
        let bytes = sealed_size(fd)?;
        let memory = MappedWords::map(fd, bytes, libc::PROT_READ)?;
        let encoding = read_header(memory.as_slice(), bytes)?;
        Ok(Self { memory, encoding })
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
        View::new(self.memory.as_slice(), self.encoding)
    }
}
