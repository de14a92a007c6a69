//! The arguments of VMMs other than QEMU, and a launcher for the daemon and a VMM.

pub mod cloud_hypervisor;
pub mod crosvm;
pub mod launch;

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, Socket, VmmTransport};
use crate::qemu::args::QemuArgsError;
use crate::topology::PciAddress;
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

/// A path that can stand in an argument as it is.
fn plain(path: &Path) -> Result<&str, VmmArgsError> {
    path.to_str()
        .filter(|text| !text.contains([',', '"', '[', ']', '=', '\n', '\r']))
        .ok_or_else(|| VmmArgsError::UnusablePath {
            path: path.to_owned(),
        })
}
