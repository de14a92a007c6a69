//! Opens devices through iommufd: devices that the VMM binds, and devices that this process binds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use log::warn;

use super::{
    HostBackends, PassthroughError, capabilities, check_coherency, check_granule, group_of,
};
use crate::address::IovaRange;
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::config::{Config, Passthrough, Pin};
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::process::inherited::adopt;
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::{
    AddressSpaces, AllowedIovas, Attach, Cdev, DeviceAccess, IommuFd, VfioError,
    probe_allowed_iovas,
};

pub(super) fn open(
    config: &Config,
    root: &HostRoot,
    facts: &HostFacts,
) -> Result<HostBackends, PassthroughError> {
    let node = root.path("dev/iommu");
    // Inherited descriptors first: a file that is opened earlier could get one of their numbers.
    let inherited = config
        .descriptors
        .iommufd
        .map(|fd| {
            adopt(fd)
                .and_then(IommuFd::adopt)
                .map_err(|source| PassthroughError::Inherited {
                    fd,
                    wanted: "the host's iommufd",
                    source,
                    option: "--iommufd-fd, open on /dev/iommu",
                })
        })
        .transpose()?;
    let mut shared: BTreeMap<PciAddress, Cdev> = BTreeMap::new();
    for (&endpoint, &fd) in &config.descriptors.devices {
        let device =
            adopt(fd)
                .and_then(check_kind)
                .map_err(|source| PassthroughError::Inherited {
                    fd,
                    wanted: "a device",
                    source,
                    option: "--vfio-fd, open on the device's node in /dev/vfio/devices",
                })?;
        shared.insert(endpoint, Cdev::adopt(device));
    }
    let iommufd = match inherited {
        Some(iommufd) => iommufd,
        None => IommuFd::open(&node)?,
    };

    let mut devices = Vec::new();
    let mut allowed: BTreeMap<PciAddress, Vec<IovaRange>> = BTreeMap::new();
    let mut exported: Vec<(PciAddress, Box<dyn DeviceAccess>)> = Vec::new();
    let mut granule = 1;
    for passthrough in &config.devices.passthrough {
        let &Passthrough { endpoint, host } = passthrough;
        let group = group_of(facts, host, endpoint)?;
        let path = facts.device(host).and_then(|device| device.node(root));
        let failed = |source| PassthroughError::Device {
            host,
            endpoint,
            source,
        };
        let is_exported = config.devices.exported_at(endpoint).is_some();
        let inherited = shared.remove(&endpoint);
        if let (Some(cdev), Some(path)) = (&inherited, &path) {
            let fd = config.descriptors.devices[&endpoint];
            check_node(cdev, path, fd, passthrough)?;
        }
        let binds = inherited.is_some() && !is_exported;
        let (cdev, found) = match inherited {
            Some(cdev) if is_exported => {
                let bound = bind_blocked(&iommufd, &cdev, host).map_err(failed)?;
                check_coherency(config, *passthrough, bound.is_coherent)?;
                (cdev, Some(bound.allowed))
            }
            Some(cdev) => (
                cdev,
                path.and_then(|path| probe_vmm_device(&node, &path, host)),
            ),
            None => {
                let path = path.ok_or(PassthroughError::NoDevice {
                    host,
                    endpoint,
                    why: "has no node in /dev/vfio/devices: no VFIO driver holds it, or the kernel \
                          lacks CONFIG_VFIO_DEVICE_CDEV",
                })?;
                let cdev = Cdev::open(&path).map_err(failed)?;
                let bound = bind_blocked(&iommufd, &cdev, host).map_err(failed)?;
                check_coherency(config, *passthrough, bound.is_coherent)?;
                (cdev, Some(bound.allowed))
            }
        };
        if let Some(found) = found {
            check_granule(config, *passthrough, found.granule)?;
            granule = granule.max(found.granule);
            allowed.insert(endpoint, found.ranges);
        }
        if is_exported {
            exported.push((endpoint, Box::new(cdev.clone())));
        }
        devices.push(PassthroughDevice {
            endpoint: endpoint.endpoint_id(),
            name: host.to_string(),
            group,
            shared: binds,
            attach: Box::new(cdev.clone()),
            memory: Arc::new(cdev),
        });
    }
    let mixed = |d: &&PassthroughDevice| {
        devices
            .iter()
            .any(|other| other.group == d.group && other.shared != d.shared)
    };
    if let Some(device) = devices.iter().find(mixed) {
        return Err(PassthroughError::MixedGroup {
            group: device.group,
        });
    }
    let endpoints = devices.iter().map(|d| d.endpoint).collect();
    let pin = match config.pin {
        Pin::All => Pinning::All,
        Pin::Mapped => Pinning::Mapped,
    };
    let capabilities = capabilities(allowed.values(), granule)?;
    let backend = Iommufd::new(Arc::new(iommufd), capabilities, pin, devices);
    Ok(HostBackends {
        backends: vec![(Box::new(backend), endpoints)],
        allowed,
        exported,
    })
}

