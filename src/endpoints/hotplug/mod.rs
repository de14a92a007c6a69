//! Adds and removes endpoints while the VM runs. The code that checks the configuration file also checks an
//! added endpoint. Then the daemon opens the endpoint's device, and last the core adds the endpoint.

mod adding;
mod removing;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use log::warn;
use thiserror::Error;

use super::bound::ServedExport;
use super::changes::{ChangeRecord, RecordError};
use super::exported::drop_client;
use super::kind::{OpenDevice, PlugError};
use super::kinds;
use super::status::DeviceReport;
use crate::config::{Config, ConfigError, DeviceKind, EndpointChanges};
use crate::device::Device;
use crate::export::HotResetRegistry;
use crate::faults::queue::FaultDelivery;
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::iommu::{AddError, Iommu, RemoveError};
use crate::locks::{Mutex, Rank};
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::socket::SocketFile;
use crate::topology::{NoSuchEndpoints, PciAddress, PciRange};

pub use self::adding::Added;

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
    use crate::page_table::Encoding;

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
            encoding: Encoding::default(),
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
