//! The state that both threads share, and the operations that both need.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::Shutdown;
use zerocopy::IntoBytes;

use super::connection::{Pending, ServerConnection, unmap_body};
use super::deadlines::{Deadlines, LimitCounters, Progress, WaitLimit};
use super::update::{DmaUpdate, DmaUpdateError, MAX_UPDATES, WindowRefusal};
use crate::address::Iova;
use crate::locks::{Condvar, Mutex, Rank};
use crate::metrics::Counter;
use crate::process::wait_budget::WaitBudget;
use crate::vfio_user::dma::DmaTarget;
use crate::vfio_user::message::Header;
use crate::warn_limited;

/// This many windows are looked up at a time.
const ANNOUNCED_AT_ONCE: usize = 64;
/// No update is added to the outbox while this many bytes wait there.
const MAX_QUEUED_BYTES: usize = 256 << 10;
/// The batch of updates that no requester waits for.
pub(super) const UNWATCHED: u64 = 0;

/// The connection to a device's server, which may disconnect and reconnect at any time.
pub struct Link {
    /// The device's name in log messages.
    pub(super) name: String,
    /// Knows all windows.
    target: Arc<dyn DmaTarget>,
    pub(super) state: Mutex<LinkState>,
    pub(super) changed: Condvar,
    wake: OwnedFd,
    pub(super) deadlines: Deadlines,
    has_client: AtomicBool,
    cut_offs: Counter,
    /// The part of them for each limit.
    limits: LimitCounters,
    /// Refused windows.
    pub(super) refused: Counter,
    /// The most windows that a server is told.
    pub(super) max_windows: u64,
}

/// Whether the client and the server of a device are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// A client is connected.
    pub client: bool,
    /// A server is connected, and client and server have negotiated.
    pub server: bool,
    /// How many times a server was cut off, because it violated the protocol, was late, or its endpoint
    /// was quarantined.
    pub cut_offs: u64,
    /// How many of these times the server had used its budget for waits up, with replies that were in time.
    pub slow_cut_offs: u64,
    /// How many of these times a reply to a request took longer than [`Deadlines::answer`].
    pub answer_cut_offs: u64,
    /// How many of these times the replies to one request took longer than [`Deadlines::total`].
    pub total_cut_offs: u64,
    /// How many of these times a reply took longer than [`Deadlines::connect`] after the server had connected.
    pub connect_cut_offs: u64,
}

#[derive(Debug)]
pub(super) struct LinkState {
    pub(super) connection: Option<ServerConnection>,
    /// The number of connections so far.
    pub(super) session: u64,
    /// The updates that a requester waits for.
    pub(super) batches: HashMap<u64, Batch>,
    pub(super) last_batch: u64,
    /// The client's commands whose server disconnected before it replied.
    pub(super) unanswered: Vec<Header>,
    /// A server whose connection is half closed. It may use its windows until it hangs up, too.
    pub(super) closing: Option<Arc<OwnedFd>>,
    /// The budget for waits for replies. It belongs to the device, so a server gets no new one when it connects again.
    replies: WaitBudget,
    /// The budget for waits until a closing server has hung up. It is another one, because a server that hung has used
    /// the first one up, and must still be able to close its connection.
    hang_ups: WaitBudget,
    /// The server's answers since the requester waits.
    pub(super) progress: Progress,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut link = f.debug_struct("Link");
        link.field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Disconnect<'a> {
    /// The server has hung up and uses no window any more.
    HungUp,
    /// The client is gone.
    ClientGone,
    /// The server has to be cut off, for this reason.
    CutOff(&'a str),
}

/// The updates that a requester waits for.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Updates without a reply.
    pub(super) remaining: usize,
    /// The batch removes windows, which a closing server may still use.
    pub(super) unmaps: bool,
    /// The first failure. That the server was cut off replaces a refusal.
    pub(super) failed: Option<DmaUpdateError>,
    /// The refused windows.
    pub(super) refused: Vec<WindowRefusal>,
}

