//! Brings the configured devices up with the daemon, in three steps:
//!
//! 1. [`OpenedDevices::open`] opens the host's devices. It must run before the process opens any other file,
//!    which could get the number of an inherited descriptor.
//! 2. [`OpenedDevices::attach`] puts the backends of all kinds behind the core. [`AttachedDevices::add_late`] does so for the
//!    endpoints that were added while an earlier process served the guest.
//! 3. [`AttachedDevices::serve`] accepts shadow readers and the VMM's clients. It runs last: a client may use
//!    every other part as soon as it connects.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use log::{error, info, warn};
use thiserror::Error;

use super::exported::KeptExport;
use super::hotplug::{ChangedVm, Hotplug};
use super::kind::{OpenDevice, Plug, PlugKeeping, PlugOrigin};
use super::kinds;
use super::passthrough::{
    DeviceKeeping, OpenedExport, PassthroughDevices, PassthroughError, VmmDevices, device_name,
    drop_devices, end_stray_devices,
};
use super::shadow::ShadowError;
use super::{emulated, exported, shadow};
use crate::backends::DmaBackend;
use crate::config::{Config, EndpointChanges};
use crate::device::Device;
use crate::export::HotResetRegistry;
use crate::faults::report::FaultReporter;
use crate::host::sysfs::IommuInstance;
use crate::ids::EndpointId;
use crate::iommu::{Iommu, NewEndpoints};
use crate::locks::Mutex;
use crate::metrics::{AdoptionCounters, Metrics};
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::shadow::{Registry, ShadowServer};
use crate::topology::{HostAddress, PciAddress, PciRange, Topology};

