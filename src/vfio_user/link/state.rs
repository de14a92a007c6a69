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

use super::connection::{Pending, ServerConnection};
use super::deadlines::{Deadlines, LimitCounters, Progress, WaitLimit};
use super::update::{DmaUpdateError, MAX_UPDATES, REPLAY, WindowRefusal};
use crate::locks::{Condvar, Mutex, Rank};
use crate::metrics::Counter;
use crate::process::unkept::UnkeptConnection;
use crate::process::wait_budget::WaitBudget;
use crate::vfio_user::dma::DmaTarget;
use crate::vfio_user::kept::{Book, KeptConnections, Place};
use crate::vfio_user::message::Header;
use crate::warn_limited;

/// The connection to a device's server, which may disconnect and reconnect at any time.
pub struct Link {
    /// The device's name in log messages.
    pub(super) name: String,
    /// Knows all windows.
    pub(super) target: Arc<dyn DmaTarget>,
    pub(super) state: Mutex<LinkState>,
    /// What a requester waits for has happened: its batch is complete, the backlog has room, a connection has ended. The
    /// requester watches its deadline itself.
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
    /// The interposer's thread waits: the endpoint's target is not known yet.
    pub(super) is_held: AtomicBool,
}

/// Whether the client and the server of a device are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// A client is connected.
    pub client: bool,
    /// A server is connected, and client and server have negotiated.
    pub server: bool,
    /// A server that was cut off, or whose client is gone, may still use the memory that it has mapped: it has not hung up.
    pub keeps_memory: bool,
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
    /// The record for a later process, if there is one.
    pub(super) book: Option<Book>,
    /// What the keeper has, to say what could not be taken over.
    pub(super) kept: Option<KeptConnections>,
    /// The places of the client's commands whose replies have come since the last commit of the server's messages.
    pub(super) replied: Vec<Place>,
    /// The server's second socket, if the connections outlive this process.
    pub(super) twin: Option<Arc<OwnedFd>>,
    /// The record has no room for all regions that the server is told, so its connection ends with this process.
    pub(super) unrecorded_regions: Option<UnkeptConnection>,
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
            is_held: AtomicBool::new(false),
        })
    }

    /// Whether the ends are connected now.
    pub fn ends(&self) -> Ends {
        let status = self.status();
        Ends {
            client: self.has_client.load(Ordering::Relaxed),
            server: status.active,
            keeps_memory: status.closing,
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
        // Before the socket says so: a later process must not send to it.
        state.note_end_of_server();
        // It fails if the server has hung up.
        let _ = rustix::net::shutdown(&*connection.socket, how);
        state.shut_twin();
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

    pub(super) fn flush_locked(&self, state: &mut LinkState) {
        let Some(connection) = &mut state.connection else {
            return;
        };
        if connection
            .outbox
            .ring()
            .is_some_and(|ring| ring.has_uncommitted())
        {
            state.commit();
        }
        let Some(connection) = &mut state.connection else {
            return;
        };
        let sent = connection.outbox.flush(&*connection.socket);
        self.after_sending(state, sent);
    }

    /// Ends the connection if the outbox could not send, with the outcome `sent`.
    pub(super) fn after_sending(&self, state: &mut LinkState, sent: io::Result<()>) {
        if let Err(cause) = sent {
            match cause.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    self.end_locked(state, Disconnect::HungUp);
                }
                // The kernel refuses to send. The server is connected, and keeps its windows.
                _ => self.end_locked(state, Disconnect::CutOff(&cause.to_string())),
            }
        } else if state
            .connection
            .as_ref()
            .is_some_and(|c| !c.outbox.is_empty())
        {
            // The interposer's thread polls until the socket accepts more.
            self.wake();
        }
    }
}

impl LinkState {
    /// Shuts the second socket of the server down. The interposer's thread may be waiting for it: the server has it in common
    /// with this process, and can make it blocking.
    pub(super) fn shut_twin(&mut self) {
        if let Some(twin) = self.twin.take() {
            let _ = rustix::net::shutdown(&*twin, Shutdown::Both);
        }
    }

    fn new(deadline: Duration) -> Self {
        let now = Instant::now();
        Self {
            connection: None,
            session: 0,
            batches: HashMap::new(),
            last_batch: REPLAY,
            unanswered: Vec::new(),
            closing: None,
            replies: WaitBudget::new(deadline, now),
            hang_ups: WaitBudget::new(deadline, now),
            progress: Progress::new(now),
            book: None,
            kept: None,
            replied: Vec::new(),
            twin: None,
            unrecorded_regions: None,
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

impl Link {
    /// Completes one update of a batch; `refusal` says whether the server refused it. Wakes the requester if it was the last
    /// one: to wake it for each answer would cost two switches between threads for each window.
    pub(super) fn finish_update(
        &self,
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
                if batch.remaining == 0 {
                    self.changed.notify_all();
                }
            }
            None => {
                if let Some(refusal) = refusal {
                    let name = &self.name;
                    warn_limited!("{name}: the server refuses a window: {refusal}");
                }
            }
        }
    }

    /// Wakes a requester that waits for room in the backlog, if half of it is free.
    pub(super) fn wake_sender(&self, connection: &mut ServerConnection) {
        if connection.backlog.len() <= MAX_UPDATES / 2
            && std::mem::take(&mut connection.is_sender_waiting)
        {
            self.changed.notify_all();
        }
    }
}
