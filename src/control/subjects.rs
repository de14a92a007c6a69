//! The parts of the daemon from which the control thread makes its answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::places::PlaceReport;
use crate::device::Device;
use crate::endpoints::hotplug::Hotplug;
use crate::endpoints::status::DeviceReport;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::metrics::{AdoptionCounters, Counter, Metrics};
use crate::process::handover::Handover;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::shadow::Registry;

/// The parts of the daemon from which the control thread makes its answers.
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
    /// The counters of devices that come from the VMM; `None` if none do.
    pub adoption: Option<Arc<AdoptionCounters>>,
    /// The devices of passthrough, emulated and exported endpoints, which hotplug changes.
    pub hotplug: Arc<Hotplug>,
    /// Whether the guest has the devices behind ports where its table has them; `None` if nothing is compared.
    pub places: Option<Arc<PlaceReport>>,
    /// What this process has taken over.
    pub life: Arc<Life>,
    /// What the program needs to know that is to take over from this process now.
    pub handover: Arc<dyn Fn() -> Handover + Send + Sync>,
    /// The process that keeps descriptors for the next one.
    pub keeper: Arc<Keeper>,
    /// Limits of the configuration.
    pub limits: SetLimits,
    /// Counters of the clients of these sockets.
    pub clients: Arc<ClientCounters>,
}

impl Subjects {
    /// The reports of the devices that the VMM does not emulate itself, by endpoint.
    pub(super) fn devices(&self) -> DeviceReports {
        self.hotplug.reports()
    }
}

/// The reports of devices, by endpoint.
pub(super) type DeviceReports = BTreeMap<EndpointId, DeviceReport>;

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
