//! The offer to the guest, which stays as it is as long as the guest runs.

use serde::{Deserialize, Serialize};

use super::Iommu;
use crate::address::{IovaRange, PageMask};
use crate::store::OfferWords;

/// The part of the offer that depends on the endpoints of the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestOffer {
    /// The first address that MAP accepts.
    first: u64,
    /// The last one.
    last: u64,
    /// The page sizes.
    page_sizes: u64,
    /// Bytes of PROBE's property list.
    probe_size: u32,
}

impl GuestOffer {
    /// Bytes of PROBE's property list.
    pub fn probe_size(&self) -> u32 {
        self.probe_size
    }
}

impl Iommu {
    /// The present offer.
    pub fn guest_offer(&self) -> GuestOffer {
        GuestOffer {
            first: self.input.first().0,
            last: self.input.last().0,
            page_sizes: self.page_sizes.bits(),
            probe_size: self.probe_size,
        }
    }

    /// Narrows the offer to that of an earlier process, which had endpoints that this one has not any more. Must be called
    /// after the backends of the start are added, and before the device is made. Does nothing where this process offers less:
    /// the restore notices that.
    pub fn narrow_offer(&mut self, offer: &GuestOffer) {
        let ends = [offer.first, offer.last].map(crate::address::Iova);
        if let Some(earlier) = IovaRange::new(ends[0], ends[1])
            && self.input.covers(earlier)
        {
            self.input = earlier;
        }
        if self.page_sizes.bits() & offer.page_sizes == offer.page_sizes
            && let Some(earlier) = PageMask::new(offer.page_sizes)
        {
            self.page_sizes = earlier;
        }
        self.offer_probe_size(self.probe_size.max(offer.probe_size));
    }

    /// The device offers the guest a property list of so many bytes for PROBE, or of more if an earlier process did so.
    /// Must be called before the guest runs. Returns the size.
    pub fn offer_probe_size(&mut self, bytes: u32) -> u32 {
        self.probe_size = self.probe_size.max(bytes);
        self.store.set_offer(&self.offer_words());
        self.probe_size
    }

    pub(super) fn offer_words(&self) -> OfferWords {
        OfferWords {
            input: self.input,
            page_sizes: self.page_sizes.bits(),
            levels: self.levels,
            last_domain: self.last_domain,
            probe_size: self.probe_size,
        }
    }
}
