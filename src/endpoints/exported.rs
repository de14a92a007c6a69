//! The devices of the host that a configuration says the VMM gets over vfio-user: their sockets and
//! servers.

use std::io;
use std::sync::Arc;

use log::info;

use crate::config::Config;
use crate::export::{self, DeviceServer, ExportedDevice};
use crate::process::socket::{SocketFile, bind};
use crate::topology::PciAddress;
use crate::vfio::DeviceAccess;

/// What there is for exported devices.
pub struct ExportSide {
    /// A server for each of them.
    pub servers: Vec<(PciAddress, DeviceServer)>,
    /// The files of the sockets that the VMM connects to.
    pub files: Vec<(PciAddress, Arc<SocketFile>)>,
}

impl ExportSide {
    /// Listens for the VMM's clients. `devices` are those that the configuration exports, by the
    /// address of their endpoint.
    ///
    /// # Errors
    /// Where a socket cannot be made, a device does not tell what it has, or the system has no
    /// descriptor or thread left.
    pub fn open(
        config: &Config,
        devices: Vec<(PciAddress, Box<dyn DeviceAccess>)>,
    ) -> io::Result<Self> {
        let mut side = Self {
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
            side.servers.push((endpoint, server));
            side.files.push((endpoint, Arc::new(file)));
            info!(
                "endpoint {endpoint} is exported at {}",
                export.path.display()
            );
        }
        Ok(side)
    }
}
