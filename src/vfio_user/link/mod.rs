//! The connection to a device's server, as two threads see it: the interposer's own, which moves
//! messages, and the one whose requests change what the device may reach.
//!
//! Who guards what: one lock guards all of it, and it is held for computing and for system calls
//! that return at once, never while anybody waits for a peer. Order: this lock, then the lock of
//! what [`super::DmaTarget`] looks into. Whoever gives orders changes that under this lock, so that
//! a server that connects is told of every window exactly once.

mod connection;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::Shutdown;
use thiserror::Error;
use zerocopy::IntoBytes;

use self::connection::{Connection, NO_REPLY_ID, Pending, map_body, unmap_body};
use super::message::{Command, Header, Kind};
use super::socket::Descriptor;
use super::version::Terms;
use crate::address::{Access, IovaRange};
use crate::locks::{Condvar, Mutex, MutexGuard, Rank};
use crate::metrics::Counter;
use crate::warn_limited;

/// Orders that wait for their replies at once; the others wait for those.
const MAX_ORDERS: usize = 1024;
/// The longest wait for all orders of one request, where the deadline of one is not longer: however many
/// there are, a server that hangs is cut off by then.
pub const MAX_PATIENCE: Duration = Duration::from_secs(20);
/// While this many bytes wait to be sent, no order is added to them.
const BUSY_BYTES: usize = 256 << 10;
/// The batch nobody waits for.
const UNWATCHED: u64 = 0;

/// Memory a device may reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// The device's addresses.
    pub range: IovaRange,
    /// What it may do there; not nothing.
    pub access: Access,
    /// The file it can map, and where in it; without one it has to ask.
    pub file: Option<(Arc<File>, u64)>,
}

/// A change to what a device may reach.
#[derive(Clone, Debug)]
pub enum Order {
    /// A new window.
    Map(Window),
    /// A window goes, of exactly this range.
    Unmap(IovaRange),
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OrderError {
    /// The server refused a window.
    #[error("the device's server refuses a window: {}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// The server was cut off, for being late or for what it said.
    #[error("the device's server is cut off: {0}")]
    CutOff(String),
}

/// Orders that were given together.
#[derive(Debug)]
#[must_use = "the orders may have failed"]
pub struct Ticket {
    batch: u64,
    until: Instant,
    /// What there was until then.
    patience: Duration,
}

/// A connection to a server that comes and goes.
#[derive(Debug)]
pub struct Link {
    /// The device's name, for messages.
    name: String,
    state: Mutex<State>,
    changed: Condvar,
    wake: OwnedFd,
    deadline: Duration,
    has_client: AtomicBool,
    cut_offs: Counter,
}

/// How a device's two ends are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// A client is connected.
    pub client: bool,
    /// A server is connected, and the two have come to terms.
    pub server: bool,
    /// How many times a server was cut off: for what it said or did not say, or with its endpoint.
    pub cut_offs: u64,
}

#[derive(Debug, Default)]
struct State {
    connection: Option<Connection>,
    /// Connections there have been.
    session: u64,
    /// Orders somebody waits for.
    batches: HashMap<u64, Batch>,
    last_batch: u64,
    /// The client's commands that no server will answer any more.
    orphans: Vec<Header>,
    /// A server that was let go, and that has memory until it hangs up too.
    parting: Option<Arc<OwnedFd>>,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug)]
enum Ending<'a> {
    /// The server has hung up: it has let go of everything.
    HungUp,
    /// Its client is gone.
    ClientGone,
    /// The server is to blame, for this.
    CutOff(&'a str),
}

#[derive(Debug, Default)]
struct Batch {
    remaining: usize,
    /// It takes windows away, which a server that is parting may have.
    unmaps: bool,
    failed: Option<OrderError>,
}

