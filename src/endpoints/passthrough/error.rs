//! Why a passthrough device cannot be used.

use std::io;
use std::os::fd::RawFd;

use thiserror::Error;

use crate::host::sysfs::{NoGroupReason, RefineError};
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::VfioError;

/// Why a passthrough device cannot be used.
#[derive(Debug, Error)]
pub enum PassthroughError {
    /// The host has no such device, or the kernel offers no VFIO node for it.
    #[error("{host} (endpoint {endpoint}) {why}; `vhost-device-iommu check` tells more")]
    NoDevice {
        /// The device.
        host: HostAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// The reason, with the missing thing.
        why: &'static str,
    },
    /// No IOMMU of the host translates for the device.
    #[error("no IOMMU translates for {host} (endpoint {endpoint}): {reason}; {}", .reason.cure())]
    NoGroup {
        /// The device.
        host: HostAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// The reason.
        reason: NoGroupReason,
    },
    /// VFIO or iommufd refused a call for the device.
    #[error("{host} (endpoint {endpoint}): {source}")]
    Device {
        /// The device.
        host: HostAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// The refused call.
        source: VfioError,
    },
    /// The interface of the host's IOMMU cannot be used at all.
    #[error(transparent)]
    Iommu(#[from] VfioError),
    /// An inherited descriptor is of the wrong kind.
    #[error("descriptor {fd} cannot be used as {wanted}: {source}; pass one with {option}")]
    Inherited {
        /// The descriptor.
        fd: RawFd,
        /// The wanted kind of descriptor.
        wanted: &'static str,
        /// The system's error.
        source: io::Error,
        /// The option.
        option: &'static str,
    },
    /// A descriptor is open on another device than the one named with it.
    #[error(
        "descriptor {fd} is not {host} (endpoint {endpoint}): it is open on another device's node; \
         pass a descriptor that is open on {node} with --vfio-fd"
    )]
    OtherDevice {
        /// The descriptor.
        fd: RawFd,
        /// The device.
        host: HostAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// The node of the device.
        node: String,
    },
    /// Two groups share one container.
    #[error(
        "the endpoints {endpoint} and {other} share one container; give each group of devices a container of \
         its own, or the devices of one group reach the memory of the other"
    )]
    OneContainer {
        /// An endpoint of one group.
        endpoint: PciAddress,
        /// An endpoint of the other.
        other: PciAddress,
    },
    /// The VMM binds some devices of a group, and the daemon the others.
    #[error(
        "group {group} has devices that the VMM binds (--vfio-fd) and others that the daemon \
         binds; hand over all of them or none, and export all of them or none"
    )]
    MixedGroup {
        /// The host's number of the group.
        group: u32,
    },
    /// The host's IOMMU cannot enforce the coherency of an exported device's DMA.
    #[error(
        "{host} (endpoint {endpoint}) cannot be exported: the host's IOMMU has no snoop control, so DMA \
         with No Snoop would bypass the caches, and KVM, which does not know of exported devices, would \
         not let the guest flush them, which corrupts the guest's memory without a sign; remove `export`, \
         so that the VMM opens the device and tells KVM, or use a host with snoop control, or, if the \
         device never does such DMA, set `allow-no-snoop = true`"
    )]
    NoSnoop {
        /// The device.
        host: HostAddress,
        /// The endpoint.
        endpoint: PciAddress,
    },
    /// The topology contradicts the host.
    #[error(transparent)]
    Refine(#[from] RefineError),
    /// The host's IOMMU has no pages as small as the guest's.
    #[error(
        "{host} (endpoint {endpoint}): the host maps no pages smaller than {} KiB for this device, and `granule` is {} KiB; \
         give the guest a kernel with pages of {} KiB and set granule = \"{}k\", boot the host with a kernel of smaller \
         pages, or set host-iommu = \"iommufd\", which maps pages smaller than those of the host's kernel",
        .smallest >> 10, .granule >> 10, .smallest >> 10, .smallest >> 10
    )]
    Granule {
        /// The device.
        host: HostAddress,
        /// The endpoint.
        endpoint: PciAddress,
        /// The host's smallest page in bytes.
        smallest: u64,
        /// The smallest page of the configuration in bytes.
        granule: u64,
    },
    /// The IOMMUs of the devices have no addresses in common.
    #[error(
        "the IOMMUs of the host's devices have no addresses in common; give the devices to VMs of \
         their own"
    )]
    NoCommonAddresses,
}
