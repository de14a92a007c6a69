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
pub mod endpoints;
pub mod export;
pub mod faults;
pub mod host;
pub mod ids;
pub mod iommu;
pub mod logging;
pub mod metrics;
pub mod page_table;
pub mod process;
pub mod protocol;
pub mod qemu;
#[cfg(not(miri))]
pub mod shadow;
pub mod topology;
pub mod vfio;
pub mod vfio_user;
