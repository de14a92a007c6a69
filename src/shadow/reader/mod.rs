//! The reader's side: guest memory through the IOMMU, for devices in processes of their own.

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

use self::access::Inside;
pub use self::error::{AccessError, ConnectError};
pub use self::iommu::{ShadowIommu, TlbGuard};
use self::session::{Registration, Session};
use crate::address::{Access, Iova};
use crate::ids::EndpointId;
use crate::page_table::Translation;

/// Guest memory as an endpoint sees it.
pub type ShadowMemory = IommuMemory<GuestMemoryMmap, ShadowIommu>;

/// A process's registration for one endpoint. Clones share it; it ends with the last of them and
/// of what was got from them.
#[derive(Clone, Debug)]
pub struct ShadowReader {
    connection: Arc<Registration>,
}

impl ShadowReader {
    /// Registers with the daemon that listens at `path`, for DMA of `endpoint`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(path: &Path, endpoint: EndpointId) -> Result<Self, ConnectError> {
        Ok(Self {
            connection: Arc::new(Registration::connect(path, endpoint)?),
        })
    }

    /// What this process reads for.
    pub fn endpoint(&self) -> EndpointId {
        self.connection.shared.endpoint
    }

    /// Whether the daemon is still there.
    pub fn is_connected(&self) -> bool {
        self.connection.shared.connected.load(Ordering::Acquire)
    }

    /// Guest memory as the endpoint sees it from now on.
    ///
    /// When memory has gone since, accesses through what this returns fail with
    /// [`AccessError::Outdated`]; memory that has come is not in it. Ask again then.
    pub fn memory(&self) -> ShadowMemory {
        let memory = self.connection.shared.memory.lock().clone();
        let iommu = ShadowIommu {
            connection: self.connection.clone(),
            generation: memory.generation,
        };
        IommuMemory::new(memory.regions, iommu, true, ())
    }

    /// Whether memory has come or gone since `memory` was asked for.
    pub fn has_changed(&self, memory: &ShadowMemory) -> bool {
        self.connection.shared.memory.lock().generation != memory.iommu().generation
    }

    /// Begins an access. What is translated before it ends stays usable until then.
    ///
    /// The guest waits for it where it unmaps something: it must not last, and the process is killed
    /// where it lasts longer than the daemon's patience.
    ///
    /// # Errors
    /// [`AccessError::Busy`].
    pub fn enter(&self) -> Result<AccessGuard<'_>, AccessError> {
        let shared = &*self.connection.shared;
        let inside = shared.enter().ok_or(AccessError::Busy)?;
        Ok(AccessGuard { shared, inside })
    }

    /// Refused accesses the daemon could not be told of, because it did not listen.
    pub fn faults_unsaid(&self) -> u64 {
        self.connection.shared.faults_unsaid.load(Ordering::Relaxed)
    }
}

/// An access in progress.
#[derive(Debug)]
pub struct AccessGuard<'a> {
    shared: &'a Session,
    inside: Inside<'a>,
}

impl AccessGuard<'_> {
    /// Where `iova` leads. The guest-physical address may be used until this access ends.
    ///
    /// # Errors
    /// See [`AccessError`].
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Translation, AccessError> {
        debug_assert!(self.inside.word.load(Ordering::Relaxed) & 1 == 1);
        let found = self.shared.find(iova, access);
        if let Err(fault @ AccessError::Fault { .. }) = &found {
            self.shared.report(fault);
        }
        found
    }
}
