//! Why a passthrough device cannot be used.

use std::io;
use std::os::fd::RawFd;

use thiserror::Error;

use crate::host::sysfs::RefineError;
use crate::topology::PciAddress;
use crate::vfio::VfioError;

/// Why a device of the host cannot be used.
#[derive(Debug, Error)]
pub enum PassthroughError {
    /// There is no such device, or the kernel does not offer it.
    #[error("{host} (endpoint {endpoint}) {why}; `vhost-device-iommu check` tells more")]
    NoDevice {
        /// The device.
        host: PciAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// What is missing.
        why: &'static str,
    },
    /// VFIO or iommufd refused.
    #[error("{host} (endpoint {endpoint}): {source}")]
    Device {
        /// The device.
        host: PciAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// What was refused.
        source: VfioError,
    },
    /// The host's IOMMU cannot be reached at all.
    #[error(transparent)]
    Iommu(#[from] VfioError),
    /// An inherited descriptor is not what it should be.
    #[error("descriptor {fd} cannot be used as {what}: {source}; pass one with {option}")]
    Inherited {
        /// The descriptor.
        fd: RawFd,
        /// What it should be.
        what: &'static str,
        /// What the system said.
        source: io::Error,
        /// The option.
        option: &'static str,
    },
    /// A descriptor is not the one of the device that is named with it.
    #[error(
        "descriptor {fd} is not {host} (endpoint {endpoint}): another device's node is open there; \
         pass the one of {node} with --vfio-fd"
    )]
    OtherDevice {
        /// The descriptor.
        fd: RawFd,
        /// The device.
        host: PciAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// The node of the device.
        node: String,
    },
    /// Two groups have one container.
    #[error(
        "the containers of endpoints {endpoint} and {other} are one; give each group of devices a \
         container of its own, or the devices would reach what the others do"
    )]
    OneContainer {
        /// An endpoint of one group.
        endpoint: PciAddress,
        /// An endpoint of the other.
        other: PciAddress,
    },
    /// Devices of one group, some of them the VMM's.
    #[error(
        "group {group} has devices that the VMM binds (--vfio-fd) and others that the daemon has to \
         itself; hand over all of them or none, and export all of them or none"
    )]
    MixedGroup {
        /// The host's number of the group.
        group: u32,
    },
    /// The topology and the host do not go together.
    #[error(transparent)]
    Refine(#[from] RefineError),
    /// The devices' IOMMUs have no addresses in common.
    #[error(
        "the IOMMUs of the host's devices have no addresses in common; give the devices to VMs of \
         their own"
    )]
    NoCommonAddresses,
}
