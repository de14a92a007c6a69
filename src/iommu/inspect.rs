//! Looking at the core piece by piece: nobody who looks keeps it locked for long.

use super::domain::Domain;
use super::error::RequestError;
use super::{Endpoint, Iommu};
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};
use crate::backends::Target;
use crate::faults::{Fault, FaultReason};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Table, Translation};
use crate::topology::ReservedRegions;

/// What an endpoint's DMA meets right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// The mappings of its domain.
    Translated,
    /// Guest-physical addresses as they are.
    Bypass,
    /// Nothing.
    Blocked,
}

/// An endpoint as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointState {
    /// Its ID.
    pub id: EndpointId,
    /// The domain it is attached to.
    pub domain: Option<DomainId>,
    /// What its DMA meets.
    pub dma: Dma,
    /// Blocked because something failed.
    pub quarantined: bool,
}

/// A domain as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Its ID.
    pub id: DomainId,
    /// A bypass domain, without mappings.
    pub bypass: bool,
    /// The endpoints attached to it.
    pub endpoints: Vec<EndpointId>,
    /// Live mappings.
    pub mappings: u64,
    /// Bytes they cover.
    pub mapped_bytes: u64,
}

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
    /// The reserved regions of an endpoint, for PROBE.
    ///
    /// # Errors
    /// [`RequestError::NoSuchEndpoint`].
    pub fn probe(&self, endpoint: EndpointId) -> Result<&ReservedRegions, RequestError> {
        self.topology
            .endpoint(endpoint)
            .map(|info| info.reserved)
            .ok_or(RequestError::NoSuchEndpoint(endpoint))
    }

    /// Where an access of `endpoint` at `iova` goes.
    ///
    /// # Errors
    /// The fault to report where it goes nowhere.
    pub fn translate(
        &self,
        endpoint: EndpointId,
        iova: Iova,
        access: Access,
    ) -> Result<Translation, Fault> {
        let fault = |reason| Fault {
            endpoint,
            reason,
            access,
            address: iova,
        };
        let Some(info) = self.topology.endpoint(endpoint) else {
            return Err(fault(FaultReason::Unknown));
        };
        let state = self.endpoints.get(&endpoint).copied().unwrap_or_default();
        let table = match (self.dma(endpoint, &state), state.domain) {
            (Dma::Translated, Some(domain)) => {
                self.domains.get(&domain).and_then(|d| d.table.as_ref())
            }
            (Dma::Bypass, _) => {
                return bypass_translation(info.reserved, iova).ok_or(fault(FaultReason::Mapping));
            }
            // OPS-5
            (Dma::Blocked, None) if !state.quarantined => return Err(fault(FaultReason::Domain)),
            (Dma::Blocked, _) | (Dma::Translated, None) => None,
        };
        let Some(table) = table else {
            return Err(fault(FaultReason::Unknown));
        };
        table
            .translate(&self.arena, iova)
            .filter(|t| t.access.allows(access))
            .ok_or(fault(FaultReason::Mapping))
    }

    /// One endpoint's state, or `None` where there is no such endpoint.
    pub fn endpoint(&self, id: EndpointId) -> Option<EndpointState> {
        self.topology.endpoint(id)?;
        let endpoint = self.endpoints.get(&id).copied().unwrap_or_default();
        Some(EndpointState {
            id,
            domain: endpoint.domain,
            dma: self.dma(id, &endpoint),
            quarantined: endpoint.quarantined,
        })
    }

    /// The first `touched` of the endpoints the guest has touched, and of the others the first
    /// `untouched` ones.
    pub fn endpoints(
        &self,
        touched: usize,
        untouched: usize,
    ) -> impl Iterator<Item = EndpointState> {
        let others = self
            .topology
            .ranges()
            .flat_map(|r| r.range.first().endpoint_id().0..=r.range.last().endpoint_id().0)
            .map(EndpointId)
            .filter(|id| !self.endpoints.contains_key(id))
            .take(untouched);
        let known = self.endpoints.keys().copied().take(touched);
        let mut ids: Vec<_> = known.chain(others).collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.endpoint(id))
    }

    /// The IDs of the domains, in their order.
    pub fn domain_ids(&self) -> impl Iterator<Item = DomainId> {
        self.domains.keys().copied()
    }

    /// The domains, in the order of their IDs.
    pub fn domains(&self) -> impl Iterator<Item = DomainState> {
        self.domains_from(DomainId(0))
    }

    /// The mappings of a domain from the one at or after `from` on, in the order of addresses.
    pub fn mappings(&self, domain: DomainId, from: Iova) -> impl Iterator<Item = Mapping> {
        self.domains
            .get(&domain)
            .and_then(|d| d.table.as_ref())
            .into_iter()
            .flat_map(move |table| table.mappings(&self.arena, from))
    }

    /// What the DMA of an endpoint in this state meets; in doubt, nothing.
    pub(super) fn dma(&self, id: EndpointId, endpoint: &Endpoint) -> Dma {
        if endpoint.quarantined || endpoint.suspended {
            return Dma::Blocked;
        }
        match endpoint.domain {
            Some(domain) => match self.domains.get(&domain) {
                Some(domain) if domain.is_bypass() => Dma::Bypass,
                Some(_) => Dma::Translated,
                None => Dma::Blocked,
            },
            None => match self.unattached_target(id) {
                Target::Bypass => Dma::Bypass,
                Target::Blocked | Target::Domain(_) => Dma::Blocked,
            },
        }
    }

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

/// Identity, except in the endpoint's reserved regions (RESV-5).
fn bypass_translation(reserved: &ReservedRegions, iova: Iova) -> Option<Translation> {
    let rest = IovaRange::new(iova, Iova(u64::MAX))?;
    let last = match reserved.overlapping(rest) {
        Some(region) if region.range.contains(iova) => return None,
        Some(region) => Iova(region.range.first().0 - 1),
        None => Iova(u64::MAX),
    };
    Some(Translation {
        gpa: Gpa(iova.0),
        contiguous_last: last,
        access: Access::READ_WRITE,
        mmio: false,
    })
}
