//! The devices of the host that a configuration names: opened or taken over, looked into, and made
//! into backends.

mod iommufd;
#[cfg(test)]
mod tests;
mod type1;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use log::{info, warn};
use thiserror::Error;

use crate::address::{IovaRange, PageMask};
use crate::backends::{BackendCapabilities, DmaBackend};
use crate::config::{Config, HostIommu};
use crate::host::sysfs::{HostFacts, HostRoot, RefineError, refine};
use crate::ids::EndpointId;
use crate::topology::{PciAddress, Topology};
use crate::vfio::{DeviceAccess, VfioError};

/// What there is on the host for a VM.
pub struct HostSide {
    /// The configuration's topology with what the host adds.
    pub topology: Topology,
    /// The backends and the endpoints each of them has.
    pub backends: Vec<(Box<dyn DmaBackend>, Vec<EndpointId>)>,
    /// The devices that are exported, by the address of their endpoint.
    pub exports: Vec<(PciAddress, Box<dyn DeviceAccess>)>,
}

/// Why a device of the host cannot be used.
#[derive(Debug, Error)]
pub enum HostSideError {
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

/// Backends that are opened, and what they allow each endpoint.
struct Opened {
    backends: Vec<(Box<dyn DmaBackend>, Vec<EndpointId>)>,
    /// By endpoint, where it is known.
    allowed: BTreeMap<PciAddress, Vec<IovaRange>>,
    exports: Vec<(PciAddress, Box<dyn DeviceAccess>)>,
}

impl HostSide {
    /// Opens what the configuration names; without passthrough endpoints there is nothing to do.
    ///
    /// # Errors
    /// See [`HostSideError`].
    pub fn open(config: &Config) -> Result<Self, HostSideError> {
        if config.devices.passthrough.is_empty() {
            return Ok(Self {
                topology: config.topology.clone(),
                backends: Vec::new(),
                exports: Vec::new(),
            });
        }
        let root = HostRoot::default();
        let facts = HostFacts::read(&root, config.devices.passthrough.iter().map(|p| p.host));
        let opened = match config.host_iommu {
            HostIommu::Iommufd => iommufd::open(config, &root, &facts)?,
            HostIommu::Type1 => type1::open(config, &root, &facts)?,
        };
        let pairs: Vec<_> = config
            .devices
            .passthrough
            .iter()
            .map(|p| (p.endpoint, p.host))
            .collect();
        let input = IovaRange::of_width(config.address_width);
        let refined = refine(&config.topology, &pairs, &facts, &opened.allowed, input)?;
        for note in refined.notes {
            warn!("{note}");
        }
        for (endpoint, host) in pairs {
            info!(
                "endpoint {endpoint} is {host}, through {}",
                config.host_iommu.name()
            );
        }
        Ok(Self {
            topology: refined.topology,
            backends: opened.backends,
            exports: opened.exports,
        })
    }
}

/// The host's number of a device's group.
fn group_of(
    facts: &HostFacts,
    host: PciAddress,
    endpoint: PciAddress,
) -> Result<u32, HostSideError> {
    let missing = |why| HostSideError::NoDevice {
        host,
        endpoint,
        why,
    };
    let device = facts
        .device(host)
        .ok_or_else(|| missing("is not on this host"))?;
    device
        .group
        .ok_or_else(|| missing("has no IOMMU group: the host's IOMMU is off"))
}

/// What a backend can do whose devices allow this.
fn capabilities<'a>(
    allowed: impl IntoIterator<Item = &'a Vec<IovaRange>>,
    granule: u64,
) -> Result<BackendCapabilities, HostSideError> {
    let mut aperture = IovaRange::ALL;
    for ranges in allowed {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
            return Err(HostSideError::NoCommonAddresses);
        };
        aperture = IovaRange::new(first.first(), last.last())
            .and_then(|whole| aperture.intersection(whole))
            .ok_or(HostSideError::NoCommonAddresses)?;
    }
    let granule = granule.max(PageMask::TABLE.granule()).next_power_of_two();
    let larger = PageMask::TABLE.bits() & !(granule - 1);
    Ok(BackendCapabilities {
        page_sizes: PageMask::new(larger | granule).unwrap_or(PageMask::TABLE),
        aperture,
    })
}
