//! Refused accesses ("faults"), and their way to the guest.
//!
//! 1. A source refuses an access and makes a [`Fault`]: the windows of an emulated device
//!    (`backends/vfio_user/windows`), or the server of shadow readers (`shadow/server`).
//! 2. The source only enqueues the fault. Emulated devices do so through a [`FaultSink`], which is
//!    `report::FaultReporter`; the shadow server has a `queue::FaultQueue` of its own. Both limit the
//!    rate of each endpoint.
//! 3. A delivery thread takes the fault off the queue and calls `device::Device::report_fault`. For a shadow
//!    reader's fault, it first asks `iommu::Iommu::translate` for the reason.
//! 4. The device converts the fault into a record (`protocol/fault`), writes it into a buffer of the
//!    event queue (`device/event_queue`), and adds it to the `log::FaultLog`.

#[cfg(feature = "daemon")]
pub mod log;
#[cfg(feature = "daemon")]
pub mod queue;
#[cfg(feature = "daemon")]
pub mod report;

use crate::address::{Access, Iova};
use crate::ids::{EndpointId, list_variants};

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// The endpoint does not exist, or is blocked: its backend or its server has failed, or its group has
    /// moved to another domain.
    Unknown,
    /// The endpoint is neither attached to a domain nor in bypass mode.
    Domain,
    /// The address is not mapped, or not for this kind of access.
    Mapping,
}

list_variants!(FaultReason: Unknown, Domain, Mapping);

impl FaultReason {
    /// The name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Domain => "domain",
            Self::Mapping => "mapping",
        }
    }
}

/// A refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The endpoint that made the access.
    pub endpoint: EndpointId,
    /// Why it was refused.
    pub reason: FaultReason,
    /// The kind of the access; [`Access::NONE`] if the endpoint was stopped without making one.
    pub access: Access,
    /// The first address that the endpoint must not access.
    pub address: Iova,
}

/// Receives the faults of emulated devices.
///
/// Two threads call this: the thread that moves a device's messages, and the thread that serves the guest's
/// requests, which holds the core's lock. An implementation must not wait for anything that either thread may
/// hold: the core, the rings, guest memory that is being replaced. It should enqueue the fault, and drop it
/// if the queue is full.
pub trait FaultSink: Send + Sync {
    /// Takes one fault.
    fn report(&self, fault: Fault);
}
