//! What the process as a whole does, and which threads do it.

use std::path::PathBuf;

use crate::ids::list_variants;

/// A kind of thread. Each has a filter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Accepts one VMM after the other. The two below are its children, so that it may do what
    /// they do.
    Main,
    /// Hears the VMM that is connected.
    VhostUser,
    /// Serves the request ring.
    Worker,
    /// Answers the control socket.
    Control,
    /// Lets readers of the page tables in and hears them.
    Shadow,
    /// Passes their faults on to the guest.
    ShadowFaults,
    /// Passes on to the guest what emulated devices are refused.
    Faults,
    /// Moves the messages of one emulated device.
    VfioUser,
    /// Serves one exported device of the host.
    Export,
    /// Turns signals into an orderly end.
    Signals,
    /// Asks the others whether they live.
    Watchdog,
    /// Hears of the VMM that it has reset the VM.
    Qmp,
}

list_variants!(
    Role:
    Main, VhostUser, Worker, Control, Shadow, ShadowFaults, Faults, VfioUser, Export, Signals,
    Watchdog, Qmp,
);

impl Role {
    /// Whether the main thread has such a thread made once it is confined itself.
    pub(super) const fn is_child_of_main(self) -> bool {
        matches!(self, Self::VhostUser | Self::Worker)
    }

    /// Whether such a thread makes others once it is confined itself. Those are confined to what it
    /// may do and to what they may do themselves.
    pub(super) const fn makes_threads(self, needs: &Needs) -> bool {
        match self {
            Self::Main => true,
            Self::Control => needs.plugging.is_some(),
            Self::VhostUser
            | Self::Worker
            | Self::Shadow
            | Self::ShadowFaults
            | Self::Faults
            | Self::VfioUser
            | Self::Export
            | Self::Signals
            | Self::Watchdog
            | Self::Qmp => false,
        }
    }

    /// The name of such a thread, as the kernel's log and `ps` have it. The main thread has the
    /// program's; the two after it get theirs from the vhost-user-backend crate.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::VhostUser => "vhost-user",
            Self::Worker => "vring_worker",
            Self::Control => "control",
            Self::Shadow => "shadow",
            Self::ShadowFaults => "shadow-faults",
            Self::Faults => "faults",
            Self::VfioUser => "vfio-user",
            Self::Export => "export",
            Self::Signals => "signals",
            Self::Watchdog => "watchdog",
            Self::Qmp => "qmp",
        }
    }
}

/// What one process's configuration asks of its threads, beyond what all of them do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Numbers of the ioctls that program the host's IOMMU; empty without devices of the host.
    pub iommu_ioctls: Vec<u32>,
    /// Numbers of the ioctls of devices that are exported; empty without such devices.
    pub device_ioctls: Vec<u32>,
    /// The VMM is listened to at a socket of its own.
    pub qmp: bool,
    /// There are devices that other processes emulate, which are connected to at any time.
    pub emulated: bool,
    /// The worker gives itself a realtime priority.
    pub realtime: bool,
    /// There are readers of the page tables, which may have to be killed.
    pub shadow: bool,
    /// Where endpoints are added and removed while the VM runs: what the thread `control` does for
    /// that, which opens their devices and makes sockets and threads.
    pub plugging: Option<Plugging>,
    /// The folder in which the thread `control` makes a file with metrics, anew each time.
    pub textfile_folder: Option<PathBuf>,
    /// Folders in which sockets were made, which are removed at the end.
    pub socket_folders: Vec<PathBuf>,
}

#[cfg(test)]
impl Needs {
    /// Everything but what lets files be opened.
    pub(super) fn most() -> Self {
        Self {
            iommu_ioctls: vec![0x3b71],
            device_ioctls: vec![0x3b6e],
            qmp: true,
            emulated: true,
            realtime: true,
            shadow: true,
            plugging: None,
            textfile_folder: None,
            socket_folders: Vec::new(),
        }
    }
}

/// What adding endpoints takes. Their sockets can be in the folders of the others alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plugging {
    /// Numbers of the ioctls by which devices are opened.
    pub ioctls: Vec<u32>,
    /// Nodes of devices, and folders of them, that are opened to be read, written and controlled.
    pub nodes: Vec<PathBuf>,
    /// Folders that are read, to learn what devices there are.
    pub facts: Vec<PathBuf>,
}
