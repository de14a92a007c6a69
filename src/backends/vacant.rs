//! The tombstone of a backend whose endpoints were removed. It keeps the backend's index, so that the indexes of the
//! other backends stay valid.

use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target,
};
use crate::address::{IovaRange, Mapping, PageMask};
use crate::ids::{DomainId, EndpointId};

/// A backend without endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Vacant;

impl DmaBackend for Vacant {
    fn capabilities(&self) -> BackendCapabilities {
        BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        }
    }

    fn vmm_present(&mut self, _present: bool) {}

    fn add_memory(&mut self, _slot: &MemorySlot) -> Result<(), BackendError> {
        Ok(())
    }

    fn remove_memory(&mut self, _slot: &MemorySlot) -> Result<(), BackendError> {
        Ok(())
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        _contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        Err(AttachError::Blocked(BackendError {
            kind: BackendErrorKind::DevErr,
            message: format!("endpoint {endpoint} has no device to be switched to {target}"),
        }))
    }

    fn destroy_domain(&mut self, _domain: DomainId) {}

    fn quarantine(&mut self, _endpoint: EndpointId) {}

    fn map(&mut self, _domain: DomainId, _mapping: &Mapping) -> Result<(), BackendError> {
        Ok(())
    }

    fn unmap(
        &mut self,
        _domain: DomainId,
        _range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        Ok(())
    }
}
