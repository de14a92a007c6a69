//! The virtio-iommu wire: structures, requests, replies, properties and faults. Types only.
//!
//! Source: virtio specification 1.3, section "IOMMU Device" (device type 23).

pub mod config_space;
pub mod fault;
pub mod probe;
pub mod reply;
pub mod request;
pub mod wire;
