//! The devices that a configuration says other processes emulate: their sockets and their backends.

use std::io;
use std::sync::Arc;

use log::info;

use crate::backends::DmaBackend;
use crate::backends::vfio_user::{EmulatedDevice, Isolation, VfioUser, Watch};
use crate::config::{self, Emulated};
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::process::socket::{SocketFile, bind};
use crate::topology::{PciAddress, Topology};

/// What there is for emulated devices.
pub struct EmulatedSide {
    /// The backends and the endpoint each of them has.
    pub backends: Vec<(Box<dyn DmaBackend>, EndpointId)>,
    /// What tells how they are doing.
    pub watches: Vec<(PciAddress, Watch)>,
    /// The files of the sockets that the VMM connects to.
    pub files: Vec<(PciAddress, Arc<SocketFile>)>,
}

impl EmulatedSide {
    /// Listens for the VMM's clients of these devices.
    ///
    /// # Errors
    /// Where a socket cannot be made, or the system has no descriptor or thread left.
    pub fn open(
        devices: &[Emulated],
        topology: &Topology,
        faults: &Arc<FaultReporter>,
    ) -> io::Result<Self> {
        let mut side = Self {
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
                    config::Isolation::Messages => Isolation::Messages,
                    config::Isolation::Mappings => Isolation::Mappings,
                },
                reserved: regions.map(|region| region.range).collect(),
                deadline: device.deadline,
            };
            let backend = VfioUser::start(emulated, listener, faults.clone())?;
            side.watches.push((device.endpoint, backend.watch()));
            side.backends.push((Box::new(backend), endpoint));
            side.files.push((device.endpoint, Arc::new(file)));
            info!(
                "endpoint {} is the device at {}, isolation {}",
                device.endpoint,
                device.connect.display(),
                device.isolation.name()
            );
        }
        Ok(side)
    }
}
