//! The thread between a client and a device's server.
//!
//! The thread never waits for a peer. It queues what it cannot send, and receives nothing more from a
//! peer that caused a long queue.

mod client;
mod peers;
mod proxy;
mod server;
mod thread;

pub use self::proxy::InterposerSettings;
pub use self::thread::Interposer;
