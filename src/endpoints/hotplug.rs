//! Adds and removes endpoints while the VM runs. The code that checks the configuration file also checks an
//! added endpoint. Then the daemon opens its device, and last the core adds the endpoint.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use log::info;
use thiserror::Error;

use super::emulated::EmulatedDevices;
use super::exported::ExportedDevices;
use super::kind::{Plug, PlugError, PluggedDevice};
use super::kinds;
use crate::backends::vfio_user::Watch;
use crate::config::{Config, ConfigError};
use crate::device::Device;
use crate::export::{DeviceServer, ServerStatus};
use crate::faults::queue::FaultDelivery;
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::iommu::{AddError, Iommu, NewEndpoints, RemoveError};
use crate::locks::{Mutex, Rank};
use crate::process::socket::SocketFile;
use crate::topology::{NoSuchEndpoints, PciAddress, PciRange};

/// Why an endpoint was not added or removed. Nothing has changed.
#[derive(Debug, Error)]
pub enum HotplugError {
    /// The text does not describe an endpoint of this VM.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The VM has no such endpoints.
    #[error(transparent)]
    NoSuch(#[from] NoSuchEndpoints),
    /// The device cannot be plugged in or unplugged.
    #[error(transparent)]
    Device(#[from] PlugError),
    /// The core refuses to add the endpoint.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The core refuses to remove the endpoint.
    #[error(transparent)]
    Remove(#[from] RemoveError),
}

/// An endpoint that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its functions.
    pub range: PciRange,
    /// Whether the guest's VIOT table lists the functions: without it, the guest's driver does not know that
    /// the IOMMU translates for them.
    pub is_described: bool,
}

/// The open devices behind the endpoints. Adds and removes endpoints.
pub struct Hotplug {
    iommu: Arc<Mutex<Iommu>>,
    device: Arc<Device>,
    reporter: Arc<FaultReporter>,
    /// The configuration with all changes. Locked while an endpoint is added or removed.
    config: Mutex<Config>,
    /// Locked briefly; only `files` may be locked after it.
    parts: Mutex<OpenDevices>,
    files: Files,
}

/// The files of the devices' sockets.
pub type Files = Arc<Mutex<BTreeMap<PciAddress, Arc<SocketFile>>>>;

#[derive(Default)]
struct OpenDevices {
    watches: BTreeMap<PciAddress, Watch>,
    hosts: BTreeMap<EndpointId, String>,
    exports: BTreeMap<PciAddress, DeviceServer>,
    faults: Option<FaultDelivery>,
}

impl Hotplug {
    /// Hotplug for a VM with `config`, whose emulated devices are open already.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn new(
        config: &Config,
        iommu: Arc<Mutex<Iommu>>,
        device: Arc<Device>,
        reporter: Arc<FaultReporter>,
        emulated: EmulatedDevices,
    ) -> io::Result<Self> {
        let hosts = config.devices.passthrough.iter();
        let parts = OpenDevices {
            watches: emulated.watches.into_iter().collect(),
            hosts: hosts
                .map(|p| (p.endpoint.endpoint_id(), p.host.to_string()))
                .collect(),
            ..OpenDevices::default()
        };
        let hotplug = Self {
            iommu,
            device,
            reporter,
            config: Mutex::new(Rank::HotplugConfig, config.clone()),
            parts: Mutex::new(Rank::HotplugParts, parts),
            files: Arc::new(Mutex::new(
                Rank::SocketFiles,
                emulated.files.into_iter().collect(),
            )),
        };
        if !config.devices.emulated.is_empty() {
            hotplug.deliver_faults()?;
        }
        Ok(hotplug)
    }

    /// Takes over the exported devices of the start.
    pub fn adopt(&self, exports: ExportedDevices) {
        self.parts.lock().exports.extend(exports.servers);
        self.files.lock().extend(exports.files);
    }

    /// Ends all exports, which releases their devices.
    pub fn end_exports(&self) {
        let exports = std::mem::take(&mut self.parts.lock().exports);
        drop(exports);
    }

    /// The [`Watch`] of each emulated device.
    pub fn watches(&self) -> Vec<Watch> {
        self.parts.lock().watches.values().cloned().collect()
    }

    /// The host's names of the passthrough devices, by endpoint.
    pub fn hosts(&self) -> BTreeMap<EndpointId, String> {
        self.parts.lock().hosts.clone()
    }

    /// The status of the server of each exported device.
    pub fn export_states(&self) -> Vec<(EndpointId, Arc<ServerStatus>)> {
        let parts = self.parts.lock();
        let exports = parts.exports.iter();
        exports
            .map(|(at, server)| (at.endpoint_id(), server.status()))
            .collect()
    }

    /// The files of the devices' sockets. Hotplug changes the shared map.
    pub fn files(&self) -> Files {
        self.files.clone()
    }

    /// Adds the endpoint that `text` describes, see [`Config::with_endpoint`].
    ///
    /// # Errors
    /// See [`HotplugError`].
    pub fn add(&self, text: &str) -> Result<Added, HotplugError> {
        let mut config = self.config.lock();
        let (with, range) = config.with_endpoint(text)?;
        let mut opened = self.open(&with, range)?;
        let info = with.topology.endpoint(range.first().endpoint_id());
        let (group, reserved) = opened.facts.take().unwrap_or_else(|| {
            let group = info.and_then(|info| with.topology.group_name(info.group?));
            let reserved = info.map(|info| info.reserved.clone());
            (group.cloned(), reserved.unwrap_or_default())
        });
        let new = NewEndpoints {
            range,
            group: group.as_ref(),
            reserved,
            room: self.device.probe_room(),
        };
        // If the core refuses the backend, the error returns it, so that it is dropped after the core is unlocked:
        // dropping it waits for its threads.
        let added = self.iommu.lock().add_endpoints(new, opened.backend.take());
        added.map_err(|(cause, _)| cause)?;
        {
            let mut parts = self.parts.lock();
            let at = range.first();
            parts.watches.extend(opened.watch.map(|watch| (at, watch)));
            parts
                .exports
                .extend(opened.export.map(|server| (at, server)));
            let host = opened.host.map(|host| (at.endpoint_id(), host));
            parts.hosts.extend(host);
        }
        let file = opened.file.map(|file| (range.first(), file));
        self.files.lock().extend(file);
        let is_described = with.topology.is_expected(range);
        *config = with;
        info!("endpoint {range} is added");
        Ok(Added {
            range,
            is_described,
        })
    }

    /// Removes endpoints. When this returns, their devices reach no memory.
    ///
    /// # Errors
    /// See [`HotplugError`].
    pub fn remove(&self, range: PciRange) -> Result<(), HotplugError> {
        let mut config = self.config.lock();
        let without = config.without_endpoints(range)?;
        let devices = config.devices.iter();
        for device in devices.filter(|device| range.contains(device.endpoint())) {
            kinds::of(device.kind()).check_unplug(&config)?;
        }
        let unused = self.iommu.lock().remove_endpoints(range)?;
        *config = without;
        let (mut watches, mut exports, mut files) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut parts = self.parts.lock();
            let inside = |at: &PciAddress| range.contains(*at);
            watches.extend(take_if(&mut parts.watches, inside));
            exports.extend(take_if(&mut parts.exports, inside));
            let mut hosts = std::mem::take(&mut parts.hosts);
            hosts.retain(|id, _| !range.contains(PciAddress::from_endpoint_id(*id)));
            parts.hosts = hosts;
            files.extend(take_if(&mut self.files.lock(), inside));
        }
        // Drops wait for threads, so `parts` must not be locked here. The lock of `config` excludes other changes.
        drop((exports, unused, watches, files));
        info!("endpoint {range} is removed");
        Ok(())
    }

