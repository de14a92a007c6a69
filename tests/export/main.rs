//! Exported devices as a vfio-user client sees them: the daemon's server over real sockets, in front of a device
//! that records the calls of the server.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod access;
mod bed;
#[path = "../common/mod.rs"]
pub mod common;
#[path = "../vfio_user_messages/connection.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod connection;
mod hostile;
mod inspected;
mod interrupts;
mod mapped;
mod resets;
mod restarts;
