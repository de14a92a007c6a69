//! The daemon as a virtio-pci device over vfio-user: the test is the VMM and the guest's driver. It is written from the
//! specifications and shares no code with the daemon.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

#[allow(dead_code, reason = "the benchmark uses the rest")]
mod bed;
mod client_crate;
#[path = "../common/mod.rs"]
pub mod common;
#[path = "../vfio_user_messages/connection.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod connection;
mod driver;
mod faults;
mod hostile;
mod tables;
mod vmm;
