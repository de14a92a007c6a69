//! Devices of the host that the daemon offers to the VMM as vfio-user devices, so that the VMM needs
//! no access to VFIO.
//!
//! ```text
//! VMM's vfio-user client <--socket--> DeviceServer --> ExportedDevice --> VFIO device
//!                                                                            ^
//!                                          a DMA backend of the core --------+  host IOMMU
//! ```
//!
//! The server and the core share no state. The server checks and answers DMA_MAP and DMA_UNMAP of the
//! client, without effect; the core alone decides where the device's DMA goes. `docs/export.md` lists the
//! features that the server offers to the client.

mod device;
mod hot_reset;
mod irqs;
mod lending;
mod regions;
mod reset_thread;

use std::io;
use std::os::unix::net::UnixListener;

pub use self::device::ExportedDevice;
pub use self::hot_reset::HotResetRegistry;
use crate::process::sandbox::Role;
pub use crate::vfio_user::server::{ClientKeeping, DeviceServer, ServerStatus};

/// Serves one client of `device` after the other at `listener`. With `keeping`, a client's connection outlives this process.
///
/// # Errors
/// The system has no descriptor or thread left.
pub fn serve(
    listener: UnixListener,
    device: ExportedDevice,
    keeping: Option<ClientKeeping>,
) -> io::Result<DeviceServer> {
    DeviceServer::start_kept(Role::Export, listener, Box::new(device), keeping)
}