/// What a reply of the server's was.
#[derive(Debug)]
pub(super) enum Settled {
    /// To VERSION.
    Version,
    /// To a command of the client's, whose header this is.
    Client(Header),
    /// To something that needs no more.
    Done,
    /// None to any command there was.
    Wrong(&'static str),
}

/// How the link is doing, for the thread that moves messages.
#[derive(Debug)]
pub(super) struct Pulse {
    pub(super) session: u64,
    pub(super) connected: bool,
    pub(super) up: bool,
    /// All orders are in the outbox.
    pub(super) told: bool,
    /// Bytes that wait to be sent.
    pub(super) bytes: usize,
    /// Descriptors that wait with them.
    pub(super) descriptors: usize,
    /// The client's commands without a reply.
    pub(super) commands: usize,
    /// The last server has not hung up yet, and no other is wanted before.
    pub(super) parting: bool,
}

impl Link {
    /// A link that is not connected, of the device of this name. `deadline` is what a server has to answer an order in; for many at
    /// once it has that for each 1024 of them, those included that are before them.
    ///
    /// # Errors
    /// Where the system has no descriptor left.
    pub fn new(name: String, deadline: Duration) -> io::Result<Self> {
        Ok(Self {
            name,
            state: Mutex::new(Rank::Link, State::default()),
            changed: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            deadline,
            has_client: AtomicBool::new(false),
            cut_offs: Counter::default(),
        })
    }

    /// How things are now.
    pub fn ends(&self) -> Ends {
        Ends {
            client: self.has_client.load(Ordering::Relaxed),
            server: self.pulse().up,
            cut_offs: self.cut_offs.get(),
        }
    }

    /// There is a client, or none any more.
    pub(super) fn set_client(&self, there: bool) {
        self.has_client.store(there, Ordering::Relaxed);
    }

    /// Keeps servers from being told anything until dropped, to give orders in step with what they
    /// are about. Nothing may wait for a peer meanwhile.
    pub fn lock(&self) -> Orders<'_> {
        Orders {
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
    /// See [`OrderError`]. Orders to unmap are never refused.
    pub fn wait(&self, ticket: Ticket) -> Result<(), OrderError> {
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
                self.end_locked(&mut state, Ending::CutOff(&why));
            } else if parting {
                let why = format!(
                    "it was told to let go, and {:?} later it still has the guest's memory",
                    ticket.patience
                );
                if let Some(batch) = state.batches.get_mut(&ticket.batch) {
                    batch.failed.get_or_insert(OrderError::CutOff(why));
                }
                break;
            }
        }
        let failed = state.batches.remove(&ticket.batch).and_then(|b| b.failed);
        failed.map_or(Ok(()), Err)
    }

    /// Ends the connection to the server, if there is one, for which that is to blame.
    pub fn cut_off(&self, why: &str) {
        self.end_locked(&mut self.state.lock(), Ending::CutOff(why));
    }

