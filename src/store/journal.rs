//! The journal: the requests of the batch that is in progress, and the phase of each.
//!
//! An entry is one cache line. Word 0, sealed, holds the phase; it has one of a few values, which are constants. The words 1
//! to 6 hold the rest: head, length, deaths, and the first 40 bytes of the request. They have no check, because the process
//! that goes on compares them with the driver's chain before it executes or answers the request. A request takes seven
//! stores when its batch is taken off the ring, one when it is planned and one when it is done; a batch takes two.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::layout::{
    ENTRY_PHASE, ENTRY_WORDS, HEADER_ENTRIES, JOURNAL_AT, JOURNAL_ENTRIES, PHASE_SALT, RECORDS_AT,
    RING_BATCH, RING_PUBLISHED, header_salt, seal, unseal,
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
    /// As `Planned`, and the death of the process that had planned it is counted: a process that dies while it takes the
    /// journal over is none that the request has ended.
    Interrupted = 5,
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

/// The words 0 and 1 of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// How far the request has come.
    pub phase: Phase,
    /// The status byte of its answer, or [`UNWRITTEN`]; only if it is done.
    pub status: u8,
    /// The number of processes that have died while they executed the request.
    pub attempts: u8,
    /// The number of processes that have died while they took over from such a process.
    pub restores: u8,
    /// The number of its bytes, or [`UNREADABLE`], or [`MALFORMED`].
    pub len: u8,
    /// Index of its chain's first descriptor.
    pub head: u16,
}

impl EntryState {
    /// Word 0, sealed: phase and status.
    pub fn phase_word(self) -> u64 {
        phase_word(self.phase, self.status)
    }

    /// Word 1: everything else.
    #[inline(always)]
    pub fn rest_word(self) -> u64 {
        u64::from(self.head)
            | u64::from(self.len) << 16
            | u64::from(self.attempts) << 24
            | u64::from(self.restores) << 32
    }

    /// Decodes both words; `None` if the first is damaged.
    pub fn from_words(phase_word: u64, rest: u64) -> Option<Self> {
        let [phase, status, 0, 0, 0, 0, 0, 0] = unseal(phase_word, PHASE_SALT)?.to_le_bytes()
        else {
            return None;
        };
        let phase = match phase {
            1 => Phase::Taken,
            2 => Phase::Planned,
            3 => Phase::Done,
            4 => Phase::Waiting,
            5 => Phase::Interrupted,
            _ => return None,
        };
        let [low, high, len, attempts, restores, ..] = rest.to_le_bytes();
        Some(Self {
            phase,
            status,
            attempts,
            restores,
            len,
            head: u16::from_le_bytes([low, high]),
        })
    }
}

const fn phase_word(phase: Phase, status: u8) -> u64 {
    seal(phase as u64 | (status as u64) << 8, PHASE_SALT)
}

const TAKEN: u64 = phase_word(Phase::Taken, 0);
const PLANNED: u64 = phase_word(Phase::Planned, 0);
/// Word 0 of a request that is done, by its status.
static DONE: [u64; 256] = {
    let mut words = [0; 256];
    let mut status = u8::MAX;
    loop {
        words[status as usize] = phase_word(Phase::Done, status);
        if status == 0 {
            break words;
        }
        status -= 1;
    }
};

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

/// No request of a batch is in progress: this index is beyond every memory, also after the addition of a batch's entries.
const NO_ENTRY: usize = usize::MAX / 64;

/// Writes the journal.
#[derive(Debug)]
pub struct Journal {
    memory: Arc<SharedWords>,
    /// Requests are written down. If not, no call has an effect.
    is_kept: bool,
    /// The entry of the request in progress, or [`NO_ENTRY`].
    current: usize,
    /// The answers of the batch that the driver has, apart from the last ones.
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

    /// Writes no request down any more. The header says so: the store cannot be taken over.
    pub(super) fn forgo(&mut self) {
        self.clear();
        self.is_kept = false;
        self.memory.store(HEADER_ENTRIES, 0);
    }

    /// Whether requests are written down.
    #[inline(always)]
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Begins a batch, whose requests are given with the head of the chain, the length as in [`EntryState`], and the words.
    /// `batch` must have their number, at most [`MAX_BATCH`](super::MAX_BATCH).
    #[inline(always)]
    pub fn begin_batch(
        &mut self,
        batch: RingBatch,
        requests: impl Iterator<Item = (u16, u8, [u64; KEPT_WORDS])>,
    ) {
        for (entry, (head, len, words)) in self.entries().iter().zip(requests) {
            let state = EntryState {
                phase: Phase::Taken,
                status: 0,
                attempts: 0,
                restores: 0,
                len,
                head,
            };
            write_entry(entry, TAKEN, state, &words);
        }
        if self.published != 0 {
            self.published = 0;
            self.header(RING_PUBLISHED, 0);
        }
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
        self.published = 0;
        self.header(RING_PUBLISHED, 0);
    }

