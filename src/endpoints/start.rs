//! Brings the configured devices up with the daemon, in three steps:
//!
//! 1. [`OpenedDevices::open`] opens the host's devices. First of all, before anything else is opened
//!    that could get the number of an inherited descriptor.
//! 2. [`OpenedDevices::attach`] puts the backends of all kinds behind the core.
//! 3. [`AttachedDevices::serve`] lets readers and the VMM's clients in. Last, since a client that
//!    connects must find everything that it needs.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::emulated::EmulatedDevices;
use super::exported::ExportedDevices;
use super::hotplug::Hotplug;
use super::passthrough::{PassthroughDevices, PassthroughError};
use super::shadow::{self, ShadowError};
use crate::backends::DmaBackend;
use crate::config::Config;
use crate::device::Device;
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::metrics::Metrics;
use crate::shadow::{Registry, ShadowServer};
use crate::topology::{PciAddress, Topology};
use crate::vfio::DeviceAccess;

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

/// Devices that are open, and not behind the core yet.
pub struct OpenedDevices {
    backends: Vec<(Box<dyn DmaBackend>, Vec<EndpointId>)>,
    exported: Vec<(PciAddress, Box<dyn DeviceAccess>)>,
}

/// Devices behind the core, which nobody can reach yet.
pub struct AttachedDevices {
    exported: Vec<(PciAddress, Box<dyn DeviceAccess>)>,
    readers: Option<Arc<Registry>>,
    emulated: EmulatedDevices,
    faults: Arc<FaultReporter>,
}

/// Devices in service.
pub struct ServedDevices {
    /// Holds the devices that may come and go.
    pub hotplug: Arc<Hotplug>,
    /// The shadow readers, where there are such endpoints.
    pub readers: Option<Arc<Registry>>,
    /// Lets those readers in.
    pub shadow: Option<ShadowServer>,
}

impl OpenedDevices {
    /// Opens the devices of the host. Also returns the topology with what the host adds to it.
    ///
    /// # Errors
    /// See [`PassthroughError`].
    pub fn open(config: &Config) -> Result<(Topology, Self), StartError> {
        let PassthroughDevices {
            topology,
            backends,
            exported,
        } = PassthroughDevices::open(config)?;
        Ok((topology, Self { backends, exported }))
    }

    /// Puts all backends behind the core. What is dropped of the faults of emulated devices is
    /// counted in `metrics`.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn attach(
        self,
        config: &Config,
        iommu: &mut Iommu,
        metrics: Arc<Metrics>,
    ) -> Result<AttachedDevices, StartError> {
        for (backend, endpoints) in self.backends {
            iommu
                .add_backend(backend, &endpoints)
                .map_err(StartError::Backend)?;
        }
        let readers = shadow::add_backend(config, iommu)?;
        let faults = Arc::new(FaultReporter::new(metrics, config.fault_rate));
        let devices = &config.devices.emulated;
        let mut emulated = EmulatedDevices::open(devices, iommu.topology(), &faults)
            .map_err(StartError::Socket)?;
        for (backend, endpoint) in emulated.backends.drain(..) {
            iommu
                .add_backend(backend, &[endpoint])
                .map_err(StartError::Backend)?;
        }
        Ok(AttachedDevices {
            exported: self.exported,
            readers,
            emulated,
            faults,
        })
    }
}

impl AttachedDevices {
    /// Lets readers and the VMM's clients in, and reports the devices' faults through `device`.
    ///
    /// # Errors
    /// A socket or a thread cannot be made.
    pub fn serve(
        self,
        config: &Config,
        iommu: &Arc<Mutex<Iommu>>,
        device: &Arc<Device>,
    ) -> Result<ServedDevices, StartError> {
        let hotplug = Hotplug::new(
            config,
            iommu.clone(),
            device.clone(),
            self.faults,
            self.emulated,
        );
        let hotplug = Arc::new(hotplug.map_err(StartError::Thread)?);
        let readers = self.readers;
        let shadow = readers.clone().map(|registry| {
            shadow::serve(config, registry, iommu.clone(), device.clone())
                .map_err(StartError::Socket)
        });
        let shadow = shadow.transpose()?;
        let exported = ExportedDevices::open(config, self.exported).map_err(StartError::Socket)?;
        hotplug.adopt(exported);
        Ok(ServedDevices {
            hotplug,
            readers,
            shadow,
        })
    }
}
