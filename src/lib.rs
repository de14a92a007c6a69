//! A guest's IOMMU as a process of its own: a vhost-user backend for virtio-iommu.
//!
//! ```text
//! request queue -> device -> protocol::Request -> iommu::Iommu --plan, apply, roll back--> page_table
//!       ^                                             |                                   + backends
//!       +---- used ring <- protocol::reply <- Result<(), RequestError>
//! event queue <- device <- iommu::Fault
//! args, file -> config -> topology -> iommu checks, PROBE answers, VIOT, QEMU arguments
//! control socket <- control <- iommu, metrics
//! launch -> this program as the daemon, and a VMM
//! ```
//!
//! Who may import whom is written down and enforced in `tests/layering.rs`.

pub mod address;
pub mod args;
pub mod backends;
pub mod config;
#[cfg(not(miri))]
pub mod control;
pub mod ctl;
#[cfg(not(miri))]
pub mod daemon;
pub mod device;
pub mod drop_in;
pub mod emulated_side;
pub mod export;
pub mod export_side;
pub mod fault_log;
pub mod fault_queue;
pub mod guest_memory;
pub mod host_check;
pub mod host_side;
pub mod host_tree;
#[cfg(not(miri))]
pub mod hotplug;
pub mod ids;
pub mod inherited;
pub mod iommu;
pub mod journal;
pub mod launch;
pub mod log_limit;
pub mod metrics;
pub mod page_table;
#[cfg(test)]
mod passthrough_tests;
pub mod protocol;
pub mod qemu_args;
#[cfg(not(miri))]
pub mod qmp;
pub mod ready;
pub mod realtime;
pub mod sandbox;
#[cfg(not(miri))]
pub mod sandbox_side;
#[cfg(not(miri))]
pub mod service;
#[cfg(not(miri))]
pub mod shadow;
#[cfg(not(miri))]
pub mod shadow_side;
#[cfg(not(miri))]
pub mod signals;
pub mod socket;
pub mod topology;
pub mod vfio;
pub mod vfio_user;
pub mod vm_log;
#[cfg(not(miri))]
pub mod watchdog;
