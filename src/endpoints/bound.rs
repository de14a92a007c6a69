//! An exported device between two steps: its socket is there, and its server is not.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use log::info;

use crate::export::{self, DeviceServer, ExportedDevice};
use crate::process::socket::SocketFile;
use crate::topology::PciAddress;

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
}

impl BoundExport {
    /// Accepts the VMM's clients. Returns the server, and the file of its socket.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn serve(self) -> io::Result<(DeviceServer, Arc<SocketFile>)> {
        let server = export::serve(self.listener, self.device)?;
        info!(
            "endpoint {} is exported at {}",
            self.endpoint,
            self.path.display()
        );
        Ok((server, self.file))
    }
}
