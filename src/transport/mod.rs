//! Transports: how a VMM reaches the device.
//!
//! [`vhost_user`] offers the device's rings, and the VMM makes the PCI device around them. [`virtio_pci`] offers the
//! whole PCI device over vfio-user. [`listener`] takes over an inherited socket for either.

pub mod listener;
pub mod vhost_user;
pub mod virtio_pci;
