//! The reader: guest memory behind the IOMMU, for a device in a process of its own.

mod access;
mod error;
mod iommu;
mod lane;
mod memory;
mod registration;
mod session;
mod tlb;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vm_memory::{GuestMemoryMmap, IommuMemory};

use self::access::EpochGuard;
pub use self::error::{AccessError, ConnectError};
pub use self::iommu::{ShadowIommu, TlbGuard};
use self::registration::{Registration, Shared};
use crate::address::{Access, Iova};
use crate::ids::EndpointId;
use crate::page_table::Translation;

/// Guest memory as the endpoint sees it: addresses are I/O virtual addresses.
pub type ShadowMemory = IommuMemory<GuestMemoryMmap, ShadowIommu>;

/// A registration of this process for the DMA of one endpoint.
///
/// It outlives the daemon. When the connection ends, the library lets the page tables go and registers again at the same
/// path, until it succeeds. Accesses wait meanwhile, see [`Self::set_patience`]; views of guest memory stay usable if the
/// next daemon has the same memory.
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
        self.registration.shared.endpoint
    }

    /// Whether a daemon is connected now. If not, the library tries to register again.
    pub fn is_connected(&self) -> bool {
        self.registration.shared.is_registered()
    }

    /// How often this process has registered with a daemon: 1 at first, and one more for each daemon after that.
    pub fn registrations(&self) -> u64 {
        self.registration.shared.registrations()
    }

    /// Sets how long after the loss of the daemon an access waits for the next registration; 10 s at first. Accesses fail
    /// with [`AccessError::Disconnected`] after that, and at once if it is zero. Holds for all clones. A thread that has an
    /// access with another handle in progress never waits.
    pub fn set_patience(&self, patience: Duration) {
        self.registration.shared.set_patience(patience);
    }

    /// A view of guest memory as the endpoint sees it.
    ///
    /// When the VMM removes memory, accesses through older views fail with [`AccessError::Outdated`]. When it
    /// adds memory, older views do not reach it. In both cases take a new view.
    pub fn memory(&self) -> ShadowMemory {
        let current = self.registration.shared.views.current.lock();
        let iommu = ShadowIommu {
            registration: self.registration.clone(),
            generation: current.generation,
        };
        IommuMemory::new(current.regions.clone(), iommu, true, ())
    }

    /// Whether the VMM has added or removed guest memory since the view `memory` was taken.
    pub fn has_changed(&self, memory: &ShadowMemory) -> bool {
        let current = self.registration.shared.views.current.lock().generation;
        current != memory.iommu().generation
    }

    /// Begins an access. Translations made while it is in progress stay valid until it ends.
    ///
    /// An UNMAP of the guest waits until the access has ended, so the holder must not block. The daemon kills
    /// this process if the access lasts longer than `patience-ms`.
    ///
    /// Waits for the next registration if no daemon is connected. An access that began before the loss of the daemon goes
    /// on, and so does one that begins within it.
    ///
    /// # Errors
    /// [`AccessError::Busy`] if this process has as many accesses in progress as it may have;
    /// [`AccessError::Disconnected`] if no daemon is connected, after the wait.
    pub fn enter(&self) -> Result<AccessGuard<'_>, AccessError> {
        let shared = &*self.registration.shared;
        let inside = shared.enter()?;
        Ok(AccessGuard { shared, inside })
    }

    /// Refused accesses that were not reported to the daemon, because its socket was full or closed. They are not
    /// reported later.
    pub fn faults_unreported(&self) -> u64 {
        let unreported = &self.registration.shared.faults_unreported;
        unreported.load(Ordering::Relaxed)
    }
}

/// An access in progress. It ends when this is dropped.
#[derive(Debug)]
pub struct AccessGuard<'a> {
    shared: &'a Shared,
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
        let found = self.inside.translate(iova, access);
        if let Err(fault @ AccessError::Fault { .. }) = &found {
            self.shared.report(self.inside.session().as_deref(), fault);
        }
        found
    }
}
