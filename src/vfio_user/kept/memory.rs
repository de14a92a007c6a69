//! Memory that outlives the process: sealed memfds and their mappings.

#![expect(unsafe_code, reason = "maps memfds")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

use super::crash;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Makes a memfd of `bytes` zeros, which takes memory only where it is written.
///
/// # Errors
/// The system refuses.
pub(super) fn new_memfd(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
    Ok(file)
}

/// Checks a memfd that an earlier process has left: its size is `bytes`, and nobody can change that.
///
/// # Errors
/// It is another file.
pub(super) fn check_memfd(file: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    let Ok(seals) = fcntl_get_seals(file) else {
        return refused("it is not a memfd");
    };
    if !seals.contains(SEALS) || u64::try_from(fstat(file)?.st_size) != Ok(bytes) {
        return refused("its memfd has another size or is not sealed");
    }
    Ok(())
}

/// The mapping of a part of a memfd. No other mapping of that part is in use, in this process or in another one.
pub(super) struct MappedBytes(MmapRegion<()>);

impl MappedBytes {
    /// Maps `bytes` from `at` on. The memfd must be sealed, and be that long.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn map(file: BorrowedFd<'_>, at: u64, bytes: usize) -> io::Result<Self> {
        let file = File::from(file.try_clone_to_owned()?);
        let region = MmapRegion::from_file(FileOffset::new(file, at), bytes);
        region.map(Self).map_err(io::Error::other)
    }

    pub(super) fn len(&self) -> usize {
        self.0.size()
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY:
        // - start and length: those of the mapping, which lives as long as this value. The memfd is sealed against
        //   shrinking, so no page can disappear
        // - aliasing: no other mapping of this part is in use (the type's contract), and `as_mut_slice` borrows mutably.
        //   The process that keeps the memfd does not map it
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.size()) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY:
        // - as for `as_slice`. The mapping is writable
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), self.0.size()) }
    }

    /// Gives the memory from `at` on back, up to `end`; both become whole pages within. The bytes there become zeros.
    /// Whoever refers to a page, such as a socket's queue, keeps the page with its old bytes.
    pub(super) fn discard(&mut self, at: usize, end: usize) {
        const PAGE: usize = 4096;
        let (at, end) = (at.next_multiple_of(PAGE), end.min(self.len()) / PAGE * PAGE);
        if at >= end {
            return;
        }
        let start = self.0.as_ptr().wrapping_add(at).cast();
        // SAFETY:
        // - the range: whole pages within the mapping, which is borrowed mutably; the bytes change to zeros only
        let done = unsafe { libc::madvise(start, end - at, libc::MADV_REMOVE) };
        debug_assert_eq!(done, 0, "the memory stays");
    }
}

/// The words of a record. All accesses are atomic: any thread may look at them.
pub(super) struct Words(MmapRegion<()>);

impl Words {
    /// Maps the first `bytes` of a memfd, which must be sealed.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn map(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        Ok(Self(MappedBytes::map(file.as_fd(), 0, bytes)?.0))
    }

    fn as_slice(&self) -> &[AtomicU64] {
        let len = self.0.size() / size_of::<AtomicU64>();
        // SAFETY:
        // - start and length: those of the mapping, which lives as long as this value, and whose pages are aligned
        // - aliasing: everybody accesses these words through atomics only
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<AtomicU64>(), len) }
    }

    /// The word at `index`; 0 outside of the memory.
    pub(super) fn get(&self, index: usize) -> u64 {
        let word = self.as_slice().get(index);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Stores a word after everything that was stored before. Does nothing outside of the memory.
    ///
    /// A process dies as a whole, so the order of one thread's stores is all that counts.
    #[inline]
    pub(super) fn set(&self, index: usize, value: u64) {
        if crash::step()
            && let Some(word) = self.as_slice().get(index)
        {
            word.store(value, Ordering::Release);
        }
    }

    /// Stores a word of something that a later store makes count.
    #[inline]
    pub(super) fn prepare(&self, index: usize, value: u64) {
        if !crash::is_dead()
            && let Some(word) = self.as_slice().get(index)
        {
            word.store(value, Ordering::Relaxed);
        }
    }
}
