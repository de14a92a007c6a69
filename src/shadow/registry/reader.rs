//! One reader, as the daemon sees it.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::ids::EndpointId;
use crate::page_table::epoch::GracePeriod;
use crate::page_table::words::SharedWords;
use crate::shadow::process::Process;
use crate::shadow::wire::{epoch_word, epoch_words};

/// A process that reads for one endpoint.
#[derive(Debug)]
pub struct Reader {
    pub(super) number: u64,
    pub(super) endpoint: EndpointId,
    pub(super) stream: UnixStream,
    pub(super) epochs: SharedWords,
    pub(super) process: Process,
    /// The generation of memory it has acknowledged.
    pub(super) taken: AtomicU64,
    /// It has left, or it was killed.
    pub(super) gone: AtomicBool,
}

impl Reader {
    /// Its number, which no other reader gets.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What it reads for.
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// Its socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Whether one of its threads is inside an access.
    pub fn is_inside(&self) -> bool {
        // A process that has hung up begins no access after that: one whose word is not seen here
        // finds that there is no connection.
        fence(Ordering::SeqCst);
        let mut words = epoch_words(self.epochs.words());
        words.any(|word| word.load(Ordering::Acquire) & 1 == 1)
    }

    pub(super) fn begin_wait(&self) -> GracePeriod {
        GracePeriod::begin(epoch_words(self.epochs.words()))
    }

    pub(super) fn has_left(&self, grace: &mut GracePeriod) -> bool {
        grace.is_over(|index| epoch_word(self.epochs.words(), index))
    }

    /// It accesses nothing any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}
