//! One VM's configuration: checked values, made once, from a file, from options, or from both.

mod addition;
mod bounds;
mod checker;
mod devices;
mod draft;
mod emulated;
mod error;
mod exported;
mod limits;
mod load;
mod operator;
mod passthrough;
mod readers;
mod shadow;
mod summary;
mod text;
mod topology;
mod translation;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::address::PageMask;
use crate::topology::Topology;

pub use bounds::{
    MAX_ARENA, MAX_BATCH, MAX_DEADLINE_MS, MAX_DOMAINS, MAX_FAULT_RATE, MAX_FILE, MAX_INTERVAL_S,
    MAX_MEMORY, MAX_NAME, MAX_POLL_US, MAX_PRIORITY, MAX_PROBLEMS, MAX_READERS, MAX_SOCKET_PATH,
    MAX_USERS, MAX_WIDTH, MIN_ARENA, MIN_DEADLINE_MS, MIN_INTERVAL_S, MIN_WIDTH,
};
pub use devices::{ConfiguredDevice, DeviceKind, DeviceLists};
pub use emulated::{Emulated, ServerIsolation};
pub use error::{ConfigError, Location, Problem, ProblemKind};
pub use exported::Exported;
pub use operator::{MetricsOutput, SocketAccess, Textfile};
pub use passthrough::{Descriptors, HostIommu, Passthrough, Pin};
pub use readers::Readers;
pub use shadow::ShadowListener;
pub use summary::Summary;

/// Where the frontend (the VMM) reaches the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A listening socket the daemon makes at this path.
    Path(PathBuf),
    /// A listening socket the daemon inherits.
    Fd(RawFd),
}

/// Everything that is settled before the daemon starts. All values are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the VM is called in messages: 1 to [`MAX_NAME`] printable ASCII characters.
    pub name: String,
    /// Where the frontend connects. Always there in a configuration made from [`RunArgs`].
    pub socket: Option<Socket>,
    /// The path of the control socket, if there is to be one.
    pub control: Option<PathBuf>,
    /// Where the VMM listens for QMP, if the daemon is to hear of resets there.
    pub qmp: Option<PathBuf>,
    /// Who may connect there.
    pub control_access: SocketAccess,
    /// Where metrics go.
    pub metrics: MetricsOutput,
    /// Bits of an I/O virtual address: `32..=57`.
    pub address_width: u8,
    /// The page sizes offered to the guest: the granule, and 2 MiB and 1 GiB where not smaller.
    pub page_mask: PageMask,
    /// Whether endpoints that no domain holds pass untranslated when the VM starts.
    pub bypass_at_boot: bool,
    /// The number of domains that can live at once; their IDs are `0..max_domains`.
    pub max_domains: u32,
    /// The most requests the worker takes off the ring at a time: `1..=`[`MAX_BATCH`].
    pub max_batch: usize,
    /// The most faults of one endpoint that the guest is told of in a second, once 64 have been:
    /// `1..=`[`MAX_FAULT_RATE`].
    pub fault_rate: u32,
    /// How long the worker looks at an empty request ring at most before it sleeps:
    /// zero to [`MAX_POLL_US`] microseconds.
    pub longest_poll: Duration,
    /// The realtime priority of the worker: `1..=`[`MAX_PRIORITY`]. Ordinary scheduling without.
    pub realtime_priority: Option<u8>,
    /// The size of guest RAM in bytes, if known.
    pub memory: Option<u64>,
    /// The most bytes the page tables may take: a multiple of 4 KiB.
    pub arena_limit: u64,
    /// The IOMMU's own address, the endpoints, their groups and reserved regions.
    pub topology: Topology,
    /// The devices behind the endpoints.
    pub devices: DeviceLists,
    /// What is asked of the processes that register for those.
    pub readers: Readers,
    /// How the host IOMMU is programmed for devices of the host.
    pub host_iommu: HostIommu,
    /// Which of the guest's memory is pinned for them.
    pub pin: Pin,
    /// What was inherited for them; empty in a configuration made from a file alone.
    pub descriptors: Descriptors,
}

#[cfg(test)]
mod tests;
