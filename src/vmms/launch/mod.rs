//! Starts the daemon and the VMM of one VM together, and ends them together.
//!
//! ```text
//! launch -- opens /dev/iommu and the devices, makes the VIOT table
//!   |-- daemon   own process group; SIGTERM when launch dies
//!   |     \-- says on a pipe that it listens; only then:
//!   \-- VMM      its own arguments and ours; SIGKILL when launch dies
//! ```
//!
//! QEMU takes the VIOT table as a file. cloud-hypervisor takes none: its guest reads the table through the device, so
//! the file is written only where the operator asks for one.

mod device_tree;
mod devices;
mod events;
mod process;
mod table;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use libc::{SIGKILL, SIGTERM};
use thiserror::Error;

use super::VmmArgsError;
use super::cloud_hypervisor::{self, LaunchedArgs};
use crate::config::{Config, ConfigError, ConfiguredDevice, HostIommu, Machine, Socket};
use crate::host::sysfs::HostRoot;
use crate::process::socket::SocketFile;
use crate::qemu::args::{OperatorOptions, QemuArgs, QemuArgsError};
use crate::topology;
use crate::topology::device_tree::DeviceTreeError;
use crate::topology::viot::{self, ViotError};
use events::{Event, Events};
use process::{Running, exit_code};
use table::TableFile;

pub use device_tree::{BaseTreeError, read_tree};
pub use devices::{OpenError, OpenFiles};

/// How long the daemon may take to end: longer than it waits for its own threads.
const DAEMON_PATIENCE: Duration = Duration::from_secs(8);
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

        // Dropped last: the daemon removes its sockets itself, unless it was killed.
        let leftover;
        let events = Events::listen().map_err(system("watch signals"))?;
        let mut daemon = self.start_daemon(&config, files.numbers(), &events)?;
        match until_ready(&mut daemon, &events, config.start_limit())? {
            Started::Ready => {}
            Started::Ended(status) => return Ok(exit_code(status)),
            Started::Signalled(signal) => return Ok(128u8.saturating_add(signal)),
        }
        leftover = sockets(&config);

        let table_fd = table.as_ref().and_then(GuestTable::fd);
        let inherited = files.numbers().into_iter().chain(table_fd).collect();
        let mut command = Command::new(program);
        command.args(&made.arguments);
        let vmm = Running::start(command, inherited, SIGKILL, VMM_PATIENCE);
        let vmm = vmm.map_err(|source| LaunchError::Start {
            program: program.into(),
            source,
        })?;
        // From here on, only the daemon and the VMM hold the devices.
        drop((files, table));
        let status = supervise(vmm, &mut daemon, &events)?;
        drop(daemon);
        drop(leftover);
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

    fn start_daemon(
        &self,
        config: &Config,
        mut inherited: Vec<RawFd>,
        events: &Events,
    ) -> Result<Running, LaunchError> {
        let (reader, writer) = io::pipe().map_err(system("make a pipe"))?;
        let mut command = Command::new(self.daemon);
        command.arg("--config").arg(self.config);
        command.args(["--ready-fd", &writer.as_raw_fd().to_string()]);
        if config.machine != Machine::default() {
            // Recognised from the VMM's arguments, which the daemon does not see.
            command.args(["--machine", config.machine.name()]);
        }
        let descriptors = &config.descriptors;
        if let Some(fd) = descriptors.iommufd {
            command.args(["--iommufd-fd", &fd.to_string()]);
        }
        for (endpoint, fd) in &descriptors.devices {
            command.args(["--vfio-fd", &format!("{endpoint}={fd}")]);
        }
        command.stdin(Stdio::null());
        // A terminal signals a whole process group, and the daemon must outlive the VMM.
        command.process_group(0);
        inherited.push(writer.as_raw_fd());
        let daemon = Running::start(command, inherited, SIGTERM, DAEMON_PATIENCE);
        let daemon = daemon.map_err(|source| LaunchError::Start {
            program: self.daemon.to_owned(),
            source,
        })?;
        events.watch(reader).map_err(system("start a thread"))?;
        Ok(daemon)
    }
}

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

/// The outcome of the daemon's start.
enum Started {
    Ready,
    /// The daemon ended with a status other than 0.
    Ended(ExitStatus),
    /// This process got a signal with this number.
    Signalled(u8),
}

fn until_ready(
    daemon: &mut Running,
    events: &Events,
    patience: Duration,
) -> Result<Started, LaunchError> {
    let deadline = Instant::now() + patience;
    while let Some(event) = events.next_until(deadline) {
        match event {
            Event::Ready => return Ok(Started::Ready),
            Event::Signal(signal) => {
                return Ok(Started::Signalled(u8::try_from(signal).unwrap_or(u8::MAX)));
            }
            Event::Child => match daemon.poll().map_err(system("wait for the daemon"))? {
                None => {}
                Some(status) if status.code().is_some_and(|code| code != 0) => {
                    return Ok(Started::Ended(status));
                }
                Some(status) => return Err(LaunchError::DaemonEnded(status)),
            },
        }
    }
    Err(LaunchError::NotReady(patience))
}

/// Waits until the daemon or the VMM has ended, and ends the other.
fn supervise(
    mut vmm: Running,
    daemon: &mut Running,
    events: &Events,
) -> Result<ExitStatus, LaunchError> {
    let failed = || system("wait for the daemon and the VMM");
    // A signal has asked the VM to end, so the end of the daemon is no failure.
    let mut signalled = false;
    loop {
        if let Event::Signal(signal) = events.next() {
            signalled = true;
            vmm.signal(signal)
                .map_err(system("send the VMM a signal"))?;
        }
        let vmm_status = vmm.poll().map_err(failed())?;
        let daemon_status = daemon.poll().map_err(failed())?;
        if vmm_status.is_none() && daemon_status.is_none() {
            continue;
        }
        signalled |= events.drain();
        return match (vmm_status, daemon_status) {
            // A service manager may signal both at once.
            (_, Some(status)) if !signalled => {
                vmm.end().map_err(failed())?;
                Err(LaunchError::DaemonEnded(status))
            }
            (Some(status), _) => Ok(status),
            (None, _) => vmm.end().map_err(failed()),
        };
    }
}

/// The daemon's sockets, to remove if the daemon is killed.
fn sockets(config: &Config) -> Vec<SocketFile> {
    let path = match &config.socket {
        Some(Socket::Path(path)) => Some(path),
        Some(Socket::Fd(_)) | None => None,
    };
    path.into_iter()
        .chain(&config.control)
        .chain(
            config
                .devices
                .iter()
                .filter_map(ConfiguredDevice::listens_at),
        )
        .filter_map(|path| SocketFile::of_another(path).ok())
        .collect()
}

fn system(action: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::System { action, source }
}
