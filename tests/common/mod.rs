//! A virtual machine for tests: a vhost-user frontend over a real socket, guest memory in memfds, and
//! the driver's side of split virtqueues.
//!
//! It is written from the virtio and vhost-user specifications and uses nothing of the daemon's library. The tests
//! could not notice a misreading of a specification in shared code.

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
pub mod kept;
pub mod memory;
pub mod relayed;
pub mod ring;
pub mod rng;
pub mod stopped_thread;
pub mod wire;
