//! The reader as an IOMMU of `vm-memory`.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::iommu::{Error as IommuError, IotlbIterator, IovaRange as VmIovaRange};
use vm_memory::{GuestAddress, Iommu, Iotlb, Permissions};

use super::access::EpochGuard;
use super::registration::Registration;
use crate::address::{Access, Iova};

/// Translates for `vm-memory`, through the page tables of the daemon.
#[derive(Clone, Debug)]
pub struct ShadowIommu {
    pub(super) registration: Arc<Registration>,
    /// The generation of guest memory that the view holds.
    pub(super) generation: u64,
}

impl Iommu for ShadowIommu {
    type IotlbGuard<'a> = TlbGuard<'a>;

    /// Begins an access and translates `length` bytes at `iova`. A refused access is reported to the guest. Waits for the
    /// daemon as [`ShadowReader::enter`](super::ShadowReader::enter) does.
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<TlbGuard<'_>>, IommuError> {
        let shared = &*self.registration.shared;
        let wanted = Access {
            read: access.allow(Permissions::Read),
            write: access.allow(Permissions::Write),
        };
        let found = shared.translate_range(Iova(iova.0), length as u64, wanted, self.generation);
        let refused = match found {
            Ok(inside) => match Iotlb::lookup(TlbGuard(inside), iova, length, access) {
                Ok(found) => return Ok(found),
                Err(_) => "the library lost the translation; report this as its bug".to_owned(),
            },
            Err(refused) => refused.to_string(),
        };
        Err(IommuError::CannotResolve {
            iova_range: VmIovaRange { base: iova, length },
            reason: refused,
        })
    }
}

/// An access in progress with its translation. The access ends when this is dropped.
#[derive(Debug)]
pub struct TlbGuard<'a>(EpochGuard<'a>);

impl Deref for TlbGuard<'_> {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.0.lane.tlb.iotlb
    }
}
