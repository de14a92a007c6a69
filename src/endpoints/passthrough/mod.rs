//! Passthrough devices: opens the devices of the host that a configuration names, or takes over their
//! descriptors. Finds the addresses that the host's IOMMU allows each device, and makes the backends.

mod adopted;
#[cfg(test)]
mod coming;
pub mod error;
#[cfg(test)]
mod instances;
mod iommufd;
mod kept;
mod kind;
#[cfg(test)]
mod refusals;
mod strays;
#[cfg(test)]
mod tests;
mod type1;
mod vmm_devices;

use std::collections::BTreeMap;
use std::sync::Arc;

use log::{info, warn};

use crate::address::{IovaRange, PageMask};
use crate::backends::{BackendCapabilities, DmaBackend};
use crate::config::{Config, HostIommu, Passthrough};
use crate::host::sysfs::{HostFacts, HostRoot, IommuInstance, refine};
use crate::ids::EndpointId;
use crate::topology::{HostAddress, PciAddress, Topology};
use crate::vfio::{Attach, Cdev, DeviceAccess};

pub use error::PassthroughError;
pub use kept::DeviceKeeping;
pub(super) use kept::{client_name, device_name};
pub use kind::{IOMMUFD_RECORD, PassthroughKind, TYPE1_RECORD};
pub(super) use strays::{PlugAttempt, drop_devices};
pub use strays::{discard_devices, end_stray_devices};
pub use vmm_devices::VmmDevices;

/// The passthrough devices of a VM, opened.
pub struct PassthroughDevices {
    /// The configuration's topology with the groups and reserved regions of the host.
    pub topology: Topology,
    /// The backends, each with its endpoints.
    pub backends: Vec<(Box<dyn DmaBackend>, Vec<EndpointId>)>,
    /// The exported devices.
    pub exported: Vec<OpenedExport>,
    /// The host's IOMMUs that translate for the devices, by endpoint, as far as sysfs names them.
    pub iommus: BTreeMap<PciAddress, IommuInstance>,
    /// See [`OpenDevice::kept`](super::kind::OpenDevice::kept), by endpoint.
    pub kept: BTreeMap<PciAddress, Vec<String>>,
    /// The devices, if they come from the VMM.
    pub vmm: Option<Arc<VmmDevices>>,
}

/// An exported device, opened for its registers.
pub struct OpenedExport {
    /// The address of its endpoint.
    pub endpoint: PciAddress,
    /// Its registers.
    pub access: Box<dyn DeviceAccess>,
    /// Whether it is as the process before has left it.
    pub is_left: bool,
    /// The name of its descriptor at the keeper.
    pub kept_as: String,
}

/// The backends of the devices, and the addresses that the host's IOMMU allows each endpoint.
struct HostBackends {
    backends: Vec<(Box<dyn DmaBackend>, Vec<EndpointId>)>,
    /// The allowed addresses by endpoint, as far as VFIO reports them.
    allowed: BTreeMap<PciAddress, Vec<IovaRange>>,
    exported: Vec<OpenedExport>,
    vmm: Option<Arc<VmmDevices>>,
}

