//! The arena: frames of a bounded, sealed memfd (under Miri: of the heap).

use std::sync::Arc;
use std::sync::atomic::Ordering;

#[cfg(not(miri))]
use std::os::fd::{BorrowedFd, OwnedFd};

use super::error::ArenaError;
use super::layout::{
    Encoding, Entry, FRAME_BYTES, FRAME_WORDS, Format, HEADER_LEVELS, HEADER_MAGIC, Levels, MAGIC,
    TableOffset, first_words,
};
use super::reader::View;
use super::words::SharedWords;

/// The header and one root: a smaller arena holds no table.
const MIN_FRAMES: u32 = 2;
/// The number of free frames whose memory is kept for reuse. Once twice as many free frames hold
/// memory, the arena returns the excess to the system.
const KEEP_FRAMES: usize = 512;

/// The memory of all tables of one daemon, and the allocator of its frames.
///
/// The system provides memory for a frame when the frame is first used, so a large limit costs
/// nothing by itself.
#[derive(Debug)]
pub struct Arena {
    memory: Arc<SharedWords>,
    /// Readers have the descriptor, so the memfd is sealed against writing: only this process's
    /// mapping can still write.
    #[cfg(not(miri))]
    shared: bool,
    /// See [`Arena::pin`].
    pinned: bool,
    encoding: Encoding,
    /// The guest-physical addresses that must not be mapped, because hardware finds the arena there: first and last. The
    /// first is above the last if there are none.
    own: (u64, u64),
    frames: u32,
    /// The first frame that was never used. All frames after it are unused, too.
    watermark: u32,
    /// Frames that were used before and are free again, all zero. The first `released` of them hold
    /// no memory.
    free: Vec<u32>,
    released: usize,
    /// Retired frames, which a reader may still be inside; all zero.
    retired: Vec<u32>,
    /// See [`Arena::set_record_bytes`].
    record_bytes: u64,
}

impl Arena {
    /// Makes an arena for software: [`Self::with_encoding`] in the default encoding.
    ///
    /// # Errors
    ///
    /// Those of [`Self::with_encoding`].
    pub fn new(limit_bytes: u64) -> Result<Self, ArenaError> {
        Self::with_encoding(limit_bytes, Encoding::default())
    }

    /// Makes an arena of `limit_bytes`, rounded down to whole frames, but of at least two frames.
    ///
    /// # Errors
    ///
    /// The limit exceeds 2^32 frames, the arena cannot lie at its base, or the system refuses the memfd or the mapping.
    pub fn with_encoding(limit_bytes: u64, encoding: Encoding) -> Result<Self, ArenaError> {
        let too_large = ArenaError::TooLarge { limit_bytes };
        let Ok(frames) = u32::try_from(limit_bytes / FRAME_BYTES) else {
            return Err(too_large);
        };
        let frames = frames.max(MIN_FRAMES);
        let Ok(bytes) = usize::try_from(u64::from(frames) * FRAME_BYTES) else {
            return Err(too_large);
        };
        encoding.check(bytes as u64)?;
        let own = match encoding.base {
            0 => (u64::MAX, 0),
            base => (base, base + (bytes as u64 - 1)),
        };
        // Reserve room for every frame now, so that no commit can fail for lack of it. The system
        // provides memory only for the part in use.
        let list = || {
            let mut list = Vec::new();
            list.try_reserve_exact(frames as usize)
                .map_err(|_| ArenaError::Lists { frames })?;
            Ok::<_, ArenaError>(list)
        };
        let arena = Self {
            memory: Arc::new(SharedWords::new(c"viommu-arena", bytes)?),
            #[cfg(not(miri))]
            shared: false,
            pinned: false,
            encoding,
            own,
            frames,
            watermark: 1,
            free: list()?,
            released: 0,
            retired: list()?,
            record_bytes: 0,
        };
        for (index, word) in first_words(encoding, frames) {
            arena.set_header(index, word);
        }
        arena.set_header(HEADER_MAGIC, MAGIC);
        Ok(arena)
    }

    /// How the tables are encoded.
    #[inline(always)]
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The format of the tables.
    #[inline(always)]
    pub fn format(&self) -> Format {
        self.encoding.format
    }

    /// Whether hardware that walks the tables finds a part of the arena at the guest-physical addresses `first..=last`.
    /// Never with base 0.
    #[inline(always)]
    pub(super) fn lies_in(&self, first: u64, last: u64) -> bool {
        first <= self.own.1 && last >= self.own.0
    }

    /// The number of frames, including the header.
    pub fn frames_total(&self) -> u64 {
        u64::from(self.frames)
    }

    /// Frames available now.
    pub fn frames_free(&self) -> u64 {
        let unused = u64::from(self.frames - self.watermark) + self.free.len() as u64;
        unused.saturating_sub(self.record_bytes.div_ceil(FRAME_BYTES))
    }

    /// Counts `bytes` of other memory, which belongs to the same budget, as used frames.
    pub fn set_record_bytes(&mut self, bytes: u64) {
        self.record_bytes = bytes;
    }

    /// The frames that [`Self::set_record_bytes`] would take with `bytes`, beside those it has taken.
    pub fn frames_for_records(&self, bytes: u64) -> u64 {
        let taken = self.record_bytes.div_ceil(FRAME_BYTES);
        bytes.div_ceil(FRAME_BYTES).saturating_sub(taken)
    }

