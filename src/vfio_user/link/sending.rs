//! The order in which messages go to the server.
//!
//! Updates go before the announcement of all windows, in their order. While a server that has just connected is told all
//! windows, few announced windows are without a reply: an UNMAP waits for those, and for nothing more of the
//! announcement.

use std::collections::HashMap;

use zerocopy::IntoBytes;

use super::connection::{Pending, Queued, ServerConnection, map_body, unmap_all_body, unmap_body};
use super::state::{Batch, Link, LinkState};
use super::update::{DmaUpdate, MAX_UPDATES, REPLAY, WindowRefusal};
use crate::address::Iova;
use crate::warn_limited;

/// This many windows are looked up at a time.
const ANNOUNCED_AT_ONCE: usize = 64;
/// The most windows of [`REPLAY`] without a reply. With more, an UNMAP would wait longer. With 8, a server that is told
/// 200 000 windows takes several times as long: each reply wakes a thread.
const MAX_REPLAYED: usize = 64;
/// No update is added to the outbox while this many bytes wait there.
const MAX_QUEUED_BYTES: usize = 256 << 10;

impl Link {
    /// Moves updates and windows to announce to the outbox, up to the limits, and sends.
    pub(super) fn send_updates(&self, state: &mut LinkState) {
        let LinkState {
            connection: Some(connection),
            batches,
            ..
        } = state
        else {
            return;
        };
        while connection.updates < MAX_UPDATES && connection.outbox.len_bytes() < MAX_QUEUED_BYTES {
            let has_sent = if self.offer_again(connection) {
                true
            } else if connection.is_announcement_next() {
                self.announce_some(connection, batches);
                true
            } else {
                self.send_next(connection, batches)
            };
            if !has_sent {
                break;
            }
        }
        self.wake_sender(connection);
        self.flush_locked(state);
    }

    /// Sends a window that the server has refused again, if it has given another one up. Returns false if there is none. It
    /// comes before the rest of the announcement, which has higher addresses.
    fn offer_again(&self, connection: &mut ServerConnection) -> bool {
        let Some(first) = connection.next_offer() else {
            return false;
        };
        let found = self.target.windows_from(first, 1).into_iter().next();
        // The guest may be unmapping it.
        if let Some(window) = found.filter(|window| window.range.first() == first) {
            let queued = connection.count_in(DmaUpdate::Map(window), REPLAY);
            connection.send_queued(queued);
        }
        true
    }

    /// Sends the next windows of the announcement.
    fn announce_some(&self, connection: &mut ServerConnection, batches: &mut HashMap<u64, Batch>) {
        let (Some(batch), Some(first)) =
            (connection.announcement.batch, connection.announcement.next)
        else {
            return;
        };
        let limit = connection.announcement_room().min(ANNOUNCED_AT_ONCE);
        if limit == 0 {
            let refusal = self.no_room(connection, first);
            return self.end_announcement(connection, batches, Some(refusal));
        }
        let windows = self.target.windows_from(first, limit);
        let is_rest = windows.len() < limit;
        let last = windows.last().map(|window| window.range.first().0);
        let next = last.and_then(|last| last.checked_add(1)).map(Iova);
        connection.announcement.next = next.filter(|_| !is_rest);
        for window in windows {
            if let Some(batch) = batches.get_mut(&batch) {
                batch.remaining += 1;
            }
            let queued = connection.count_in(DmaUpdate::Map(window), batch);
            connection.send_queued(queued);
        }
        if connection.announcement.next.is_none() {
            self.end_announcement(connection, batches, None);
        } else if connection.windows >= connection.max_windows() {
            warn_limited!(
                "{}: the server takes {} windows and no more; it gets the others as it gives windows up",
                self.name,
                connection.max_windows()
            );
        }
    }

    /// Sends the next update. Returns false if there is none, or if it has to wait.
    fn send_next(
        &self,
        connection: &mut ServerConnection,
        batches: &mut HashMap<u64, Batch>,
    ) -> bool {
        // The server may still refuse the window: then there is nothing to remove.
        if let Some(next) = connection.backlog.front()
            && let DmaUpdate::Unmap(range) = &next.update
            && connection.unconfirmed.contains(&range.first().0)
        {
            return false;
        }
        let Some(next) = connection.backlog.pop_front() else {
            return false;
        };
        let done = match &next.update {
            DmaUpdate::Map(window) if connection.windows >= connection.max_windows() => {
                let first = window.range.first();
                connection.refused.insert(first, next.batch <= REPLAY);
                Some(Some(self.no_room(connection, first)))
            }
            DmaUpdate::Unmap(range) if connection.refused.remove(range.first()) => Some(None),
            DmaUpdate::Map(_) | DmaUpdate::Unmap(_) | DmaUpdate::UnmapAll => None,
        };
        match done {
            Some(refusal) => {
                connection.announcement.count_out(next.batch);
                self.finish_update(batches, next.batch, refusal);
            }
            None => connection.send_queued(next),
        }
        true
    }

