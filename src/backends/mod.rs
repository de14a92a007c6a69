//! What makes an endpoint obey: the one trait through which the core drives DMA.

#[cfg(test)]
pub(crate) mod recorder;

use thiserror::Error;

use crate::address::{IovaRange, Mapping, PageMask};
use crate::ids::{DomainId, EndpointId};

/// What a backend can do. The core offers the guest no more than all backends can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Page sizes; the smallest bounds the granularity the guest sees.
    pub page_sizes: PageMask,
    /// The addresses it can translate.
    pub aperture: IovaRange,
}

/// Where an endpoint's DMA goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Through the mappings of a domain.
    Domain(DomainId),
    /// To guest-physical addresses as they are.
    Bypass,
    /// Nowhere.
    Blocked,
}

/// What kind of failure a backend met; it becomes the status of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendErrorKind {
    /// Out of memory, of mapping entries, or over a limit.
    NoMem,
    /// The guest-physical addresses are not memory this backend can reach.
    Fault,
    /// The addresses are out of the backend's range.
    Range,
    /// The endpoint cannot be put there.
    Unsupp,
    /// The backend failed.
    DevErr,
}

/// A backend's refusal.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct BackendError {
    /// What kind of failure it was.
    pub kind: BackendErrorKind,
    /// What failed, with the backend's own words.
    pub message: String,
}

/// Makes endpoints obey. One backend may serve several endpoints and domains.
///
/// The core calls it in this order: `create_domain`, `map` of what the domain holds, `attach` of
/// an endpoint; then `map` and `unmap`; `attach` of the last endpoint elsewhere, `destroy_domain`.
pub trait DmaBackend: Send {
    /// What this backend can do. Constant.
    fn capabilities(&self) -> Capabilities;

    /// Prepares an empty domain.
    ///
    /// # Errors
    /// On error the domain does not exist in this backend.
    fn create_domain(&mut self, domain: DomainId) -> Result<(), BackendError>;

    /// Forgets a domain no endpoint is attached to, with all its mappings.
    fn destroy_domain(&mut self, domain: DomainId);

    /// Switches an endpoint over, from wherever it was.
    ///
    /// # Errors
    /// On error the endpoint is where it was.
    fn attach(&mut self, endpoint: EndpointId, target: Target) -> Result<(), BackendError>;

    /// Ends all DMA of an endpoint by every means there is; nothing can be done if that fails, so
    /// it must not: closing the endpoint's descriptors is the last of the means.
    fn quarantine(&mut self, endpoint: EndpointId);

    /// Makes a mapping reachable, with exactly its access rights.
    ///
    /// # Errors
    /// On error no byte of the mapping is reachable.
    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError>;

    /// Removes every mapping in `range`; the core has checked that it splits none.
    ///
    /// When it returns `Ok`, no endpoint can use an address of the range any more.
    ///
    /// # Errors
    /// On error it is not known what can still be reached: the core quarantines the endpoints.
    fn unmap(&mut self, domain: DomainId, range: IovaRange) -> Result<(), BackendError>;
}
