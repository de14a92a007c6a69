//! Device servers, VMMs and processes that follow the page tables are killed at any moment. The daemon stays,
//! nobody reaches memory through a mapping that is gone, nothing leaks, and whoever comes next is served.
//!
//! All of them are processes: this program again, in a role ([`roles`]), and in one test an unmodified QEMU.
//! `VIOMMU_KILLS` says how many are killed (200), `VIOMMU_KILLS_SEED` with which random numbers.
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
mod stamps;
mod vmm;