    /// Ends the announcement of all windows. `refusal` says why the server does not get them all.
    pub(super) fn end_announcement(
        &self,
        connection: &mut ServerConnection,
        batches: &mut HashMap<u64, Batch>,
        refusal: Option<WindowRefusal>,
    ) {
        if let Some(batch) = connection.announcement.batch.take()
            && batch != REPLAY
        {
            self.finish_update(batches, batch, refusal);
        }
    }
}

impl ServerConnection {
    /// The number of windows that may be announced now.
    fn announcement_room(&self) -> usize {
        match self.announcement.batch {
            Some(REPLAY) => {
                let in_flight = MAX_REPLAYED.saturating_sub(self.announcement.replayed);
                self.room(true).min(in_flight)
            }
            _ => self.room(false),
        }
    }

    /// The first address of a refused window that the server may be offered now. Not while updates wait: they may remove
    /// the window, and another one at its address may follow. Not while all windows are replaced: those that the server
    /// still has must go first.
    fn next_offer(&mut self) -> Option<Iova> {
        let most = self.max_windows().min(self.limit.unwrap_or(u64::MAX));
        let has_room = self.windows < most && self.announcement.replayed < MAX_REPLAYED;
        if !has_room || !self.backlog.is_empty() {
            return None;
        }
        // The announcement will come to those that it has not reached.
        let first = self.refused.take_offer()?;
        (!self.announcement.is_ahead(first)).then_some(first)
    }

    /// Whether the announcement continues before the next update.
    fn is_announcement_next(&mut self) -> bool {
        let can_go_on = match (self.announcement.batch, self.announcement.next) {
            (None, _) | (_, None) => false,
            // Several at a time: each time costs a search in the page table.
            (Some(REPLAY), _) => {
                self.announcement_room() > 0 && self.announcement.replayed <= MAX_REPLAYED / 2
            }
            (Some(_), _) => true,
        };
        match self.backlog.front() {
            None => can_go_on,
            // A requester waits.
            Some(next) if next.batch > REPLAY => false,
            // It, or one after it, may remove a window at the same addresses.
            Some(next) if next.serial <= self.announcement.after => false,
            // In turns: a guest that maps all the time must not hold the announcement up.
            Some(_) => {
                let turn = &mut self.announcement.goes_next;
                *turn = !*turn;
                can_go_on && *turn
            }
        }
    }

    /// Sends an update that [`Self::count_in`] has counted.
    fn send_queued(&mut self, queued: Queued) {
        let (body, descriptors) = match &queued.update {
            DmaUpdate::Map(window) => {
                self.note_window(window);
                let (body, descriptors) = map_body(window);
                (body.as_bytes().to_vec(), descriptors)
            }
            DmaUpdate::Unmap(range) => (unmap_body(*range).as_bytes().to_vec(), Vec::new()),
            DmaUpdate::UnmapAll => (unmap_all_body().as_bytes().to_vec(), Vec::new()),
        };
        self.updates += 1;
        let pending = Pending::Update(queued);
        let command = pending.command();
        self.send(pending, command, &body, descriptors);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;
    use crate::vfio_user::socket::Outbox;
    use crate::vfio_user::version::Terms;

    #[test]
    fn a_refused_window_is_offered_only_if_nothing_comes_before_it() {
        let (server, _peer) = UnixStream::pair().expect("sockets");
        let mut connection = ServerConnection::new(Arc::new(server.into()), Outbox::default());
        connection.terms = Some(Terms {
            server_descriptors: 8,
            client_descriptors: 8,
            server_data: 4096,
            windows: 4,
            twin: None,
        });
        connection.windows = 1;
        connection.announcement.next = None;
        let window = Iova(0x1000);
        connection.refused.insert(window, true);
        assert_eq!(connection.next_offer(), None, "no place");
        let offer = |connection: &mut ServerConnection| {
            connection.refused.given_up(1);
            connection.next_offer()
        };
        assert_eq!(offer(&mut connection), Some(window));
        connection.queue(DmaUpdate::UnmapAll, REPLAY);
        assert_eq!(offer(&mut connection), None, "an update waits");
        connection.backlog.clear();
        assert_eq!(offer(&mut connection), Some(window));
        connection.limit = Some(1);
        assert_eq!(offer(&mut connection), None, "the server is full");
        connection.limit = None;
        connection.windows = 4;
        assert_eq!(offer(&mut connection), None, "the server is full");
        connection.windows = 1;
        connection.announcement.replayed = MAX_REPLAYED;
        assert_eq!(offer(&mut connection), None, "many are in flight");
        connection.announcement.replayed = 0;
        assert_eq!(offer(&mut connection), Some(window));
        connection.announcement.hold_back(false);
        assert_eq!(offer(&mut connection), None, "all windows are replaced");
    }
}
