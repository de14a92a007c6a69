//! Brings the configured devices up with the daemon, in three steps:
//!
//! 1. [`OpenedDevices::open`] opens the host's devices. It must run before the process opens any other file,
//!    which could get the number of an inherited descriptor.
//! 2. [`OpenedDevices::attach`] puts the backends of all kinds behind the core.
//! 3. [`AttachedDevices::serve`] accepts shadow readers and the VMM's clients. It runs last: a client may use
//!    every other part as soon as it connects.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use log::warn;
use thiserror::Error;

use super::exported::KeptExport;
use super::hotplug::Hotplug;
use super::kind::OpenDevice;
use super::passthrough::{OpenedExport, PassthroughDevices, PassthroughError, VmmDevices};
use super::shadow::ShadowError;
use super::{emulated, exported, shadow};
use crate::backends::DmaBackend;
use crate::config::Config;
use crate::device::Device;
use crate::faults::report::FaultReporter;
use crate::host::sysfs::IommuInstance;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::metrics::Metrics;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::shadow::{Registry, ShadowServer};
use crate::topology::{PciAddress, Topology};

/// Why the state ends with this process although there is a keeper.
const MEMORY_SERVER: &str = "the next daemon will not go on where this one ends: the server of an emulated device has guest \
    memory (isolation = \"mappings\"), its connection is not kept, and it goes on using the memory until it notices the end of \
    its connection; with isolation = \"messages\" it has none";

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
    faults: Arc<FaultReporter>,
}

/// Devices in service.
pub struct ServedDevices {
    /// Owns the devices that hotplug can add and remove.
    pub hotplug: Arc<Hotplug>,
    /// The shadow readers; `None` if no endpoint has any.
    pub readers: Option<Arc<Registry>>,
    /// The server that registers these readers.
    pub shadow: Option<ShadowServer>,
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
        } = PassthroughDevices::open(config, keeper)?;
        let opened = Self {
            backends,
            exported,
            iommus,
            kept,
            vmm,
        };
        Ok((topology, opened))
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
                    warn!("{MEMORY_SERVER}");
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
        // Before the state of the daemon before is taken over.
        emulated::end_strays(keeper, life);
        Ok(AttachedDevices {
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
    /// Accepts shadow readers and the VMM's clients, and reports the devices' faults through `device`. `keeper` keeps the
    /// connections of exported devices, and `life` learns which are lost.
    ///
    /// # Errors
    /// A socket or a thread cannot be made.
    pub fn serve(
        self,
        config: &Config,
        iommu: &Arc<Mutex<Iommu>>,
        device: &Arc<Device>,
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
    ) -> Result<ServedDevices, StartError> {
        let hotplug = Hotplug::new(
            config,
            iommu.clone(),
            device.clone(),
            self.faults,
            self.keeper,
        );
        let hotplug = Arc::new(hotplug);
        hotplug.adopt(self.devices).map_err(StartError::Thread)?;
        if let Some(vmm) = self.vmm {
            vmm.start().map_err(StartError::Thread)?;
            device.watch_vmm(vmm);
        }
        let readers = self.readers;
        let shadow = readers.clone().map(|registry| {
            shadow::serve(config, registry, iommu.clone(), device.clone())
                .map_err(StartError::Socket)
        });
        let shadow = shadow.transpose()?;
        // A hot reset concerns several devices, so all of them are registered before one of them has a client.
        let mut bound = Vec::new();
        for export in self.exported {
            let endpoint = export.endpoint;
            let kept = keeper.is_present().then(|| KeptExport {
                keeper: keeper.clone(),
                life: life.clone(),
                is_left: export.is_left,
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
        })
    }
}
