//! Serves the device to a VMM over a vhost-user socket.
//!
//! [`serve`] waits for one VMM after the other. [`backend`] turns the
//! messages of the connected VMM into calls of [`Device`](crate::device::Device). [`ring`] has the descriptors of its
//! rings. `relay` makes the connection outlive the process, if another process keeps descriptors.

pub mod backend;
mod connection;
mod relay;
pub mod ring;
pub mod serve;

pub use self::relay::left::LeftVmm;
pub use self::relay::record::VERSION as RECORD_VERSION;
