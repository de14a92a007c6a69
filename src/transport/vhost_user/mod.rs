//! Serves the device to a VMM over a vhost-user socket.
//!
//! [`serve`] waits for one VMM after the other. [`backend`] turns the
//! messages of the connected VMM into calls of [`Device`](crate::device::Device). [`ring`] has the descriptors of its
//! rings.

pub mod backend;
mod connection;
pub mod ring;
pub mod serve;
