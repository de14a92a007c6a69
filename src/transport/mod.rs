//! Transports: how a VMM reaches the device. [`listener`] takes over an inherited socket.

pub mod listener;
pub mod vhost_user;
