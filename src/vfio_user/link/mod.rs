//! The connection to a device's server, which two threads share: the interposer's thread, which moves
//! messages, and the requester, whose requests change the windows that the device may reach.
//!
//! One lock guards all state. A thread holds it while it computes and makes system calls that return
//! at once; it never holds it while it waits for a peer. Lock order: this lock, then the lock of the
//! [`DmaTarget`](super::DmaTarget). The requester changes the target's windows while it holds this
//! lock ([`Link::lock`]), so a server that connects gets every window exactly once: either with the
//! announcement of all windows, or with an update after it.
//!
//! The link keeps no list of windows. It announces all windows in ascending order, asks the target for a few at a time,
//! and remembers the address it has reached. The server is told exactly the target's windows below that address, less
//! those that it refuses: updates concern no others, and go before the rest of the announcement.

mod announcement;
mod connection;
mod deadlines;
mod limit;
mod recorded;
mod refused;
mod removal;
mod requester;
mod sending;
mod state;
#[cfg(test)]
mod tests;
mod thread;
mod trial;
mod update;

pub use self::deadlines::Deadlines;
pub use self::limit::WindowLimits;
pub(super) use self::recorded::{ClientProgress, KeptNegotiation, LeftServer, ServerProgress};
pub use self::requester::{Announced, DmaUpdates};
pub use self::state::{Ends, Link};
pub(super) use self::thread::{LinkStatus, MatchedReply};
pub use self::update::{BatchTicket, DmaUpdate, DmaUpdateError, WindowRefusal};