    /// Makes the interposer's thread look at the link.
    pub(super) fn wake(&self) {
        // A counter that is full wakes too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// What [`Self::wake`] makes readable.
    pub(super) fn woken(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes note of having been woken.
    pub(super) fn awake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    pub(super) fn pulse(&self) -> Pulse {
        let state = self.state.lock();
        let connection = state.connection.as_ref();
        Pulse {
            session: state.session,
            connected: connection.is_some(),
            up: connection.is_some_and(|c| c.terms.is_some()),
            told: connection.is_none_or(|c| c.backlog.is_empty()),
            bytes: connection.map_or(0, |c| c.outbox.len_bytes()),
            descriptors: connection.map_or(0, |c| c.outbox.len_descriptors()),
            commands: connection.map_or(0, |c| c.commands),
            parting: state.parting.is_some(),
        }
    }

    /// A server is connected: asks it for a version. Returns the number of the session.
    pub(super) fn begin(&self, socket: Arc<OwnedFd>, proposal: &[u8]) -> u64 {
        let mut state = self.state.lock();
        state.session += 1;
        let connection = state.connection.insert(Connection::new(socket));
        connection.send(Pending::Version, Command::Version, proposal, Vec::new());
        let session = state.session;
        self.flush_locked(&mut state);
        session
    }

    /// Server and client have come to terms: the server is told what `windows` returns, and what
    /// is to be told again.
    pub(super) fn come_up(
        &self,
        terms: Terms,
        windows: impl FnOnce() -> Vec<Window>,
        again: Vec<(Command, Vec<u8>, Vec<Descriptor>)>,
    ) {
        let mut state = self.state.lock();
        let Some(connection) = &mut state.connection else {
            return;
        };
        connection.terms = Some(terms);
        let orders = windows().into_iter().map(|w| (Order::Map(w), UNWATCHED));
        connection.backlog.extend(orders);
        for (command, body, descriptors) in again {
            connection.send(Pending::Again(command), command, &body, descriptors);
        }
        self.pump(&mut state);
    }

    /// Sends the server a command of the client's. `false` where there is no server for it.
    pub(super) fn forward(
        &self,
        header: Header,
        command: Command,
        body: &[u8],
        descriptors: Vec<Descriptor>,
    ) -> bool {
        let mut state = self.state.lock();
        let Some(connection) = state.connection.as_mut().filter(|c| c.terms.is_some()) else {
            return false;
        };
        if header.wants_no_reply() {
            let renumbered = Header {
                id: NO_REPLY_ID,
                ..header
            };
            connection
                .outbox
                .push(renumbered.with_body(body), descriptors);
        } else {
            connection.commands += 1;
            connection.send(Pending::Client(header), command, body, descriptors);
        }
        self.flush_locked(&mut state);
        true
    }

    /// Sends the server the reply to a command of its own.
    pub(super) fn reply(&self, bytes: Vec<u8>) {
        let mut state = self.state.lock();
        if let Some(connection) = &mut state.connection {
            connection.outbox.push(bytes, Vec::new());
            self.flush_locked(&mut state);
        }
    }

    /// Sends what the server takes now.
    pub(super) fn flush(&self) {
        self.pump(&mut self.state.lock());
    }

    /// Finds what a reply is to.
    pub(super) fn settle(&self, reply: &Header) -> Settled {
        let mut state = self.state.lock();
        let State {
            connection: Some(connection),
            batches,
            ..
        } = &mut *state
        else {
            return Settled::Done;
        };
        if reply.id == NO_REPLY_ID {
            return Settled::Done;
        }
        let Some(pending) = connection.pending.remove(&reply.id) else {
            return Settled::Wrong("a reply to no command");
        };
        if pending.command().number() != reply.command {
            // Put back, so that whoever waits hears of the end.
            connection.pending.insert(reply.id, pending);
            return Settled::Wrong("a reply to another command");
        }
        match pending {
            Pending::Version => Settled::Version,
            Pending::Client(header) => {
                connection.commands -= 1;
                Settled::Client(header)
            }
            Pending::Again(command) => {
                if let Kind::Refusal(error) = reply.kind {
                    let name = &self.name;
                    warn_limited!("{name}: the server refuses {command:?}: errno {error}");
                }
                Settled::Done
            }
            Pending::Order(order, batch) => {
                connection.orders -= 1;
                if let Order::Map(window) = &order {
                    connection.asked.remove(&window.range.first().0);
                }
                let error = match (reply.kind, &order) {
                    (Kind::Refusal(_), Order::Unmap(range)) => {
                        let why = format!("it refuses to give {range} up");
                        if let Some(batch) = batches.get_mut(&batch) {
                            batch.failed = Some(OrderError::CutOff(why));
                        }
                        return Settled::Wrong("it refuses to give a window up");
                    }
                    (Kind::Refusal(error), Order::Map(window)) => {
                        connection.windows -= 1;
                        connection.refused.insert(window.range.first().0);
                        Some(i32::try_from(error).unwrap_or(libc::EIO))
                    }
                    (_, Order::Map(_)) => None,
                    (_, Order::Unmap(_)) => {
                        connection.windows -= 1;
                        None
                    }
                };
                finish(&self.name, batches, batch, error);
                self.pump(&mut state);
                self.changed.notify_all();
                Settled::Done
            }
        }
    }

    /// The server has hung up, or nobody is left to talk to it.
    pub(super) fn end(&self) {
        self.end_locked(&mut self.state.lock(), Ending::HungUp);
    }

    /// The client is gone.
    pub(super) fn part(&self) {
        self.end_locked(&mut self.state.lock(), Ending::ClientGone);
    }

    /// The server that is parting.
    pub(super) fn parting(&self) -> Option<Arc<OwnedFd>> {
        self.state.lock().parting.clone()
    }

    /// It has hung up.
    pub(super) fn parted(&self) {
        self.state.lock().parting = None;
        self.changed.notify_all();
    }

    /// The client's commands that no server answers any more.
    pub(super) fn take_orphans(&self) -> Vec<Header> {
        std::mem::take(&mut self.state.lock().orphans)
    }

    /// Ends the connection. A server that was given memory, and has not hung up, is told by the end of
    /// its stream. Whoever takes windows away waits until it has hung up, for then it has let go of them.
    fn end_locked(&self, state: &mut State, ending: Ending<'_>) {
        let Some(connection) = state.connection.take() else {
            return;
        };
        let (may_have_memory, why) = match ending {
            Ending::HungUp => (false, None),
            Ending::ClientGone => (true, None),
            Ending::CutOff(why) => (true, Some(why)),
        };
        if why.is_some() {
            self.cut_offs.inc();
        }
        let how = if may_have_memory && connection.shares && connection.windows > 0 {
            state.parting = Some(connection.socket.clone());
            Shutdown::Write
        } else {
            Shutdown::Both
        };
        // It may have hung up itself.
        let _ = rustix::net::shutdown(&*connection.socket, how);
        for pending in connection.pending.into_values() {
            if let Pending::Client(header) = pending {
                state.orphans.push(header);
            }
        }
        for batch in state.batches.values_mut().filter(|b| b.remaining > 0) {
            batch.remaining = 0;
            if let Some(why) = why {
                batch
                    .failed
                    .get_or_insert_with(|| OrderError::CutOff(why.into()));
            }
        }
        self.changed.notify_all();
        self.wake();
    }

    /// Puts orders that wait into the outbox, as many as may be there at once, and sends.
    fn pump(&self, state: &mut State) {
        let State {
            connection: Some(connection),
            batches,
            ..
        } = state
        else {
            return;
        };
        let most = connection.terms.as_ref().map_or(0, |t| t.windows);
        while connection.orders < MAX_ORDERS && connection.outbox.len_bytes() < BUSY_BYTES {
            // Whether there is a window to take away is not known before the server has said so.
            let unknown = match connection.backlog.front() {
                Some((Order::Unmap(range), _)) => connection.asked.contains(&range.first().0),
                Some((Order::Map(_), _)) | None => false,
            };
            if unknown {
                break;
            }
            let Some((order, batch)) = connection.backlog.pop_front() else {
                break;
            };
            match &order {
                Order::Map(window) if connection.windows >= most => {
                    connection.refused.insert(window.range.first().0);
                    finish(&self.name, batches, batch, Some(libc::ENOSPC));
                    self.changed.notify_all();
                }
                Order::Unmap(range) if connection.refused.remove(&range.first().0) => {
                    finish(&self.name, batches, batch, None);
                    self.changed.notify_all();
                }
                Order::Map(window) => {
                    connection.windows += 1;
                    connection.asked.insert(window.range.first().0);
                    let (body, descriptors) = map_body(window);
                    connection.shares |= !descriptors.is_empty();
                    connection.order(order, batch, body.as_bytes(), descriptors);
                }
                Order::Unmap(range) => {
                    let body = unmap_body(*range);
                    connection.order(order, batch, body.as_bytes(), Vec::new());
                }
            }
        }
        self.flush_locked(state);
    }

    fn flush_locked(&self, state: &mut State) {
        let Some(connection) = &mut state.connection else {
            return;
        };
        if let Err(cause) = connection.outbox.flush(&*connection.socket) {
            match cause.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    self.end_locked(state, Ending::HungUp);
                }
                // The system will not send it: the server is there, and has what it has.
                _ => self.end_locked(state, Ending::CutOff(&cause.to_string())),
            }
        } else if !connection.outbox.is_empty() {
            // The interposer's thread sees when there is room.
            self.wake();
        }
    }
}

