//! Adds and removes endpoints while the VM runs. The code that checks the configuration file also checks an
//! added endpoint. Then the daemon opens the endpoint's device, and last the core adds the endpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::{info, warn};
use thiserror::Error;

use super::bound::ServedExport;
use super::changes::{ChangeRecord, RecordError};
use super::exported::drop_client;
use super::kind::{OpenDevice, Plug, PlugError, PlugKeeping, PlugOrigin};
use super::kinds;
use super::status::DeviceReport;
use crate::config::{Config, ConfigError, DeviceKind, EndpointChanges};
use crate::device::Device;
use crate::export::HotResetRegistry;
use crate::faults::queue::FaultDelivery;
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::iommu::{AddError, Iommu, NewEndpoints, RemoveError};
use crate::locks::{Mutex, Rank};
use crate::process::keeper::Keeper;
use crate::process::life::Life;
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
    /// The change cannot be recorded.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The state of the process before is not taken over yet.
    #[error("the daemon still takes over from the one before; try again")]
    TakingOver,
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
    keeper: Arc<Keeper>,
    life: Arc<Life>,
    hot_resets: HotResetRegistry,
    /// Locked while an endpoint is added or removed.
    vm: Mutex<ChangedVm>,
    /// Locked briefly; only `files` may be locked after it.
    parts: Mutex<DevicesInService>,
    files: Files,
}

/// The endpoints of the running VM.
pub struct ChangedVm {
    /// The configuration with all changes.
    pub config: Config,
    /// What differs from the file, for a later process.
    pub record: ChangeRecord,
}

/// The files of the devices' sockets.
pub type Files = Arc<Mutex<BTreeMap<PciAddress, Arc<SocketFile>>>>;

#[derive(Default)]
struct DevicesInService {
    reports: BTreeMap<PciAddress, DeviceReport>,
    servers: BTreeMap<PciAddress, ServedExport>,
    /// See [`OpenDevice::kept`].
    kept: BTreeMap<PciAddress, Vec<String>>,
    faults: Option<FaultDelivery>,
}

impl Hotplug {
    /// Hotplug for a VM, without devices.
    pub fn new(
        vm: ChangedVm,
        hot_resets: HotResetRegistry,
        iommu: Arc<Mutex<Iommu>>,
        device: Arc<Device>,
        reporter: Arc<FaultReporter>,
        (keeper, life): (Arc<Keeper>, Arc<Life>),
    ) -> Self {
        Self {
            hot_resets,
            iommu,
            device,
            reporter,
            keeper,
            life,
            vm: Mutex::new(Rank::HotplugConfig, vm),
            parts: Mutex::new(Rank::HotplugParts, DevicesInService::default()),
            files: Arc::new(Mutex::new(Rank::SocketFiles, BTreeMap::new())),
        }
    }

    /// The registry for the exported devices of the start, to which hotplug adds the later ones.
    pub fn hot_resets(&self) -> &HotResetRegistry {
        &self.hot_resets
    }

