//! Device servers, VMMs and shadow readers are killed at any moment. The daemon keeps running, no process reaches
//! memory through a mapping that is gone, nothing leaks, and the daemon serves the next processes.
//!
//! The processes are this program in a role ([`roles`]), and in one test an unmodified QEMU. `VIOMMU_KILLS` is the
//! number of kills (200 by default), `VIOMMU_KILLS_SEED` the seed of the random numbers. `VIOMMU_SOAK_SECONDS` is the
//! duration of the soak ([`soak`]).
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

#[path = "../common/mod.rs"]
pub mod common;
#[allow(dead_code, reason = "a part is used")]
#[path = "../vfio_user_messages/connection.rs"]
mod connection;
mod process;
mod qemu;
mod roles;
mod rounds;
mod server;
mod soak;
mod stamps;
mod vmm;
