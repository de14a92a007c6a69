//! The announcement of all windows to a server, and how far it is.

use super::update::{REPLAY, UNWATCHED};
use crate::address::Iova;

/// The state of the announcement of all windows, and of the updates that no requester waits for.
#[derive(Debug)]
pub(super) struct Announcement {
    /// Its batch, if one is in progress.
    pub(super) batch: Option<u64>,
    /// The windows from this address on are not announced yet; `None` if all are. No update concerns those.
    pub(super) next: Option<Iova>,
    /// [`DmaUpdates::hold_back`](super::DmaUpdates::hold_back) has stopped the announcement of [`REPLAY`].
    pub(super) has_held_back: bool,
    /// It begins after the update of this number: earlier ones remove windows of a former domain.
    pub(super) after: u64,
    /// It continues before the next update of [`UNWATCHED`].
    pub(super) goes_next: bool,
    /// The windows of [`REPLAY`] without a reply.
    pub(super) replayed: usize,
    /// The updates of [`UNWATCHED`] without a reply, whether they are sent or not.
    pub(super) unwatched: usize,
}

impl Announcement {
    /// None has begun: no window is announced.
    pub(super) fn new() -> Self {
        Self {
            batch: None,
            next: Some(Iova(0)),
            has_held_back: false,
            after: 0,
            goes_next: false,
            replayed: 0,
            unwatched: 0,
        }
    }

    /// Begins one of all windows, for `batch`, after the update `after`.
    pub(super) fn begin(&mut self, batch: u64, after: u64) {
        self.batch = Some(batch);
        self.next = Some(Iova(0));
        self.has_held_back = false;
        self.after = after;
    }

    /// Stops it: all windows are about to be replaced. `is_replaying`: it was one of [`REPLAY`].
    pub(super) fn hold_back(&mut self, is_replaying: bool) {
        self.has_held_back = is_replaying;
        self.batch = None;
        self.next = Some(Iova(0));
    }

    /// Whether it has not reached the window at `first`.
    pub(super) fn is_ahead(&self, first: Iova) -> bool {
        self.next.is_some_and(|from| first >= from)
    }

    /// Counts an update of `batch` that is about to be sent or to join the backlog. Returns whether a requester waits for it.
    pub(super) fn count_in(&mut self, batch: u64) -> bool {
        match batch {
            UNWATCHED => self.unwatched += 1,
            REPLAY => self.replayed += 1,
            _ => return true,
        }
        false
    }

    /// Counts an update of `batch` that is complete.
    pub(super) fn count_out(&mut self, batch: u64) {
        match batch {
            UNWATCHED => self.unwatched -= 1,
            REPLAY => self.replayed -= 1,
            _ => {}
        }
    }
}
