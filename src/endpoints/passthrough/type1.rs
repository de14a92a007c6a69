//! Opens devices through VFIO containers: one container for each group. Takes over those that the process before has left
//! open.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use log::warn;

use super::kept::{self, DeviceKeeping};
use super::strays::end_other;
use super::{
    HostBackends, OpenedExport, PassthroughError, capabilities, check_coherency, check_granule,
    group_of, stop_export,
};
use crate::address::IovaRange;
use crate::backends::type1::{GroupDevice, Type1Group};
use crate::config::{Config, Passthrough};
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::process::inherited::{adopt, is_same_file};
use crate::process::keeper::Keeper;
use crate::topology::PciAddress;
use crate::vfio::{Attach, Cdev, Container, DeviceAccess, DeviceMemory, Group, VfioError};

/// A container and the devices of its group.
struct OpenedGroup {
    container: Container,
    /// The process before may have filled the container.
    is_left: bool,
    devices: Vec<OpenedMember>,
}

/// An endpoint with a device of the group.
struct OpenedMember {
    passthrough: Passthrough,
    /// `None` if this process was given the container alone.
    device: Option<Cdev>,
    /// The device is as the process before has left it.
    is_left: bool,
    /// The name of its descriptor at the keeper.
    kept_as: String,
}

pub(super) fn open(
    config: &Config,
    root: &HostRoot,
    facts: &HostFacts,
    keeping: &DeviceKeeping<'_>,
) -> Result<HostBackends, PassthroughError> {
    let mut inherited = Inherited::adopt(config)?;
    let mut groups: BTreeMap<u32, OpenedGroup> = BTreeMap::new();
    for &passthrough in &config.devices.passthrough {
        let Passthrough { endpoint, host, .. } = passthrough;
        end_other(keeping, host);
        let number = group_of(facts, host, endpoint)?;
        let failed = |source| PassthroughError::Device {
            host,
            endpoint,
            source,
        };
        let device = inherited.devices.remove(&endpoint);
        let container = inherited.containers.remove(&endpoint);
        let open = match groups.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let (container, is_left) = match container {
                    // The file is open elsewhere, so it outlives this process without a keeper.
                    Some(container) => (container, true),
                    None => match claim_container(keeping, number) {
                        Some(container) => (container, true),
                        None => {
                            close_devices(config, facts, keeping, number);
                            let container = open_container(root, number).map_err(failed)?;
                            keep_container(keeping.keeper, number, &container);
                            (container, false)
                        }
                    },
                };
                entry.insert(OpenedGroup {
                    container,
                    is_left,
                    devices: Vec::new(),
                })
            }
        };
        let name = keeping.device_name(host);
        let is_exported = config.devices.exported_at(endpoint).is_some();
        let (device, is_left) = match (device, open.container.group()) {
            (Some(device), _) if is_exported => {
                let is_left = kept::keep_inherited(keeping.keeper, &name, device.as_fd());
                (Some(device), is_left)
            }
            (Some(device), _) => (Some(device), false),
            (None, Some(group)) => {
                let opened = open_device(keeping, group, &passthrough, open.is_left);
                let (device, is_left) = opened.map_err(failed)?;
                (Some(device), is_left)
            }
            (None, None) => (None, false),
        };
        if is_exported
            && open.is_left
            && !is_left
            && let Some(device) = &device
        {
            stop_export(device, &passthrough);
        }
        if device.is_none() && is_exported {
            return Err(PassthroughError::NoDevice {
                host,
                endpoint,
                why: "is exported, and only its container is handed over: pass the device with \
                      --vfio-fd",
            });
        }
        open.devices.push(OpenedMember {
            passthrough,
            device,
            is_left,
            kept_as: name,
        });
    }
    refuse_shared_containers(&groups)?;

    let peers: Vec<Arc<dyn DeviceMemory>> = groups
        .values()
        .flat_map(|open| &open.devices)
        .filter_map(|member| member.device.clone())
        .map(|device| -> Arc<dyn DeviceMemory> { Arc::new(device) })
        .collect();
    let mut opened = HostBackends {
        backends: Vec::new(),
        allowed: BTreeMap::new(),
        exported: Vec::new(),
        vmm: None,
    };
    for (number, open) in groups {
        add_group(config, &mut opened, number, open, &peers)?;
    }
    Ok(opened)
}

/// Refuses a container that several groups share. Some VMMs make such containers, but a container has only one address
/// space.
fn refuse_shared_containers(groups: &BTreeMap<u32, OpenedGroup>) -> Result<(), PassthroughError> {
    let open: Vec<_> = groups.values().collect();
    for (n, one) in open.iter().enumerate() {
        for other in &open[..n] {
            if is_same_file(one.container.as_fd(), other.container.as_fd()) == Some(true)
                && let (Some(one), Some(other)) = (one.devices.first(), other.devices.first())
            {
                return Err(PassthroughError::OneContainer {
                    endpoint: one.passthrough.endpoint,
                    other: other.passthrough.endpoint,
                });
            }
        }
    }
    Ok(())
}

/// Inherited containers and devices, by endpoint.
struct Inherited {
    containers: BTreeMap<PciAddress, Container>,
    devices: BTreeMap<PciAddress, Cdev>,
}

impl Inherited {
    fn adopt(config: &Config) -> Result<Self, PassthroughError> {
        let mut containers = BTreeMap::new();
        let mut devices = BTreeMap::new();
        for (&endpoint, &fd) in &config.descriptors.containers {
            let container = adopt(fd).and_then(Container::adopt);
            let container = container.map_err(|source| PassthroughError::Inherited {
                fd,
                wanted: "a VFIO container with a type1 IOMMU",
                source,
                option: "--vfio-container-fd",
            })?;
            containers.insert(endpoint, container);
        }
        for (&endpoint, &fd) in &config.descriptors.devices {
            let device = adopt(fd).map_err(|source| PassthroughError::Inherited {
                fd,
                wanted: "a VFIO device",
                source,
                option: "--vfio-fd",
            })?;
            devices.insert(endpoint, Cdev::adopt(device));
        }
        Ok(Self {
            containers,
            devices,
        })
    }
}

