//! From the configuration to opened devices: one module for each kind of endpoint.
//!
//! - [`kind`] has the trait that every kind implements, and `kinds` the table of all of them.
//! - [`status`] has the form in which devices in service report their figures.
//! - [`changes`] has the record of the endpoints that hotplug has added and removed.
//! - `start` brings the configured devices up with the daemon; `hotplug` adds and removes endpoints
//!   while the VM runs.

pub mod bound;
pub mod changes;
mod emulated;
pub mod exported;
#[cfg(not(miri))]
pub mod hotplug;
pub mod kind;
#[cfg(not(miri))]
pub mod kinds;
pub mod passthrough;
#[cfg(not(miri))]
pub mod shadow;
pub mod sockets;
#[cfg(not(miri))]
pub mod start;
pub mod status;
