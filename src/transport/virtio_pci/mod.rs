//! Serves the device to a VMM as a modern virtio-pci device over vfio-user.
//!
//! ```text
//! VMM's vfio-user client <--socket--> thread `virtio-pci`             thread `pci-worker`
//!                                       device    one message           worker    kicks
//!                                       registers the driver's view       |
//!                                       memory    DMA_MAP -> slots        v
//!                                          \------ rings, interrupts ---- Device
//! ```
//!
//! The VMM passes on the driver's accesses to registers, and grants guest memory with DMA_MAP. So this transport knows
//! what the VMM keeps to itself with vhost-user: when the driver resets the device, and which state it has reached. In
//! return a kick is a message. `device` answers it before the worker has seen the ring.
//!
//! If another process keeps descriptors, the device tells the server what the next process must know (`record`), and that
//! process goes on with it (`resume`).
//!
//! `layout` says where everything is. [`trapped_bar`] is the place for a second BAR, in which
//! [`table_bar`] tells the guest its endpoints.
//!
//! Statements of the specification's chapters "Virtio Over PCI Bus" and "Basic Facilities of a Virtio Device" have an
//! identifier here and a row in `docs/conformance.md`.

mod config_space;
mod device;
mod fields;
mod interrupts;
mod layout;
mod memory;
mod record;
mod registers;
mod resume;
mod ring;
pub mod serve;
pub mod table_bar;
#[cfg(test)]
mod tests;
pub mod trapped_bar;
mod worker;
