//! Endpoints that the guest knows under other addresses than the core, or may know so.
//!
//! An endpoint is named by its PCI address, and the bus number in it is the choice of the guest's firmware. If firmware
//! has chosen another one than the table says, a request for an endpoint is about another device than the one behind
//! its backend. Such endpoints are withheld: their DMA is blocked, and ATTACH is refused.

use super::Iommu;
use super::domain::Domain;
use super::target::target_of;
use crate::backends::Target;
use crate::ids::EndpointId;
use crate::topology::{PciAddress, PciRange};

impl Iommu {
    /// Withholds the endpoints in `ranges`, and no others. A withheld endpoint stays in its domain, and is blocked.
    /// Endpoints that are withheld no more get the target of their domain again.
    pub fn withhold(&mut self, ranges: Vec<PciRange>) {
        self.spares_attached = false;
        let before = std::mem::replace(&mut self.withheld, ranges);
        let changed: Vec<_> = self
            .backend_of
            .keys()
            .copied()
            .filter(|&endpoint| is_in(&before, endpoint) != self.is_withheld(endpoint))
            .collect();
        // Block before others reach memory: two of them may have changed places.
        for &endpoint in &changed {
            let record = self.endpoints.get(&endpoint);
            let is_quarantined = record.is_some_and(|record| record.quarantined);
            if self.is_withheld(endpoint) && !is_quarantined {
                self.retarget(endpoint, Target::Blocked);
            }
        }
        for endpoint in changed {
            let state = self.endpoints.get(&endpoint).copied().unwrap_or_default();
            if self.is_withheld(endpoint) || state.quarantined || state.suspended {
                continue;
            }
            let target = match state.domain {
                Some(domain) => {
                    let entry = self.domains.get(&domain);
                    target_of(domain, entry.is_some_and(Domain::is_bypass))
                }
                None => self.unattached_target(endpoint),
            };
            self.retarget(endpoint, target);
        }
    }

    /// Withholds the endpoints in `ranges` before [`Self::restore`], which lets those go that it finds in a domain: the
    /// earlier process may have withheld the others, and its memory does not say which. [`Self::withhold`] replaces all
    /// this.
    pub fn withhold_unattached(&mut self, ranges: Vec<PciRange>) {
        self.withhold(ranges);
        self.spares_attached = self.adopting;
    }

    /// Lets the endpoints go that [`Self::withhold_unattached`] does not mean. Their backends adopt them afterwards.
    pub(super) fn spare_attached(&mut self) {
        if !std::mem::replace(&mut self.spares_attached, false) {
            return;
        }
        let attached = self.endpoints.iter().filter(|(_, e)| e.domain.is_some());
        for (&endpoint, _) in attached {
            let address = PciAddress::from_endpoint_id(endpoint);
            let hit = |range: &PciRange| range.contains(address);
            while let Some(at) = self.withheld.iter().position(hit) {
                let range = self.withheld.swap_remove(at);
                self.withheld.extend(range.without(address.into()));
            }
        }
    }

    /// Whether an endpoint is withheld.
    pub fn is_withheld(&self, endpoint: EndpointId) -> bool {
        is_in(&self.withheld, endpoint)
    }

    /// `target`, unless the endpoint is withheld.
    pub(super) fn allowed_target(&self, endpoint: EndpointId, target: Target) -> Target {
        if self.is_withheld(endpoint) {
            Target::Blocked
        } else {
            target
        }
    }
}

fn is_in(ranges: &[PciRange], endpoint: EndpointId) -> bool {
    let address = PciAddress::from_endpoint_id(endpoint);
    ranges.iter().any(|range| range.contains(address))
}
