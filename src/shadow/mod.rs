//! Devices in processes of their own that follow the page tables themselves.
//!
//! A device process connects to the daemon's socket and names its endpoint. It gets the page tables for
//! reading, guest memory, and *epoch words*, in which it says that an access is in progress. From then
//! on it translates addresses without a lock, a system call or a message; the daemon is told of refused
//! accesses only, and tells the guest.
//!
//! ```no_run
//! use vhost_device_iommu::ids::EndpointId;
//! use vhost_device_iommu::shadow::ShadowReader;
//! use vm_memory::{Bytes, GuestAddress};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 00:03.0
//! let reader = ShadowReader::connect("/run/vm0/disk.sock".as_ref(), EndpointId(0x18))?;
//! let memory = reader.memory();
//! let length: u32 = memory.read_obj(GuestAddress(0x1000))?;
//! memory.write_slice(&[0; 512], GuestAddress(0x2000))?;
//! # Ok(())
//! # }
//! ```
//!
//! What an author of devices has to keep in mind is in `docs/shadow.md`. Above all: a slice of guest
//! memory that is kept (`get_slices`, the readers and writers of `virtio-queue`) may be used only while
//! an access is in progress that was begun before it was got: hold what [`ShadowReader::enter`] returns.
//!
//! This guards against a device that errs, not against one that is malicious: it has guest memory
//! mapped, all of it.

mod frames;
#[cfg(feature = "daemon")]
mod process;
pub mod reader;
#[cfg(feature = "daemon")]
pub mod registry;
#[cfg(feature = "daemon")]
pub mod server;
mod sys;
pub mod wire;

#[cfg(feature = "daemon")]
pub use process::Process;

pub use reader::{
    AccessError, AccessGuard, ConnectError, ShadowIommu, ShadowMemory, ShadowReader, TlbGuard,
};
#[cfg(feature = "daemon")]
pub use registry::{
    Limits, Ram, Reader, ReaderCounters, Registry, RegistryError, ShadowEndpoint, Stuck,
};
#[cfg(feature = "daemon")]
pub use server::{ShadowServer, ShadowSocket};
