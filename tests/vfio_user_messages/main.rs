//! The interposer between a VMM's vfio-user client and a device's server, over real sockets. The tests
//! take the roles of the client and the server.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod bed;
#[path = "../common/mod.rs"]
pub mod common;
mod connection;
mod daemon;
mod deadlines;
mod dma;
mod forwarding;
mod hostile;
mod hotplug;
mod in_flight;
mod in_place;
mod kept;
mod large;
mod library;
mod limits;
mod reconnection;
mod regions;
mod removal;
mod replay;
mod replies;
mod runs;
mod sockets;
mod unclaimed;
mod windows;
