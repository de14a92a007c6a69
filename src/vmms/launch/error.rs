//! Why a VM could not be started, or did not end as it should.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

use super::device_tree::BaseTreeError;
use super::devices::OpenError;
use crate::config::ConfigError;
use crate::qemu::args::QemuArgsError;
use crate::topology::device_tree::DeviceTreeError;
use crate::topology::viot::ViotError;
use crate::vmms::VmmArgsError;

/// A VM that could not be started, or did not end as it should.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// QEMU's arguments cannot express the configuration.
    #[error(transparent)]
    QemuArgs(#[from] QemuArgsError),
    /// cloud-hypervisor's arguments cannot express the configuration.
    #[error(transparent)]
    VmmArgs(#[from] VmmArgsError),
    /// A file of the host cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The configuration has no VIOT table.
    #[error(transparent)]
    Viot(#[from] ViotError),
    /// The VMM's device tree cannot be had.
    #[error(transparent)]
    BaseTree(#[from] BaseTreeError),
    /// The device tree cannot be extended.
    #[error(transparent)]
    DeviceTree(#[from] DeviceTreeError),
    /// The table cannot be written to its path.
    #[error("cannot write {path}: {source}; give a path that can be written with --viot")]
    WriteTable {
        /// The path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No VMM is given.
    #[error("no VMM is given; give its program and arguments after --")]
    NoVmm,
    /// A program cannot be started.
    #[error("cannot start {program}: {source}; give a program that can be run, or its path")]
    Start {
        /// The program.
        program: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The daemon does not listen in time.
    #[error(
        "the daemon did not listen within {} s, so it was ended; try again when the machine is less \
         busy, or read the daemon's own messages: vhost-device-iommu --config FILE",
        .0.as_secs()
    )]
    NotReady(Duration),
    /// The daemon ended before the VMM, which was ended too.
    #[error(
        "the daemon ended ({0}) before the VMM, which was ended too, because a guest without its \
         IOMMU hangs; read the daemon's last message for the reason, and start the VM again"
    )]
    DaemonEnded(ExitStatus),
    /// The daemon ended again and again.
    #[error(
        "the daemon ended ({status}), after it was started again {restarts} times within {} s, and the VMM was ended, too, \
         because a guest without its IOMMU hangs; read the daemon's messages for the reason, and start the VM again",
        .within.as_secs()
    )]
    DaemonLoops {
        /// How it ended at last.
        status: ExitStatus,
        /// How often it was started again.
        restarts: u32,
        /// The time within which that happened.
        within: Duration,
    },
    /// A system call failed.
    #[error(
        "cannot {action}: {source}; check whether the system is short of files, memory or processes"
    )]
    System {
        /// The action that failed.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// Tells which action failed.
pub(super) fn system(action: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::System { action, source }
}
