//! The daemon's sandbox, read from outside in `/proc`, and attacked from inside: an intruder, the
//! test itself, makes a thread of the daemon make a call that it never makes by itself.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod bed;
#[path = "../common/mod.rs"]
mod common;
mod confinement;
#[path = "../vfio_user_messages/connection.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod connection;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod intruder;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod landlock;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod violations;
