//! Looking at the core piece by piece: nobody who looks keeps it locked for long.

use super::{Domain, DomainState, EndpointState, Iommu};
use crate::address::{IovaRange, Mapping};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::Table;

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Live domains.
    pub domains: u64,
    /// Live mappings.
    pub mappings: u64,
    /// Bytes they cover.
    pub mapped_bytes: u64,
    /// Endpoints that are attached to a domain.
    pub attached: u64,
    /// Endpoints that are blocked because something failed.
    pub quarantined: u64,
}

/// Where counting goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// With the domains from this one on.
    Domain(DomainId),
    /// With the endpoints from this one on.
    Endpoint(EndpointId),
}

impl Iommu {
    /// Adds up to `most` domains or endpoints to `totals`. Returns where to go on, if that is not all;
    /// it begins with the first domain.
    pub fn add_totals(&self, totals: &mut Totals, from: Next, most: usize) -> Option<Next> {
        match from {
            Next::Domain(from) => {
                let mut rest = self.domains.range(from..);
                for (_, domain) in rest.by_ref().take(most) {
                    totals.domains += 1;
                    if let Some(table) = &domain.table {
                        totals.mappings += table.mapping_count();
                        totals.mapped_bytes += table.mapped_bytes();
                    }
                }
                let next = rest.next().map(|(&id, _)| Next::Domain(id));
                next.or(Some(Next::Endpoint(EndpointId(0))))
            }
            Next::Endpoint(from) => {
                let mut rest = self.endpoints.range(from..);
                for (_, endpoint) in rest.by_ref().take(most) {
                    totals.attached += u64::from(endpoint.domain.is_some());
                    totals.quarantined += u64::from(endpoint.quarantined);
                }
                rest.next().map(|(&id, _)| Next::Endpoint(id))
            }
        }
    }

    /// The endpoints from this one on, in the order of their IDs, touched by the guest or not.
    pub fn endpoints_from(&self, from: EndpointId) -> impl Iterator<Item = EndpointState> {
        self.topology()
            .ranges()
            .flat_map(move |entry| {
                let first = entry.range.first().endpoint_id().0.max(from.0);
                first..=entry.range.last().endpoint_id().0
            })
            .filter_map(|id| self.endpoint(EndpointId(id)))
    }

    /// The domains from this one on, in the order of their IDs.
    pub fn domains_from(&self, from: DomainId) -> impl Iterator<Item = DomainState> {
        self.domains
            .range(from..)
            .map(|(&id, domain)| domain.state(id))
    }

    /// Whether there is such a domain now.
    pub fn has_domain(&self, domain: DomainId) -> bool {
        self.domains.contains_key(&domain)
    }

    /// The mappings of a domain that share an address with `range`, in the order of addresses.
    pub fn mappings_in(&self, domain: DomainId, range: IovaRange) -> impl Iterator<Item = Mapping> {
        self.domains
            .get(&domain)
            .and_then(|d| d.table.as_ref())
            .into_iter()
            .flat_map(move |table| table.mappings_in(&self.arena, range))
    }
}

impl Domain {
    /// The domain as an operator sees it.
    pub(super) fn state(&self, id: DomainId) -> DomainState {
        DomainState {
            id,
            bypass: self.is_bypass(),
            endpoints: self.members.iter().copied().collect(),
            mappings: self.table.as_ref().map_or(0, Table::mapping_count),
            mapped_bytes: self.table.as_ref().map_or(0, Table::mapped_bytes),
        }
    }
}
