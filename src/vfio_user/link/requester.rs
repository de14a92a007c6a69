//! The half of the link for the thread whose requests change what the device may reach.

use std::time::Instant;

use super::state::{Batch, Disconnect, Link, LinkState, MAX_ORDERS, UNWATCHED};
use super::update::{BatchTicket, DmaUpdate, DmaUpdateError, MAX_PATIENCE};
use crate::locks::MutexGuard;

impl Link {
    /// Keeps servers from being told anything until dropped, to give orders in step with what they
    /// are about. Nothing may wait for a peer meanwhile.
    pub fn lock(&self) -> DmaUpdates<'_> {
        DmaUpdates {
            state: self.state.lock(),
            link: self,
        }
    }

    /// Waits until orders are carried out. A server that takes too long is cut off.
    ///
    /// Without a server there is nothing to wait for: one that comes is told what holds then. One
    /// that hangs up has nothing any more.
    ///
    /// # Errors
    /// See [`DmaUpdateError`]. Updates to unmap are never refused.
    pub fn wait(&self, ticket: BatchTicket) -> Result<(), DmaUpdateError> {
        let mut state = self.state.lock();
        loop {
            let (answers, parting) = state.awaited(ticket.batch);
            if !answers && !parting {
                break;
            }
            let late = self.changed.wait_until(&mut state, ticket.until);
            if !late {
                continue;
            }
            let (answers, parting) = state.awaited(ticket.batch);
            if answers {
                let why = format!("no answer in {:?}", ticket.patience);
                self.end_locked(&mut state, Disconnect::CutOff(&why));
            } else if parting {
                let why = format!(
                    "it was told to let go, and {:?} later it still has the guest's memory",
                    ticket.patience
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
    /// What a batch waits for: answers to its orders, and a server that is parting.
    fn awaited(&self, batch: u64) -> (bool, bool) {
        self.batches.get(&batch).map_or((false, false), |batch| {
            let parting = batch.unmaps && self.parting.is_some();
            (batch.remaining > 0, parting)
        })
    }
}

/// The right to give orders.
pub struct DmaUpdates<'a> {
    state: MutexGuard<'a, LinkState>,
    link: &'a Link,
}

impl DmaUpdates<'_> {
    /// Gives orders, which are carried out in their order. [`Link::wait`] tells when.
    pub fn send(&mut self, orders: impl IntoIterator<Item = DmaUpdate>) -> BatchTicket {
        let state = &mut *self.state;
        let orders: Vec<_> = orders.into_iter().collect();
        let unmaps = orders.iter().any(|o| matches!(o, DmaUpdate::Unmap(_)));
        let connection = state.connection.as_mut().filter(|c| c.terms.is_some());
        let before = connection
            .as_ref()
            .map_or(0, |c| c.orders + c.backlog.len());
        let rounds = 1 + (before + orders.len()) / MAX_ORDERS;
        let patience = self.link.deadline;
        let patience = patience.saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX));
        let patience = patience.min(self.link.deadline.max(MAX_PATIENCE));
        let until = Instant::now() + patience;
        if connection.is_none() && !(unmaps && state.parting.is_some()) {
            // A server that comes is told what holds then.
            let batch = UNWATCHED;
            return BatchTicket {
                batch,
                until,
                patience,
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
            entry.remaining = orders.len();
            let orders = orders.into_iter().map(|order| (order, batch));
            connection.backlog.extend(orders);
        }
        state.batches.insert(batch, entry);
        self.link.pump(state);
        BatchTicket {
            batch,
            until,
            patience,
        }
    }
}
