//! The requester's half of the link: it changes the windows that the device may reach.

use std::time::Instant;

use super::state::{Batch, Disconnect, Link, LinkState, MAX_UPDATES, UNWATCHED};
use super::update::{BatchTicket, DmaUpdate, DmaUpdateError, MAX_BATCH_TIMEOUT};
use crate::locks::MutexGuard;

impl Link {
    /// Locks the link, so that the caller can change the windows of the
    /// [`DmaTarget`](crate::vfio_user::DmaTarget) and send the updates in one step. The caller must not
    /// wait for a peer while it holds the lock.
    pub fn lock(&self) -> DmaUpdates<'_> {
        DmaUpdates {
            state: self.state.lock(),
            link: self,
        }
    }

    /// Waits until the server has applied the updates. A server that is late is cut off.
    ///
    /// Returns at once without a server: a server that connects later gets the windows of that time. A
    /// server that hangs up uses no window any more, which ends the wait, too. A server that was cut off
    /// counts as connected until it hangs up, if it has memory and the batch removes windows.
    ///
    /// # Errors
    /// See [`DmaUpdateError`]. [`DmaUpdateError::Refused`] concerns only new windows: a server that
    /// refuses to remove one is cut off.
    pub fn wait(&self, ticket: BatchTicket) -> Result<(), DmaUpdateError> {
        let mut state = self.state.lock();
        loop {
            let (replies, closing) = state.awaited(ticket.batch);
            if !replies && !closing {
                break;
            }
            let late = self.changed.wait_until(&mut state, ticket.until);
            if !late {
                continue;
            }
            let (replies, closing) = state.awaited(ticket.batch);
            if replies {
                let why = format!("no reply within {:?}", ticket.timeout);
                self.end_locked(&mut state, Disconnect::CutOff(&why));
            } else if closing {
                let why = format!(
                    "it has not hung up within {:?} after its connection was closed, and still has \
                     the guest's memory",
                    ticket.timeout
                );
                if let Some(batch) = state.batches.get_mut(&ticket.batch) {
                    batch.failed.get_or_insert(DmaUpdateError::CutOff(why));
                }
                break;
            }
        }
        let failed = state.batches.remove(&ticket.batch).and_then(|b| b.failed);
        failed.map_or(Ok(()), Err)
    }
}

impl LinkState {
    /// Whether a batch waits for replies, and for a closing server to hang up.
    fn awaited(&self, batch: u64) -> (bool, bool) {
        self.batches.get(&batch).map_or((false, false), |batch| {
            let closing = batch.unmaps && self.closing.is_some();
            (batch.remaining > 0, closing)
        })
    }
}

/// The locked link, which sends updates.
pub struct DmaUpdates<'a> {
    state: MutexGuard<'a, LinkState>,
    link: &'a Link,
}

impl DmaUpdates<'_> {
    /// Sends updates, which the server applies in order. [`Link::wait`] waits for that.
    pub fn send(&mut self, updates: impl IntoIterator<Item = DmaUpdate>) -> BatchTicket {
        let state = &mut *self.state;
        let updates: Vec<_> = updates.into_iter().collect();
        let unmaps = updates.iter().any(|u| matches!(u, DmaUpdate::Unmap(_)));
        let connection = state.connection.as_mut().filter(|c| c.terms.is_some());
        let before = connection
            .as_ref()
            .map_or(0, |c| c.updates + c.backlog.len());
        let rounds = 1 + (before + updates.len()) / MAX_UPDATES;
        let timeout = self.link.deadline;
        let timeout = timeout.saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX));
        let timeout = timeout.min(self.link.deadline.max(MAX_BATCH_TIMEOUT));
        let until = Instant::now() + timeout;
        if connection.is_none() && !(unmaps && state.closing.is_some()) {
            // A server that connects later gets the windows of that time.
            let batch = UNWATCHED;
            return BatchTicket {
                batch,
                until,
                timeout,
            };
        }
        state.last_batch += 1;
        let batch = state.last_batch;
        let mut entry = Batch {
            remaining: 0,
            unmaps,
            failed: None,
        };
        if let Some(connection) = connection {
            entry.remaining = updates.len();
            let updates = updates.into_iter().map(|update| (update, batch));
            connection.backlog.extend(updates);
        }
        state.batches.insert(batch, entry);
        self.link.send_updates(state);
        BatchTicket {
            batch,
            until,
            timeout,
        }
    }
}
