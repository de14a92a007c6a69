//! The updates that a requester sends to a device's server.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::{Access, IovaRange};

/// The longest wait for all updates of one request, unless the deadline of a single update is longer.
/// A server that hangs is cut off by then, however many updates there are.
pub const MAX_BATCH_TIMEOUT: Duration = Duration::from_secs(20);

/// Memory that a device may reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// The device's addresses.
    pub range: IovaRange,
    /// The rights of the device there, at least one.
    pub access: Access,
    /// The file that the server can map, and the offset of the window in it. Without a file the server
    /// has to send DMA_READ and DMA_WRITE.
    pub file: Option<(Arc<File>, u64)>,
}

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
#[derive(Debug)]
#[must_use = "the updates may fail"]
pub struct BatchTicket {
    pub(super) batch: u64,
    pub(super) until: Instant,
    /// The time until then, for messages.
    pub(super) timeout: Duration,
}
