//! Emulated devices: the sockets and the backends of devices that other processes emulate.

use std::io;
use std::sync::Arc;

use log::info;

use super::kind::{EndpointKind, Plug, PlugError, PluggedDevice, Resources, check_prepared};
use crate::backends::DmaBackend;
use crate::backends::vfio_user::{EmulatedDevice, Isolation, MAX_BATCH_TIMEOUT, VfioUser, Watch};
use crate::config::{Config, Emulated, ServerIsolation};
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::process::sandbox::Needs;
use crate::process::socket::{SocketFile, bind};
use crate::topology::{PciAddress, Topology};

/// The emulated devices, served.
pub struct EmulatedDevices {
    /// The backends, each with its endpoint.
    pub backends: Vec<(Box<dyn DmaBackend>, EndpointId)>,
    /// The [`Watch`] of each device.
    pub watches: Vec<(PciAddress, Watch)>,
    /// The files of the sockets that the VMM connects to.
    pub files: Vec<(PciAddress, Arc<SocketFile>)>,
}

impl EmulatedDevices {
    /// Listens for the VMM's client of each device.
    ///
    /// # Errors
    /// A socket cannot be made, or the system has no descriptor or thread left.
    pub fn open(
        devices: &[Emulated],
        topology: &Topology,
        faults: &Arc<FaultReporter>,
    ) -> io::Result<Self> {
        let mut opened = Self {
            backends: Vec::new(),
            watches: Vec::new(),
            files: Vec::new(),
        };
        for device in devices {
            let (listener, file) = bind(&device.listen)?;
            let endpoint = device.endpoint.endpoint_id();
            let info = topology.endpoint(endpoint);
            let regions = info.iter().flat_map(|info| info.reserved.iter());
            let emulated = EmulatedDevice {
                endpoint,
                name: format!("endpoint {}", device.endpoint),
                server: device.connect.clone(),
                isolation: match device.isolation {
                    ServerIsolation::Messages => Isolation::Messages,
                    ServerIsolation::Mappings => Isolation::Mappings,
                },
                reserved: regions.map(|region| region.range).collect(),
                deadline: device.deadline,
            };
            let backend = VfioUser::start(emulated, listener, faults.clone())?;
            opened.watches.push((device.endpoint, backend.watch()));
            opened.backends.push((Box::new(backend), endpoint));
            opened.files.push((device.endpoint, Arc::new(file)));
            info!(
                "endpoint {} is the device at {}, isolation {}",
                device.endpoint,
                device.connect.display(),
                device.isolation.name()
            );
        }
        Ok(opened)
    }
}

/// Devices that other processes emulate over vfio-user.
pub struct EmulatedKind;

impl EndpointKind for EmulatedKind {
    fn add_needs(&self, config: &Config, needs: &mut Needs) {
        needs.emulated = needs.plugging.is_some() || !config.devices.emulated.is_empty();
    }

    fn resources(&self, config: &Config) -> Resources {
        let devices = &config.devices.emulated;
        Resources {
            devices: devices.len(),
            wait: devices
                .iter()
                .map(|e| e.deadline.max(MAX_BATCH_TIMEOUT))
                .sum(),
            ..Resources::default()
        }
    }

    fn plug(&self, plug: &Plug<'_>) -> Result<PluggedDevice, PlugError> {
        check_prepared(plug.config)?;
        let device = plug.config.devices.emulated_at(plug.endpoint);
        let devices = device.map(std::slice::from_ref).unwrap_or_default();
        let opened = EmulatedDevices::open(devices, &plug.config.topology, plug.faults)?;
        let backend = opened.backends.into_iter().next();
        Ok(PluggedDevice {
            backend: backend.map(|(backend, _)| backend),
            watch: opened.watches.into_iter().next().map(|(_, watch)| watch),
            file: opened.files.into_iter().next().map(|(_, file)| file),
            ..PluggedDevice::default()
        })
    }

    fn check_unplug(&self, config: &Config) -> Result<(), PlugError> {
        check_prepared(config)
    }
}
