//! A hostile driver and a hostile VMM. Whatever they do, the daemon must stay alive, bound its
//! memory and its log, and serve the next legal request.

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
mod descriptors;
mod floods;
mod frontend;
mod requests;
mod rings;
mod storm;
