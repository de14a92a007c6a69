//! A guest's IOMMU as a process of its own: a vhost-user backend for virtio-iommu.
//!
//! ```text
//! request queue -> device -> protocol::Request -> iommu::Iommu --plan, apply, roll back--> page_table
//!       ^                                             |                                   + backends
//!       +---- used ring <- protocol::reply <- Result<(), RequestError>
//! event queue <- device <- faults::Fault <- iommu, backends, shadow
//! args, file -> config -> topology -> iommu checks, PROBE answers, VIOT, QEMU arguments
//! control socket <- control <- iommu, metrics
//! launch -> this program as the daemon, and a VMM
//! ```
//!
//! Who may import whom is written down and enforced in `tests/layering.rs`.

pub mod address;
#[cfg(feature = "daemon")]
pub mod args;
#[cfg(feature = "daemon")]
pub mod backends;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(all(feature = "daemon", not(miri)))]
pub mod control;
#[cfg(feature = "daemon")]
pub mod ctl;
#[cfg(all(feature = "daemon", not(miri)))]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod device;
#[cfg(feature = "daemon")]
pub mod endpoints;
#[cfg(feature = "daemon")]
pub mod export;
pub mod faults;
#[cfg(feature = "daemon")]
pub mod host;
pub mod ids;
#[cfg(feature = "daemon")]
pub mod iommu;
pub mod locks;
#[cfg(feature = "daemon")]
pub mod logging;
#[cfg(feature = "daemon")]
pub mod metrics;
pub mod page_table;
#[cfg(feature = "daemon")]
pub mod process;
#[cfg(feature = "daemon")]
pub mod protocol;
#[cfg(feature = "daemon")]
pub mod qemu;
#[cfg(not(miri))]
pub mod shadow;
#[cfg(feature = "daemon")]
pub mod topology;
#[cfg(feature = "daemon")]
pub mod transport;
#[cfg(feature = "daemon")]
pub mod vfio;
#[cfg(feature = "daemon")]
pub mod vfio_user;
