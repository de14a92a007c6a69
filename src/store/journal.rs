//! The journal: the requests of the batch that is in progress, and the phase of each.
//!
//! An entry is one cache line. Word 0, sealed, holds everything that changes. The words 1 to 5 hold the first 40 bytes of
//! the request, and word 6 their check. A request takes seven stores when its batch is taken off the ring, one when it is
//! planned and one when it is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{
    ENTRY_WORDS, HEADER_ENTRIES, JOURNAL_AT, JOURNAL_ENTRIES, RING_BATCH, RING_PUBLISHED,
    entry_salt, header_salt, seal, value_of,
};
use crate::page_table::words::SharedWords;
use crate::protocol::reply::Status;

/// Bytes of a request that the journal keeps. All that a longer request (PROBE) has beyond them is reserved.
pub const KEPT_BYTES: usize = 40;

/// Words of a request that the journal keeps.
pub const KEPT_WORDS: usize = KEPT_BYTES / 8;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing has happened.
    Taken = 1,
    /// All mappings in its range, in the table and in backends, are this request's. For ATTACH and DETACH: backends may
    /// have switched endpoints.
    Planned = 2,
    /// It has a status, and must not be executed again.
    Done = 3,
    /// Taken by an earlier process: nothing has happened, and this process has not begun it.
    Waiting = 4,
}

/// The status of a chain that is returned unwritten, with the used length 0.
pub const UNWRITTEN: u8 = 0xff;

/// The status byte of a request that has succeeded.
pub const STATUS_OK: u8 = Status::Ok as u8;
/// The status byte of a request with which the device has failed.
pub const STATUS_DEVERR: u8 = Status::DevErr as u8;

/// The length of a request whose bytes are not in guest memory.
pub const UNREADABLE: u8 = 0xff;
/// The length of a request whose chain is malformed.
pub const MALFORMED: u8 = 0xfe;

/// Word 0 of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// How far the request has come.
    pub phase: Phase,
    /// The status byte of its answer, or [`UNWRITTEN`]; only if it is done.
    pub status: u8,
    /// The number of processes that have died while the request was in progress.
    pub attempts: u8,
    /// The number of its bytes, or [`UNREADABLE`], or [`MALFORMED`].
    pub len: u8,
    /// Index of its chain's first descriptor.
    pub head: u16,
}

impl EntryState {
    const PHASE: u64 = 0xff;
    const STATUS_SHIFT: u32 = 8;

    /// The value of the sealed word.
    #[inline(always)]
    pub fn bits(self) -> u64 {
        self.phase as u64
            | u64::from(self.status) << Self::STATUS_SHIFT
            | u64::from(self.attempts) << 16
            | u64::from(self.len) << 24
            | u64::from(self.head) << 32
    }

    /// Decodes the value; `None` if it has an unknown phase.
    pub fn from_bits(bits: u64) -> Option<Self> {
        let [phase, status, attempts, len, low, high, _, _] = bits.to_le_bytes();
        let phase = match phase {
            1 => Phase::Taken,
            2 => Phase::Planned,
            3 => Phase::Done,
            4 => Phase::Waiting,
            _ => return None,
        };
        Some(Self {
            phase,
            status,
            attempts,
            len,
            head: u16::from_le_bytes([low, high]),
        })
    }
}

/// The batch in progress, and the indices of the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingBatch {
    /// The ring's next available index before the batch was taken.
    pub next_avail: u16,
    /// The ring's next used index before the first answer of the batch.
    pub next_used: u16,
    /// The number of requests in the batch; 0 between batches.
    pub count: u16,
}

impl RingBatch {
    /// The value of the sealed word. 0 stands for a ring that has served no request. The count is stored plus one, so
    /// that no batch has the value 0.
    #[inline(always)]
    pub fn bits(self) -> u64 {
        u64::from(self.next_avail)
            | u64::from(self.next_used) << 16
            | (u64::from(self.count) + 1) << 32
    }

    /// Decodes the value; `None` if the ring has served no request.
    pub fn from_bits(bits: u64) -> Option<Self> {
        let [a, b, c, d, e, f, _, _] = bits.to_le_bytes();
        Some(Self {
            next_avail: u16::from_le_bytes([a, b]),
            next_used: u16::from_le_bytes([c, d]),
            count: u16::from_le_bytes([e, f]).checked_sub(1)?,
        })
    }
}

/// The check of the words of a request.
#[inline(always)]
pub fn check_request(words: &[u64; KEPT_WORDS]) -> u64 {
    let [a, b, c, d, e] = *words;
    a ^ b.rotate_left(7)
        ^ c.rotate_left(17)
        ^ d.rotate_left(29)
        ^ e.rotate_left(41)
        ^ 0x6a6f_7572_6e61_6c21
}

/// No request of a batch is in progress.
const NO_ENTRY: usize = usize::MAX / 2;

/// Writes the journal.
#[derive(Debug)]
pub struct Journal {
    memory: Arc<SharedWords>,
    /// Requests are written down. If not, no call has an effect.
    is_kept: bool,
    /// The entry of the request in progress, or [`NO_ENTRY`].
    current: usize,
    published: u16,
}

impl Journal {
    pub(super) fn new(memory: Arc<SharedWords>) -> Self {
        Self {
            memory,
            is_kept: false,
            current: NO_ENTRY,
            published: 0,
        }
    }

    /// Writes requests down from now on. The header says so: without a journal a store cannot be taken over.
    pub(super) fn keep(&mut self) {
        self.is_kept = true;
        self.clear();
        self.memory.store(HEADER_ENTRIES, JOURNAL_ENTRIES as u64);
    }

