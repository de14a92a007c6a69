//! Frames of a bounded, sealed memfd (of the heap under Miri).

use std::sync::Arc;
use std::sync::atomic::Ordering;

#[cfg(not(miri))]
use std::os::fd::{BorrowedFd, OwnedFd};

use super::error::ArenaError;
use super::layout::{
    ABI_VERSION, Entry, FRAME_BYTES, FRAME_WORDS, HEADER_FRAMES, HEADER_LEVELS, HEADER_MAGIC,
    HEADER_VERSION, Levels, MAGIC, TableOffset,
};
use super::reader::View;
use super::words::SharedWords;

/// The header and one root: less than this holds no table at all.
const MIN_FRAMES: u32 = 2;
/// Free frames whose memory is kept for reuse; more than twice as many give memory back.
const KEEP_FRAMES: usize = 512;

/// The memory of all tables of one daemon, and the frames that are still to be had.
///
/// Memory is taken from the system when a frame is first used, so that a large limit costs
/// nothing by itself.
#[derive(Debug)]
pub struct Arena {
    memory: Arc<SharedWords>,
    /// Readers have it: nothing but this process's mapping can write to it any more.
    #[cfg(not(miri))]
    shared: bool,
    frames: u32,
    /// Frames from here on were never used.
    watermark: u32,
    /// Frames that were used before and can be used again, all zero. The first `given_back` of
    /// them hold no memory.
    free: Vec<u32>,
    given_back: usize,
    /// Frames a reader may still be inside, all zero.
    retired: Vec<u32>,
}

impl Arena {
    /// An arena of `limit_bytes`, rounded down to whole frames, but two frames at least.
    ///
    /// # Errors
    ///
    /// The limit is beyond 2^32 frames, or the system refuses the memfd or the mapping.
    pub fn new(limit_bytes: u64) -> Result<Self, ArenaError> {
        let too_large = ArenaError::TooLarge { limit_bytes };
        let Ok(frames) = u32::try_from(limit_bytes / FRAME_BYTES) else {
            return Err(too_large);
        };
        let frames = frames.max(MIN_FRAMES);
        let Ok(bytes) = usize::try_from(u64::from(frames) * FRAME_BYTES) else {
            return Err(too_large);
        };
        // The lists have room for every frame from the start, so that no commit can fail for
        // want of it. Only the part that gets used takes memory.
        let list = || {
            let mut list = Vec::new();
            list.try_reserve_exact(frames as usize)
                .map_err(|_| ArenaError::Lists { frames })?;
            Ok(list)
        };
        let arena = Self {
            memory: Arc::new(SharedWords::new(bytes)?),
            #[cfg(not(miri))]
            shared: false,
            frames,
            watermark: 1,
            free: list()?,
            given_back: 0,
            retired: list()?,
        };
        arena.set_header(HEADER_VERSION, ABI_VERSION);
        arena.set_header(HEADER_FRAMES, u64::from(frames));
        arena.set_header(HEADER_MAGIC, MAGIC);
        Ok(arena)
    }

    /// All frames, the header's own included.
    pub fn frames_total(&self) -> u64 {
        u64::from(self.frames)
    }

    /// Frames that can be had now.
    pub fn frames_free(&self) -> u64 {
        u64::from(self.frames - self.watermark) + self.free.len() as u64
    }

    /// Frames that cannot be had now: the header, tables, and retired frames.
    pub fn frames_used(&self) -> u64 {
        self.frames_total() - self.frames_free()
    }

    /// Frames that left their tree and wait for [`Self::reclaim`].
    pub fn frames_retired(&self) -> u64 {
        self.retired.len() as u64
    }

    /// The size of the memfd.
    pub fn limit_bytes(&self) -> u64 {
        self.frames_total() * FRAME_BYTES
    }

    /// [`Self::frames_used`] in bytes.
    pub fn used_bytes(&self) -> u64 {
        self.frames_used() * FRAME_BYTES
    }

    /// A descriptor for readers, who can change nothing through it: from now on no descriptor of
    /// the memfd can be written to or mapped for writing, however it is opened, and no seal can be
    /// added. This process's mapping stays as it is.
    ///
    /// Frames no longer in use keep their memory after this, since no hole can be made in the memfd.
    ///
    /// # Errors
    /// The system refuses the seals.
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

    /// The memfd.
    #[cfg(not(miri))]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// What a reader sees.
    pub fn view(&self) -> View<'_> {
        View::new(self.memory.words())
    }

    /// Makes the retired frames available again.
    ///
    /// The caller has seen to it that no reader is still inside a frame that was retired before
    /// this call. Where many frames lie unused, most of their memory goes back to the system.
    pub fn reclaim(&mut self) {
        if self.retired.is_empty() {
            return;
        }
        self.free.append(&mut self.retired);
        #[cfg(not(miri))]
        if self.shared {
            return;
        }
        if self.free.len() - self.given_back > 2 * KEEP_FRAMES {
            self.give_back();
        }
    }

    #[cold]
    fn give_back(&mut self) {
        let kept_from = self.free.len() - KEEP_FRAMES;
        if let Some(idle) = self.free.get_mut(self.given_back..kept_from) {
            idle.sort_unstable();
            for run in idle.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
                if let Some(first) = run.first() {
                    self.memory.discard(*first, run.len());
                }
            }
        }
        self.given_back = kept_from;
    }

    pub(super) fn memory(&self) -> &Arc<SharedWords> {
        &self.memory
    }

    /// A frame of zeros, or `None` where there is none to be had.
    pub(super) fn allocate(&mut self) -> Option<TableOffset> {
        let frame = match self.free.pop() {
            Some(frame) => {
                self.given_back = self.given_back.min(self.free.len());
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

    /// Takes back a frame that no entry leads to any more and that is all zero.
    pub(super) fn retire(&mut self, table: TableOffset) {
        debug_assert!(
            (0..FRAME_WORDS as u64).all(|i| self.load(table.slot(i)).is_free()),
            "a retired frame is all zero"
        );
        if let Ok(frame) = u32::try_from(table.0 / FRAME_BYTES) {
            self.retired.push(frame);
        }
    }

    /// Tells readers how deep tables can get.
    pub(super) fn note_levels(&mut self, levels: Levels) {
        let words = self.memory.words();
        let noted = words.get(HEADER_LEVELS).map(|w| w.load(Ordering::Relaxed));
        let levels = u64::from(levels.count());
        if noted.is_some_and(|noted| noted < levels) {
            self.set_header(HEADER_LEVELS, levels);
        }
    }

    fn set_header(&self, index: usize, value: u64) {
        if let Some(word) = self.memory.words().get(index) {
            word.store(value, Ordering::Release);
        }
    }

    /// The entry at `slot`, as its only writer left it.
    pub(super) fn load(&self, slot: usize) -> Entry {
        // Relaxed: all stores come from the caller itself.
        let word = self.memory.words().get(slot);
        Entry::from_bits(word.map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    /// Lets readers see `entry`, and with it all that was stored before.
    pub(super) fn store(&mut self, slot: usize, entry: Entry) {
        if let Some(word) = self.memory.words().get(slot) {
            word.store(entry.bits(), Ordering::Release);
        }
    }

    /// Frees all entries of a table, at most `used` of which are not free, and calls `each` with
    /// every one of them.
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
                word.store(0, Ordering::Release);
                each(entry);
                left -= 1;
            }
        }
    }
}
