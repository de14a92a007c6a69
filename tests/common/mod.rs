//! A virtual machine for tests: a vhost-user frontend over a real socket, guest memory in memfds, and
//! the driver's side of split virtqueues.
//!
//! Written from the virtio and vhost-user specifications alone. It uses nothing of the daemon's own
//! library, so that a misreading on one side is not repeated on the other.

#![allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic, and lengths here are small"
)]

pub mod daemon;
pub mod guest;
pub mod memory;
pub mod ring;
pub mod rng;
pub mod wire;
