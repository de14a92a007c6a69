//! The connection to a device's server, which two threads share: the interposer's thread, which moves
//! messages, and the requester, whose requests change the windows that the device may reach.
//!
//! One lock guards all state. A thread holds it while it computes and makes system calls that return
//! at once; it never holds it while it waits for a peer. Lock order: this lock, then the lock of the
//! [`DmaTarget`](super::DmaTarget). The requester changes the target's windows while it holds this
//! lock ([`Link::lock`]), so a server that connects gets every window exactly once: either with the
//! windows at the connection, or with an update after it.

mod connection;
mod requester;
mod state;
mod thread;
mod update;

pub use self::requester::DmaUpdates;
pub use self::state::{Ends, Link};
pub(super) use self::thread::{LinkStatus, MatchedReply};
pub use self::update::{BatchTicket, DmaUpdate, DmaUpdateError, MAX_BATCH_TIMEOUT, Window};
