//! A guest's IOMMU as a process of its own: a vhost-user backend for virtio-iommu.

pub mod address;
pub mod backends;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod guest_memory;
pub mod ids;
pub mod iommu;
pub mod log_limit;
pub mod metrics;
pub mod page_table;
pub mod protocol;
pub mod topology;
