//! Arguments and notes for passthrough devices that the VMM binds.

use std::collections::BTreeSet;
use std::os::fd::RawFd;

use super::places::{device_id, has_bus, place};
use super::{PREFIX, QemuArgsError};
use crate::config::{Config, HostIommu, Passthrough};
use crate::topology::PciAddress;

/// The first descriptor without a conventional meaning.
const FIRST_FREE: RawFd = 3;

/// The devices that the VMM binds, and the numbers of their descriptors in the VMM.
#[derive(Debug)]
pub struct PassthroughArguments {
    iommufd: RawFd,
    /// The VMM opens the nodes itself, and the daemon takes the open files over.
    opens_nodes: bool,
    /// At least one, in ascending order of endpoint.
    devices: Vec<VmmDevice>,
}

/// A passthrough device that the VMM binds.
#[derive(Clone, Debug)]
struct VmmDevice {
    device: Passthrough,
    fd: RawFd,
    /// Its ID in QEMU.
    id: String,
    /// The properties that put it at its endpoint's address.
    place: String,
    /// Whether they suffice: its bus is known.
    is_placed: bool,
}

impl PassthroughArguments {
    /// The arguments for `config`; `None` if it has no device that the VMM binds. A device without a configured
    /// descriptor gets the lowest free number, from 3 on.
    ///
    /// # Errors
    ///
    /// The daemon alone holds the devices ([`QemuArgsError::Type1`]).
    pub fn new(config: &Config) -> Result<Option<Self>, QemuArgsError> {
        let mut shared = config
            .devices
            .passthrough
            .iter()
            .filter(|device| config.devices.exported_at(device.endpoint).is_none())
            .peekable();
        if shared.peek().is_none() {
            return Ok(None);
        }
        if config.host_iommu == HostIommu::Type1 {
            return Err(QemuArgsError::Type1);
        }
        let given = &config.descriptors;
        let taken: BTreeSet<RawFd> = given
            .devices
            .values()
            .copied()
            .chain(given.iommufd)
            .collect();
        let mut free = (FIRST_FREE..).filter(|fd| !taken.contains(fd));
        let mut number = |given: Option<RawFd>| given.or_else(|| free.next()).unwrap_or(RawFd::MAX);
        let iommufd = number(given.iommufd);
        let devices = shared
            .map(|device| {
                let given = given.devices.get(&device.endpoint).copied();
                VmmDevice {
                    device: *device,
                    fd: number(given),
                    place: place(config, device.endpoint),
                    id: device_id(config, device.endpoint, "vfio"),
                    is_placed: has_bus(config, device.endpoint),
                }
            })
            .collect();
        Ok(Some(Self {
            iommufd,
            opens_nodes: config.takes_vmm_files(),
            devices,
        }))
    }

    /// The number of the descriptor of `/dev/iommu`.
    pub fn iommufd(&self) -> RawFd {
        self.iommufd
    }

    /// The devices, in ascending order of endpoint, each with the number of its descriptor.
    pub fn devices(&self) -> impl Iterator<Item = (Passthrough, RawFd)> + '_ {
        self.devices.iter().map(|shared| (shared.device, shared.fd))
    }

    /// The arguments. They must come before the IOMMU's, so that QEMU has bound and attached the devices
    /// when the guest's driver starts.
    pub(super) fn arguments(&self) -> Vec<(&'static str, String)> {
        let iommufd = if self.opens_nodes {
            format!("iommufd,id={PREFIX}iommufd")
        } else {
            format!("iommufd,id={PREFIX}iommufd,fd={}", self.iommufd)
        };
        let mut arguments = vec![("-object", iommufd)];
        for shared in &self.devices {
            if shared.is_placed {
                arguments.push(("-device", shared.argument(self.opens_nodes)));
            }
        }
        arguments
    }

    /// Notes on the descriptors that `vmm` and the daemon must inherit, which arguments cannot express.
    pub fn notes(&self, vmm: &str) -> Vec<String> {
        if self.opens_nodes {
            return vec![format!(
                "{vmm} must be able to open /dev/iommu and the devices' nodes; the daemon takes the open files over through its \
                 helper (vhost-device-iommu-adopt@.socket)"
            )];
        }
        let mut notes = vec![
            format!(
                "{vmm} and the daemon must inherit the same open files. `vhost-device-iommu launch` opens \
             them for both; to open them by hand in bash, before both are started:"
            ),
            format!("  exec {}<>/dev/iommu", self.iommufd),
        ];
        let mut daemon = format!("--iommufd-fd {}", self.iommufd);
        for VmmDevice { device, fd, .. } in &self.devices {
            let (endpoint, host) = (device.endpoint, device.host);
            notes.push(format!(
                "  exec {fd}<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/{host}/vfio-dev)"
            ));
            daemon.push_str(&format!(" --vfio-fd {endpoint}={fd}"));
        }
        notes.push(format!("  and start the daemon with {daemon}"));
        notes
    }

    /// The note for an endpoint with a device that the VMM binds.
    pub(super) fn endpoint_note(&self, endpoint: PciAddress) -> Option<String> {
        let at = self
            .devices
            .binary_search_by_key(&endpoint, |shared| shared.device.endpoint)
            .ok()?;
        let shared = self.devices.get(at)?;
        let host = shared.device.host;
        Some(if shared.is_placed {
            format!("the host's device {host}, among the arguments")
        } else if endpoint.segment() != 0 {
            format!(
                "the host's device {host}, but QEMU's machine has segment 0 only, so QEMU can put no device \
                 there"
            )
        } else {
            format!(
                "the host's device {host}; add `-device {}`, on the bridge that the guest numbers \
                 as bus {:02x} and before the IOMMU's -device",
                shared.argument(self.opens_nodes),
                endpoint.bus()
            )
        })
    }
}

impl VmmDevice {
    fn argument(&self, opens_node: bool) -> String {
        let device = if opens_node {
            format!("host={}", self.device.host)
        } else {
            format!("fd={}", self.fd)
        };
        // QEMU refuses a device given by descriptor that has no name.
        format!(
            "vfio-pci,id={},{device},iommufd={PREFIX}iommufd,{}",
            self.id, self.place
        )
    }
}
