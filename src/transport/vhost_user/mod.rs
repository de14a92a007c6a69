//! A VMM reaches the device over a vhost-user socket.
//!
//! [`serve`] waits for one VMM after the other, [`backend`] turns the messages of the one that is connected into calls
//! of [`Device`](crate::device::Device), [`listener`] has the socket.

pub mod backend;
pub mod listener;
pub mod serve;
