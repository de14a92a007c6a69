//! The state that both threads share, and what either does with it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::Shutdown;
use zerocopy::IntoBytes;

use super::connection::{Pending, ServerConnection, map_body, unmap_body};
use super::update::{DmaUpdate, DmaUpdateError};
use crate::locks::{Condvar, Mutex, Rank};
use crate::metrics::Counter;
use crate::vfio_user::message::Header;
use crate::warn_limited;

/// Updates that wait for their replies at once; the others wait for those.
pub(super) const MAX_ORDERS: usize = 1024;
/// While this many bytes wait to be sent, no order is added to them.
const BUSY_BYTES: usize = 256 << 10;
/// The batch nobody waits for.
pub(super) const UNWATCHED: u64 = 0;

/// A connection to a server that comes and goes.
#[derive(Debug)]
pub struct Link {
    /// The device's name, for messages.
    pub(super) name: String,
    pub(super) state: Mutex<LinkState>,
    pub(super) changed: Condvar,
    wake: OwnedFd,
    pub(super) deadline: Duration,
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
pub(super) struct LinkState {
    pub(super) connection: Option<ServerConnection>,
    /// Connections there have been.
    pub(super) session: u64,
    /// Updates somebody waits for.
    pub(super) batches: HashMap<u64, Batch>,
    pub(super) last_batch: u64,
    /// The client's commands that no server will answer any more.
    pub(super) orphans: Vec<Header>,
    /// A server that was let go, and that has memory until it hangs up too.
    pub(super) parting: Option<Arc<OwnedFd>>,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Disconnect<'a> {
    /// The server has hung up: it has let go of everything.
    HungUp,
    /// Its client is gone.
    ClientGone,
    /// The server is to blame, for this.
    CutOff(&'a str),
}

#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) remaining: usize,
    /// It takes windows away, which a server that is parting may have.
    pub(super) unmaps: bool,
    pub(super) failed: Option<DmaUpdateError>,
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
            state: Mutex::new(Rank::Link, LinkState::default()),
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
            server: self.status().up,
            cut_offs: self.cut_offs.get(),
        }
    }

    /// There is a client, or none any more.
    pub(in crate::vfio_user) fn set_client(&self, there: bool) {
        self.has_client.store(there, Ordering::Relaxed);
    }

    /// Ends the connection to the server, if there is one, for which that is to blame.
    pub fn cut_off(&self, why: &str) {
        self.end_locked(&mut self.state.lock(), Disconnect::CutOff(why));
    }

    /// Makes the interposer's thread look at the link.
    pub(in crate::vfio_user) fn wake(&self) {
        // A counter that is full wakes too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// What [`Self::wake`] makes readable.
    pub(in crate::vfio_user) fn woken(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes note of having been woken.
    pub(in crate::vfio_user) fn awake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    /// Ends the connection. A server that was given memory, and has not hung up, is told by the end of
    /// its stream. Whoever takes windows away waits until it has hung up, for then it has let go of them.
    pub(super) fn end_locked(&self, state: &mut LinkState, ending: Disconnect<'_>) {
        let Some(connection) = state.connection.take() else {
            return;
        };
        let (may_have_memory, why) = match ending {
            Disconnect::HungUp => (false, None),
            Disconnect::ClientGone => (true, None),
            Disconnect::CutOff(why) => (true, Some(why)),
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
                    .get_or_insert_with(|| DmaUpdateError::CutOff(why.into()));
            }
        }
        self.changed.notify_all();
        self.wake();
    }

    /// Puts orders that wait into the outbox, as many as may be there at once, and sends.
    pub(super) fn pump(&self, state: &mut LinkState) {
        let LinkState {
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
                Some((DmaUpdate::Unmap(range), _)) => connection.asked.contains(&range.first().0),
                Some((DmaUpdate::Map(_), _)) | None => false,
            };
            if unknown {
                break;
            }
            let Some((order, batch)) = connection.backlog.pop_front() else {
                break;
            };
            match &order {
                DmaUpdate::Map(window) if connection.windows >= most => {
                    connection.refused.insert(window.range.first().0);
                    finish(&self.name, batches, batch, Some(libc::ENOSPC));
                    self.changed.notify_all();
                }
                DmaUpdate::Unmap(range) if connection.refused.remove(&range.first().0) => {
                    finish(&self.name, batches, batch, None);
                    self.changed.notify_all();
                }
                DmaUpdate::Map(window) => {
                    connection.windows += 1;
                    connection.asked.insert(window.range.first().0);
                    let (body, descriptors) = map_body(window);
                    connection.shares |= !descriptors.is_empty();
                    connection.order(order, batch, body.as_bytes(), descriptors);
                }
                DmaUpdate::Unmap(range) => {
                    let body = unmap_body(*range);
                    connection.order(order, batch, body.as_bytes(), Vec::new());
                }
            }
        }
        self.flush_locked(state);
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
                // The system will not send it: the server is there, and has what it has.
                _ => self.end_locked(state, Disconnect::CutOff(&cause.to_string())),
            }
        } else if !connection.outbox.is_empty() {
            // The interposer's thread sees when there is room.
            self.wake();
        }
    }
}

/// One order of a batch is done with.
pub(super) fn finish(
    name: &str,
    batches: &mut HashMap<u64, Batch>,
    batch: u64,
    error: Option<i32>,
) {
    match batches.get_mut(&batch) {
        Some(batch) => {
            batch.remaining = batch.remaining.saturating_sub(1);
            if let Some(error) = error {
                batch.failed.get_or_insert(DmaUpdateError::Refused(error));
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
