//! Accesses that were refused.

use crate::address::{Access, Iova};
use crate::ids::{EndpointId, list_variants};

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// There is no such endpoint, or it is blocked for a reason of the device's own.
    Unknown,
    /// The endpoint is not attached to a domain and not in bypass mode.
    Domain,
    /// The address is not mapped, or not for this access.
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

/// A refused access, on its way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Who tried.
    pub endpoint: EndpointId,
    /// Why it was refused.
    pub reason: FaultReason,
    /// What it tried.
    pub access: Access,
    /// Where.
    pub address: Iova,
}
