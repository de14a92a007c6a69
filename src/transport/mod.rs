//! Transports: how a VMM reaches the device.

pub mod vhost_user;
