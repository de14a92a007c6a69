//! Exported devices: passthrough devices that the daemon offers to the VMM over vfio-user, with their
//! sockets and servers.

use std::io;
use std::sync::Arc;

use log::info;

use super::kind::{EndpointKind, Plug, PlugError, PluggedDevice, Resources, check_prepared};
use super::passthrough::PassthroughDevices;
use crate::config::{Config, Descriptors};
use crate::export::{self, DeviceServer, ExportedDevice};
use crate::process::sandbox::Needs;
use crate::process::socket::{SocketFile, bind};
use crate::topology::PciAddress;
use crate::vfio::{DeviceAccess, ioctls_of_exports, ioctls_of_opening};

/// The exported devices, served.
pub struct ExportedDevices {
    /// A server for each of them.
    pub servers: Vec<(PciAddress, DeviceServer)>,
    /// The files of the sockets that the VMM connects to.
    pub files: Vec<(PciAddress, Arc<SocketFile>)>,
}

impl ExportedDevices {
    /// Listens for the VMM's clients. `devices` are the devices that the configuration exports, by
    /// the address of their endpoint.
    ///
    /// # Errors
    /// A socket cannot be made, a device does not describe its registers, or the system has no
    /// descriptor or thread left.
    pub fn open(
        config: &Config,
        devices: Vec<(PciAddress, Box<dyn DeviceAccess>)>,
    ) -> io::Result<Self> {
        let mut opened = Self {
            servers: Vec::new(),
            files: Vec::new(),
        };
        for (endpoint, device) in devices {
            let Some(export) = config.devices.exported_at(endpoint) else {
                continue;
            };
            let name = format!("endpoint {endpoint}");
            let offered = ExportedDevice::new(name, device).map_err(|cause| {
                let what = format!("endpoint {endpoint} cannot be exported: {cause}");
                io::Error::new(cause.kind(), what)
            })?;
            let (listener, file) = bind(&export.path)?;
            let server = export::serve(listener, offered)?;
            opened.servers.push((endpoint, server));
            opened.files.push((endpoint, Arc::new(file)));
            info!(
                "endpoint {endpoint} is exported at {}",
                export.path.display()
            );
        }
        Ok(opened)
    }
}

/// Passthrough devices that the daemon offers to the VMM over vfio-user.
pub struct ExportedKind;

impl EndpointKind for ExportedKind {
    fn add_needs(&self, config: &Config, needs: &mut Needs) {
        if needs.plugging.is_some() || !config.devices.exported.is_empty() {
            needs.device_ioctls = ioctls_of_exports();
        }
        if let Some(plugging) = &mut needs.plugging {
            plugging.ioctls.extend(ioctls_of_opening());
            plugging
                .nodes
                .extend(["/dev/vfio", "/dev/iommu"].map(Into::into));
            plugging.facts.push("/sys".into());
        }
    }

    /// No resources: the passthrough kind counts the device already.
    fn resources(&self, _: &Config) -> Resources {
        Resources::default()
    }

    fn plug(&self, plug: &Plug<'_>) -> Result<PluggedDevice, PlugError> {
        check_prepared(plug.config)?;
        let endpoint = plug.endpoint;
        let devices = &plug.config.devices;
        let Some(&device) = devices.passthrough_at(endpoint) else {
            return Ok(PluggedDevice::default());
        };
        let mut alone = plug.config.clone();
        alone.devices.passthrough = vec![device];
        alone.descriptors = Descriptors::default();
        let opened = PassthroughDevices::open(&alone)?;
        let info = opened.topology.endpoint(endpoint.endpoint_id());
        let facts = info.map(|info| {
            let group = info.group.and_then(|id| opened.topology.group_name(id));
            (group.cloned(), info.reserved.clone())
        });
        let served = ExportedDevices::open(&alone, opened.exported)?;
        let backend = opened.backends.into_iter().next();
        Ok(PluggedDevice {
            backend: backend.map(|(backend, _)| backend),
            export: served.servers.into_iter().next().map(|(_, server)| server),
            file: served.files.into_iter().next().map(|(_, file)| file),
            host: Some(device.host.to_string()),
            facts,
            watch: None,
        })
    }

    fn check_unplug(&self, config: &Config) -> Result<(), PlugError> {
        check_prepared(config)
    }
}