/// Why the configured devices cannot be brought up.
#[derive(Debug, Error)]
pub enum StartError {
    /// A passthrough device cannot be used.
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    /// Shadow readers cannot be served.
    #[error(transparent)]
    Shadow(#[from] ShadowError),
    /// A backend cannot do what the configuration asks for.
    #[error("{0}")]
    Backend(String),
    /// A socket cannot be made.
    #[error("{0}")]
    Socket(io::Error),
    /// The system has no thread left.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// Open devices without backends in the core.
pub struct OpenedDevices {
    backends: Vec<(Box<dyn DmaBackend>, Vec<EndpointId>)>,
    exported: Vec<OpenedExport>,
    iommus: BTreeMap<PciAddress, IommuInstance>,
    /// See [`OpenDevice::kept`].
    kept: BTreeMap<PciAddress, Vec<String>>,
    vmm: Option<Arc<VmmDevices>>,
}

/// Devices with backends in the core, before any socket accepts a client.
pub struct AttachedDevices {
    exported: Vec<OpenedExport>,
    iommus: BTreeMap<PciAddress, IommuInstance>,
    /// See [`OpenDevice::kept`].
    kept: BTreeMap<PciAddress, Vec<String>>,
    vmm: Option<Arc<VmmDevices>>,
    keeper: Arc<Keeper>,
    readers: Option<Arc<Registry>>,
    /// All devices but the exported ones.
    devices: Vec<(PciAddress, OpenDevice)>,
    hot_resets: HotResetRegistry,
    /// Exported devices that were added while the VM ran.
    bound: Vec<(PciAddress, OpenDevice)>,
    faults: Arc<FaultReporter>,
}

/// The endpoints that were added while an earlier process served the guest.
pub struct LateEndpoints {
    /// The configuration, to which they are added.
    pub config: Config,
    /// The changes, from which those are taken out that cannot be added.
    pub changes: EndpointChanges,
    /// The number of reserved regions of one endpoint that a PROBE of this guest has room for.
    pub room: usize,
}

/// Devices in service.
pub struct ServedDevices {
    /// Owns the devices that hotplug can add and remove.
    pub hotplug: Arc<Hotplug>,
    /// The shadow readers; `None` if no endpoint has any.
    pub readers: Option<Arc<Registry>>,
    /// The server that registers these readers.
    pub shadow: Option<ShadowServer>,
    /// The counters of devices that come from the VMM; `None` if none do.
    pub adoption: Option<Arc<AdoptionCounters>>,
}

impl StartError {
    /// The device of the host that cannot be opened, with its endpoint.
    pub fn unopened(&self) -> Option<(PciAddress, HostAddress)> {
        match *self {
            Self::Passthrough(PassthroughError::Device { host, endpoint, .. }) => {
                Some((endpoint, host))
            }
            _ => None,
        }
    }
}

impl OpenedDevices {
    /// Opens the devices of the host. Also returns the topology of `config` with the groups and reserved regions
    /// of the host. Takes over the devices that the process before has left with the keeper.
    ///
    /// # Errors
    /// See [`PassthroughError`].
    pub fn open(config: &Config, keeper: &Arc<Keeper>) -> Result<(Topology, Self), StartError> {
        let PassthroughDevices {
            topology,
            backends,
            exported,
            iommus,
            kept,
            vmm,
        } = PassthroughDevices::open(config, &DeviceKeeping::of_start(keeper))?;
        let opened = Self {
            backends,
            exported,
            iommus,
            kept,
            vmm,
        };
        Ok((topology, opened))
    }

    /// Has the keeper close what a failed [`Self::open`] has kept of the device `host`. What it has kept of the other devices
    /// is for the next attempt.
    pub fn forget_unopened(keeper: &Keeper, host: HostAddress) {
        keeper.drop_file(&device_name(host));
    }

    /// Adds all backends to the core. `life` says whether the state outlives this process. `metrics` counts the dropped faults of emulated devices, `keeper` keeps the
    /// descriptors of shadow readers.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn attach(
        self,
        config: &Config,
        iommu: &mut Iommu,
        metrics: Arc<Metrics>,
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
    ) -> Result<AttachedDevices, StartError> {
        for (backend, endpoints) in self.backends {
            iommu
                .add_backend(backend, &endpoints)
                .map_err(StartError::Backend)?;
        }
        let readers = shadow::add_backend(config, iommu, keeper)?;
        let faults = Arc::new(FaultReporter::new(metrics, config.fault_rate));
        let mut devices = Vec::new();
        for passthrough in &config.devices.passthrough {
            let device = OpenDevice {
                host: Some(passthrough.host.to_string()),
                host_iommu: self.iommus.get(&passthrough.endpoint).cloned(),
                vmm_file: self
                    .vmm
                    .as_ref()
                    .and_then(|vmm| vmm.cdev(passthrough.endpoint)),
                kept: self
                    .kept
                    .get(&passthrough.endpoint)
                    .cloned()
                    .unwrap_or_default(),
                ..OpenDevice::default()
            };
            devices.push((passthrough.endpoint, device));
        }
        for configured in &config.devices.emulated {
            let kept = keeper
                .is_present()
                .then(|| emulated::keep(configured, keeper, life, iommu.is_adopting()))
                .flatten();
            if kept.is_none() && keeper.is_present() {
                keeper.unkept().count_always();
                if configured.shares_memory() {
                    warn!("{}", emulated::MEMORY_SERVER);
                    iommu.forgo_restart();
                    life.forgo();
                }
            }
            let topology = iommu.topology();
            let mut device = emulated::open(configured, config, topology, &faults, kept)
                .map_err(StartError::Socket)?;
            if let Some(backend) = device.backend.take() {
                iommu
                    .add_backend(backend, &[configured.endpoint.endpoint_id()])
                    .map_err(StartError::Backend)?;
            }
            devices.push((configured.endpoint, device));
        }
        Ok(AttachedDevices {
            hot_resets: HotResetRegistry::default(),
            bound: Vec::new(),
            exported: self.exported,
            iommus: self.iommus,
            kept: self.kept,
            vmm: self.vmm,
            keeper: keeper.clone(),
            readers,
            devices,
            faults,
        })
    }
}

impl AttachedDevices {
    /// Opens the devices of the endpoints that were added to `late.config` while an earlier process served the guest, and has
    /// the core add the endpoints. An endpoint whose device cannot be opened is not there any more, which `life` learns.
    pub fn add_late(&mut self, late: &mut LateEndpoints, iommu: &mut Iommu, life: &Arc<Life>) {
        for added in late.changes.added().to_vec() {
            let range = added.range();
            let with = late.config.with_added(&added);
            let with = with.map_err(|cause| cause.to_string());
            let outcome = with.and_then(|with| {
                self.add_late_one(&with, &added.present(), late.room, iommu, life)?;
                Ok(with)
            });
            match outcome {
                Ok(with) => late.config = with,
                Err(cause) => {
                    let text = format!(
                        "endpoint {range}, which `ctl` has added, is gone, because it cannot be added again: {cause}; unplug \
                         its device, and add both again"
                    );
                    error!("{text}");
                    life.lose(text);
                    late.changes.forget(range);
                }
            }
        }
    }

