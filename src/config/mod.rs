//! One VM's configuration: checked values, made once from a file, from options, or from both.
//!
//! `draft` holds each key as it was written. The file of the key's subject (`limits`, `translation`,
//! `topology`, one file for each kind of device) checks it, and the result goes into [`Config`]. `checker`
//! collects the problems of all checks.

mod addition;
mod assemble;
mod bounds;
mod changes;
mod checker;
mod devices;
mod draft;
mod emulated;
mod error;
mod exported;
mod kind;
mod limits;
mod load;
mod machine;
mod named;
mod operator;
mod passthrough;
mod ports;
mod readers;
mod shadow;
mod slots;
mod summary;
mod text;
mod topology;
mod translation;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::address::PageMask;
use crate::topology::{Ports, Topology};

pub use bounds::{
    MAX_ARENA, MAX_BATCH, MAX_DEADLINE_MS, MAX_DOMAINS, MAX_FAULT_RATE, MAX_FILE, MAX_INTERVAL_S,
    MAX_MEMORY, MAX_NAME, MAX_POLL_US, MAX_PRIORITY, MAX_PROBLEMS, MAX_READERS, MAX_RESERVED_BUSES,
    MAX_SOCKET_PATH, MAX_USERS, MAX_WIDTH, MAX_WINDOWS, MIN_ARENA, MIN_DEADLINE_MS, MIN_INTERVAL_S,
    MIN_WIDTH,
};
pub use changes::{
    AddedEndpoint, ChangedConfig, Contradiction, EndpointChanges, MAX_CHANGES, TooManyChanges,
};
pub use devices::DeviceLists;
pub use emulated::{Emulated, ServerDeadlines, ServerIsolation};
pub use error::{ConfigError, Location, Problem, ProblemKind};
pub use exported::{Exported, RegisterAccess};
pub use kind::{ConfiguredDevice, DeviceKind};
pub use machine::Machine;
pub use named::{NamedDevice, is_device_id};
pub use operator::{MetricsOutput, SocketAccess, Textfile};
pub(crate) use passthrough::default_helper;
pub use passthrough::{Descriptors, HostIommu, Passthrough, Pin, VfioFrom};
pub use readers::Readers;
pub use shadow::ShadowListener;
pub use slots::{SlotProblem, function_zero};
pub use summary::Summary;

/// Where the VMM reaches the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// The daemon makes a listening socket at this path.
    Path(PathBuf),
    /// The daemon inherits a listening socket with this number.
    Fd(RawFd),
}

/// How a VMM reaches the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmmTransport {
    /// The VMM is a vhost-user frontend, and makes the PCI device itself.
    #[default]
    VhostUser,
    /// The VMM is a vfio-user client: the daemon serves the whole virtio-pci device.
    VirtioPci,
}

/// The settings of one daemon. All values are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The name of the VM in messages: 1 to [`MAX_NAME`] printable ASCII characters.
    pub name: String,
    /// Where the VMM connects. Always present in a configuration made from [`RunArgs`](crate::args::RunArgs).
    pub socket: Option<Socket>,
    /// The protocol that the VMM speaks there.
    pub transport: VmmTransport,
    /// The path of the control socket, if one is wanted.
    pub control: Option<PathBuf>,
    /// The VMM's QMP socket, if the daemon connects to it to receive reset events.
    pub qmp: Option<PathBuf>,
    /// The access rights of the sockets that the daemon makes for VMMs and device processes: `socket`, and
    /// those of the endpoints.
    pub socket_access: SocketAccess,
    /// The access rights of the control socket.
    pub control_access: SocketAccess,
    /// Where the daemon writes metrics.
    pub metrics: MetricsOutput,
    /// Bits of an I/O virtual address: `32..=57`.
    pub address_width: u8,
    /// The page sizes offered to the guest: the granule, and those of 2 MiB and 1 GiB that are larger.
    pub page_mask: PageMask,
    /// Whether endpoints without a domain are in bypass mode when the VM starts.
    pub bypass_at_boot: bool,
    /// The number of domains that can exist at once; their IDs are `0..=max_domains - 1`.
    pub max_domains: u32,
    /// The most requests that the worker takes off the ring at a time: `1..=`[`MAX_BATCH`].
    pub max_batch: usize,
    /// The most faults of one endpoint that the daemon reports to the guest in a second, after a burst
    /// of 64: `1..=`[`MAX_FAULT_RATE`].
    pub fault_rate: u32,
    /// The longest time that the worker polls an empty request ring before it sleeps: 0 to
    /// [`MAX_POLL_US`] microseconds.
    pub longest_poll: Duration,
    /// The realtime priority of the worker: `1..=`[`MAX_PRIORITY`]. `None` means ordinary scheduling.
    pub realtime_priority: Option<u8>,
    /// The size of guest RAM in bytes, if known.
    pub memory: Option<u64>,
    /// The most bytes that the page tables may take: a multiple of 4 KiB.
    pub arena_limit: u64,
    /// The IOMMU's own address, the endpoints, their groups and reserved regions.
    pub topology: Topology,
    /// The ports behind which endpoints are, or may come.
    pub ports: Ports,
    /// The devices behind the endpoints.
    pub devices: DeviceLists,
    /// The endpoints that name the device which must be at their address. There are none without `qmp`.
    pub named: Vec<NamedDevice>,
    /// Which users' shadow readers may register, how many, and how long the daemon waits for them.
    pub readers: Readers,
    /// How the daemon programs the host's IOMMU for passthrough devices.
    pub host_iommu: HostIommu,
    /// The machine that the VMM emulates.
    pub machine: Machine,
    /// The part of guest memory that the daemon pins for passthrough devices.
    pub pin: Pin,
    /// Where the open files of passthrough devices come from.
    pub vfio_from: VfioFrom,
    /// The socket of the helper that takes them out of the VMM's process.
    pub vfio_helper: PathBuf,
    /// Inherited descriptors of passthrough devices; empty in a configuration made from a file alone.
    pub descriptors: Descriptors,
}

/// The longest time that a daemon without passthrough devices takes until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);
/// The additional time for each passthrough device: the daemon opens the device, and some devices take seconds to reset.
const START_LIMIT_PER_DEVICE: Duration = Duration::from_secs(5);

impl Config {
    /// How long the daemon may take from its start until it listens, on a host that does nothing else.
    pub fn start_limit(&self) -> Duration {
        let devices = u32::try_from(self.devices.passthrough.len()).unwrap_or(u32::MAX);
        START_LIMIT.saturating_add(START_LIMIT_PER_DEVICE.saturating_mul(devices))
    }
}

impl Config {
    /// Whether the open files of passthrough devices come from the VMM, once it runs. Inherited descriptors take precedence.
    pub fn takes_vmm_files(&self) -> bool {
        self.vfio_from == VfioFrom::Vmm
            && self.descriptors.iommufd.is_none()
            && self
                .devices
                .passthrough
                .iter()
                .any(|device| self.devices.exported_at(device.endpoint).is_none())
    }

    /// Whether the VMM's vfio-user clients may be of the kind that takes no refusal for an answer, as cloud-hypervisor's.
    /// Only such a VMM needs the IOMMU over vfio-user.
    pub fn answers_all_accesses(&self) -> bool {
        self.transport == VmmTransport::VirtioPci
    }
}

#[cfg(test)]
mod tests;
