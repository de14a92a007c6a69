//! One reader, as the daemon sees it.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Duration;

use super::Stuck;
use crate::ids::EndpointId;
use crate::page_table::epoch::GracePeriod;
use crate::page_table::words::SharedWords;
use crate::shadow::kept::{KeptReader, has_let_go};
use crate::shadow::process::{Process, has_hung_up};
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
    /// Its descriptors with the keeper, if there is one.
    pub(super) kept: Option<KeptReader>,
    /// A daemon before this one has admitted it, and could not end it. It uses the page tables of that daemon.
    pub(super) is_left: bool,
    /// Its process has ended, and another process had its connection then. No access of that process is visible in
    /// the epoch words.
    pub(super) inherited: AtomicBool,
}

impl Reader {
    /// A reader of the daemon before, which that daemon's successor could not end.
    pub(in crate::shadow) fn left(
        kept: KeptReader,
        stream: UnixStream,
        epochs: SharedWords,
        process: Process,
    ) -> Self {
        Self {
            number: kept.identity.number,
            endpoint: kept.identity.endpoint,
            stream,
            epochs,
            acknowledged: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            inherited: AtomicBool::new(process.is_gone()),
            process,
            kept: Some(kept),
            is_left: true,
        }
    }

    /// The report that it may still use guest memory.
    pub(super) fn stuck(&self, why: String) -> Stuck {
        Stuck {
            reader: self.number,
            endpoint: self.endpoint,
            why,
        }
    }

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
        if self.is_left {
            return self.has_let_go();
        }
        grace.is_over(|index| epoch_word(self.epochs.words(), index)) && !self.is_inherited()
    }

    /// Whether it accesses nothing any more, and never will.
    pub(super) fn is_over(&self) -> bool {
        self.has_ended() || self.is_left && self.has_let_go()
    }

    fn has_let_go(&self) -> bool {
        let is_revocable = self.kept.as_ref().is_some_and(|k| k.identity.is_revocable);
        let (stream, epochs) = (Some(&self.stream), Some(&self.epochs));
        has_let_go(is_revocable, stream, epochs, Some(&self.process))
    }

    /// Whether its process has ended, and no other process has its connection.
    pub(super) fn has_ended(&self) -> bool {
        self.process.is_gone() && has_hung_up(&self.stream)
    }

    /// Sleeps for `nap`, or until its process ends.
    pub(super) fn wait_for_end(&self, nap: Duration) {
        if self.is_inherited() {
            std::thread::sleep(nap);
        } else {
            self.process.wait_until_gone(nap);
        }
    }

    pub(super) fn is_inherited(&self) -> bool {
        self.inherited.load(Ordering::Acquire)
    }

    /// Returns whether it was set before.
    pub(super) fn set_inherited(&self) -> bool {
        self.inherited.swap(true, Ordering::AcqRel)
    }

    /// Whether it accesses nothing any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}