    /// Frames not available now: the header, tables, endpoint slots, retired frames and records.
    pub fn frames_used(&self) -> u64 {
        self.frames_total() - self.frames_free()
    }

    /// Retired frames: they have left their tree and wait for [`Self::reclaim`].
    pub fn frames_retired(&self) -> u64 {
        self.retired.len() as u64
    }

    /// The size of the memfd in bytes.
    pub fn limit_bytes(&self) -> u64 {
        self.frames_total() * FRAME_BYTES
    }

    /// [`Self::frames_used`] in bytes.
    pub fn used_bytes(&self) -> u64 {
        self.frames_used() * FRAME_BYTES
    }

    /// Seals the memfd against writing and returns a descriptor for readers.
    ///
    /// From this call on no descriptor of the memfd can be written to or mapped for writing, however
    /// it is opened, and no further seal can be added. This process's mapping stays writable. Free
    /// frames keep their memory from now on, because the seal also forbids holes.
    ///
    /// # Errors
    /// The system refuses the seals or the copy of the descriptor.
    #[cfg(not(miri))]
    pub fn share(&mut self) -> Result<OwnedFd, ArenaError> {
        if !self.shared {
            let seals = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
            self.memory.add_seals(seals)?;
            self.shared = true;
        }
        let copy = self.memory.fd().try_clone_to_owned();
        copy.map_err(|source| ArenaError::System {
            action: "copy the descriptor of the memfd",
            source,
        })
    }

    /// Keeps every frame's memory where it is, for as long as the arena exists. Must be called before hardware gets the
    /// memory: it pins the frames, and would not notice that a hole in the memfd is filled by other memory.
    pub fn pin(&mut self) {
        self.pinned = true;
    }

    /// The memfd.
    #[cfg(not(miri))]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// The view that a reader has.
    pub fn view(&self) -> View<'_> {
        View::new(self.memory.words(), self.encoding)
    }

    /// Makes the retired frames available again.
    ///
    /// No reader may still be inside a frame that was retired before this call; the caller must
    /// ensure that. If many frames are free, most of their memory goes back to the system.
    pub fn reclaim(&mut self) {
        if self.retired.is_empty() {
            return;
        }
        self.free.append(&mut self.retired);
        if self.pinned {
            return;
        }
        #[cfg(not(miri))]
        if self.shared {
            return;
        }
        if self.free.len() - self.released > 2 * KEEP_FRAMES {
            self.release_memory();
        }
    }

    #[cold]
    fn release_memory(&mut self) {
        let kept_from = self.free.len() - KEEP_FRAMES;
        if let Some(idle) = self.free.get_mut(self.released..kept_from) {
            idle.sort_unstable();
            for run in idle.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
                if let Some(first) = run.first() {
                    self.memory.discard(*first, run.len());
                }
            }
        }
        self.released = kept_from;
    }

    /// The memory, for the descriptor that a later process gets.
    pub fn memory(&self) -> &Arc<SharedWords> {
        &self.memory
    }

    /// Takes a frame of zeros, or `None` if no frame is free.
    pub(super) fn allocate(&mut self) -> Option<TableOffset> {
        let frame = match self.free.pop() {
            Some(frame) => {
                self.released = self.released.min(self.free.len());
                frame
            }
            None if self.watermark < self.frames => {
                self.watermark += 1;
                self.watermark - 1
            }
            None => return None,
        };
        Some(TableOffset(u64::from(frame) * FRAME_BYTES))
    }

    /// Retires a frame. It must be all zero, and no entry may point to it any more.
    pub(super) fn retire(&mut self, table: TableOffset) {
        debug_assert!(
            (0..FRAME_WORDS as u64).all(|i| self.load(table.slot(i)).is_free()),
            "a retired frame is all zero"
        );
        if let Ok(frame) = u32::try_from(table.0 / FRAME_BYTES) {
            self.retired.push(frame);
        }
    }

    /// Records the levels of a new table in the header, for readers.
    pub(super) fn note_levels(&mut self, levels: Levels) {
        let words = self.memory.words();
        let noted = words.get(HEADER_LEVELS).map(|w| w.load(Ordering::Relaxed));
        let levels = u64::from(levels.count());
        if noted.is_some_and(|noted| noted < levels) {
            self.set_header(HEADER_LEVELS, levels);
        }
    }

    fn set_header(&self, index: usize, value: u64) {
        self.memory.store(index, value);
    }

    /// The entry at `slot`.
    pub(super) fn load(&self, slot: usize) -> Entry {
        // Relaxed suffices: this is the only writer, so every store is the caller's own.
        let word = self.memory.words().get(slot);
        Entry::from_bits(word.map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    /// Stores `entry`. A reader that sees it also sees everything stored before.
    pub(super) fn store(&mut self, slot: usize, entry: Entry) {
        self.memory.store(slot, entry.bits());
    }

    /// Frees all entries of a table, and calls `each` with every entry that was in use. At most
    /// `used` entries may be in use.
    pub(super) fn clear(&mut self, table: TableOffset, used: u64, mut each: impl FnMut(Entry)) {
        let first = table.slot(0);
        let words = self.memory.words().get(first..).unwrap_or(&[]);
        let mut left = used;
        for word in words.iter().take(FRAME_WORDS) {
            if left == 0 {
                return;
            }
            let entry = Entry::from_bits(word.load(Ordering::Relaxed));
            if !entry.is_free() {
                SharedWords::set(word, 0);
                each(entry);
                left -= 1;
            }
        }
    }
}