/// Refuses a descriptor that is open on something else than a device's node, before VFIO sees it.
fn check_kind(fd: OwnedFd) -> io::Result<OwnedFd> {
    let file = File::from(fd);
    if !file.metadata()?.file_type().is_char_device() {
        return Err(io::Error::other("it is open on something else"));
    }
    Ok(file.into())
}

/// Refuses a descriptor of another device: the guest would drive one device, and the daemon would translate
/// for the other.
fn check_node(
    cdev: &Cdev,
    path: &Path,
    fd: RawFd,
    passthrough: &Passthrough,
) -> Result<(), PassthroughError> {
    let node = std::fs::metadata(path).map(|metadata| metadata.rdev());
    match (cdev.node_number(), node) {
        (Ok(open), Ok(node)) if open != node => Err(PassthroughError::OtherDevice {
            fd,
            host: passthrough.host,
            endpoint: passthrough.endpoint,
            node: path.display().to_string(),
        }),
        _ => Ok(()),
    }
}

/// Asks VFIO for the addresses that a device allows, before the VMM binds the device. Only VFIO knows these addresses
/// for certain. `None` if VFIO does not tell them, for example because this process may not open the device or the VMM
/// has bound it already.
fn probe_vmm_device(node: &Path, path: &Path, host: HostAddress) -> Option<AllowedIovas> {
    match probe_allowed_iovas(node, path) {
        Ok(allowed) => Some(allowed),
        Err(cause) => {
            warn!(
                "{host}: the addresses its IOMMU allows are taken from its group's reserved \
                 regions alone: {cause}"
            );
            None
        }
    }
}

/// The answers of the kernel about a device's IOMMU.
struct BoundDevice {
    allowed: AllowedIovas,
    /// Whether the IOMMU makes all DMA of the device snoop the caches.
    is_coherent: bool,
}

/// Binds a device for this process and leaves it blocked.
fn bind_blocked(
    iommufd: &IommuFd,
    cdev: &Cdev,
    host: HostAddress,
) -> Result<BoundDevice, VfioError> {
    cdev.bind(iommufd)?;
    let failed = |step: &str, source| VfioError {
        problem: format!("cannot {step} for {host}"),
        source,
        cure: "see the kernel's log",
    };
    let ioas = iommufd
        .alloc()
        .map_err(|e| failed("make an address space", e))?;
    let ask = || {
        Ok(BoundDevice {
            allowed: iommufd.allowed_iovas(ioas)?,
            is_coherent: iommufd.enforces_coherency(ioas)?,
        })
    };
    let bound = cdev
        .attach(ioas)
        .and_then(|()| ask())
        .and_then(|bound| cdev.detach().map(|()| bound))
        .map_err(|e| failed("learn the properties of the IOMMU", e));
    if let Err(cause) = iommufd.destroy(ioas) {
        warn!("an address space cannot be destroyed: {cause}");
    }
    bound
}
