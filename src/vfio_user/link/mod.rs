//! The connection to a device's server, as two threads see it: the interposer's own, which moves
//! messages, and the one whose requests change what the device may reach.
//!
//! Who guards what: one lock guards all of it, and it is held for computing and for system calls
//! that return at once, never while anybody waits for a peer. Order: this lock, then the lock of
//! what [`super::DmaTarget`] looks into. Whoever gives orders changes that under this lock, so that
//! a server that connects is told of every window exactly once.

mod connection;
mod requester;
mod state;
mod thread;
mod update;

pub use self::requester::DmaUpdates;
pub use self::state::{Ends, Link};
pub(super) use self::thread::{LinkStatus, Settled};
pub use self::update::{BatchTicket, DmaUpdate, DmaUpdateError, MAX_PATIENCE, Window};
