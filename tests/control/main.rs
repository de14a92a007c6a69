//! The operator's view of a daemon: `ctl`, metrics, the log, and limits.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and lengths here are small"
)]

#[path = "../common/mod.rs"]
mod common;

mod bed;
mod clients;
mod commands;
mod limits;
mod load;
mod logs;
mod metrics;
mod monitoring;
