//! The parts of the daemon that answers are about.

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

/// The parts of the daemon that answers are about.
#[derive(Clone)]
pub struct Subjects {
    /// The name of the VM.
    pub name: String,
    /// The core.
    pub iommu: Arc<Mutex<Iommu>>,
    /// The device in front of it.
    pub device: Arc<Device>,
    /// The counters of the device.
    pub metrics: Arc<Metrics>,
    /// The registry of shadow readers; `None` without shadow endpoints.
    pub readers: Option<Arc<Registry>>,
    /// The devices of passthrough, emulated and exported endpoints, which hotplug changes.
    pub hotplug: Arc<Hotplug>,
    /// Limits of the configuration.
    pub limits: SetLimits,
    /// Counters of the clients of these sockets.
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

/// A snapshot of the devices that the VMM does not emulate itself.
pub(super) struct ExternalDevices {
    /// The name on the host of each passthrough endpoint.
    pub hosts: BTreeMap<EndpointId, String>,
    /// Emulated devices.
    pub emulated: Vec<Watch>,
    /// Exported devices.
    pub exports: Vec<(EndpointId, Arc<ServerStatus>)>,
}

/// Limits of the configuration that no other subject knows.
#[derive(Clone, Copy, Debug)]
pub struct SetLimits {
    /// The most requests the worker takes off the ring at a time.
    pub batch: usize,
    /// Faults of one endpoint that are passed on to the guest in a second.
    pub fault_rate: u32,
}

/// Counters of clients.
#[derive(Debug, Default)]
pub struct ClientCounters {
    /// Clients that got an answer.
    pub answered: Counter,
    /// Clients that got no answer: they sent no request in time, did not read, or hung up.
    pub cut_off: Counter,
    /// Failed attempts to write the file with metrics.
    pub unwritten: Counter,
}
