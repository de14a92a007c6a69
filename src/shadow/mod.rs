//! Shadow readers: devices in processes of their own that walk the page tables themselves.
//!
//! A device process connects to the daemon's socket and names its endpoint. The daemon passes it the page tables
//! for reading, guest memory, and *epoch words*, which the reader makes odd while an access is in progress. From
//! then on the reader translates addresses without waiting for a lock, without a system call and without a message.
//! It reports only refused accesses to the daemon, which reports them to the guest.
//!
//! A device links this module without the daemon (`default-features = false`): it then
//! holds [`reader`] and [`wire`]. `registry` and `server` are the daemon's part.
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
//! `docs/shadow.md` has the rules for authors of devices. Above all: a device must use a slice of guest memory
//! (from `get_slices`, or in the readers and writers of `virtio-queue`) only during an access that began before it
//! took the slice. [`ShadowReader::enter`] begins such an access.
//!
//! This protects the guest against a faulty device, not against a malicious one: the process has all of guest
//! memory mapped.

mod frames;
#[cfg(feature = "daemon")]
mod kept;
#[cfg(feature = "daemon")]
pub mod left;
#[cfg(feature = "daemon")]
mod peer;
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
    EndedReaders, Limits, Ram, Reader, ReaderCounters, Registry, RegistryError, ShadowEndpoint,
    Stuck,
};
#[cfg(feature = "daemon")]
pub use server::{ShadowServer, ShadowSocket};
