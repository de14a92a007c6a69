//! The roles of threads, and the rights that a configuration needs.

use std::path::PathBuf;

use crate::ids::list_variants;

/// The role of a thread. Each role has a filter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Accepts VMMs, one after the other. It starts the threads of the next three roles, so its filter also allows
    /// their calls.
    Main,
    /// Handles the vhost-user messages of the connected VMM.
    VhostUser,
    /// Forwards the VMM's vhost-user messages to the previous role, and records them for a later process.
    Relay,
    /// Serves the request ring.
    Worker,
    /// Answers the control socket.
    Control,
    /// Registers shadow readers and handles their messages.
    Shadow,
    /// Delivers the faults of shadow readers to the guest.
    ShadowFaults,
    /// Delivers the faults of emulated devices to the guest.
    Faults,
    /// Moves the messages of one emulated device.
    VfioUser,
    /// Serves one exported device.
    Export,
    /// Serves the daemon's own device to the VMM over vfio-user.
    VirtioPci,
    /// Serves the request ring of that device.
    PciWorker,
    /// Resets the buses of exported devices.
    Resets,
    /// Stops the daemon in order when a signal comes.
    Signals,
    /// Checks that other threads make progress.
    Watchdog,
    /// Listens for resets of the VM at the QMP socket of the VMM.
    Qmp,
    /// Connects to sockets of other processes. It reads nothing that another process sends.
    Connector,
    /// Writes the file with metrics. It reads nothing that another process sends.
    MetricsFile,
    /// Closes descriptors that the VMM has chosen.
    Closer,
    /// Takes the open files of devices over from the VMM, through the helper.
    VmmDevices,
}

list_variants!(
    Role:
    Main, VhostUser, Relay, Worker, Control, Shadow, ShadowFaults, Faults, VfioUser, Export, Resets,
    VirtioPci, PciWorker, Signals, Watchdog, Qmp, Connector,
    MetricsFile, Closer, VmmDevices,
);

impl Role {
    /// Whether the main thread starts threads of this role after it is confined.
    pub(super) const fn is_child_of_main(self) -> bool {
        matches!(self, Self::VhostUser | Self::Relay | Self::Worker)
    }

    /// Whether a thread of this role starts others after it is confined. The new threads inherit its filter and
    /// add the filter of their own role.
    pub(super) const fn starts_threads(self, needs: &Needs) -> bool {
        match self {
            Self::Main => true,
            Self::Control => needs.plugging.is_some(),
            Self::VhostUser
            | Self::Relay
            | Self::Worker
            | Self::Shadow
            | Self::ShadowFaults
            | Self::Faults
            | Self::VfioUser
            | Self::Export
            | Self::VirtioPci
            | Self::PciWorker
            | Self::Resets
            | Self::Signals
            | Self::Watchdog
            | Self::Qmp
            | Self::Connector
            | Self::MetricsFile
            | Self::Closer
            | Self::VmmDevices => false,
        }
    }

    /// The name of a thread of this role, as in the kernel's log and in `ps`. The main thread has the name of the
    /// program there, and the vhost-user-backend crate names those of `VhostUser` and `Worker`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::VhostUser => "vhost-user",
            Self::Relay => "relay",
            Self::Worker => "vring_worker",
            Self::Control => "control",
            Self::Shadow => "shadow",
            Self::ShadowFaults => "shadow-faults",
            Self::Faults => "faults",
            Self::VfioUser => "vfio-user",
            Self::Export => "export",
            Self::VirtioPci => "virtio-pci",
            Self::PciWorker => "pci-worker",
            Self::Resets => "resets",
            Self::Signals => "signals",
            Self::Watchdog => "watchdog",
            Self::Qmp => "qmp",
            Self::Connector => "connector",
            Self::MetricsFile => "metrics-file",
            Self::Closer => "closer",
            Self::VmmDevices => "vmm-devices",
        }
    }
}

/// The rights that threads need because of the configuration, in addition to those that they always need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Numbers of the ioctls that program the host's IOMMU; empty without passthrough endpoints.
    pub iommu_ioctls: Vec<u32>,
    /// Numbers of the ioctls of exported devices; empty without such devices.
    pub device_ioctls: Vec<u32>,
    /// Numbers of the ioctls that reset the buses of exported devices; empty without such devices.
    pub reset_ioctls: Vec<u32>,
    /// The daemon connects to the QMP socket of the VMM.
    pub qmp: bool,
    /// There are emulated endpoints. The daemon may connect to their servers at any time.
    pub emulated: bool,
    /// The worker gives itself a realtime priority.
    pub realtime: bool,
    /// The VMM's connection is relayed: another process keeps descriptors for the next daemon, or the devices come from the
    /// VMM.
    pub relay: bool,
    /// The devices come from the VMM: the daemon connects to the helper that takes them out of its process.
    pub vmm_devices: bool,
    /// Another process keeps descriptors for the next daemon: so it does those of vfio-user clients.
    pub kept_clients: bool,
    /// There are shadow endpoints. The daemon may have to kill their readers.
    pub shadow: bool,
    /// The rights with which the thread `control` adds and removes endpoints while the VM runs: it opens their
    /// devices, and creates sockets and threads. `None` without `hotplug` in the configuration.
    pub plugging: Option<Plugging>,
    /// Sockets get a configured mode or group, also those of added endpoints.
    pub socket_rights: bool,
    /// The folder in which the thread `metrics-file` writes its file.
    pub textfile_folder: Option<PathBuf>,
    /// The folders of the sockets. The daemon removes their files at its end.
    pub socket_folders: Vec<PathBuf>,
}

impl Needs {
    /// Whether the daemon connects to sockets of other processes while it serves.
    pub const fn connects(&self) -> bool {
        self.emulated || self.qmp || self.vmm_devices || self.plugging.is_some()
    }

    /// Whether the thread `connector` is needed: for these sockets, or for those of a relay.
    pub const fn has_connector(&self) -> bool {
        self.connects() || self.relay
    }
}

#[cfg(test)]
impl Needs {
    /// All needs except those that allow opening files.
    pub(super) fn all_without_files() -> Self {
        Self {
            iommu_ioctls: vec![0x3b71],
            device_ioctls: vec![0x3b6e],
            reset_ioctls: vec![0x3b6a, 0x3b71],
            qmp: true,
            emulated: true,
            realtime: true,
            relay: true,
            vmm_devices: true,
            kept_clients: true,
            shadow: true,
            plugging: None,
            socket_rights: true,
            textfile_folder: None,
            socket_folders: Vec::new(),
        }
    }
}

/// The rights with which endpoints are added. Their sockets can only be in the folders of other sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plugging {
    /// Numbers of the ioctls that open a device.
    pub ioctls: Vec<u32>,
    /// Device nodes and folders of nodes, which are opened for reading, writing and ioctls.
    pub nodes: Vec<PathBuf>,
    /// Folders of sysfs that are read to find devices.
    pub sysfs_folders: Vec<PathBuf>,
}
