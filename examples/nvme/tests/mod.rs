//! The controller with a driver and memory of the test, and the server with a hostile client.
//! `tests/emulated` runs both with the driver of a guest's kernel.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod controller;
mod driver;
mod log;
mod memory;
mod server;
