//! Starts the daemon and the VMM of one VM together, and ends them together.
//!
//! ```text
//! launch -- opens /dev/iommu and the devices, makes the VIOT table
//!   |-- daemon   own process group; SIGTERM when launch dies
//!   |     |-- says on a pipe that it listens; only then:
//!   |     \-- sends the descriptors that the next daemon needs
//!   \-- VMM      its own arguments and ours; SIGKILL when launch dies
//! ```
//!
//! If a daemon that has left descriptors ends before the VMM, it is started again with them, and the VMM goes on
//! (`daemons`).
//!
//! QEMU takes the VIOT table as a file. cloud-hypervisor takes none: its guest reads the table through the device, so
//! the file is written only where the operator asks for one.

mod daemons;
mod descriptor_store;
mod device_tree;
mod devices;
mod error;
mod events;
mod process;
mod supervise;
mod table;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use libc::SIGKILL;

use super::cloud_hypervisor::{self, LaunchedArgs};
use crate::config::{Config, ConfiguredDevice, HostIommu, Machine, Socket};
use crate::host::sysfs::HostRoot;
use crate::qemu::args::{OperatorOptions, QemuArgs, QemuArgsError};
use crate::topology;
use crate::topology::viot;
use daemons::{DaemonStart, Daemons, Started};
use descriptor_store::allow_more_files;
use error::system;
use events::Events;
use process::{Running, exit_code};
use supervise::supervise;
use table::TableFile;

pub use device_tree::{BaseTreeError, read_tree};
pub use devices::{OpenError, OpenFiles};
pub use error::LaunchError;

/// How long the VMM may take to end after its IOMMU is gone.
const VMM_PATIENCE: Duration = Duration::from_secs(10);

/// A VMM that [`Launch`] can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmKind {
    /// QEMU.
    Qemu,
    /// cloud-hypervisor.
    CloudHypervisor,
}

/// The daemon and the VMM to start.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// The configuration's file, which the daemon reads, too.
    pub config: &'a Path,
    /// The path to write the VIOT table or the device tree to; `None` keeps it in memory.
    pub table: Option<&'a Path>,
    /// The VMM's program and its first arguments; not empty.
    pub vmm: &'a [OsString],
    /// The kind of the VMM; `None` takes it from the program's name.
    pub kind: Option<VmmKind>,
    /// How often within a minute the daemon is started again.
    pub max_restarts: u32,
    /// The program of the daemon.
    pub daemon: &'a Path,
    /// The root of the host's `dev` and `sys`.
    pub host: &'a HostRoot,
}

