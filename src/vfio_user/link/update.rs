//! The updates that a requester sends to a device's server.

use std::fmt;
use std::io;

use thiserror::Error;

use super::deadlines::Deadlines;
use crate::address::{Iova, IovaRange};
use crate::process::wait_budget::AllowedWait;
use crate::vfio_user::dma::Window;

/// At most this many updates are without a reply; the others wait in the backlog.
pub(super) const MAX_UPDATES: usize = 1024;
/// At most this many updates that no requester waits for are without a reply. A requester that comes next waits for all
/// of them.
pub(super) const MAX_UNWATCHED: usize = 64;

/// The batch of updates that no requester waits for.
pub(super) const UNWATCHED: u64 = 0;
/// The batch of all windows that a server gets when it connects. No requester waits for it either. The batches of
/// requesters have higher numbers.
pub(super) const REPLAY: u64 = 1;

/// A change of the memory that a device may reach.
#[derive(Clone, Debug)]
pub enum DmaUpdate {
    /// Adds a window.
    Map(Window),
    /// Removes the window of exactly this range.
    Unmap(IovaRange),
    /// Removes all windows. Only [`Link::remove_all`](super::Link::remove_all) sends it: a server may ignore it.
    UnmapAll,
}

impl fmt::Display for DmaUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(window) => write!(f, "the window {}", window.range),
            Self::Unmap(range) => write!(f, "the window {range}"),
            Self::UnmapAll => write!(f, "a window"),
        }
    }
}

/// A server's refusal of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowRefusal {
    /// The first address of the window.
    pub first: Iova,
    /// The errno of the server's reply; ENOSPC if the window was not sent, because the server has as many as it takes.
    pub errno: i32,
    /// The number of windows that the server had.
    pub windows: u64,
}

impl WindowRefusal {
    /// Whether the server has probably reached the limit of its windows. libvfio-user answers EINVAL there. A server that
    /// answers EINVAL to its first window refuses the window itself.
    pub fn is_limit(&self) -> bool {
        self.windows > 0 && matches!(self.errno, libc::EINVAL | libc::ENOSPC | libc::ENOMEM)
    }
}

impl fmt::Display for WindowRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cause = io::Error::from_raw_os_error(self.errno);
        let windows = self.windows;
        write!(f, "{cause}; it has {windows} windows")
    }
}

/// Why a server did not apply an update.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaUpdateError {
    /// The server refused a window.
    #[error("the device's server refuses a window: {0}")]
    Refused(WindowRefusal),
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
    /// The updates to wait for, including those sent before this batch.
    pub(super) updates: usize,
    /// The wait that the budget of the device allows.
    pub(super) wait: AllowedWait,
    /// The wait is for a closing server to hang up, not for replies.
    pub(super) is_for_hang_up: bool,
}

impl BatchTicket {
    /// Counts `updates` more. The server has the deadline of an answer for each, up to the total; of this time, it has
    /// the part that its budget allows.
    pub(super) fn expect_more(&mut self, updates: usize, deadlines: &Deadlines) {
        self.updates += updates;
        self.wait.grow(deadlines.of_updates(self.updates));
    }
}
