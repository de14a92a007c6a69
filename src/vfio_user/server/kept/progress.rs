//! How far the server has come with the client's messages: seven words in memory that outlives the process.
//!
//! The words count bytes of the connection. One thread stores them, in this order for a message of `n` bytes at `at`:
//! `ATTEMPTS`, `BEGUN = at + 1`, perhaps `ONCE = at + 1`, then `EXECUTED = at + n`. To take executed messages out of the socket it stores
//! `LOOKED`, `TAKING = EXECUTED`, and `TAKEN` afterwards. A process dies as a whole, so the next one finds the stores up to one
//! of them.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Where the words are in the record: in its first page, which the record leaves to its owner.
const FIRST_WORD: usize = 64;
const PAGE: usize = 4096;
/// The most bytes that are counted: a sum of two words does not overflow. A word above is damaged.
pub(super) const MAX_BYTES: u64 = 1 << 62;

/// The words.
#[derive(Clone, Copy, Debug)]
enum ProgressWord {
    /// Bytes that the server has looked at, while it takes bytes out.
    Looked,
    /// 1 more than the place of the message that is being executed, or was executed last; 0 before the first.
    Begun,
    /// The same of a message that must not be executed, or answered, twice.
    Once,
    /// Bytes of the messages that were executed.
    Executed,
    /// Bytes that are out of the socket.
    Taken,
    /// Bytes that will be; the same as before until the server begins to take more out.
    Taking,
    /// How many processes have begun to execute the message of `Begun`.
    Attempts,
}

/// The mapped words.
#[derive(Debug)]
pub(super) struct ClientProgress(MmapRegion);

/// What an earlier process has stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeftProgress {
    pub(super) looked: u64,
    pub(super) begun: u64,
    pub(super) once: u64,
    pub(super) executed: u64,
    pub(super) taken: u64,
    pub(super) taking: u64,
    pub(super) attempts: u64,
}

impl LeftProgress {
    /// Whether each word that counts bytes can be one.
    pub(super) fn is_plausible(&self) -> bool {
        let words = [
            self.looked,
            self.begun,
            self.once,
            self.executed,
            self.taken,
            self.taking,
        ];
        words.iter().all(|word| *word <= MAX_BYTES)
    }
}

impl ClientProgress {
    /// Maps the words of a record.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn map(record: BorrowedFd<'_>) -> io::Result<Self> {
        let file = File::from(record.try_clone_to_owned()?);
        let mapped = MmapRegion::from_file(FileOffset::new(file, 0), PAGE);
        mapped.map(Self).map_err(io::Error::other)
    }

    /// A new connection begins.
    pub(super) fn reset(&self) {
        for word in [
            ProgressWord::Begun,
            ProgressWord::Once,
            ProgressWord::Executed,
            ProgressWord::Taking,
            ProgressWord::Taken,
            ProgressWord::Looked,
            ProgressWord::Attempts,
        ] {
            self.store(word, 0);
        }
    }

    pub(super) fn load(&self) -> LeftProgress {
        LeftProgress {
            looked: self.word(ProgressWord::Looked),
            begun: self.word(ProgressWord::Begun),
            once: self.word(ProgressWord::Once),
            executed: self.word(ProgressWord::Executed),
            taken: self.word(ProgressWord::Taken),
            taking: self.word(ProgressWord::Taking),
            attempts: self.word(ProgressWord::Attempts),
        }
    }

    /// The server begins to take all executed bytes out of the socket. It has looked at `looked` bytes, and looks at no more
    /// until they are [taken](Self::taken).
    pub(super) fn take(&self, executed: u64, looked: u64) {
        self.store(ProgressWord::Looked, looked);
        self.store(ProgressWord::Taking, executed);
    }

    /// The execution of the message at this place begins. It `can_repeat` if the next process may execute it again.
    pub(super) fn begin(&self, at: u64, can_repeat: bool) {
        let mark = at.saturating_add(1);
        let before = if self.word(ProgressWord::Begun) == mark {
            self.word(ProgressWord::Attempts)
        } else {
            0
        };
        self.store(ProgressWord::Attempts, before.saturating_add(1));
        self.store(ProgressWord::Begun, mark);
        if !can_repeat {
            self.mark_once(at);
        }
    }

    /// The message at this place, which has begun, must not be executed, or answered, again.
    pub(super) fn mark_once(&self, at: u64) {
        self.store(ProgressWord::Once, at.saturating_add(1));
    }

    /// The message is executed, so this many bytes are, and its reply is in the pipe.
    pub(super) fn executed(&self, bytes: u64) {
        self.store(ProgressWord::Executed, bytes);
    }

    /// This many bytes are out of the socket.
    pub(super) fn taken(&self, bytes: u64) {
        self.store(ProgressWord::Taken, bytes);
    }

    fn store(&self, word: ProgressWord, value: u64) {
        // A page has room for all words, and the record's seals keep it: it cannot fail.
        let _ = self
            .0
            .as_volatile_slice()
            .store(value, word.at(), Ordering::Release);
    }

    fn word(&self, word: ProgressWord) -> u64 {
        let loaded = self
            .0
            .as_volatile_slice()
            .load(word.at(), Ordering::Acquire);
        loaded.unwrap_or(0)
    }
}

impl ProgressWord {
    const fn at(self) -> usize {
        FIRST_WORD + 8 * self as usize
    }
}