    /// Whether requests are written down.
    #[inline(always)]
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Writes the entry at `index` of the batch that is being taken off the ring. `len` as in [`EntryState`].
    #[inline(always)]
    pub fn take(&self, index: usize, head: u16, len: u8, words: &[u64; KEPT_WORDS]) {
        let Some(entry) = self.entry(index) else {
            return;
        };
        let state = EntryState {
            phase: Phase::Taken,
            status: 0,
            attempts: 0,
            len,
            head,
        };
        write_entry(entry, index, state, words);
    }

    /// Begins the batch whose entries were [taken](Self::take).
    #[inline(always)]
    pub fn begin_batch(&mut self, batch: RingBatch) {
        self.publish_word(0, 0);
        self.published = 0;
        self.header(RING_BATCH, batch.bits());
    }

    /// Ends the batch. `next_avail` and `next_used` are the ring's indices.
    #[inline(always)]
    pub fn end_batch(&mut self, next_avail: u16, next_used: u16) {
        self.current = NO_ENTRY;
        let idle = RingBatch {
            next_avail,
            next_used,
            count: 0,
        };
        self.header(RING_BATCH, idle.bits());
    }

    /// The ring is gone, and its batch with it.
    pub fn clear(&mut self) {
        self.current = NO_ENTRY;
        self.header(RING_BATCH, 0);
        self.publish_word(0, 0);
        self.published = 0;
    }

    /// The device is about to execute the request of this entry.
    #[inline(always)]
    pub fn start(&mut self, index: usize) {
        self.current = if self.is_kept { index } else { NO_ENTRY };
    }

    /// As [`Self::start`], for a request that an earlier process has taken: from now on a death counts.
    pub fn begin_again(&mut self, index: usize) {
        self.start(index);
        self.advance(index, Phase::Taken, 0);
    }

    /// The entry of the request in progress, for [`Self::start`].
    #[inline(always)]
    pub fn current(&self) -> usize {
        self.current
    }

    /// From now on backends and tables have effects of the request in progress.
    #[inline(always)]
    pub fn plan(&self) {
        self.plan_at(self.current);
    }

    /// The same for the request of another entry.
    #[inline(always)]
    pub fn plan_at(&self, index: usize) {
        self.advance(index, Phase::Planned, 0);
    }

    /// The request in progress is over, and has this status byte.
    #[inline(always)]
    pub fn done(&self, status: u8) {
        self.advance(self.current, Phase::Done, status);
    }

    /// The device is about to publish the next `count` answers of the batch.
    #[inline(always)]
    pub fn publishing(&self, count: u16) {
        self.publish_word(self.published, self.published.wrapping_add(count));
    }

    /// The driver sees the next `count` answers of the batch.
    #[inline(always)]
    pub fn published(&mut self, count: u16) {
        self.published = self.published.wrapping_add(count);
        self.publish_word(self.published, self.published);
    }

    /// Writes a whole entry, for a journal that is taken over.
    pub(super) fn write(&self, index: usize, state: EntryState, words: &[u64; KEPT_WORDS]) {
        if let Some(entry) = self.entry(index) {
            write_entry(entry, index, state, words);
        }
    }

    /// Takes the batch of a journal over, after its entries were [written](Self::write).
    pub(super) fn adopt(&mut self, batch: Option<RingBatch>, published: u16, target: u16) {
        self.published = published;
        self.publish_word(published, target);
        self.header(RING_BATCH, batch.map_or(0, RingBatch::bits));
    }

    /// Changes the phase of an entry of a journal that was taken over.
    pub fn settle(&self, index: usize, state: EntryState) {
        if let Some(word) = self.entry(index).and_then(|entry| entry.first()) {
            SharedWords::set(word, seal(state.bits(), entry_salt(index)));
        }
    }

    #[inline(always)]
    fn advance(&self, index: usize, phase: Phase, status: u8) {
        let Some([word, ..]) = self.entry(index) else {
            return;
        };
        let kept = !(EntryState::PHASE | 0xff << EntryState::STATUS_SHIFT);
        let bits = value_of(word.load(Ordering::Relaxed)) & kept
            | phase as u64
            | u64::from(status) << EntryState::STATUS_SHIFT;
        SharedWords::set(word, seal(bits, entry_salt(index)));
    }

    #[inline(always)]
    fn entry(&self, index: usize) -> Option<&[AtomicU64; ENTRY_WORDS]> {
        if index >= JOURNAL_ENTRIES {
            return None;
        }
        let at = JOURNAL_AT + index * ENTRY_WORDS;
        let words = self.memory.words().get(at..at + ENTRY_WORDS)?;
        words.try_into().ok()
    }

    #[inline(always)]
    fn publish_word(&self, published: u16, target: u16) {
        let bits = u64::from(published) | u64::from(target) << 16;
        self.header(RING_PUBLISHED, bits);
    }

    #[inline(always)]
    fn header(&self, index: usize, value: u64) {
        if self.is_kept {
            self.memory.store(index, seal(value, header_salt(index)));
        }
    }
}

#[inline(always)]
fn write_entry(
    entry: &[AtomicU64; ENTRY_WORDS],
    index: usize,
    state: EntryState,
    words: &[u64; KEPT_WORDS],
) {
    let [first, a, b, c, d, e, check, _] = entry;
    for (word, value) in [a, b, c, d, e].into_iter().zip(words) {
        SharedWords::set(word, *value);
    }
    SharedWords::set(check, check_request(words));
    SharedWords::set(first, seal(state.bits(), entry_salt(index)));
}
