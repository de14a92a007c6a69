//! The controller between a driver and memory played here, and the server with a client that means
//! harm. What a kernel makes of them is seen in `tests/emulated`.
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