impl State {
    /// What a batch waits for: answers to its orders, and a server that is parting.
    fn awaited(&self, batch: u64) -> (bool, bool) {
        self.batches.get(&batch).map_or((false, false), |batch| {
            let parting = batch.unmaps && self.parting.is_some();
            (batch.remaining > 0, parting)
        })
    }
}

/// The right to give orders.
pub struct Orders<'a> {
    state: MutexGuard<'a, State>,
    link: &'a Link,
}

impl Orders<'_> {
    /// Gives orders, which are carried out in their order. [`Link::wait`] tells when.
    pub fn give(&mut self, orders: impl IntoIterator<Item = Order>) -> Ticket {
        let state = &mut *self.state;
        let orders: Vec<_> = orders.into_iter().collect();
        let unmaps = orders.iter().any(|o| matches!(o, Order::Unmap(_)));
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
            return Ticket {
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
        Ticket {
            batch,
            until,
            patience,
        }
    }
}

/// One order of a batch is done with.
fn finish(name: &str, batches: &mut HashMap<u64, Batch>, batch: u64, error: Option<i32>) {
    match batches.get_mut(&batch) {
        Some(batch) => {
            batch.remaining = batch.remaining.saturating_sub(1);
            if let Some(error) = error {
                batch.failed.get_or_insert(OrderError::Refused(error));
            }
        }
        None => {
            if let Some(error) = error {
                let cause = io::Error::from_raw_os_error(error);
                warn_limited!("{name}: the server refuses a window: {cause}");
            }
        }
    }
}
