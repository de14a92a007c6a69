//! The requester's half of the link: it changes the windows that the device may reach.

use std::time::Instant;

use super::connection::ServerConnection;
use super::deadlines::{Progress, WaitLimit};
use super::state::{Batch, Link, LinkState};
use super::update::{
    BatchTicket, DmaUpdate, DmaUpdateError, MAX_UNWATCHED, MAX_UPDATES, REPLAY, UNWATCHED,
    WindowRefusal,
};
use crate::address::{Iova, IovaRange};
use crate::locks::MutexGuard;
use crate::vfio_user::dma::Window;

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

    /// Waits until the server has applied the updates. A server that is late is cut off, and so is a server that
    /// has used its budget for waits up ([`WaitBudget`](crate::process::wait_budget::WaitBudget)).
    ///
    /// Returns at once without a server: a server that connects later gets the windows of that time. A
    /// server that hangs up uses no window any more, which ends the wait, too. A server that was cut off
    /// counts as connected until it hangs up, if it has memory and the batch removes windows.
    ///
    /// # Errors
    /// See [`DmaUpdateError`]. [`DmaUpdateError::Refused`] concerns only new windows: a server that
    /// refuses to remove one is cut off.
    pub fn wait(&self, ticket: BatchTicket) -> Result<(), DmaUpdateError> {
        let failed = self.wait_for_batch(ticket).and_then(|batch| batch.failed);
        failed.map_or(Ok(()), Err)
    }

    /// As [`Self::wait`], but returns the refused windows. The server has the others of the batch. The batch must have
    /// been sent with [`DmaUpdates::send`], which sends all of it.
    ///
    /// # Errors
    /// [`DmaUpdateError::CutOff`]: no window of the batch exists.
    pub fn wait_for_each(&self, ticket: BatchTicket) -> Result<Vec<WindowRefusal>, DmaUpdateError> {
        let Some(batch) = self.wait_for_batch(ticket) else {
            return Ok(Vec::new());
        };
        match batch.failed {
            Some(cut_off @ DmaUpdateError::CutOff(_)) => Err(cut_off),
            Some(DmaUpdateError::Refused(_)) | None => Ok(batch.refused),
        }
    }

    /// Waits until a batch is complete. Returns it, unless nobody has opened it.
    fn wait_for_batch(&self, ticket: BatchTicket) -> Option<Batch> {
        let mut state = self.state.lock();
        loop {
            let (replies, closing) = state.awaited(ticket.batch);
            if !replies && !closing {
                break;
            }
            let Some(limit) = self.wait_for_change(&mut state, &ticket) else {
                continue;
            };
            let (replies, closing) = state.awaited(ticket.batch);
            if replies {
                self.end_late(&mut state, &ticket, limit);
            } else if closing {
                let why = format!(
                    "it has not hung up within {:?} after its connection was closed, and still has \
                     the guest's memory",
                    ticket.wait.answer
                );
                if let Some(batch) = state.batches.get_mut(&ticket.batch) {
                    batch.failed = Some(DmaUpdateError::CutOff(why));
                }
                break;
            }
        }
        if ticket.batch != UNWATCHED {
            let now = Instant::now();
            let slowest = state.progress.take_slowest(now);
            let budget = state.budget(ticket.is_for_hang_up);
            budget.charge_answers(&ticket.wait, slowest, now);
        }
        state.batches.remove(&ticket.batch)
    }
}

impl LinkState {
    /// The active connection, if it is still that of the ticket.
    pub(super) fn connection_of(&mut self, ticket: &BatchTicket) -> Option<&mut ServerConnection> {
        let is_same = self.session == ticket.session;
        let connection = self.connection.as_mut().filter(|_| is_same)?;
        connection.terms.is_some().then_some(connection)
    }

    fn is_full(&mut self, ticket: &BatchTicket) -> bool {
        let connection = self.connection_of(ticket);
        connection.is_some_and(|c| c.backlog.len() >= MAX_UPDATES)
    }

    /// Whether a batch waits for replies, and for a closing server to hang up.
    fn awaited(&self, batch: u64) -> (bool, bool) {
        self.batches.get(&batch).map_or((false, false), |batch| {
            let closing = batch.unmaps && self.closing.is_some();
            (batch.remaining > 0, closing)
        })
    }
}

