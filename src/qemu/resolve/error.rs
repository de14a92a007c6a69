//! The errors of `resolve`.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::config::ConfigError;

/// Why the addresses of a file cannot be found.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// The file cannot be used, whatever the addresses.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// The text cannot be changed.
    #[error("the file cannot be changed: {0}; write the addresses into it by hand")]
    Syntax(String),
    /// Nobody to ask.
    #[error(
        "an endpoint has no `address`, and it is unknown which QEMU has its device; give --qmp, or `qmp` in the file"
    )]
    NoSocket,
    /// QEMU cannot be asked.
    #[error(
        "QEMU's monitor at {socket:?}: {source}; start QEMU with its devices and \
         -S -qmp unix:PATH,server=on,wait=off, and let no other program use this socket"
    )]
    Monitor {
        /// The socket.
        socket: PathBuf,
        /// The error of the system, or the answer that is none.
        source: io::Error,
    },
    /// QEMU has ended, or answers something else than QEMU does.
    #[error("QEMU does not tell where the device {id:?} is: {source}; start it anew")]
    Unanswered {
        /// The ID of the device.
        id: String,
        /// The error of the system, or the answer that is none.
        source: io::Error,
    },
    /// There is no such device.
    #[error(
        "QEMU has no device with the ID {id:?}; start it with `-device ...,id={id}`, or correct `device`"
    )]
    NoDevice {
        /// The ID.
        id: String,
    },
    /// Something else has this ID.
    #[error("the device {id:?} is no PCI device ({why}); correct `device`")]
    NotPci {
        /// The ID.
        id: String,
        /// QEMU's message.
        why: String,
    },
    /// The device is below a host bridge that the guest's table does not have.
    #[error(
        "the device {id:?} is behind {bus:?} and not behind pcie.0, the root bus of the machine; give it another `bus`"
    )]
    OtherRoot {
        /// The ID.
        id: String,
        /// The bus without a bridge above it.
        bus: String,
    },
    /// The file would be refused.
    #[error("with the addresses that QEMU tells, the file cannot be used: {0}")]
    Unusable(ConfigError),
    /// The file cannot be replaced.
    #[error(
        "{file:?} cannot be replaced: {source}; run the command without --write, and paste what it prints"
    )]
    Write {
        /// The file.
        file: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}
