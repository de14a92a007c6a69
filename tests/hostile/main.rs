//! A driver and a VMM that mean harm. Whatever they do, the daemon lives, stays within its
//! memory, logs within reason, and serves the next legal request.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

#[path = "../common/mod.rs"]
mod common;

mod bed;
mod chains;
mod floods;
mod frontend;
mod requests;
mod rings;
mod storm;