impl Link {
    /// Sends updates of a batch, which the server applies in order, and takes them from `updates` only as fast as the
    /// server applies them. [`Link::wait`] waits for the rest. Sends nothing more after a failure, or if the connection
    /// is not the one of the ticket any more.
    ///
    /// If the server has just connected, is still being told all windows, and has no memory, [`Link::wait`] does not wait
    /// for the removal of a few windows: each access of the server is a message, which the interposer refuses.
    ///
    /// `updates` must not wait for a peer: the link is locked while the next ones are taken.
    pub fn send_all(&self, ticket: &mut BatchTicket, updates: impl IntoIterator<Item = DmaUpdate>) {
        let mut updates = updates.into_iter().peekable();
        let mut state = self.state.lock();
        while updates.peek().is_some() {
            let batch = ticket.batch;
            let is_open = state
                .batches
                .get(&batch)
                .is_some_and(|b| b.failed.is_none());
            let connection = state.connection_of(ticket);
            let Some(connection) = connection.filter(|_| is_open) else {
                return;
            };
            let room = MAX_UPDATES.saturating_sub(connection.backlog.len());
            if room == 0 {
                connection.is_sender_waiting = true;
                let late = self.wait_for_change(&mut state, ticket);
                if let Some(limit) = late.filter(|_| state.is_full(ticket)) {
                    self.end_late(&mut state, ticket, limit);
                }
                continue;
            }
            let mut sent = 0;
            for update in updates.by_ref().take(room) {
                if connection.needs_no_wait(&update) {
                    connection.queue(update, UNWATCHED);
                } else {
                    connection.queue(update, batch);
                    sent += 1;
                }
            }
            if let Some(batch) = state.batches.get_mut(&batch) {
                batch.remaining += sent;
            }
            ticket.expect_more(sent, &self.deadlines);
            self.send_updates(&mut state);
        }
    }

    /// Waits until the server has answered all updates of a batch, or is gone.
    pub(super) fn wait_for_replies(
        &self,
        state: &mut MutexGuard<'_, LinkState>,
        ticket: &BatchTicket,
    ) {
        while state.awaited(ticket.batch).0 {
            let late = self.wait_for_change(state, ticket);
            if let Some(limit) = late.filter(|_| state.awaited(ticket.batch).0) {
                self.end_late(state, ticket, limit);
            }
        }
    }

    /// Waits until the state changes. Returns the limit that the server has exceeded, if it has.
    fn wait_for_change(
        &self,
        state: &mut MutexGuard<'_, LinkState>,
        ticket: &BatchTicket,
    ) -> Option<WaitLimit> {
        let (until, _) = state.progress.end_of(&ticket.wait);
        if !self.changed.wait_until(state, until) {
            return None;
        }
        // Answers that have come meanwhile have put the end off. Nobody was woken for them.
        let (until, limit) = state.progress.end_of(&ticket.wait);
        (until <= Instant::now()).then_some(limit)
    }

    fn end_late(&self, state: &mut LinkState, ticket: &BatchTicket, limit: WaitLimit) {
        let wait = match limit {
            WaitLimit::Budget => ticket.wait.answer,
            WaitLimit::Answer | WaitLimit::Total | WaitLimit::Connect => ticket.wait.length(),
        };
        self.end_for(state, limit, wait);
    }
}

/// The locked link, which sends updates.
pub struct DmaUpdates<'a> {
    state: MutexGuard<'a, LinkState>,
    link: &'a Link,
}

