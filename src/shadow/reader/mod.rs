//! The reader: guest memory behind the IOMMU, for a device in a process of its own.

mod access;
mod error;
mod iommu;
mod memory;
mod session;
mod tlb;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{GuestMemoryMmap, IommuMemory};

use self::access::EpochGuard;
pub use self::error::{AccessError, ConnectError};
pub use self::iommu::{ShadowIommu, TlbGuard};
use self::session::{Registration, Session};
use crate::address::{Access, Iova};
use crate::ids::EndpointId;
use crate::page_table::Translation;

/// Guest memory as the endpoint sees it: addresses are I/O virtual addresses.
pub type ShadowMemory = IommuMemory<GuestMemoryMmap, ShadowIommu>;

/// A registration of this process for the DMA of one endpoint.
///
/// Clones share the registration. It ends when the last clone, and the last [`ShadowMemory`] taken from one,
/// is dropped.
#[derive(Clone, Debug)]
pub struct ShadowReader {
    registration: Arc<Registration>,
}

impl ShadowReader {
    /// Registers with the daemon that listens at `path`, for DMA of `endpoint`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(path: &Path, endpoint: EndpointId) -> Result<Self, ConnectError> {
        Ok(Self {
            registration: Arc::new(Registration::connect(path, endpoint)?),
        })
    }

    /// The endpoint that this process is registered for.
    pub fn endpoint(&self) -> EndpointId {
        self.registration.session.endpoint
    }

    /// Whether the connection to the daemon still stands. Without it every access fails.
    pub fn is_connected(&self) -> bool {
        self.registration.session.connected.load(Ordering::Acquire)
    }

    /// A view of guest memory as the endpoint sees it.
    ///
    /// When the VMM removes memory, accesses through older views fail with [`AccessError::Outdated`]. When it
    /// adds memory, older views do not reach it. In both cases take a new view.
    pub fn memory(&self) -> ShadowMemory {
        let memory = self.registration.session.memory.lock().clone();
        let iommu = ShadowIommu {
            registration: self.registration.clone(),
            generation: memory.generation,
        };
        IommuMemory::new(memory.regions, iommu, true, ())
    }

    /// Whether the VMM has added or removed guest memory since the view `memory` was taken.
    pub fn has_changed(&self, memory: &ShadowMemory) -> bool {
        self.registration.session.memory.lock().generation != memory.iommu().generation
    }

    /// Begins an access. Translations made while it is in progress stay valid until it ends.
    ///
    /// An UNMAP of the guest waits until the access has ended, so the holder must not block. The daemon kills
    /// this process if the access lasts longer than `patience-ms`.
    ///
    /// # Errors
    /// [`AccessError::Busy`] if this process has as many accesses in progress as it may have.
    pub fn enter(&self) -> Result<AccessGuard<'_>, AccessError> {
        let session = &*self.registration.session;
        let inside = session.enter().ok_or(AccessError::Busy)?;
        Ok(AccessGuard { session, inside })
    }

    /// Refused accesses that were not reported to the daemon, because its socket was full or closed.
    pub fn faults_unreported(&self) -> u64 {
        self.registration
            .session
            .faults_unreported
            .load(Ordering::Relaxed)
    }
}

/// An access in progress. It ends when this is dropped.
#[derive(Debug)]
pub struct AccessGuard<'a> {
    session: &'a Session,
    inside: EpochGuard<'a>,
}

impl AccessGuard<'_> {
    /// Translates `iova`. The caller may use the guest-physical address until this access ends. The library
    /// reports a refused access to the guest.
    ///
    /// # Errors
    /// See [`AccessError`].
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Translation, AccessError> {
        debug_assert!(self.inside.word.load(Ordering::Relaxed) & 1 == 1);
        let found = self.session.translate(iova, access);
        if let Err(fault @ AccessError::Fault { .. }) = &found {
            self.session.report(fault);
        }
        found
    }
}
