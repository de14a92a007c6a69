//! An exported device between two steps, with its socket and without its server, and in service.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::info;

use super::status::{DeviceFigure, DeviceMetric, DeviceStatus};
use crate::export::{self, ClientKeeping, DeviceServer, ExportedDevice, ServerStatus};
use crate::process::socket::SocketFile;
use crate::topology::PciAddress;
use crate::vfio_user::server::ServedDevice;

/// Whether a device has a client.
const CLIENT_UP: DeviceMetric = DeviceMetric {
    name: "export_up",
    metric_type: "gauge",
    help: "Whether an exported device has a client.",
};

/// Whether a device could not be reset after its last client.
const LEFTOVER: DeviceMetric = DeviceMetric {
    name: "export_leftover_state",
    metric_type: "gauge",
    help: "Whether an exported device has, or may have, the state of a client that has gone.",
};

/// Whether another process may reach a device without being its client.
const HELD: DeviceMetric = DeviceMetric {
    name: "export_held",
    metric_type: "gauge",
    help: "Whether a process of a former client has, or may have, the descriptor of an exported device.",
};

/// An exported device whose socket no client is accepted at yet: the device does no DMA.
pub struct BoundExport {
    /// The address of its endpoint.
    pub endpoint: PciAddress,
    /// The path of the socket.
    pub path: PathBuf,
    /// The socket.
    pub listener: UnixListener,
    /// The socket's file.
    pub file: Arc<SocketFile>,
    /// The device.
    pub device: ExportedDevice,
    /// Lets the connections of clients outlive this process.
    pub keeping: Option<ClientKeeping>,
    /// The device is as the process before has left it, and nobody goes on with what its last client may have made of it.
    pub is_abandoned: bool,
}

impl BoundExport {
    /// Accepts the VMM's clients. Returns the server, its device's status, and the file of its socket. All devices of the
    /// daemon's start must be bound before: the release of an abandoned one may reset its bus, and with it the device of a
    /// client that goes on.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn serve(mut self) -> io::Result<(ServedExport, Arc<dyn DeviceStatus>, Arc<SocketFile>)> {
        if self.is_abandoned {
            self.device.abandon();
            self.device.release();
        }
        let leftover = self.device.leftover();
        let held = self.device.held();
        let is_silent = self.device.is_silent();
        let server = export::serve(self.listener, self.device, self.keeping)?;
        info!(
            "endpoint {} is exported at {}",
            self.endpoint,
            self.path.display()
        );
        let status = ExportStatus {
            server: server.status(),
            leftover,
            held,
        };
        let served = ServedExport { server, is_silent };
        Ok((served, Arc::new(status), self.file))
    }
}

/// The server of an exported device.
pub struct ServedExport {
    /// Serves the VMM's clients until it is dropped.
    pub server: DeviceServer,
    /// True once the server has ended and the device does no DMA.
    pub is_silent: Arc<AtomicBool>,
}

/// The status of an exported device in service.
struct ExportStatus {
    server: Arc<ServerStatus>,
    /// The device has, or may have, the state of a client that has gone.
    leftover: Arc<AtomicBool>,
    /// A process of a client that has gone has, or may have, the device's descriptor.
    held: Arc<AtomicBool>,
}

impl DeviceStatus for ExportStatus {
    fn figures(&self) -> Vec<DeviceFigure> {
        let leftover = self.leftover.load(Ordering::Relaxed);
        vec![
            DeviceFigure::flag("client", self.server.is_connected()).with_metric(&CLIENT_UP),
            DeviceFigure::flag("leftover", leftover).with_metric(&LEFTOVER),
            DeviceFigure::flag("held", self.held.load(Ordering::Relaxed)).with_metric(&HELD),
            DeviceFigure::count("clients", self.server.clients.get()),
            DeviceFigure::count("cut_offs", self.server.cut_offs.get()),
        ]
    }
}