    /// The device is about to execute the request of this entry.
    #[inline(always)]
    pub fn start(&mut self, index: usize) {
        self.current = if self.is_kept && index < JOURNAL_ENTRIES {
            index
        } else {
            NO_ENTRY
        };
    }

    /// As [`Self::start`], for a request that an earlier process has taken: from now on a death counts.
    pub fn begin_again(&mut self, index: usize) {
        self.start(index);
        self.advance(self.current, TAKEN);
    }

    /// The entry of the request in progress, for [`Self::start`].
    #[inline(always)]
    pub fn current(&self) -> usize {
        self.current
    }

    /// From now on backends and tables have effects of the request in progress.
    #[inline(always)]
    pub fn plan(&self) {
        self.advance(self.current, PLANNED);
    }

    /// The same for a request `ahead` entries behind the one in progress.
    #[inline(always)]
    pub fn plan_ahead(&self, ahead: usize) {
        let index = self.current + ahead;
        if index < JOURNAL_ENTRIES {
            self.advance(index, PLANNED);
        }
    }

    /// The request in progress is over, and has this status byte.
    #[inline(always)]
    pub fn done(&self, status: u8) {
        self.advance(self.current, DONE[usize::from(status)]);
    }

    /// The driver has the next `count` answers of the batch, and more will follow. Not to be called for the last ones, after
    /// which [`Self::end_batch`] follows.
    pub fn published(&mut self, count: u16) {
        self.published = self.published.wrapping_add(count);
        self.header(RING_PUBLISHED, self.published.into());
    }

    /// Writes a whole entry, for a journal that is taken over.
    pub(super) fn write(&self, index: usize, state: EntryState, words: &[u64; KEPT_WORDS]) {
        if let Some(entry) = self.entries().get(index) {
            write_entry(entry, state.phase_word(), state, words);
        }
    }

    /// Takes the batch of a journal over, after its entries were [written](Self::write).
    pub(super) fn adopt(&mut self, batch: Option<RingBatch>, published: u16) {
        self.published = published;
        self.header(RING_PUBLISHED, published.into());
        self.header(RING_BATCH, batch.map_or(0, RingBatch::bits));
    }

    /// Changes phase and status of an entry of a journal that was taken over.
    pub fn settle(&self, index: usize, state: EntryState) {
        if index < JOURNAL_ENTRIES {
            self.advance(index, state.phase_word());
        }
    }

    /// Stores the phase of an entry. `index` must be that of an entry, or [`NO_ENTRY`].
    #[inline(always)]
    fn advance(&self, index: usize, phase_word: u64) {
        let at = JOURNAL_AT + index * ENTRY_WORDS + ENTRY_PHASE;
        self.memory.store(at, phase_word);
    }

    #[inline(always)]
    fn entries(&self) -> &[[AtomicU64; ENTRY_WORDS]] {
        let words = self.memory.words().get(JOURNAL_AT..RECORDS_AT);
        words.unwrap_or(&[]).as_chunks().0
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
    phase_word: u64,
    state: EntryState,
    words: &[u64; KEPT_WORDS],
) {
    let [first, rest, kept @ .., _] = entry;
    let kept: &[AtomicU64; KEPT_WORDS] = kept;
    for (word, value) in kept.iter().zip(words) {
        SharedWords::set(word, *value);
    }
    SharedWords::set(rest, state.rest_word());
    SharedWords::set(first, phase_word);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_flipped_bit_of_a_phase_is_noticed() {
        let phases = [Phase::Taken, Phase::Planned, Phase::Done];
        for phase in phases
            .into_iter()
            .chain([Phase::Waiting, Phase::Interrupted])
        {
            for status in [0, STATUS_DEVERR, UNWRITTEN] {
                let state = EntryState {
                    phase,
                    status,
                    attempts: 2,
                    restores: 7,
                    len: 36,
                    head: 0x1234,
                };
                let (word, rest) = (state.phase_word(), state.rest_word());
                assert_eq!(EntryState::from_words(word, rest), Some(state));
                for bit in 0..64 {
                    assert_eq!(EntryState::from_words(word ^ 1 << bit, rest), None);
                }
            }
        }
        assert_eq!(
            DONE[usize::from(STATUS_DEVERR)],
            phase_word(Phase::Done, STATUS_DEVERR)
        );
    }
}
