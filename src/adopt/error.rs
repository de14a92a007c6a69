//! Why the helper refuses a daemon.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::config::ConfigError;
use crate::topology::HostAddress;

/// Why the helper refuses a daemon.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// The process that asks is not the daemon of this VM's service.
    #[error(
        "the process that asks is in the control group {group:?}, which is not that of {service}; start the daemon with \
         `systemctl start {service}`, or a helper for it with `vhost-device-iommu adopt --config FILE --socket-path PATH`"
    )]
    Stranger {
        /// The control group.
        group: String,
        /// The service of this VM's daemon.
        service: String,
    },
    /// The VM's file cannot be used.
    #[error("the file of the daemon's VM cannot be used: {0}")]
    File(#[from] ConfigError),
    /// The VM's file does not say that the daemon takes files over from the VMM.
    #[error(
        "{0} has no `vfio-from = \"vmm\"`, so its daemon takes nothing over from the VMM; add the key, and start the daemon anew"
    )]
    NotFromVmm(PathBuf),
    /// The VM's file does not name a device.
    #[error(
        "{file} has no endpoint with vfio = \"{host}\"; correct the file, and start the daemon anew"
    )]
    NotNamed {
        /// The device.
        host: HostAddress,
        /// The file.
        file: PathBuf,
    },
    /// The daemon has sent something else than a request.
    #[error("the daemon sends no request: {0}; use a daemon and a helper of one version")]
    Request(&'static str),
    /// The kernel does not name the process at the other end of a socket.
    #[error(
        "the kernel does not say who is at the other end of the {socket} socket: {source}; the process may have ended, and the \
         kernel must be Linux 6.5 or later"
    )]
    NoPeer {
        /// Whose socket it is.
        socket: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// The process that has connected to the daemon has ended.
    #[error("the process that has connected to the daemon has ended; start the VM anew")]
    Ended,
    /// This process may not take descriptors of the other one.
    #[error(
        "the descriptors of the process {pid} cannot be duplicated: {source}; run the helper with CAP_SYS_PTRACE, in the user \
         namespace of the host, and outside of a Landlock sandbox"
    )]
    Denied {
        /// The process.
        pid: i32,
        /// The error of the system.
        source: io::Error,
    },
    /// The process runs another program, or as another user, than a moment before.
    #[error(
        "the process that has connected to the daemon has begun another program or has become another user meanwhile; connect to the daemon \
         with the VMM itself"
    )]
    Changed,
    /// The VMM has more descriptors than are looked at.
    #[error(
        "the process that has connected to the daemon has more than {0} open files that could be devices; close some"
    )]
    TooMany(usize),
    /// The VMM has several iommufds, and it is unknown to which of them the devices are bound.
    #[error(
        "the VMM has {0} open /dev/iommu, and the kernel does not tell to which of them a device is bound; give all its devices \
         one (for QEMU, one `-object iommufd`)"
    )]
    SeveralIommufds(usize),
    /// The VMM has devices and no iommufd.
    #[error(
        "the VMM has its devices open and no /dev/iommu; let it use iommufd (for QEMU, `-object iommufd,id=i0` and \
         `-device vfio-pci,...,iommufd=i0`)"
    )]
    NoIommufd,
    /// The system refuses something else.
    #[error("cannot {step}: {source}")]
    System {
        /// The failed step: a verb and its object.
        step: &'static str,
        /// The error of the system.
        source: io::Error,
    },
}