    /// Takes over the devices of the start. The core must have their backends.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn adopt(
        &self,
        devices: impl IntoIterator<Item = (PciAddress, OpenDevice)>,
    ) -> io::Result<()> {
        for (endpoint, device) in devices {
            let kind = self.vm.lock().config.devices.kind_of(endpoint);
            if device.reports_faults {
                self.deliver_faults()?;
            }
            self.take_into_service(endpoint, kind, device);
        }
        Ok(())
    }

    /// Ends the servers of the exported devices, which releases the devices.
    pub fn end_exports(&self) {
        let servers = std::mem::take(&mut self.parts.lock().servers);
        drop(servers);
    }

    /// The report of each device in service, by endpoint.
    pub fn reports(&self) -> BTreeMap<EndpointId, DeviceReport> {
        let parts = self.parts.lock();
        let reports = parts.reports.iter();
        reports
            .map(|(at, report)| (at.endpoint_id(), report.clone()))
            .collect()
    }

    /// Calls `describe` with the configuration with all changes, and with the changes.
    pub fn describe<T>(&self, describe: impl FnOnce(&Config, &EndpointChanges) -> T) -> T {
        let vm = self.vm.lock();
        describe(&vm.config, vm.record.changes())
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
        let mut vm = self.vm.lock();
        self.check_settled()?;
        let (with, range) = vm.config.with_endpoint(text)?;
        let kind = with.devices.kind_of(range.first());
        let mut opened = self.open(&with, range.first(), kind)?;
        if let Err(cause) = self.publish(&mut vm.record, text, &with, range, &mut opened) {
            let names = std::mem::take(&mut opened.kept);
            drop(opened);
            self.forget_names(range, names);
            return Err(cause);
        }
        self.take_into_service(range.first(), kind, opened);
        let is_described = with.topology.is_expected(range);
        vm.config = with;
        vm.record.finish_addition();
        info!("endpoint {range} is added");
        Ok(Added {
            range,
            is_described,
        })
    }

    /// Records that an endpoint is being added, has the core add it, and serves its device. On an error, it is not there.
    fn publish(
        &self,
        record: &mut ChangeRecord,
        text: &str,
        with: &Config,
        range: PciRange,
        opened: &mut OpenDevice,
    ) -> Result<(), HotplugError> {
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
        self.forgo_unrecorded(record);
        record.begin_addition(text, range)?;
        // If the core refuses the backend, the error returns it, so that it is dropped after the core is unlocked:
        // dropping it waits for its threads.
        let added = match (opened.backend.take(), &opened.bound) {
            // An exported device does no DMA before its server accepts a client, so its backend can be filled before
            // the core has it. Another device may do DMA as soon as its backend lets it.
            (Some(backend), Some(_)) => {
                Iommu::add_filled(&self.iommu, &new, backend).map_err(|(cause, _)| cause)
            }
            (backend, _) => {
                let added = self.iommu.lock().add_endpoints(new, backend);
                added.map_err(|(cause, _)| cause)
            }
        };
        if let Err(cause) = added {
            record.abandon_addition(range);
            return Err(cause.into());
        }
        if let Err(cause) = opened.serve() {
            // The device has no client yet, so nobody uses the endpoint.
            let unused = self.iommu.lock().remove_endpoints(range);
            drop(unused);
            record.abandon_addition(range);
            return Err(PlugError::System(cause).into());
        }
        Ok(())
    }

    /// Removes endpoints. When this returns, their devices reach no memory.
    ///
    /// # Errors
    /// See [`HotplugError`].
    pub fn remove(&self, range: PciRange) -> Result<(), HotplugError> {
        let mut vm = self.vm.lock();
        self.check_settled()?;
        let without = vm.config.without_endpoints(range)?;
        let devices = vm.config.devices.iter();
        for device in devices.filter(|device| range.contains(device.endpoint())) {
            kinds::of(device.kind()).check_unplug(&vm.config)?;
        }
        // The lock of `vm` excludes other changes, so the removal below cannot fail.
        self.iommu.lock().check_removal(range)?;
        self.forgo_unrecorded(&vm.record);
        vm.record.begin_removal(range)?;
        let silent = self.end_servers(range);
        let unused = match Iommu::remove_emptied(&self.iommu, range, &silent) {
            Ok(unused) => unused,
            Err(cause) => {
                vm.record.abandon_removal();
                return Err(cause.into());
            }
        };
        vm.config = without;
        let (reports, files, kept);
        {
            let mut parts = self.parts.lock();
            kept = take_range(&mut parts.kept, range).concat();
            reports = take_range(&mut parts.reports, range);
            files = take_range(&mut self.files.lock(), range);
        }
        // A device that the VMM has brought stays open in the backend, whose other devices go on. The VMM may still have it.
        let brought = reports.iter().flat_map(|report| &report.vmm_file);
        brought.for_each(|file| drop(file.end()));
        // Drops wait for threads, so `parts` must not be locked here.
        drop((unused, reports, files));
        vm.record.finish_removal(range);
        self.forget_names(range, kept);
        info!("endpoint {range} is removed");
        Ok(())
    }

    /// The state that the process before has left is taken over or refused: what was half removed is blocked there.
    pub fn taken_over(&self) {
        self.vm.lock().record.blocked();
    }

    /// Refuses changes while the core waits for the state of the process before.
    fn check_settled(&self) -> Result<(), HotplugError> {
        if self.iommu.lock().is_adopting() {
            return Err(HotplugError::TakingOver);
        }
        Ok(())
    }

    /// Has no later process go on after this one if the change about to be made cannot be recorded: that process would have
    /// other endpoints than the guest.
    fn forgo_unrecorded(&self, record: &ChangeRecord) {
        if self.keeper.is_present() && record.file().is_none() {
            warn!(
                "endpoints change without a record, so no later daemon will go on where this one ends"
            );
            self.device.forgo_restart();
        }
    }

    /// Makes the keeper close what only endpoints had that are gone. Otherwise nobody else could use the devices before the
    /// VM ends.
    fn forget_names(&self, range: PciRange, mut names: Vec<String>) {
        {
            let parts = self.parts.lock();
            let others: BTreeSet<_> = parts.kept.values().flatten().collect();
            names.retain(|name| !others.contains(name));
        }
        for name in names {
            self.keeper.drop_file(&name);
        }
        if range.count() == 1 {
            drop_client(&self.keeper, range.first());
        }
    }

    /// Ends the servers of exported devices. Returns the endpoints whose devices do no DMA any more.
    fn end_servers(&self, range: PciRange) -> BTreeSet<EndpointId> {
        let servers = {
            let mut parts = self.parts.lock();
            let within = parts.servers.range(range.first()..=range.last());
            let addresses: Vec<_> = within.map(|(at, _)| *at).collect();
            addresses
                .into_iter()
                .zip(take_range(&mut parts.servers, range))
        };
        let mut silent = BTreeSet::new();
        for (address, ServedExport { server, is_silent }) in servers {
            // Waits for the server's thread, which releases the device.
            drop(server);
            if is_silent.load(Ordering::Acquire) {
                silent.insert(address.endpoint_id());
            }
        }
        silent
    }

    /// Opens the device of an endpoint, if it has one.
    fn open(
        &self,
        config: &Config,
        endpoint: PciAddress,
        kind: Option<DeviceKind>,
    ) -> Result<OpenDevice, PlugError> {
        let Some(kind) = kind else {
            return Ok(OpenDevice::default());
        };
        let opened = kinds::of(kind).plug(&Plug {
            config,
            endpoint,
            faults: &self.reporter,
            hot_resets: &self.hot_resets,
            keeping: PlugKeeping {
                keeper: &self.keeper,
                life: &self.life,
                origin: PlugOrigin::Here,
                forgo_restart: &|| self.device.forgo_restart(),
            },
        })?;
        if opened.reports_faults {
            self.deliver_faults()?;
        }
        Ok(opened)
    }

    /// Reports the device of an endpoint from now on, and keeps its server and its socket's file.
    fn take_into_service(
        &self,
        endpoint: PciAddress,
        kind: Option<DeviceKind>,
        device: OpenDevice,
    ) {
        {
            let mut parts = self.parts.lock();
            let report = kind.map(|kind| DeviceReport {
                names: kinds::of(kind).status_names(),
                host: device.host,
                host_iommu: device.host_iommu,
                status: device.status,
                vmm_file: device.vmm_file,
            });
            parts
                .reports
                .extend(report.map(|report| (endpoint, report)));
            parts.kept.insert(endpoint, device.kept);
            parts
                .servers
                .extend(device.server.map(|server| (endpoint, server)));
        }
        let file = device.file.map(|file| (endpoint, file));
        self.files.lock().extend(file);
    }

    /// Starts the thread that reports the faults of emulated devices to the guest, unless the thread runs already.
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

