//! A guest's IOMMU as a process of its own: a vhost-user backend for virtio-iommu.

pub mod address;
pub mod config;
pub mod ids;
pub mod page_table;
pub mod protocol;
pub mod topology;