    /// Opens the device of an endpoint, if it has one.
    fn open(&self, config: &Config, range: PciRange) -> Result<PluggedDevice, PlugError> {
        let endpoint = range.first();
        let Some(kind) = config.devices.kind_of(endpoint) else {
            return Ok(PluggedDevice::default());
        };
        let opened = kinds::of(kind).plug(&Plug {
            config,
            endpoint,
            faults: &self.reporter,
        })?;
        if opened.watch.is_some() {
            self.deliver_faults()?;
        }
        Ok(opened)
    }

    /// Starts the thread that reports the faults of emulated devices to the guest, unless it runs.
    fn deliver_faults(&self) -> io::Result<()> {
        let mut parts = self.parts.lock();
        if parts.faults.is_none() {
            let device = self.device.clone();
            let delivery = self
                .reporter
                .start(move |fault| device.report_fault(fault))?;
            parts.faults = Some(delivery);
        }
        Ok(())
    }
}

/// Takes out the values whose key is `wanted`.
fn take_if<T>(map: &mut BTreeMap<PciAddress, T>, wanted: impl Fn(&PciAddress) -> bool) -> Vec<T> {
    let keys: Vec<_> = map.keys().copied().filter(|at| wanted(at)).collect();
    keys.iter().filter_map(|at| map.remove(at)).collect()
}
