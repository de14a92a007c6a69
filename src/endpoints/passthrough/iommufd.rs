//! Opens devices through iommufd: devices that the VMM binds, and devices that this process binds. Takes over those that
//! the process before has left open.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::warn;

use super::kept::{self, DeviceFacts, DeviceKeeping, KnownDevices};
use super::strays::end_other;
use super::{
    HostBackends, OpenedExport, PassthroughError, capabilities, check_coherency, check_granule,
    group_of, stop_export,
};
use crate::address::IovaRange;
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::config::{Config, Passthrough, Pin};
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::ids::VfToken;
use crate::process::inherited::adopt;
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::{AddressSpaces, Attach, Cdev, IommuFd, VfioError, probe_allowed_iovas};

/// How long the keeper may take to close all devices, and how often the kernel is asked meanwhile.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
const CLOSE_INTERVAL: Duration = Duration::from_millis(10);

pub(super) fn open(
    config: &Config,
    root: &HostRoot,
    facts: &HostFacts,
    keeping: &DeviceKeeping<'_>,
) -> Result<HostBackends, PassthroughError> {
    let keeper = keeping.keeper;
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
    let (iommufd, is_left) = match inherited {
        // The file is open elsewhere, so it outlives this process without a keeper.
        Some(iommufd) => (iommufd, true),
        None => open_iommufd(&node, keeping)?,
    };

    let left = KnownDevices::claim(keeping);
    let mut known = KnownDevices::default();
    let mut bound_before = Vec::new();
    let mut devices = Vec::new();
    let mut allowed: BTreeMap<PciAddress, Vec<IovaRange>> = BTreeMap::new();
    let mut exported = Vec::new();
    let mut close_deadline = None;
    let mut granule = 1;
    for passthrough in &config.devices.passthrough {
        let &Passthrough { endpoint, host, .. } = passthrough;
        let group = group_of(facts, host, endpoint)?;
        let path = facts.device(host).and_then(|device| device.node(root));
        let failed = |source| PassthroughError::Device {
            host,
            endpoint,
            source,
        };
        let is_exported = config.devices.exported_at(endpoint).is_some();
        let name = keeping.device_name(host);
        let mut was_left = end_other(keeping, host);
        let inherited = shared.remove(&endpoint);
        if let (Some(cdev), Some(path)) = (&inherited, &path) {
            let fd = config.descriptors.devices[&endpoint];
            check_node(cdev, path, fd, passthrough)?;
        }
        let binds = inherited.is_some() && !is_exported;
        let (cdev, is_claimed) = match inherited {
            Some(cdev) if is_exported => {
                let is_claimed = kept::keep_inherited(keeper, &name, cdev.as_fd());
                (cdev, is_claimed)
            }
            Some(cdev) => (cdev, false),
            None => {
                // Otherwise it is bound to an iommufd that is gone. An exported device without a client is taken over, too:
                // a device that the keeper still has open cannot be bound anew.
                let left = is_left.then(|| claim_cdev(keeping, &name, path.as_deref()));
                match left.flatten() {
                    Some(cdev) => (cdev, true),
                    None => {
                        was_left |= keeper.drop_file(&name);
                        let cdev = open_cdev(path.as_deref(), passthrough)?;
                        kept::keep(keeper, &name, cdev.as_fd());
                        (cdev, false)
                    }
                }
            }
        };
        let found = if binds {
            match left.get(host) {
                Some(known) => known.clone(),
                // Asked anew, it may be another answer: the VMM has bound the device meanwhile.
                None => path.and_then(|path| probe_vmm_device(&node, &path, host)),
            }
        } else {
            if cdev.is_bound() {
                bound_before.push(endpoint.endpoint_id());
                if is_exported && !is_claimed {
                    stop_export(&cdev, passthrough);
                }
            }
            let bound = left.get(host).and_then(Option::as_ref);
            if was_left {
                let end = close_deadline.get_or_insert_with(|| Instant::now() + CLOSE_PATIENCE);
                await_close(&iommufd, &cdev, passthrough.token.as_ref(), *end);
            }
            let bound = bind_blocked(&iommufd, &cdev, passthrough, bound).map_err(failed)?;
            check_coherency(config, *passthrough, bound.is_coherent)?;
            Some(bound)
        };
        known.add(host, found.clone());
        let found = found.map(|found| found.allowed);
        if let Some(found) = found {
            check_granule(config, *passthrough, found.granule)?;
            granule = granule.max(found.granule);
            allowed.insert(endpoint, found.ranges);
        }
        if is_exported {
            exported.push(OpenedExport {
                endpoint,
                access: Box::new(cdev.clone()),
                is_left: is_claimed,
                kept_as: name,
            });
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
    known.keep(&left, keeping);
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
    let backend = backend.with_bound_before(&bound_before);
    let backend = match keeping.plugged {
        Some(endpoint) => backend.of_plugged(endpoint.endpoint_id()),
        None => backend,
    };
    Ok(HostBackends {
        backends: vec![(Box::new(backend), endpoints)],
        allowed,
        exported,
        vmm: None,
    })
}

/// Opens the host's iommufd, or takes over that of the process before. Also returns whether it is taken over.
fn open_iommufd(node: &Path, keeping: &DeviceKeeping<'_>) -> Result<(IommuFd, bool), VfioError> {
    let name = keeping.iommufd_name();
    if let Some(file) = keeping.claim(&name) {
        match IommuFd::adopt(file) {
            Ok(iommufd) => return Ok((iommufd, true)),
            Err(cause) => {
                warn!(
                    "the iommufd of the daemon before cannot be used, so all devices are opened anew: {cause}"
                );
                keeping.keeper.release(&name);
            }
        }
    }
    let file = IommuFd::open_node(node)?;
    kept::keep(keeping.keeper, &name, file.as_fd());
    Ok((IommuFd::from(file), false))
}

/// The device that the process before has left under a name, if it is still the one with this node.
pub(super) fn claim_cdev(
    keeping: &DeviceKeeping<'_>,
    name: &str,
    path: Option<&Path>,
) -> Option<Cdev> {
    let cdev = Cdev::adopt(check_kind(keeping.claim(name)?).ok()?);
    let node = path.and_then(|path| std::fs::metadata(path).ok());
    if cdev.node_number().ok() == node.map(|node| node.rdev()) {
        return Some(cdev);
    }
    warn!(
        "the descriptor {name} of the daemon before is open on another device, so the device is opened anew"
    );
    keeping.keeper.release(name);
    None
}

/// Opens a device's node.
fn open_cdev(path: Option<&Path>, passthrough: &Passthrough) -> Result<Cdev, PassthroughError> {
    let &Passthrough { endpoint, host, .. } = passthrough;
    let path = path.ok_or(PassthroughError::NoDevice {
        host,
        endpoint,
        why: "has no node in /dev/vfio/devices: no VFIO driver holds it, or the kernel \
              lacks CONFIG_VFIO_DEVICE_CDEV",
    })?;
    Cdev::open(path).map_err(|source| PassthroughError::Device {
        host,
        endpoint,
        source,
    })
}

/// Refuses a descriptor that is open on something else than a device's node, before VFIO sees it.
pub(super) fn check_kind(fd: OwnedFd) -> io::Result<OwnedFd> {
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
pub(super) fn probe_vmm_device(node: &Path, path: &Path, host: HostAddress) -> Option<DeviceFacts> {
    match probe_allowed_iovas(node, path) {
        // Nobody asks whether a device of the VMM is coherent.
        Ok(allowed) => Some(DeviceFacts {
            allowed,
            is_coherent: false,
        }),
        Err(cause) => {
            warn!(
                "{host}: the addresses its IOMMU allows are taken from its group's reserved \
                 regions alone: {cause}"
            );
            None
        }
    }
}

/// Binds a device that the keeper has only just been told to close: it does so in its own time, and the kernel binds a device
/// to one open file at a time. A device that cannot be bound is left to [`bind_blocked`].
fn await_close(iommufd: &IommuFd, cdev: &Cdev, token: Option<&VfToken>, end: Instant) {
    while !cdev.is_bound() && cdev.bind(iommufd, token).is_err() && Instant::now() < end {
        thread::sleep(CLOSE_INTERVAL);
    }
}

/// Binds a device for this process and leaves it blocked. A device that the process before has bound keeps its DMA if its
/// properties are `known`.
fn bind_blocked(
    iommufd: &IommuFd,
    cdev: &Cdev,
    passthrough: &Passthrough,
    known: Option<&DeviceFacts>,
) -> Result<DeviceFacts, VfioError> {
    let host = passthrough.host;
    if !cdev.is_bound() {
        cdev.bind(iommufd, passthrough.token.as_ref())?;
    } else if let Some(bound) = known {
        return Ok(bound.clone());
    } else {
        warn!("the properties of {host} are not known any more: its DMA is blocked for a moment");
    }
    let failed = |step: &str, source| VfioError {
        problem: format!("cannot {step} for {host}"),
        source,
        cure: "see the kernel's log",
    };
    let ioas = iommufd
        .alloc()
        .map_err(|e| failed("make an address space", e))?;
    let ask = || {
        Ok(DeviceFacts {
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