    /// Opens the device of an endpoint of `with`, or of the parts of a range that are present.
    fn add_late_one(
        &mut self,
        with: &Config,
        present: &[PciRange],
        room: usize,
        iommu: &mut Iommu,
        life: &Arc<Life>,
    ) -> Result<(), String> {
        let has_state = iommu.is_adopting();
        for &range in present {
            let first = range.first();
            let kind = with.devices.kind_of(first);
            let core = RefCell::new(&mut *iommu);
            let opened = kind.map(|kind| {
                kinds::of(kind).plug(&Plug {
                    config: with,
                    endpoint: first,
                    faults: &self.faults,
                    hot_resets: &self.hot_resets,
                    keeping: PlugKeeping {
                        keeper: &self.keeper,
                        life,
                        origin: PlugOrigin::Before { has_state },
                        forgo_restart: &|| {
                            core.borrow_mut().forgo_restart();
                            life.forgo();
                        },
                    },
                })
            });
            let mut opened = opened
                .transpose()
                .map_err(|cause| cause.to_string())?
                .unwrap_or_default();
            let (group, reserved) = opened.take_facts(&with.topology, first);
            let new = NewEndpoints {
                range,
                group: group.as_ref(),
                reserved,
                room,
            };
            if let Err((cause, backend)) = iommu.add_late_endpoints(new, opened.backend.take()) {
                let names = std::mem::take(&mut opened.kept);
                drop((backend, opened));
                drop_devices(&self.keeper, &names);
                return Err(cause.to_string());
            }
            info!("endpoint {range}, which `ctl` has added, is there again");
            match (kind, opened.bound.is_some()) {
                (None, _) => {}
                (Some(_), true) => self.bound.push((first, opened)),
                (Some(_), false) => self.devices.push((first, opened)),
            }
        }
        Ok(())
    }

    /// Ends what the daemon before has left of devices that this one does not have. Before its state is taken over.
    pub fn end_strays(&self, life: &Life) {
        emulated::end_strays(&self.keeper, life);
        let devices = end_stray_devices(&self.keeper);
        if !devices.is_empty() {
            warn!(
                "the daemon before has left devices that this one does not have: {}",
                devices.join(", ")
            );
        }
    }

    /// Accepts shadow readers and the VMM's clients, and reports the devices' faults through `device`. `keeper` keeps the
    /// connections of exported devices, and `life` learns which are lost.
    ///
    /// # Errors
    /// A socket or a thread cannot be made.
    pub fn serve(
        self,
        vm: ChangedVm,
        iommu: &Arc<Mutex<Iommu>>,
        device: &Arc<Device>,
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
    ) -> Result<ServedDevices, StartError> {
        let config = &vm.config.clone();
        let hotplug = Hotplug::new(
            vm,
            self.hot_resets,
            iommu.clone(),
            device.clone(),
            self.faults,
            (self.keeper, life.clone()),
        );
        let hotplug = Arc::new(hotplug);
        hotplug.adopt(self.devices).map_err(StartError::Thread)?;
        let adoption = self.vmm.as_ref().map(|vmm| vmm.counters().clone());
        if let Some(vmm) = self.vmm {
            vmm.start(iommu.clone()).map_err(StartError::Thread)?;
            device.watch_vmm(vmm);
        }
        let readers = self.readers;
        let shadow = readers.clone().map(|registry| {
            shadow::serve(config, registry, iommu.clone(), device.clone())
                .map_err(StartError::Socket)
        });
        let shadow = shadow.transpose()?;
        let resets = hotplug.hot_resets().clone();
        device.refuse_vmms(move || resets.vmm_refusal());
        // A hot reset concerns several devices, so all of them are registered before one of them has a client.
        let mut bound = self.bound;
        for export in self.exported {
            let endpoint = export.endpoint;
            let kept = keeper.is_present().then(|| KeptExport {
                keeper: keeper.clone(),
                life: life.clone(),
                is_left: export.is_left,
                kept_as: export.kept_as,
            });
            let access = export.access;
            let resets = hotplug.hot_resets();
            let device = exported::bind_export(config, endpoint, access, resets, kept);
            let device = OpenDevice {
                host_iommu: self.iommus.get(&endpoint).cloned(),
                kept: self.kept.get(&endpoint).cloned().unwrap_or_default(),
                ..device.map_err(StartError::Socket)?
            };
            bound.push((endpoint, device));
        }
        for (endpoint, mut device) in bound {
            device.serve().map_err(StartError::Socket)?;
            hotplug
                .adopt([(endpoint, device)])
                .map_err(StartError::Thread)?;
        }
        Ok(ServedDevices {
            hotplug,
            readers,
            shadow,
            adoption,
        })
    }
}
