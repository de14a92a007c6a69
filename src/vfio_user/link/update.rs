//! What a link's users order, and what becomes of it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::{Access, IovaRange};

/// The longest wait for all orders of one request, where the deadline of one is not longer: however many
/// there are, a server that hangs is cut off by then.
pub const MAX_PATIENCE: Duration = Duration::from_secs(20);

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
pub enum DmaUpdate {
    /// A new window.
    Map(Window),
    /// A window goes, of exactly this range.
    Unmap(IovaRange),
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaUpdateError {
    /// The server refused a window.
    #[error("the device's server refuses a window: {}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// The server was cut off, for being late or for what it said.
    #[error("the device's server is cut off: {0}")]
    CutOff(String),
}

/// Updates that were given together.
#[derive(Debug)]
#[must_use = "the orders may have failed"]
pub struct BatchTicket {
    pub(super) batch: u64,
    pub(super) until: Instant,
    /// What there was until then.
    pub(super) patience: Duration,
}
