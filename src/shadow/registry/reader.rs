//! One reader, as the daemon sees it.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::ids::EndpointId;
use crate::page_table::epoch::GracePeriod;
use crate::page_table::words::SharedWords;
use crate::shadow::process::Process;
use crate::shadow::wire::{epoch_word, epoch_words};

/// A process that is registered for the DMA of one endpoint.
#[derive(Debug)]
pub struct Reader {
    pub(super) number: u64,
    pub(super) endpoint: EndpointId,
    pub(super) stream: UnixStream,
    pub(super) epochs: SharedWords,
    pub(super) process: Process,
    /// The latest generation of guest memory that it has acknowledged.
    pub(super) acknowledged: AtomicU64,
    /// It has been removed: it accesses nothing any more.
    pub(super) gone: AtomicBool,
}

impl Reader {
    /// The reader's number. No other reader of this daemon gets it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The reader's endpoint.
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// The reader's socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The reader's process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Whether one of its threads is inside an access.
    pub fn is_inside(&self) -> bool {
        // The fence orders this check after the end of the connection. An access whose word is not odd here
        // begins later and finds the reader disconnected.
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

    /// Whether it accesses nothing any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}