impl Launch<'_> {
    /// Starts the daemon and the VMM, and waits until both have ended. Meanwhile, the VMM gets the signals
    /// that would end this process. Both end when the calling thread dies.
    ///
    /// Returns the VMM's exit status (128 plus the number of a signal), or the daemon's if it refused to
    /// start; the daemon has printed its reasons.
    ///
    /// # Errors
    /// See [`LaunchError`]. Neither process is left running.
    pub fn run(&self) -> Result<u8, LaunchError> {
        let (program, others) = self.vmm.split_first().ok_or(LaunchError::NoVmm)?;
        let kind = self.kind.unwrap_or_else(|| VmmKind::of(program));
        let machine = match kind {
            VmmKind::Qemu => OperatorOptions::new(others)
                .map_err(QemuArgsError::from)?
                .machine(),
            VmmKind::CloudHypervisor => None,
        };
        let mut config = Config::for_machine(self.config, machine)?;
        let mut files = OpenFiles::default();
        if config.host_iommu == HostIommu::Iommufd {
            files = OpenFiles::open(self.host, &config)?;
        }
        config.descriptors = files.descriptors();
        let (made, table) = match kind {
            VmmKind::Qemu => self.for_qemu(&config, program, others)?,
            VmmKind::CloudHypervisor => self.for_cloud_hypervisor(&config, others)?,
        };
        for note in &made.notes {
            // Nothing is lost that the VM needs if nobody reads standard error.
            let _ = writeln!(io::stderr(), "vhost-device-iommu: note: {note}");
        }

        let events = Events::listen().map_err(system("watch signals"))?;
        let start = DaemonStart {
            program: self.daemon,
            config: self.config,
            options: daemon_options(&config),
            patience: config.start_limit(),
            sockets: sockets(&config),
            max_restarts: self.max_restarts,
        };
        let mut inherited = files.numbers();
        let mut daemons = Daemons::start(start, files, &events)?;
        match daemons.until_ready()? {
            Started::Ready => {}
            Started::Ended(status) => return Ok(exit_code(status)),
            Started::Signalled(signal) => return Ok(128u8.saturating_add(signal)),
        }

        inherited.extend(table.as_ref().and_then(GuestTable::fd));
        let mut command = Command::new(program);
        command.args(&made.arguments);
        let vmm = Running::start(command, inherited, SIGKILL, VMM_PATIENCE);
        let vmm = vmm.map_err(|source| LaunchError::Start {
            program: program.into(),
            source,
        })?;
        // Only the VMM reads the table. The files of the host stay open here, for the next daemon.
        drop(table);
        // Not before: the VMM keeps the limit of this process.
        allow_more_files();
        let status = supervise(vmm, &mut daemons, &events)?;
        Ok(exit_code(status))
    }

    /// QEMU's arguments, those in `others` first, and the table that they name.
    fn for_qemu(
        &self,
        config: &Config,
        program: &OsStr,
        others: &[OsString],
    ) -> Result<(LaunchedArgs, Option<GuestTable>), LaunchError> {
        let bytes = match config.machine {
            Machine::Q35 => viot::table(&config.topology)?,
            Machine::Virt => {
                // Before QEMU is started for its tree.
                let options = OperatorOptions::new(others).map_err(QemuArgsError::from)?;
                options.check(config.machine).map_err(QemuArgsError::from)?;
                let base = device_tree::base(config, program, others)?;
                topology::device_tree::extended(&base, &config.topology)?
            }
        };
        let table = self.table(&bytes)?;
        let made = QemuArgs::appended_to(config, &table.path, others)?;
        let ours = made.arguments.into_iter().map(OsString::from);
        let made = LaunchedArgs {
            arguments: others.iter().cloned().chain(ours).collect(),
            notes: made.notes,
        };
        Ok((made, Some(table)))
    }

    /// cloud-hypervisor's arguments. If the program is a wrapper, its own arguments stay before ours: all words before
    /// the first one that begins with two dashes.
    fn for_cloud_hypervisor(
        &self,
        config: &Config,
        others: &[OsString],
    ) -> Result<(LaunchedArgs, Option<GuestTable>), LaunchError> {
        let table = match self.table {
            Some(_) => Some(self.table(&viot::table(&config.topology)?)?),
            None => None,
        };
        let first = others
            .iter()
            .position(|word| word.as_bytes().starts_with(b"--"));
        let (wrapper, own) = others.split_at(first.unwrap_or(others.len()));
        let mut made = cloud_hypervisor::launched(config, own, self.host)?;
        made.arguments.splice(0..0, wrapper.iter().cloned());
        Ok((made, table))
    }

    /// `bytes`, the VIOT table or the device tree, as a file for the VMM.
    fn table(&self, bytes: &[u8]) -> Result<GuestTable, LaunchError> {
        if let Some(path) = self.table {
            return match fs::write(path, bytes) {
                Ok(()) => Ok(GuestTable {
                    path: path.to_owned(),
                    file: None,
                }),
                Err(source) => Err(LaunchError::WriteTable {
                    path: path.to_owned(),
                    source,
                }),
            };
        }
        let file = TableFile::new(bytes).map_err(system("make a file for the guest's table"))?;
        Ok(GuestTable {
            path: file.path(),
            file: Some(file),
        })
    }
}

impl VmmKind {
    /// The kind of a VMM by the name of its program. A name that says nothing is QEMU's.
    fn of(program: &OsStr) -> Self {
        let name = Path::new(program).file_name().unwrap_or_default();
        if name.as_bytes().starts_with(b"cloud-hypervisor") {
            Self::CloudHypervisor
        } else {
            Self::Qemu
        }
    }
}

/// The VIOT table or the device tree, and the path at which the VMM finds it.
struct GuestTable {
    path: PathBuf,
    /// The file, if it has no name in the file system.
    file: Option<TableFile>,
}

impl GuestTable {
    fn fd(&self) -> Option<RawFd> {
        self.file.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// The paths of the daemon's sockets.
fn sockets(config: &Config) -> Vec<PathBuf> {
    let path = match &config.socket {
        Some(Socket::Path(path)) => Some(path),
        Some(Socket::Fd(_)) | None => None,
    };
    path.into_iter()
        .chain(&config.control)
        .chain(&config.metrics.socket)
        .chain(
            config
                .devices
                .iter()
                .filter_map(ConfiguredDevice::listens_at),
        )
        .cloned()
        .collect()
}

/// The options that every start of the daemon has.
fn daemon_options(config: &Config) -> Vec<String> {
    let mut options = Vec::new();
    let mut add = |name: &str, value: String| options.extend([name.to_owned(), value]);
    if config.machine != Machine::default() {
        // Recognised from the VMM's arguments, which the daemon does not see.
        add("--machine", config.machine.name().into());
    }
    let descriptors = &config.descriptors;
    if let Some(fd) = descriptors.iommufd {
        add("--iommufd-fd", fd.to_string());
    }
    for (endpoint, fd) in &descriptors.devices {
        add("--vfio-fd", format!("{endpoint}={fd}"));
    }
    options
}
