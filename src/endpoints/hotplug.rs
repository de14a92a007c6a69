//! Endpoints that an operator adds and removes while the VM runs: checked as those of the file are,
//! their devices opened, and only then put behind the IOMMU.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use log::info;
use thiserror::Error;

use crate::backends::DmaBackend;
use crate::backends::vfio_user::Watch;
use crate::config::{Config, ConfigError, Descriptors};
use crate::device::Device;
use crate::endpoints::emulated::EmulatedSide;
use crate::endpoints::exported::ExportSide;
use crate::endpoints::passthrough::{HostSide, HostSideError};
use crate::export::{DeviceServer, ServerStatus};
use crate::faults::queue::FaultDelivery;
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::iommu::{AddError, Iommu, NewEndpoints, RemoveError};
use crate::locks::{Mutex, Rank};
use crate::process::socket::SocketFile;
use crate::topology::{GroupName, NoSuchEndpoints, PciAddress, PciRange, ReservedRegions};

/// Why an endpoint is not added or removed. Nothing has changed then.
#[derive(Debug, Error)]
pub enum HotplugError {
    /// What was given does not make an endpoint of this VM.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There are no such endpoints.
    #[error(transparent)]
    NoSuch(#[from] NoSuchEndpoints),
    /// Readers cannot come and go with their endpoint.
    #[error(
        "endpoints with `shadow` are there from the start to the end of the daemon; put it into the \
         file, or take it out, and start the VM anew"
    )]
    Shadow,
    /// The VMM cannot be given the descriptor that it would have to share.
    #[error(
        "a device of the host can be added to a running VM only where the daemon has it to itself; \
         give `export = \"PATH\"` beside `vfio` and plug it in as a vfio-user device"
    )]
    Shared,
    /// The sandbox is made for what the file says.
    #[error(
        "devices are opened and let go while the VM runs only where the file has `hotplug`; give the \
         ranges that endpoints are plugged into there, and start the VM anew"
    )]
    Unprepared,
    /// A device of the host cannot be used.
    #[error(transparent)]
    Host(#[from] HostSideError),
    /// A socket cannot be made, or a thread started.
    #[error("{0}")]
    System(#[from] io::Error),
    /// The IOMMU does not take it.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The IOMMU does not let it go.
    #[error(transparent)]
    Remove(#[from] RemoveError),
}

/// An endpoint that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its functions.
    pub range: PciRange,
    /// The guest's table has them: its driver finds the IOMMU in front of them.
    pub is_described: bool,
}

/// The endpoints' devices as they are now.
pub struct Hotplug {
    iommu: Arc<Mutex<Iommu>>,
    device: Arc<Device>,
    reporter: Arc<FaultReporter>,
    /// As if it had just been read. Held while an endpoint is added or removed.
    config: Mutex<Config>,
    /// Held for a moment only, and last.
    parts: Mutex<Parts>,
    files: Files,
}

/// The files of the devices' sockets.
pub type Files = Arc<Mutex<BTreeMap<PciAddress, Arc<SocketFile>>>>;

#[derive(Default)]
struct Parts {
    watches: BTreeMap<PciAddress, Watch>,
    hosts: BTreeMap<EndpointId, String>,
    exports: BTreeMap<PciAddress, DeviceServer>,
    faults: Option<FaultDelivery>,
}

/// What an endpoint's device has brought along, until it is known whether it stays.
#[derive(Default)]
struct Opened {
    backend: Option<Box<dyn DmaBackend>>,
    watches: Vec<(PciAddress, Watch)>,
    exports: Vec<(PciAddress, DeviceServer)>,
    files: Vec<(PciAddress, Arc<SocketFile>)>,
    host: Option<String>,
    /// Where the host has a say in them.
    facts: Option<(Option<GroupName>, ReservedRegions)>,
}

impl Hotplug {
    /// The devices of `config`, of which those that other processes emulate are open already.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn new(
        config: &Config,
        iommu: Arc<Mutex<Iommu>>,
        device: Arc<Device>,
        reporter: Arc<FaultReporter>,
        emulated: EmulatedSide,
    ) -> io::Result<Self> {
        let hosts = config.devices.passthrough.iter();
        let parts = Parts {
            watches: emulated.watches.into_iter().collect(),
            hosts: hosts
                .map(|p| (p.endpoint.endpoint_id(), p.host.to_string()))
                .collect(),
            ..Parts::default()
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

    /// Takes over what was exported at the start.
    pub fn adopt(&self, exports: ExportSide) {
        self.parts.lock().exports.extend(exports.servers);
        self.files.lock().extend(exports.files);
    }

    /// Ends the exports, which releases their devices.
    pub fn end_exports(&self) {
        let exports = std::mem::take(&mut self.parts.lock().exports);
        drop(exports);
    }

    /// Looks at the devices that other processes emulate.
    pub fn watches(&self) -> Vec<Watch> {
        self.parts.lock().watches.values().cloned().collect()
    }

    /// The host's names of endpoints that are its devices.
    pub fn hosts(&self) -> BTreeMap<EndpointId, String> {
        self.parts.lock().hosts.clone()
    }

    /// How the devices are doing that are offered to the VMM.
    pub fn export_states(&self) -> Vec<(EndpointId, Arc<ServerStatus>)> {
        let parts = self.parts.lock();
        let exports = parts.exports.iter();
        exports
            .map(|(at, server)| (at.endpoint_id(), server.status()))
            .collect()
    }

    /// The files of the devices' sockets, now and later.
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
        // A backend that is given back ends after the lock was let go.
        let added = self.iommu.lock().add_endpoints(new, opened.backend.take());
        added.map_err(|(cause, _)| cause)?;
        {
            let mut parts = self.parts.lock();
            parts.watches.extend(opened.watches);
            parts.exports.extend(opened.exports);
            let id = range.first().endpoint_id();
            parts.hosts.extend(opened.host.map(|host| (id, host)));
        }
        self.files.lock().extend(opened.files);
        let is_described = with.topology.is_expected(range);
        *config = with;
        info!("endpoint {range} is added");
        Ok(Added {
            range,
            is_described,
        })
    }

    /// Removes endpoints. When this returns they reach nothing any more.
    ///
    /// # Errors
    /// See [`HotplugError`].
    pub fn remove(&self, range: PciRange) -> Result<(), HotplugError> {
        let mut config = self.config.lock();
        let without = config.without_endpoints(range)?;
        if without.devices.shadow.len() < config.devices.shadow.len() {
            return Err(HotplugError::Shadow);
        }
        if without.devices.emulated.len() < config.devices.emulated.len()
            || without.devices.passthrough.len() < config.devices.passthrough.len()
        {
            is_prepared(&config)?;
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
        // Threads are waited for with nothing locked but what keeps other additions out.
        drop((exports, unused, watches, files));
        info!("endpoint {range} is removed");
        Ok(())
    }

    /// Opens the device of an endpoint, if it has one.
    fn open(&self, with: &Config, range: PciRange) -> Result<Opened, HotplugError> {
        let first = range.first();
        if with.devices.shadow.iter().any(|s| s.endpoint == first) {
            return Err(HotplugError::Shadow);
        }
        if let Some(device) = with.devices.emulated.iter().find(|e| e.endpoint == first) {
            is_prepared(with)?;
            let devices = std::slice::from_ref(device);
            let side = EmulatedSide::open(devices, &with.topology, &self.reporter)?;
            self.deliver_faults()?;
            return Ok(Opened {
                backend: side.backends.into_iter().next().map(|(backend, _)| backend),
                watches: side.watches,
                files: side.files,
                ..Opened::default()
            });
        }
        let Some(&passthrough) = with
            .devices
            .passthrough
            .iter()
            .find(|p| p.endpoint == first)
        else {
            return Ok(Opened::default());
        };
        if with.devices.exported_at(first).is_none() {
            return Err(HotplugError::Shared);
        }
        is_prepared(with)?;
        let mut alone = with.clone();
        alone.devices.passthrough = vec![passthrough];
        alone.descriptors = Descriptors::default();
        let host = HostSide::open(&alone)?;
        let info = host.topology.endpoint(first.endpoint_id());
        let facts = info.map(|info| {
            let group = info.group.and_then(|id| host.topology.group_name(id));
            (group.cloned(), info.reserved.clone())
        });
        let exports = ExportSide::open(&alone, host.exports)?;
        Ok(Opened {
            backend: host.backends.into_iter().next().map(|(backend, _)| backend),
            exports: exports.servers,
            files: exports.files,
            host: Some(passthrough.host.to_string()),
            facts,
            ..Opened::default()
        })
    }

    /// Starts the thread that tells the guest what emulated devices are refused, if it is not there.
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

/// Whether devices come and go with this configuration.
fn is_prepared(config: &Config) -> Result<(), HotplugError> {
    if config.topology.expected().is_empty() {
        return Err(HotplugError::Unprepared);
    }
    Ok(())
}

/// Takes out what has a key that `wanted` holds for.
fn take_if<T>(map: &mut BTreeMap<PciAddress, T>, wanted: impl Fn(&PciAddress) -> bool) -> Vec<T> {
    let keys: Vec<_> = map.keys().copied().filter(|at| wanted(at)).collect();
    keys.iter().filter_map(|at| map.remove(at)).collect()
}
