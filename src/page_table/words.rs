//! Words of memory shared between processes, in a sealed memfd (under Miri: on the heap).

#![expect(unsafe_code, reason = "makes and maps memory")]

use std::ffi::CStr;
use std::io;
#[cfg(not(miri))]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::ArenaError;
#[cfg(not(miri))]
use super::layout::FRAME_BYTES;

/// Mapped words. Threads and other processes share them, so every access is atomic.
#[derive(Debug)]
pub struct MappedWords {
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY:
// - this value alone owns the mapping until it is dropped, and no thread has a claim to it
unsafe impl Send for MappedWords {}

// SAFETY:
// - a shared reference gives access to atomics only
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// The words.
    pub fn as_slice(&self) -> &[AtomicU64] {
        // SAFETY:
        // - start and len: describe memory that `map` (or `heap`) made and that lives until drop;
        //   every byte is initialised, to zero or by a store
        // - alignment: `map` returns whole pages, `heap` allocates words
        // - aliasing: this process and all others access the memory through atomics only
        // - validity: the memfd is sealed against shrinking, so no page can disappear
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

#[cfg(not(miri))]
impl MappedWords {
    /// Maps the first `bytes` of a memfd, which must be sealed against shrinking (see
    /// [`sealed_size`]).
    ///
    /// # Errors
    /// The system refuses.
    pub fn map(
        fd: BorrowedFd<'_>,
        bytes: usize,
        protection: libc::c_int,
    ) -> Result<Self, ArenaError> {
        // SAFETY:
        // - no address is requested, so the call replaces no existing mapping
        // - the descriptor is borrowed and therefore open
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(system_error("map the memfd"));
        }
        let Some(start) = NonNull::new(start.cast()) else {
            return Err(ArenaError::NotAnArena("it was mapped at address 0"));
        };
        Ok(Self {
            start,
            len: bytes / size_of::<AtomicU64>(),
        })
    }

    /// Keeps the mapping out of the children that this process forks.
    ///
    /// # Errors
    /// The system refuses.
    pub fn keep_from_children(&self) -> Result<(), ArenaError> {
        let start = self.start.as_ptr().cast();
        let bytes = self.len * size_of::<AtomicU64>();
        // SAFETY:
        // - start and bytes: the mapping of this value; the advice changes nothing in this process
        if unsafe { libc::madvise(start, bytes, libc::MADV_DONTFORK) } != 0 {
            return Err(system_error("keep the memfd from child processes"));
        }
        Ok(())
    }
}

#[cfg(not(miri))]
impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY:
        // - start and len: returned by mmap in `map`, and unmapped nowhere else
        // - no reference remains: references borrow from this value
        unsafe {
            libc::munmap(
                self.start.as_ptr().cast(),
                self.len * size_of::<AtomicU64>(),
            )
        };
    }
}

#[cfg(miri)]
impl MappedWords {
    fn heap(bytes: usize) -> Self {
        let words = (0..bytes / size_of::<AtomicU64>()).map(|_| AtomicU64::new(0));
        let words: Box<[AtomicU64]> = words.collect();
        let len = words.len();
        let start = NonNull::from(Box::leak(words)).cast();
        Self { start, len }
    }
}

#[cfg(miri)]
impl Drop for MappedWords {
    fn drop(&mut self) {
        let words = std::ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.len);
        // SAFETY:
        // - start and len: those of the box that `heap` leaked, which is freed nowhere else
        drop(unsafe { Box::from_raw(words) });
    }
}

/// Words in a memfd that other processes can map. All are zero at first.
#[derive(Debug)]
pub struct SharedWords {
    words: MappedWords,
    #[cfg(not(miri))]
    fd: OwnedFd,
}