impl Link {
    /// A link without a connection, for the device of this name, whose server gets the windows of `target`.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn new(name: String, target: Arc<dyn DmaTarget>, deadlines: Deadlines) -> io::Result<Self> {
        Ok(Self {
            name,
            target,
            state: Mutex::new(Rank::Link, LinkState::new(deadlines.answer)),
            changed: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            deadlines,
            has_client: AtomicBool::new(false),
            cut_offs: Counter::default(),
            limits: LimitCounters::default(),
            refused: Counter::default(),
            max_windows: u64::MAX,
        })
    }

    /// Whether the ends are connected now.
    pub fn ends(&self) -> Ends {
        Ends {
            client: self.has_client.load(Ordering::Relaxed),
            server: self.status().active,
            cut_offs: self.cut_offs.get(),
            slow_cut_offs: self.limits.of(WaitLimit::Budget).get(),
            answer_cut_offs: self.limits.of(WaitLimit::Answer).get(),
            total_cut_offs: self.limits.of(WaitLimit::Total).get(),
            connect_cut_offs: self.limits.of(WaitLimit::Connect).get(),
        }
    }

    /// How long the server may take to answer.
    pub fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    /// Records whether a client is connected.
    pub(in crate::vfio_user) fn set_client(&self, connected: bool) {
        self.has_client.store(connected, Ordering::Relaxed);
    }

    /// Cuts the server off, if one is connected. Requesters that wait for it get `why`.
    pub fn cut_off(&self, why: &str) {
        self.end_locked(&mut self.state.lock(), Disconnect::CutOff(why));
    }

    /// Makes the interposer's thread poll the link.
    pub(in crate::vfio_user) fn wake(&self) {
        // A write fails only if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The descriptor that [`Self::wake`] makes readable.
    pub(in crate::vfio_user) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes [`Self::wake_fd`] unreadable again.
    pub(in crate::vfio_user) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    /// Cuts the server off because of a limit. It had `wait`.
    pub(super) fn end_for(&self, state: &mut LinkState, limit: WaitLimit, wait: Duration) {
        if state.connection.is_none() {
            return;
        }
        self.limits.of(limit).inc();
        let why = limit.reason(&self.deadlines, wait);
        warn_limited!("{}: the server is cut off: {why}", self.name);
        self.end_locked(state, Disconnect::CutOff(&why));
    }

    /// Ends the connection. If the server has memory and has not hung up, the connection is half closed
    /// only: a requester that removes windows then waits until the server hangs up, after which it
    /// cannot use them.
    pub(super) fn end_locked(&self, state: &mut LinkState, reason: Disconnect<'_>) {
        let Some(connection) = state.connection.take() else {
            return;
        };
        let (may_have_memory, why) = match reason {
            Disconnect::HungUp => (false, None),
            Disconnect::ClientGone => (true, None),
            Disconnect::CutOff(why) => (true, Some(why)),
        };
        if why.is_some() {
            self.cut_offs.inc();
        }
        let how = if may_have_memory && connection.shares_memory && connection.windows > 0 {
            state.closing = Some(connection.socket.clone());
            Shutdown::Write
        } else {
            Shutdown::Both
        };
        // It fails if the server has hung up.
        let _ = rustix::net::shutdown(&*connection.socket, how);
        for pending in connection.pending.into_values() {
            if let Pending::Client(command) = pending {
                state.unanswered.push(command.header);
            }
        }
        for batch in state.batches.values_mut().filter(|b| b.remaining > 0) {
            batch.remaining = 0;
            if let Some(why) = why {
                batch.failed = Some(DmaUpdateError::CutOff(why.into()));
            }
        }
        self.changed.notify_all();
        self.wake();
    }

    /// Moves windows to announce, and updates from the backlog, to the outbox, up to the limits, and sends.
    pub(super) fn send_updates(&self, state: &mut LinkState) {
        let LinkState {
            connection: Some(connection),
            batches,
            ..
        } = state
        else {
            return;
        };
        let max_windows = connection.max_windows();
        while connection.updates < MAX_UPDATES && connection.outbox.len_bytes() < MAX_QUEUED_BYTES {
            if let (Some(batch), Some(first)) = (connection.announcing, connection.unannounced) {
                let room = max_windows.saturating_sub(connection.windows);
                let room = usize::try_from(room).unwrap_or(usize::MAX);
                if room > 0 {
                    let limit = room.min(ANNOUNCED_AT_ONCE);
                    let windows = self.target.windows_from(first, limit);
                    let is_rest = windows.len() < limit;
                    let last = windows.last().map(|window| window.range.first().0);
                    let next = last.and_then(|last| last.checked_add(1)).map(Iova);
                    connection.unannounced = next.filter(|_| !is_rest);
                    for window in windows {
                        if !connection.is_in_backlog(&window) {
                            if let Some(batch) = batches.get_mut(&batch) {
                                batch.remaining += 1;
                            }
                            connection.send_window(window, batch);
                        }
                    }
                    if connection.unannounced.is_some() && connection.is_announcement_paused() {
                        warn_limited!(
                            "{}: the server takes {max_windows} windows and no more; it gets the others as it gives \
                             windows up",
                            self.name
                        );
                    }
                    if connection.unannounced.is_none() {
                        self.end_announcement(connection, batches, None);
                    }
                    continue;
                }
                if batch != UNWATCHED {
                    let refusal = self.no_room(connection, first);
                    self.end_announcement(connection, batches, Some(refusal));
                }
            }
            // The server may still refuse the window: then there is nothing to remove.
            let unconfirmed = match connection.backlog.front() {
                Some((DmaUpdate::Unmap(range), _)) => {
                    connection.unconfirmed.contains(&range.first().0)
                }
                Some((DmaUpdate::Map(_), _)) | None => false,
            };
            if unconfirmed {
                break;
            }
            let Some((update, batch)) = connection.backlog.pop_front() else {
                break;
            };
            match update {
                DmaUpdate::Map(window) if connection.windows >= max_windows => {
                    connection.refused.insert(window.range.first().0);
                    let refusal = self.no_room(connection, window.range.first());
                    finish_update(&self.name, batches, batch, Some(refusal));
                    self.changed.notify_all();
                }
                DmaUpdate::Unmap(range) if connection.refused.remove(&range.first().0) => {
                    finish_update(&self.name, batches, batch, None);
                    self.changed.notify_all();
                }
                DmaUpdate::Map(window) => connection.send_window(window, batch),
                DmaUpdate::Unmap(range) => {
                    let body = unmap_body(range);
                    connection.send_update(update, batch, body.as_bytes(), Vec::new());
                }
            }
        }
        self.flush_locked(state);
    }

    /// Ends the announcement of all windows. `refusal` says why the server does not get them all.
    pub(super) fn end_announcement(
        &self,
        connection: &mut ServerConnection,
        batches: &mut HashMap<u64, Batch>,
        refusal: Option<WindowRefusal>,
    ) {
        if let Some(batch) = connection.announcing.take()
            && batch != UNWATCHED
        {
            finish_update(&self.name, batches, batch, refusal);
            self.changed.notify_all();
        }
    }

    pub(super) fn flush_locked(&self, state: &mut LinkState) {
        let Some(connection) = &mut state.connection else {
            return;
        };
        if let Err(cause) = connection.outbox.flush(&*connection.socket) {
            match cause.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    self.end_locked(state, Disconnect::HungUp);
                }
                // The kernel refuses to send. The server is connected, and keeps its windows.
                _ => self.end_locked(state, Disconnect::CutOff(&cause.to_string())),
            }
        } else if !connection.outbox.is_empty() {
            // The interposer's thread polls until the socket accepts more.
            self.wake();
        }
    }
}

