//! The updates that a requester sends to a device's server.

use std::io;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::IovaRange;
use crate::vfio_user::dma::Window;

/// The longest wait for all updates of one request, unless the deadline of a single update is longer.
/// A server that hangs is cut off by then, however many updates there are.
pub const MAX_BATCH_TIMEOUT: Duration = Duration::from_secs(20);
/// At most this many updates are without a reply; the others wait in the backlog.
pub(super) const MAX_UPDATES: usize = 1024;

/// A change of the memory that a device may reach.
#[derive(Clone, Debug)]
pub enum DmaUpdate {
    /// Adds a window.
    Map(Window),
    /// Removes the window of exactly this range.
    Unmap(IovaRange),
}

/// Why a server did not apply an update.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaUpdateError {
    /// The server refused a window, with this errno.
    #[error("the device's server refuses a window: {}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// The link cut the server off, which was late or violated the protocol.
    #[error("the device's server is cut off: {0}")]
    CutOff(String),
}

/// A batch of updates to wait for with [`Link::wait`](super::Link::wait).
#[derive(Clone, Debug)]
#[must_use = "the updates may fail"]
pub struct BatchTicket {
    pub(super) batch: u64,
    /// The number of the connection at its opening.
    pub(super) session: u64,
    opened: Instant,
    /// The updates to wait for, including those sent before this batch.
    updates: usize,
    pub(super) until: Instant,
    /// The time until then, for messages.
    pub(super) timeout: Duration,
}

impl BatchTicket {
    /// The ticket of a batch that is opened now, after `before` updates. `deadline` is that of one update.
    pub(super) fn new(batch: u64, session: u64, before: usize, deadline: Duration) -> Self {
        let opened = Instant::now();
        let mut ticket = Self {
            batch,
            session,
            opened,
            updates: before,
            until: opened,
            timeout: deadline,
        };
        ticket.expect_more(0, deadline);
        ticket
    }

    /// Counts `updates` more. The server has `deadline` once, and once more for each 1024 updates.
    pub(super) fn expect_more(&mut self, updates: usize, deadline: Duration) {
        self.updates += updates;
        let rounds = u32::try_from(1 + self.updates / MAX_UPDATES).unwrap_or(u32::MAX);
        let timeout = deadline.saturating_mul(rounds);
        self.timeout = timeout.min(deadline.max(MAX_BATCH_TIMEOUT));
        self.until = self.opened + self.timeout;
    }
}
