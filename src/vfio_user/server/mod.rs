//! The served half of vfio-user: a client, usually a VMM, drives a device that this process has.
//!
//! ```text
//! client <--socket--> DeviceServer's thread --> ServedDevice
//!                     serve_client                  |
//!            ^                                      |  DMA_READ, DMA_WRITE
//!            +------ ClientChannel::send -----------+  (if the device sends commands)
//! ```
//!
//! The server knows no device: `listen` accepts clients, `client` receives messages and sends
//! replies, `respond` makes the reply to a message, `commands` checks each command and calls the device, and `region`
//! encodes the description of a region. A device implements [`ServedDevice`].
//!
//! `kept` serves a client whose connection outlives this process.
//!
//! A client may be hostile. It is cut off if it sends nothing for ten seconds after it has connected,
//! or if a message violates the protocol; every other refusal is an errno in a reply. The server
//! receives nothing while a client leaves its replies unread, so that a client cannot fill memory.

mod client;
mod commands;
mod descriptors;
mod device;
mod kept;
mod listen;
mod region;
mod respond;
#[cfg(test)]
mod tests;

pub use self::client::{ClientChannel, ClientEnd, ServerSignal, serve_client};
pub use self::descriptors::{ClientEvent, DescriptorKeeping};
pub use self::device::{
    ClientFiles, DeviceRecord, DeviceSummary, IrqAction, IrqKind, IrqSet, IrqSetData,
    RegionCapability, RegionFile, ServedDevice, ServedRegion,
};
pub use self::kept::{ClientKeeping, VERSION as RECORD_VERSION};
pub use self::listen::{DeviceServer, ServerStatus};
pub use self::respond::ClientError;
