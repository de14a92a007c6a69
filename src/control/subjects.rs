//! What the answers are made from.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::backends::vfio_user::Watch;
use crate::device::Device;
use crate::endpoints::hotplug::Hotplug;
use crate::export::ServerStatus;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::metrics::{Counter, Metrics};
use crate::shadow::Registry;

/// What the answers are made from.
#[derive(Clone)]
pub struct Subjects {
    /// What the VM is called.
    pub name: String,
    /// The core.
    pub iommu: Arc<Mutex<Iommu>>,
    /// The device in front of it.
    pub device: Arc<Device>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Processes that follow the page tables, where there are such endpoints.
    pub readers: Option<Arc<Registry>>,
    /// The endpoints' devices, which may come and go.
    pub hotplug: Arc<Hotplug>,
    /// Limits that the configuration sets.
    pub limits: SetLimits,
    /// What clients of these sockets have done.
    pub clients: Arc<ClientCounters>,
}

impl Subjects {
    pub(super) fn devices(&self) -> ExternalDevices {
        ExternalDevices {
            hosts: self.hotplug.hosts(),
            emulated: self.hotplug.watches(),
            exports: self.hotplug.export_states(),
        }
    }
}

/// Devices that are not the VMM's own, as they are at one time.
pub(super) struct ExternalDevices {
    /// The host's names of endpoints that are its devices.
    pub hosts: BTreeMap<EndpointId, String>,
    /// Devices that other processes emulate.
    pub emulated: Vec<Watch>,
    /// Devices of the host that are offered to the VMM over vfio-user.
    pub exports: Vec<(EndpointId, Arc<ServerStatus>)>,
}

/// Limits that are known to nobody else here.
#[derive(Clone, Copy, Debug)]
pub struct SetLimits {
    /// Requests taken off the ring at a time.
    pub batch: usize,
    /// Faults of one endpoint that the guest is told of in a second.
    pub fault_rate: u32,
}

/// What has become of clients.
#[derive(Debug, Default)]
pub struct ClientCounters {
    /// Clients that got an answer.
    pub answered: Counter,
    /// Clients that did not: they were silent, did not read, or hung up.
    pub cut_off: Counter,
    /// Times the metrics could not be written to their file.
    pub unwritten: Counter,
}
