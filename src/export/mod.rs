//! Devices of the host that are offered to a VMM as vfio-user devices, so that it needs no access to
//! VFIO.
//!
//! ```text
//! VMM's vfio-user client <--socket--> ExportServer's thread --> Offered --> VFIO device
//!                                                                             ^
//!                                           a DMA backend of the core --------+  host IOMMU
//! ```
//!
//! The two ways to the device do not meet: what the client says of memory is taken note of and has no
//! effect, and the core decides where the device's DMA goes. `docs/export.md` tells what is offered.

mod device;
mod irqs;
mod server;

pub use self::device::{Offered, RegionReply};
pub use self::server::{ExportServer, ExportState};
