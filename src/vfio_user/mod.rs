//! vfio-user: its messages, and what stands between a VMM and the process of an emulated device.

pub mod message;
pub mod socket;
pub mod version;
