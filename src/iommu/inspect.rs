//! Reading the core. Long lists are read in pieces, so that no reader holds the lock for long.

use super::domain::Domain;
use super::error::RequestError;
use super::{EndpointRecord, Iommu};
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};
use crate::backends::Target;
use crate::faults::{Fault, FaultReason};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Table, Translation};
use crate::topology::ReservedRegions;

/// How the IOMMU currently treats an endpoint's DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// The mappings of its domain translate it.
    Translated,
    /// Its addresses are guest-physical.
    Bypass,
    /// It is blocked.
    Blocked,
}

/// The state of an endpoint, as reported to operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointState {
    /// Its ID.
    pub id: EndpointId,
    /// The domain it is attached to.
    pub domain: Option<DomainId>,
    /// How the IOMMU treats its DMA.
    pub dma: Dma,
    /// Blocked because a backend failed.
    pub quarantined: bool,
    /// Blocked because its place in the guest is not the one in the topology, or not known.
    pub misplaced: bool,
}

/// The state of a domain, as reported to operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Its ID.
    pub id: DomainId,
    /// Whether it is a bypass domain, which has no mappings.
    pub bypass: bool,
    /// The endpoints attached to it.
    pub endpoints: Vec<EndpointId>,
    /// The number of live mappings.
    pub mappings: u64,
    /// The bytes they cover.
    pub mapped_bytes: u64,
}

/// Sums over all domains and endpoints.
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
    /// Quarantined endpoints.
    pub quarantined: u64,
}

/// The position of a count in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TotalsCursor {
    /// Continue with the domains from this one on.
    Domain(DomainId),
    /// Continue with the endpoints from this one on.
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

    /// Translates an access of `endpoint` at `iova`.
    ///
    /// # Errors
    /// The fault to report if the access is refused.
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

    /// The state of one endpoint, or `None` if it does not exist.
    pub fn endpoint(&self, id: EndpointId) -> Option<EndpointState> {
        self.topology.endpoint(id)?;
        let endpoint = self.endpoints.get(&id).copied().unwrap_or_default();
        Some(EndpointState {
            id,
            domain: endpoint.domain,
            dma: self.dma(id, &endpoint),
            quarantined: endpoint.quarantined,
            misplaced: self.is_withheld(id),
        })
    }

    /// The first `touched` endpoints that the guest has attached to a domain or that are
    /// quarantined, and the first `untouched` of all other endpoints, in the order of their IDs.
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

    /// The IDs of the domains, in ascending order.
    pub fn domain_ids(&self) -> impl Iterator<Item = DomainId> {
        self.domains.keys().copied()
    }

    /// The domains, in the order of their IDs.
    pub fn domains(&self) -> impl Iterator<Item = DomainState> {
        self.domains_from(DomainId(0))
    }

    /// The mappings of a domain from the one that covers or follows `from`, in the order of addresses.
    pub fn mappings(&self, domain: DomainId, from: Iova) -> impl Iterator<Item = Mapping> {
        self.domains
            .get(&domain)
            .and_then(|d| d.table.as_ref())
            .into_iter()
            .flat_map(move |table| table.mappings(&self.arena, from))
    }

    /// The number of the host's address spaces that the backends could not destroy yet.
    pub fn condemned_spaces(&self) -> usize {
        let backends = self.backends.iter();
        backends.map(|backend| backend.condemned_spaces()).sum()
    }

    /// How the IOMMU treats the DMA of an endpoint in this state. DMA in doubt counts as blocked.
    pub(super) fn dma(&self, id: EndpointId, endpoint: &EndpointRecord) -> Dma {
        if endpoint.quarantined || endpoint.suspended || self.is_withheld(id) {
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

    /// Adds up to `limit` domains or endpoints to `totals`, starting at `from`. The first call must
    /// start at the first domain. Returns the position to continue at, or `None` at the end.
    pub fn add_totals(
        &self,
        totals: &mut Totals,
        from: TotalsCursor,
        limit: usize,
    ) -> Option<TotalsCursor> {
        match from {
            TotalsCursor::Domain(from) => {
                let mut rest = self.domains.range(from..);
                for (_, domain) in rest.by_ref().take(limit) {
                    totals.domains += 1;
                    if let Some(table) = &domain.table {
                        totals.mappings += table.mapping_count();
                        totals.mapped_bytes += table.mapped_bytes();
                    }
                }
                let next = rest.next().map(|(&id, _)| TotalsCursor::Domain(id));
                next.or(Some(TotalsCursor::Endpoint(EndpointId(0))))
            }
            TotalsCursor::Endpoint(from) => {
                let mut rest = self.endpoints.range(from..);
                for (_, endpoint) in rest.by_ref().take(limit) {
                    totals.attached += u64::from(endpoint.domain.is_some());
                    totals.quarantined += u64::from(endpoint.quarantined);
                }
                rest.next().map(|(&id, _)| TotalsCursor::Endpoint(id))
            }
        }
    }

    /// All endpoints from this one on, in the order of their IDs.
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

    /// Whether this domain exists.
    pub fn has_domain(&self, domain: DomainId) -> bool {
        self.domains.contains_key(&domain)
    }

    /// The mappings of a domain that overlap `range`, in the order of addresses.
    pub fn mappings_in(&self, domain: DomainId, range: IovaRange) -> impl Iterator<Item = Mapping> {
        self.domains
            .get(&domain)
            .and_then(|d| d.table.as_ref())
            .into_iter()
            .flat_map(move |table| table.mappings_in(&self.arena, range))
    }
}

impl Domain {
    /// The state of this domain.
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

/// The translation in bypass mode: identity, except in the endpoint's reserved regions (RESV-5).
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