impl PassthroughDevices {
    /// Opens the devices of the host that the configuration names. Takes over those that the process before has left with
    /// the keeper, and keeps the others there.
    ///
    /// # Errors
    /// See [`PassthroughError`].
    pub fn open(config: &Config, keeping: &DeviceKeeping<'_>) -> Result<Self, PassthroughError> {
        if config.devices.passthrough.is_empty() {
            return Ok(Self {
                topology: config.topology.clone(),
                backends: Vec::new(),
                exported: Vec::new(),
                iommus: BTreeMap::new(),
                kept: BTreeMap::new(),
                vmm: None,
            });
        }
        let root = HostRoot::default();
        let facts = HostFacts::read(&root, config.devices.passthrough.iter().map(|p| p.host));
        let opened = match config.host_iommu {
            HostIommu::Iommufd if config.takes_vmm_files() => {
                adopted::open(config, &root, &facts, keeping)?
            }
            HostIommu::Iommufd => iommufd::open(config, &root, &facts, keeping)?,
            HostIommu::Type1 => type1::open(config, &root, &facts, keeping)?,
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
        let mut iommus = BTreeMap::new();
        let mut kept = BTreeMap::new();
        for (endpoint, host) in pairs {
            let group = group_of(&facts, host, endpoint)?;
            kept.insert(endpoint, keeping.names_of(host, group));
            info!(
                "endpoint {endpoint} is the host's device {host}, through {}",
                config.host_iommu.name()
            );
            let Some(iommu) = facts.group_of(host).and_then(|group| group.iommu.clone()) else {
                continue;
            };
            if let Some(note) = iommu.write_only_note() {
                info!("the IOMMU of {host}, {iommu}, has {note}");
            }
            iommus.insert(endpoint, iommu);
        }
        Ok(Self {
            topology: refined.topology,
            backends: opened.backends,
            exported: opened.exported,
            iommus,
            kept,
            vmm: opened.vmm,
        })
    }
}

/// The host's number of the group in which an IOMMU translates for a device.
fn group_of(
    facts: &HostFacts,
    host: HostAddress,
    endpoint: PciAddress,
) -> Result<u32, PassthroughError> {
    if facts.device(host).is_none() {
        return Err(PassthroughError::NoDevice {
            host,
            endpoint,
            why: "is not on this host",
        });
    }
    let group = facts.translated_group(host);
    group
        .map(|group| group.number)
        .map_err(|reason| PassthroughError::NoGroup {
            host,
            endpoint,
            reason,
        })
}

/// Refuses an exported device whose DMA may pass the caches by, unless the operator answers for it. `is_enforced` says
/// whether the host's IOMMU makes all DMA of the device snoop the caches.
///
/// Only x86 needs this: there KVM ignores the guest's cache attributes and cache flushes until it knows of a device with
/// such DMA. On other architectures a guest always manages its caches itself.
fn check_coherency(
    config: &Config,
    passthrough: Passthrough,
    is_enforced: bool,
) -> Result<(), PassthroughError> {
    let Passthrough { endpoint, host, .. } = passthrough;
    let Some(export) = config.devices.exported_at(endpoint) else {
        return Ok(());
    };
    if is_enforced || !cfg!(any(target_arch = "x86_64", target_arch = "x86")) {
        return Ok(());
    }
    if !export.allow_no_snoop {
        return Err(PassthroughError::NoSnoop { host, endpoint });
    }
    warn!(
        "{host} (endpoint {endpoint}): the host's IOMMU does not enforce cache coherency, and \
         `allow-no-snoop` says that the device needs no such enforcement"
    );
    Ok(())
}

/// Ends the DMA of an exported device that the process before has served: its VMM must connect again.
fn stop_export(cdev: &Cdev, passthrough: &Passthrough) {
    let Passthrough { endpoint, host, .. } = passthrough;
    match cdev.clear_bus_master() {
        Ok(()) => warn!(
            "{host} (endpoint {endpoint}) is exported: its connection has ended with the daemon before, and its DMA is \
             stopped until the VMM connects again"
        ),
        Err(cause) => warn!("{host} (endpoint {endpoint}) cannot be stopped: {cause}"),
    }
}

/// Refuses a device for which the host cannot map pages as small as the configuration promises to the guest. `smallest` is
/// the host's smallest page in bytes.
///
/// Not by a promise of larger pages: a guest with smaller pages would then not use its IOMMU at all.
fn check_granule(
    config: &Config,
    passthrough: Passthrough,
    smallest: u64,
) -> Result<(), PassthroughError> {
    let Passthrough { endpoint, host, .. } = passthrough;
    let granule = config.page_mask.granule();
    if smallest <= granule {
        return Ok(());
    }
    Err(PassthroughError::Granule {
        host,
        endpoint,
        smallest,
        granule,
    })
}

/// The capabilities of a backend whose devices allow these addresses and this granule.
fn capabilities<'a>(
    allowed: impl IntoIterator<Item = &'a Vec<IovaRange>>,
    granule: u64,
) -> Result<BackendCapabilities, PassthroughError> {
    let mut aperture = IovaRange::ALL;
    for ranges in allowed {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
            return Err(PassthroughError::NoCommonAddresses);
        };
        aperture = IovaRange::new(first.first(), last.last())
            .and_then(|whole| aperture.intersection(whole))
            .ok_or(PassthroughError::NoCommonAddresses)?;
    }
    let granule = granule.max(PageMask::TABLE.granule()).next_power_of_two();
    let larger = PageMask::TABLE.bits() & !(granule - 1);
    Ok(BackendCapabilities {
        page_sizes: PageMask::new(larger | granule).unwrap_or(PageMask::TABLE),
        aperture,
    })
}