fn open_container(root: &HostRoot, number: u32) -> Result<Container, VfioError> {
    let mut container = Container::open(&root.path("dev/vfio/vfio"))?;
    container.set_group(Group::open(&root.path(format!("dev/vfio/{number}")))?)?;
    Ok(container)
}

/// The container of a group, and the group, as the process before has left them.
fn claim_container(keeping: &DeviceKeeping<'_>, number: u32) -> Option<Container> {
    let names = [kept::container_name(number), kept::group_name(number)];
    let container = keeping.claim(&names[0]);
    let group = keeping.claim(&names[1]);
    let adopted = match (container, group) {
        (Some(container), Some(group)) => Container::adopt_with_group(container, group),
        (None, None) => return None,
        _ => Err(io::Error::other("one of two descriptors is missing")),
    };
    match adopted {
        Ok(container) => Some(container),
        Err(cause) => {
            warn!(
                "the container of group {number} of the daemon before cannot be used, so its devices are opened anew: {cause}"
            );
            names.iter().for_each(|name| keeping.keeper.release(name));
            None
        }
    }
}

fn keep_container(keeper: &Keeper, number: u32, container: &Container) {
    kept::keep(keeper, &kept::container_name(number), container.as_fd());
    if let Some(group) = container.group() {
        kept::keep(keeper, &kept::group_name(number), group.as_fd());
    }
}

/// Closes the devices of a group that the process before has left without the group: they keep the group in use, so it could
/// not be opened.
fn close_devices(config: &Config, facts: &HostFacts, keeping: &DeviceKeeping<'_>, number: u32) {
    for passthrough in &config.devices.passthrough {
        let group = facts.translated_group(passthrough.host);
        if group.is_ok_and(|group| group.number == number) {
            let name = keeping.device_name(passthrough.host);
            keeping.keeper.drop_file(&name);
        }
    }
}

/// Takes a device of a group over from the process before, if the group `is_left` by that process, or opens it. Also returns
/// whether it is taken over.
fn open_device(
    keeping: &DeviceKeeping<'_>,
    group: &Group,
    passthrough: &Passthrough,
    is_left: bool,
) -> Result<(Cdev, bool), VfioError> {
    let &Passthrough { host, token, .. } = passthrough;
    let keeper = keeping.keeper;
    let name = keeping.device_name(host);
    let left = keeping.claim(&name).filter(|_| is_left);
    if let Some(file) = left {
        let device = group.adopt_device(&host.to_string(), token, file)?;
        match device.info() {
            Ok(_) => return Ok((device, true)),
            Err(cause) => warn!(
                "the descriptor {name} of the daemon before cannot be used, so the device is opened anew: {cause}"
            ),
        }
    }
    keeper.drop_file(&name);
    let device = group.device(&host.to_string(), token)?;
    kept::keep(keeper, &name, device.as_fd());
    Ok((device, false))
}

fn add_group(
    config: &Config,
    opened: &mut HostBackends,
    number: u32,
    open: OpenedGroup,
    peers: &[Arc<dyn DeviceMemory>],
) -> Result<(), PassthroughError> {
    let info = open.container.info().map_err(|source| VfioError {
        problem: format!("cannot ask the IOMMU of group {number}"),
        source,
        cure: "see the kernel's log",
    })?;
    if let Some(available) = info.available.filter(|n| *n < 4096) {
        warn!(
            "group {number} takes {available} mappings only; raise dma_entry_limit of the module \
             vfio_iommu_type1"
        );
    }
    let ranges: Vec<IovaRange> = info.ranges.unwrap_or_else(|| vec![IovaRange::ALL]);
    let granule = match info.page_sizes {
        0 => 1,
        sizes => 1 << sizes.trailing_zeros(),
    };
    let capabilities = capabilities([&ranges], granule)?;
    let mut endpoints = Vec::new();
    let mut devices = Vec::new();
    let is_coherent = open
        .container
        .enforces_coherency()
        .map_err(|source| VfioError {
            problem: format!(
                "cannot ask whether the IOMMU of group {number} enforces cache coherency"
            ),
            source,
            cure: "see the kernel's log",
        })?;
    for OpenedMember {
        passthrough,
        device,
        is_left,
        kept_as,
    } in open.devices
    {
        check_coherency(config, passthrough, is_coherent)?;
        check_granule(config, passthrough, granule)?;
        opened.allowed.insert(passthrough.endpoint, ranges.clone());
        endpoints.push(passthrough.endpoint.endpoint_id());
        if let Some(device) = &device
            && config.devices.exported_at(passthrough.endpoint).is_some()
        {
            opened.exported.push(OpenedExport {
                endpoint: passthrough.endpoint,
                access: Box::new(device.clone()),
                is_left,
                kept_as,
            });
        }
        devices.push(GroupDevice {
            endpoint: passthrough.endpoint.endpoint_id(),
            name: passthrough.host.to_string(),
            device: device.map(|device| -> Box<dyn Attach> { Box::new(device) }),
        });
    }
    let backend = Type1Group::new(
        Box::new(open.container),
        capabilities,
        devices,
        peers.to_vec(),
    );
    let backend = backend.of_group(number, open.is_left);
    opened.backends.push((Box::new(backend), endpoints));
    Ok(())
}
