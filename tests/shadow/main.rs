//! Readers of the page tables, in this process and in others, over real sockets.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may stop"
)]

mod access;
mod bed;
mod hostile;
mod left;
mod lives;
mod roles;
mod stress;
