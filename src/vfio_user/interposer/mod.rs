//! The thread between a client and a device's server.
//!
//! The thread never waits for a peer. It queues messages that a socket does not accept yet, and receives
//! nothing more from a peer whose messages have made a queue long.

mod client;
mod left;
mod peers;
mod proxy;
mod server;
mod thread;
mod twin;
mod unclaimed;

pub use self::proxy::InterposerSettings;
pub use self::thread::Interposer;
