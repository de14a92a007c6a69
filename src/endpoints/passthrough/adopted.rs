//! Opens devices that the VMM brings: their files come later, or were left by the process before.

use std::collections::BTreeMap;
use std::sync::Arc;

use log::{info, warn};

use super::iommufd::{claim_cdev, probe_vmm_device};
use super::kept::{self, DeviceFacts, DeviceKeeping, KnownDevices};
use super::strays::end_other;
use super::vmm_devices::{FilesOfVmm, VmmDeviceFile, VmmDevices, missing_helper};
use super::{HostBackends, PassthroughError, capabilities, check_granule, group_of};
use crate::address::IovaRange;
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::config::{Config, Passthrough, Pin, Socket};
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::process::inherited::is_readable;
use crate::topology::PciAddress;
use crate::vfio::{IommuFd, VmmCdev, VmmIommufd};

pub(super) fn open(
    config: &Config,
    root: &HostRoot,
    facts: &HostFacts,
    keeping: &DeviceKeeping<'_>,
) -> Result<HostBackends, PassthroughError> {
    let keeper = keeping.keeper;
    let node = root.path("dev/iommu");
    let iommufd = VmmIommufd::default();
    let left_iommufd = keeping.claim(kept::IOMMUFD);
    if let Some(file) = left_iommufd.as_ref().and_then(|file| file.try_clone().ok()) {
        match IommuFd::adopt(file) {
            Ok(file) => drop(iommufd.set(Some(file))),
            Err(cause) => warn!("the iommufd of the daemon before cannot be used: {cause}"),
        }
    }
    let is_left = iommufd.file().is_some();
    if !is_left {
        keeper.drop_file(kept::IOMMUFD);
    }
    let is_vmm_waiting = is_vmm_waiting(config);
    let left = KnownDevices::claim(keeping);
    let mut known = KnownDevices::default();
    let mut allowed: BTreeMap<PciAddress, Vec<IovaRange>> = BTreeMap::new();
    let mut granule = 1;
    let mut files = Vec::new();
    let mut devices = Vec::new();
    for passthrough in &config.devices.passthrough {
        let &Passthrough { endpoint, host, .. } = passthrough;
        let group = group_of(facts, host, endpoint)?;
        let path = facts.device(host).and_then(|device| device.node(root));
        let path = path.ok_or(PassthroughError::NoDevice {
            host,
            endpoint,
            why: "has no node in /dev/vfio/devices: no VFIO driver holds it, or the kernel \
                  lacks CONFIG_VFIO_DEVICE_CDEV",
        })?;
        let name = keeping.device_name(host);
        end_other(keeping, host);
        let cdev = VmmCdev::default();
        match is_left
            .then(|| claim_cdev(keeping, &name, Some(&path)))
            .flatten()
        {
            Some(file) => drop(cdev.open(file)),
            None => {
                keeper.drop_file(&name);
            }
        }
        let found = match left.get(host) {
            Some(known) => known.clone(),
            None if is_vmm_waiting => None,
            None => probe_vmm_device(&node, &path, host),
        };
        known.add(host, found.clone());
        if let Some(DeviceFacts { allowed: found, .. }) = found {
            check_granule(config, *passthrough, found.granule)?;
            granule = granule.max(found.granule);
            allowed.insert(endpoint, found.ranges);
        }
        files.push(VmmDeviceFile {
            endpoint,
            host,
            cdev: cdev.clone(),
        });
        devices.push(PassthroughDevice {
            endpoint: endpoint.endpoint_id(),
            name: host.to_string(),
            group,
            shared: true,
            attach: Box::new(cdev.clone()),
            memory: Arc::new(cdev),
        });
    }
    known.keep(&left, keeping);
    let helper = config.vfio_helper.clone();
    info!(
        "the devices come from the VMM that connects, through the helper at {}",
        helper.display()
    );
    if !helper.exists() {
        // It may be started later.
        warn!("{}", missing_helper(&helper, "there is no such socket"));
    }
    let left_iommufd = left_iommufd.filter(|_| is_left);
    let vmm = VmmDevices::new(helper, iommufd.clone(), left_iommufd, files, keeper.clone());
    let vmm = Arc::new(vmm);
    let endpoints = devices.iter().map(|d| d.endpoint).collect();
    let pin = match config.pin {
        Pin::All => Pinning::All,
        Pin::Mapped => Pinning::Mapped,
    };
    let capabilities = capabilities(allowed.values(), granule)?;
    let backend = Iommufd::new(Arc::new(iommufd), capabilities, pin, devices);
    let backend = backend.with_vmm_files(Box::new(FilesOfVmm(vmm.clone())));
    Ok(HostBackends {
        backends: vec![(Box::new(backend), endpoints)],
        allowed,
        exported: Vec::new(),
        vmm: Some(vmm),
    })
}

/// Whether a VMM waits at the inherited socket. It may be binding its devices now: a probe could be in its way.
fn is_vmm_waiting(config: &Config) -> bool {
    match config.socket {
        Some(Socket::Fd(fd)) => is_readable(fd),
        Some(Socket::Path(_)) | None => false,
    }
}