impl DmaUpdates<'_> {
    pub(super) fn state(&mut self) -> &mut LinkState {
        &mut self.state
    }

    /// Sends windows that the caller has added to the target. [`Link::wait`] waits until the server has them.
    ///
    /// A server that has just connected gets them with all others, and nobody waits for that. If the announcement has
    /// passed a window, the server gets it besides, and a caller waits only if very many have come so. If the server has
    /// no room for windows that the announcement has not reached, it refuses them.
    pub fn add(&mut self, windows: &[Window]) -> BatchTicket {
        let connection = self.state.connection.as_mut();
        let Some(connection) = connection.filter(|c| c.terms.is_some()) else {
            return self.open(false);
        };
        let (later, now): (Vec<_>, Vec<_>) = windows
            .iter()
            .partition(|w| connection.announcement.is_ahead(w.range.first()));
        let has_no_room = !later.is_empty() && connection.is_announcement_paused();
        let is_replaying = connection.is_replaying();
        let is_free = connection.announcement.unwatched + now.len() <= MAX_UNWATCHED
            && now.len() <= connection.refusable();
        let maps = now.into_iter().cloned().map(DmaUpdate::Map);
        if has_no_room {
            let ticket = self.send(maps.collect(), false);
            self.refuse(ticket.batch, &later);
            return ticket;
        }
        if !is_replaying || !is_free {
            return self.send(maps.collect(), false);
        }
        for map in maps {
            connection.queue(map, UNWATCHED);
        }
        self.link.send_updates(&mut self.state);
        self.open_as(UNWATCHED)
    }

    /// The server has no room for windows of a batch.
    fn refuse(&mut self, batch: u64, windows: &[&Window]) {
        let state = &mut *self.state;
        let (Some(connection), Some(batch)) =
            (state.connection.as_mut(), state.batches.get_mut(&batch))
        else {
            return;
        };
        for window in windows {
            let refusal = self.link.no_room(connection, window.range.first());
            let failed = DmaUpdateError::Refused(refusal);
            batch.failed.get_or_insert(failed);
            batch.refused.push(refusal);
        }
    }

    /// Sends updates, which the server applies in order. [`Link::wait`] waits for that. For `unmaps`, see [`Self::open`].
    pub fn send(&mut self, updates: Vec<DmaUpdate>, unmaps: bool) -> BatchTicket {
        let mut ticket = self.open(unmaps);
        ticket.expect_more(updates.len(), &self.link.deadlines);
        let state = &mut *self.state;
        let batch = ticket.batch;
        if let Some(entry) = state.batches.get_mut(&batch)
            && let Some(connection) = state.connection.as_mut().filter(|c| c.terms.is_some())
        {
            entry.remaining = updates.len();
            for update in updates {
                connection.queue(update, batch);
            }
            self.link.send_updates(state);
        }
        ticket
    }

    /// Opens a batch for [`Link::send_all`]. `unmaps` says that the caller removes windows, which a server whose
    /// connection is half closed may still use.
    pub fn open(&mut self, unmaps: bool) -> BatchTicket {
        let state = &mut *self.state;
        if state.batches.is_empty() {
            state.progress = Progress::new(Instant::now());
        }
        let connection = state.connection.as_ref().filter(|c| c.terms.is_some());
        let is_watched = connection.is_some() || unmaps && state.closing.is_some();
        let batch = if is_watched {
            state.last_batch += 1;
            let entry = Batch {
                unmaps,
                ..Batch::default()
            };
            state.batches.insert(state.last_batch, entry);
            state.last_batch
        } else {
            // A server that connects later gets the windows of that time.
            UNWATCHED
        };
        self.open_as(batch)
    }

    fn open_as(&mut self, batch: u64) -> BatchTicket {
        let state = &mut *self.state;
        let now = Instant::now();
        let connection = state.connection.as_ref().filter(|c| c.terms.is_some());
        let before = connection.map_or(0, |c| c.updates + c.backlog.len());
        let deadlines = &self.link.deadlines;
        let is_for_hang_up = state.connection.as_ref().is_none_or(|c| c.terms.is_none());
        let budget = state.budget(is_for_hang_up);
        let wait = budget.allow(deadlines.answer, now);
        let mut ticket = BatchTicket {
            batch,
            session: state.session,
            updates: before,
            wait,
            is_for_hang_up,
        };
        ticket.expect_more(0, deadlines);
        ticket
    }

    /// The windows that the server has, or is getting.
    pub fn announced(&self) -> Announced {
        let connection = self.state.connection.as_ref();
        let connection = connection.filter(|c| c.terms.is_some());
        Announced {
            is_connected: connection.is_some(),
            unannounced: connection.and_then(|c| c.announcement.next),
        }
    }

    /// The number of the connection of a server that may still use its windows, although the connection is closed on this
    /// side: the server has memory, and has not hung up.
    pub fn closing_session(&self) -> Option<u64> {
        // No server connects before it hangs up.
        self.state.closing.is_some().then_some(self.state.session)
    }

    /// The caller replaces all windows. Those it adds are not announced before [`Self::announce`].
    pub fn hold_back(&mut self) {
        if let Some(connection) = self.state.connection.as_mut().filter(|c| c.terms.is_some()) {
            let is_replaying = connection.is_replaying();
            connection.announcement.hold_back(is_replaying);
        }
    }

    /// Announces all windows, so many of them, to the server for which [`Self::hold_back`] was called: the one of
    /// `former`, whose time counts on. Another server that is connected has got them already, also one that was still
    /// negotiating. Nobody waits for a server that had not got all former windows yet.
    pub fn announce(&mut self, former: &BatchTicket, windows: usize) -> BatchTicket {
        let state = &mut *self.state;
        let mut ticket = former.clone();
        ticket.expect_more(windows, &self.link.deadlines);
        ticket.batch = UNWATCHED;
        let batch = state.last_batch + 1;
        if let Some(connection) = state.connection_of(former)
            && let Some(is_replaying) = connection.announcement.held_back
        {
            if is_replaying {
                connection.announce(REPLAY);
            } else {
                connection.announce(batch);
                ticket.batch = batch;
                state.last_batch = batch;
                let entry = Batch {
                    remaining: 1,
                    ..Batch::default()
                };
                state.batches.insert(batch, entry);
            }
            self.link.send_updates(state);
        }
        ticket
    }
}

/// The windows that a server has, or is getting, at some moment.
#[derive(Clone, Copy, Debug)]
pub struct Announced {
    /// There is a connection.
    is_connected: bool,
    /// The windows from this address on are not announced yet.
    unannounced: Option<Iova>,
}

impl Announced {
    /// Whether `window` is one of them.
    pub fn has(&self, window: IovaRange) -> bool {
        let announced = self.unannounced.is_none_or(|from| window.first() < from);
        self.is_connected && announced
    }
}