/// Takes out the values of the endpoints in `range`.
fn take_range<T>(map: &mut BTreeMap<PciAddress, T>, range: PciRange) -> Vec<T> {
    let keys: Vec<_> = map.range(range.first()..=range.last()).collect();
    let keys: Vec<_> = keys.into_iter().map(|(at, _)| *at).collect();
    keys.iter().filter_map(|at| map.remove(at)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixDatagram;
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::device::WorkerSettings;
    use crate::iommu::Settings;
    use crate::metrics::Metrics;

    const CONFIG: &str = "socket = '/run/s'\naddress = '00:05.0'\nhotplug = ['01:00.0']\n[[endpoint]]\n\
                          address = '00:06.0'\nvfio = '65:00.0'\n[[endpoint]]\naddress = '00:07.0'\n";

    fn hotplug(keeper: Arc<Keeper>) -> Hotplug {
        let config = Config::from_text(Path::new("vm.toml"), CONFIG).expect("a configuration");
        let settings = Settings {
            address_width: config.address_width,
            page_sizes: config.page_mask,
            last_domain: 15,
            bypass_at_boot: true,
            arena_limit: 1 << 20,
        };
        let iommu = Iommu::new(settings, config.topology.clone()).expect("memory");
        let iommu = Arc::new(Mutex::new(Rank::Core, iommu));
        let metrics = Arc::new(Metrics::default());
        let worker = WorkerSettings {
            longest_poll: Duration::ZERO,
            max_batch: 1,
            realtime: None,
        };
        let device = Device::new(iommu.clone(), metrics.clone(), worker).expect("descriptors");
        let reporter = Arc::new(FaultReporter::new(metrics, 1));
        let vm = ChangedVm {
            config,
            record: ChangeRecord::unkept(),
        };
        let kept = (keeper, Arc::new(Life::new(true)));
        let resets = HotResetRegistry::default();
        Hotplug::new(vm, resets, iommu, Arc::new(device), reporter, kept)
    }

    /// Otherwise nobody else could use the device, nor the group of its host.
    #[test]
    fn the_keeper_closes_what_only_removed_endpoints_had() {
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        for name in ["vfio.a", "vfio.b", "vfio.container.1", "iommufd"] {
            let file = OwnedFd::from(io::pipe().expect("a pipe").0);
            keeper.keep_as(name, file.as_fd()).expect("kept");
        }
        let hotplug = hotplug(keeper.clone());
        let at = ["00:06.0", "00:07.0"].map(|at| at.parse::<PciAddress>().expect("an address"));
        let file = crate::vfio::VmmCdev::default();
        let device = |name: &str| OpenDevice {
            kept: vec![name.into(), "vfio.container.1".into()],
            vmm_file: Some(file.clone()),
            ..OpenDevice::default()
        };
        let devices = at.into_iter().zip(["vfio.a", "vfio.b"].map(device));
        hotplug.adopt(devices).expect("adopted");
        hotplug.remove(at[0].into()).expect("removed");
        assert_eq!(keeper.names(), ["iommufd", "vfio.b", "vfio.container.1"]);
        assert!(file.has_ended(), "the VMM may still have the device");
        hotplug.remove(at[1].into()).expect("removed");
        assert_eq!(keeper.names(), ["iommufd"]);
    }
}