impl LinkState {
    fn new(deadline: Duration) -> Self {
        let now = Instant::now();
        Self {
            connection: None,
            session: 0,
            batches: HashMap::new(),
            last_batch: 0,
            unanswered: Vec::new(),
            closing: None,
            replies: WaitBudget::new(deadline, now),
            hang_ups: WaitBudget::new(deadline, now),
            progress: Progress::new(now),
        }
    }

    /// The budget for waits until a closing server has hung up, or for its replies.
    pub(super) fn budget(&mut self, is_for_hang_up: bool) -> &mut WaitBudget {
        if is_for_hang_up {
            &mut self.hang_ups
        } else {
            &mut self.replies
        }
    }
}

/// Completes one update of a batch; `refusal` says whether the server refused it.
pub(super) fn finish_update(
    name: &str,
    batches: &mut HashMap<u64, Batch>,
    batch: u64,
    refusal: Option<WindowRefusal>,
) {
    match batches.get_mut(&batch) {
        Some(batch) => {
            batch.remaining = batch.remaining.saturating_sub(1);
            if let Some(refusal) = refusal {
                batch.failed.get_or_insert(DmaUpdateError::Refused(refusal));
                batch.refused.push(refusal);
            }
        }
        None => {
            if let Some(refusal) = refusal {
                warn_limited!("{name}: the server refuses a window: {refusal}");
            }
        }
    }
}
