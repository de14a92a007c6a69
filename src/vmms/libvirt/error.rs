//! The errors of `libvirt-xml`.

use std::path::PathBuf;

use thiserror::Error;

use crate::qemu::args::QemuArgsError;
use crate::topology::{PciAddress, PortPath};

/// A configuration that a domain of libvirt cannot express.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LibvirtError {
    /// What QEMU cannot have.
    #[error(transparent)]
    Qemu(#[from] QemuArgsError),
    /// No size of guest RAM.
    #[error(
        "a domain needs the size of guest RAM, and the configuration has none; give `memory = \"2G\"`"
    )]
    NoMemory,
    /// QEMU and the daemon would have to inherit the same open files.
    #[error(
        "endpoint {endpoint} needs open files that QEMU and the daemon inherit both, and libvirt lets QEMU inherit none; set \
         `vfio-from = \"vmm\"`, with which the daemon takes them over from QEMU, or export the device with `export = \"...\"`"
    )]
    InheritedFiles {
        /// The first such endpoint.
        endpoint: PciAddress,
    },
    /// A port would have to be both libvirt's and in the arguments.
    #[error(
        "behind the port {port} are a device that libvirt makes (`vfio`) and one that it does not know (`vfio-user` or \
         `hotplug`), and such a port can be neither libvirt's nor an argument; give the two different ports on bus 00"
    )]
    MixedPort {
        /// The port on bus 00.
        port: PortPath,
    },
    /// libvirt starts QEMU in a directory of its own.
    #[error(
        "the path {path:?} depends on the current directory, and libvirt starts QEMU in another one; give a path that \
         begins with /"
    )]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// libvirt gives the device another ID, and the endpoint would stay blocked.
    #[error(
        "libvirt cannot give the device of endpoint {endpoint} the ID {id:?}; give `device = \"ua-NAME\"` with letters, \
         digits, - and _, or {usual:?}, which it has without one"
    )]
    Id {
        /// The endpoint.
        endpoint: PciAddress,
        /// Its `device`.
        id: String,
        /// The ID that libvirt gives the device by itself.
        usual: String,
    },
    /// A name that no domain has.
    #[error(
        "libvirt takes no domain with the name {name:?}, because it has a /; set another `name`"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A character that has no form in XML.
    #[error("{text:?} has a character that XML cannot have; use a path without it")]
    Character {
        /// The path, or the argument with it.
        text: String,
    },
}
