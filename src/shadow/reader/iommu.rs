//! Guest memory behind the IOMMU, in the form that `vm-memory` asks for.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::iommu::{Error as IommuError, IotlbIterator, IovaRange as VmIovaRange};
use vm_memory::{GuestAddress, Iommu, Iotlb, Permissions};

use super::access::Inside;
use super::session::Registration;
use crate::address::{Access, Iova};

/// What `vm-memory` asks for translations.
#[derive(Clone, Debug)]
pub struct ShadowIommu {
    pub(super) connection: Arc<Registration>,
    /// The generation of memory it goes with.
    pub(super) generation: u64,
}

impl Iommu for ShadowIommu {
    type IotlbGuard<'a> = TlbGuard<'a>;

    /// Reports what is refused to the guest.
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<TlbGuard<'_>>, IommuError> {
        let shared = &*self.connection.shared;
        let wanted = Access {
            read: access.allow(Permissions::Read),
            write: access.allow(Permissions::Write),
        };
        let found = shared.fill(Iova(iova.0), length as u64, wanted, self.generation);
        let refused = match found {
            Ok(inside) => match Iotlb::lookup(TlbGuard(inside), iova, length, access) {
                Ok(found) => return Ok(found),
                Err(_) => "the translation was lost".to_owned(),
            },
            // The access is over here, so whoever waits for it does not wait for the report.
            Err(refused) => {
                shared.report(&refused);
                refused.to_string()
            }
        };
        Err(IommuError::CannotResolve {
            iova_range: VmIovaRange { base: iova, length },
            reason: refused,
        })
    }
}

/// A translation in use: the access lasts as long as this.
#[derive(Debug)]
pub struct TlbGuard<'a>(Inside<'a>);

impl Deref for TlbGuard<'_> {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.0.tlb.found
    }
}