impl SharedWords {
    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        self.words.as_slice()
    }

    /// Stores `value` in the word at `index`. Does nothing outside of the memory.
    #[inline(always)]
    pub fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.words().get(index) {
            Self::set(word, value);
        }
    }

    /// Stores `value` in one of the [`Self::words`]. A reader that sees it also sees everything stored before.
    ///
    /// Every store of this process to memory that outlives it goes through this function, so that a test can end the
    /// process after any of them.
    #[inline(always)]
    pub fn set(word: &AtomicU64, value: u64) {
        #[cfg(all(test, feature = "daemon"))]
        if super::crash::is_dead() {
            return;
        }
        word.store(value, Ordering::Release);
        #[cfg(all(test, feature = "daemon"))]
        super::crash::point();
    }

    /// Allocates `bytes` of memory.
    ///
    /// # Errors
    /// Never.
    #[cfg(miri)]
    pub fn new(_name: &CStr, bytes: usize) -> Result<Self, ArenaError> {
        let words = MappedWords::heap(bytes);
        Ok(Self { words })
    }

    /// Allocates `bytes` of memory in a memfd sealed against shrinking and growing. An operator sees `name` in `/proc`.
    ///
    /// # Errors
    /// The system refuses.
    #[cfg(not(miri))]
    pub fn new(name: &CStr, bytes: usize) -> Result<Self, ArenaError> {
        let fd = memfd(name)?;
        let Ok(length) = libc::off_t::try_from(bytes) else {
            return Err(ArenaError::TooLarge {
                limit_bytes: bytes as u64,
            });
        };
        // SAFETY:
        // - the descriptor is open and owned by this function; no pointer is passed
        if unsafe { libc::ftruncate(fd.as_raw_fd(), length) } != 0 {
            return Err(system_error("set the size of the memfd"));
        }
        add_seals(&fd, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
        let words = MappedWords::map(fd.as_fd(), bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { words, fd })
    }

    /// Maps the memory that another process has allocated, which must have `bytes`.
    ///
    /// # Errors
    /// It is not a memfd of that size that is sealed against shrinking, or the system refuses.
    #[cfg(not(miri))]
    pub fn adopt(fd: OwnedFd, bytes: usize) -> Result<Self, ArenaError> {
        if sealed_size(fd.as_fd())? != bytes {
            return Err(ArenaError::NotAnArena("it has another size"));
        }
        let words = MappedWords::map(fd.as_fd(), bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { words, fd })
    }

    /// The memfd.
    #[cfg(not(miri))]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Adds seals to the memfd.
    ///
    /// # Errors
    /// The system refuses.
    #[cfg(not(miri))]
    pub fn add_seals(&self, seals: libc::c_int) -> Result<(), ArenaError> {
        add_seals(&self.fd, seals)
    }

    #[cfg(miri)]
    pub(super) fn discard(&self, _first: u32, _frames: usize) {}

    /// Returns the memory of `frames` frames from frame `first` on to the system. The frames must be
    /// all zero, and still read as zero afterwards.
    #[cfg(not(miri))]
    pub(super) fn discard(&self, first: u32, frames: usize) {
        let offset = libc::off_t::try_from(u64::from(first) * FRAME_BYTES);
        let length = libc::off_t::try_from(frames as u64 * FRAME_BYTES);
        let (Ok(offset), Ok(length)) = (offset, length) else {
            return;
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY:
        // - the descriptor is open and owned by this value; no pointer is passed
        // - the call replaces mapped pages by zeros; the caller ensures that the pages are zero already
        let failed = unsafe { libc::fallocate(self.fd.as_raw_fd(), mode, offset, length) } != 0;
        if failed {
            // Harmless: the process only keeps more memory than it needs.
            log::debug!(
                "cannot return page table memory to the system: {}",
                last_error()
            );
        }
    }
}

#[cfg(not(miri))]
fn memfd(name: &CStr) -> Result<OwnedFd, ArenaError> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Some hosts refuse memfds that could be executed, and older kernels refuse the unknown flag.
    for flags in [flags | libc::MFD_NOEXEC_SEAL, flags] {
        // SAFETY:
        // - the name is a zero-terminated string that outlives the call
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY:
            // - the descriptor is new and has no other owner
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(system_error("make a memfd"))
}

#[cfg(not(miri))]
fn add_seals(fd: &OwnedFd, seals: libc::c_int) -> Result<(), ArenaError> {
    // SAFETY:
    // - the descriptor is borrowed and therefore open; no pointer is passed
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(system_error("seal the memfd"));
    }
    Ok(())
}

/// The size of a memfd in bytes. Checks first that the file cannot shrink under its readers.
///
/// # Errors
/// The descriptor is not a memfd sealed against shrinking, or the file is empty.
#[cfg(not(miri))]
pub fn sealed_size(fd: BorrowedFd<'_>) -> Result<usize, ArenaError> {
    // SAFETY:
    // - the descriptor is borrowed and therefore open; no pointer is passed
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(ArenaError::NotAnArena("it is not sealed against shrinking"));
    }
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY:
    // - the descriptor is borrowed and therefore open
    // - the pointer is valid for writes of one `stat`
    if unsafe { libc::fstat(fd.as_raw_fd(), status.as_mut_ptr()) } != 0 {
        return Err(system_error("find the size of the memfd"));
    }
    // SAFETY:
    // - fstat succeeded, so it initialised the whole structure
    let size = unsafe { status.assume_init() }.st_size;
    match usize::try_from(size) {
        Ok(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(ArenaError::NotAnArena("it is empty")),
    }
}

#[cfg(not(miri))]
fn system_error(action: &'static str) -> ArenaError {
    let source = last_error();
    ArenaError::System { action, source }
}

#[cfg(not(miri))]
fn last_error() -> io::Error {
    io::Error::last_os_error()
}
