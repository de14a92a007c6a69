//! Serves the device to a VMM over a vhost-user socket.
//!
//! [`listener`] takes over an inherited socket. [`serve`] waits for one VMM after the other. [`backend`] turns the
//! messages of the connected VMM into calls of [`Device`](crate::device::Device).

pub mod backend;
pub mod listener;
pub mod serve;
