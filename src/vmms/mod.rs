//! The arguments of VMMs other than QEMU, the domain of libvirt, and a launcher for the daemon and a VMM.

pub mod cloud_hypervisor;
pub mod crosvm;
pub mod launch;
pub mod libvirt;

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, Machine, Socket, VmmTransport};
use crate::host::sysfs::HostRoot;
use crate::qemu::args::QemuArgsError;
use crate::topology::{PciAddress, PortPath};
use cloud_hypervisor::OwnArgumentError;

/// The arguments of a VMM, and notes on the settings that arguments cannot express.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmArgs {
    /// The arguments, without the program's name.
    pub arguments: Vec<String>,
    /// Notes for the operator.
    pub notes: Vec<String>,
}

/// A configuration that the arguments of a VMM cannot express.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VmmArgsError {
    /// No path for the VMM to connect to, or one for another protocol.
    #[error(
        "the VMM needs the path of a socket for its protocol, and the configuration has none; \
         give `{key} = \"/run/vm0/iommu.sock\"`"
    )]
    NoSocketPath {
        /// The key of the protocol that the VMM speaks.
        key: &'static str,
    },
    /// No size of guest RAM.
    #[error(
        "the VMM needs the size of guest RAM, and the configuration has none; give `memory = \"2G\"`"
    )]
    NoMemorySize,
    /// cloud-hypervisor has one device in each slot, and no bridges.
    #[error(
        "cloud-hypervisor puts a device at function 0 of slots 01 to 1f on bus 00 only, and {address} is elsewhere; \
         give it an address such as `address = \"00:05.0\"`"
    )]
    NotASlot {
        /// The IOMMU or an endpoint with a device.
        address: PciAddress,
    },
    /// A path that the VMM would split.
    #[error(
        "the path {path:?} has a character that stands for itself in no argument of this VMM (one of , \" [ ] = or a \
         line break) or is not UTF-8; use another"
    )]
    UnusablePath {
        /// The path.
        path: PathBuf,
    },
    /// The VMM cannot have the devices of the host.
    #[error(transparent)]
    Passthrough(#[from] QemuArgsError),
    /// The operator's arguments would leave the guest without a working IOMMU.
    #[error(transparent)]
    OwnArgument(#[from] OwnArgumentError),
    /// QEMU's Arm machine, for another VMM.
    #[error(
        "`machine = \"virt\"` is QEMU's Arm machine, and this VMM's guests find the endpoints in a VIOT table; leave the key \
         out, or start this VM with QEMU"
    )]
    MachineOfQemu,
    /// Ports, which only QEMU has.
    #[error(
        "the file has ports, such as {port}, and only QEMU puts devices behind ports; give the endpoints addresses on \
         bus 00, or start this VM with QEMU"
    )]
    Ports {
        /// The first port.
        port: PortPath,
    },
    /// No table would describe the IOMMU.
    #[error(
        "on an Arm host this VMM describes the hardware by a device tree of its own, and nothing can add the IOMMU to it; \
         start this VM with QEMU, whose tree `launch` extends: an IOMMU that no table describes makes Linux crash"
    )]
    ArmHost,
    /// crosvm's guest cannot have the devices that the VMM reaches over vfio-user or through iommufd.
    #[error(
        "endpoint {endpoint} has a device for vfio-user or iommufd, and crosvm has neither; \
         use a device process that reads the page tables (`shadow`), or another VMM"
    )]
    NotForCrosvm {
        /// The endpoint.
        endpoint: PciAddress,
    },
}

/// The path of the socket of a VMM that speaks the protocol of `transport`.
fn socket(config: &Config, transport: VmmTransport) -> Result<&str, VmmArgsError> {
    match &config.socket {
        Some(Socket::Path(path)) if config.transport == transport => plain(path),
        Some(_) | None => Err(VmmArgsError::NoSocketPath {
            key: match transport {
                VmmTransport::VhostUser => "socket",
                VmmTransport::VirtioPci => "vfio-user-socket",
            },
        }),
    }
}

/// Refuses a VM of a VMM other than QEMU whose guest could not learn the endpoints. Such a VMM runs guests of the host's
/// own processors.
fn check_guest(config: &Config, host: &HostRoot) -> Result<(), VmmArgsError> {
    if config.machine == Machine::Virt {
        return Err(VmmArgsError::MachineOfQemu);
    }
    if let Some(port) = config.ports.iter().next() {
        let port = port.path.clone();
        return Err(VmmArgsError::Ports { port });
    }
    // Since Linux 6.1. An older kernel of an Arm host is not recognised.
    match host.value("proc/sys/kernel/arch").as_deref() {
        Some("aarch64") => Err(VmmArgsError::ArmHost),
        Some(_) | None => Ok(()),
    }
}

/// A path that can stand in an argument as it is.
fn plain(path: &Path) -> Result<&str, VmmArgsError> {
    path.to_str()
        .filter(|text| !text.contains([',', '"', '[', ']', '=', '\n', '\r']))
        .ok_or_else(|| VmmArgsError::UnusablePath {
            path: path.to_owned(),
        })
}
