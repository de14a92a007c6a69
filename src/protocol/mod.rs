//! The virtio-iommu wire format: requests, replies, properties, faults and the configuration space.
//! Types and their encoding only.
//!
//! Source: virtio specification 1.3, section "IOMMU Device" (device type 23).

pub mod config_space;
pub mod fault;
pub mod probe;
pub mod reply;
pub mod request;
pub mod wire;
