//! The state that the answers promise to the guest.

use std::collections::{BTreeMap, BTreeSet};

use super::bed::{ALL, DEVERR, OK, Req};
use crate::address::{Iova, Mapping};
use crate::ids::{DomainId, EndpointId};
use crate::iommu::Iommu;

/// What the answers promise.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    attached: BTreeMap<EndpointId, DomainId>,
    domains: BTreeMap<DomainId, BTreeMap<u64, Mapping>>,
    /// Mappings of an UNMAP that was refused because a backend failed, or because it has ended too many processes: they
    /// may be gone.
    doubtful: BTreeSet<(DomainId, u64)>,
    /// Endpoints whose ATTACH or DETACH was refused for such a reason, and the domains that the requests asked for.
    moving: BTreeMap<EndpointId, BTreeSet<Option<DomainId>>>,
}

impl Model {
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn leave(&mut self, endpoint: EndpointId) {
        let Some(domain) = self.attached.remove(&endpoint) else {
            return;
        };
        let is_left = self.attached.values().any(|d| *d == domain);
        let may_have_come = self.may_be_entered(domain);
        if is_left || may_have_come {
            self.doubt(domain);
        } else {
            self.domains.remove(&domain);
        }
    }

    /// If all members of a domain may have left it, the domain may have ended, and another one begun with its number.
    fn doubt(&mut self, domain: DomainId) {
        let mut members = self.attached.iter().filter(|(_, d)| **d == domain);
        if members.all(|(endpoint, _)| self.moving.contains_key(endpoint)) {
            let mappings = self.domains.get(&domain).into_iter().flatten();
            self.doubtful
                .extend(mappings.map(|(first, _)| (domain, *first)));
        }
    }

    fn may_be_entered(&self, domain: DomainId) -> bool {
        self.moving.values().any(|to| to.contains(&Some(domain)))
    }

    fn may_move(&mut self, endpoint: EndpointId, to: Option<DomainId>) {
        self.moving.entry(endpoint).or_default().insert(to);
        if let Some(&domain) = self.attached.get(&endpoint) {
            self.doubt(domain);
        }
    }

    /// Applies an answered request.
    pub(super) fn apply(&mut self, request: Req, status: Option<u8>) {
        assert_eq!(status.is_none(), request == Req::Junk, "{request:?}");
        match (request, status) {
            (Req::Attach(endpoint, domain, _), Some(OK)) => {
                self.moving.remove(&endpoint);
                if self.attached.get(&endpoint) != Some(&domain) {
                    self.domains.entry(domain).or_default();
                    self.leave(endpoint);
                    self.attached.insert(endpoint, domain);
                }
            }
            (Req::Detach(endpoint, _), Some(OK)) => {
                self.moving.remove(&endpoint);
                self.leave(endpoint);
            }
            (Req::Attach(endpoint, domain, _), Some(DEVERR)) => {
                self.may_move(endpoint, Some(domain));
            }
            (Req::Detach(endpoint, _), Some(DEVERR)) => self.may_move(endpoint, None),
            (Req::Map(domain, ..), Some(OK)) => {
                let mappings = self.domains.entry(domain).or_default();
                let mapping = request.mapping();
                mappings.retain(|first, m| {
                    let is_doubtful = self.doubtful.contains(&(domain, *first));
                    !(is_doubtful && m.range.overlaps(mapping.range))
                });
                let overlaps = mappings.values().any(|m| m.range.overlaps(mapping.range));
                assert!(!overlaps, "{request:?}");
                self.doubtful.remove(&(domain, mapping.range.first().0));
                mappings.insert(mapping.range.first().0, mapping);
            }
            (Req::Unmap(domain, ..), Some(status)) => {
                let range = request.range();
                if self.may_be_entered(domain) {
                    self.domains.entry(domain).or_default();
                }
                let Some(mappings) = self.domains.get_mut(&domain) else {
                    assert_ne!(status, OK);
                    return;
                };
                if status == OK {
                    let splits = |m: &Mapping| range.overlaps(m.range) && !range.covers(m.range);
                    // The UNMAP shows that these are gone.
                    mappings.retain(|first, m| {
                        !(splits(m) && self.doubtful.contains(&(domain, *first)))
                    });
                    assert!(!mappings.values().any(splits), "{request:?}");
                    mappings.retain(|_, m| !range.covers(m.range));
                } else if status == DEVERR {
                    let covered = mappings.values().filter(|m| range.covers(m.range));
                    let covered = covered.map(|m| (domain, m.range.first().0));
                    self.doubtful.extend(covered);
                }
            }
            _ => {}
        }
    }

    pub(super) fn check(&mut self, iommu: &Iommu) {
        for (domain, first) in std::mem::take(&mut self.doubtful) {
            let mut there = iommu.mappings(domain, Iova(first));
            if there.next().is_none_or(|m| m.range.first().0 != first)
                && let Some(mappings) = self.domains.get_mut(&domain)
            {
                mappings.remove(&first);
            }
        }
        for (endpoint, asked) in std::mem::take(&mut self.moving) {
            let seen = iommu.endpoint(endpoint).expect("an endpoint");
            let to = seen.domain;
            if asked.contains(&to) && self.attached.get(&endpoint).copied() != to {
                if let Some(domain) = to {
                    self.domains.entry(domain).or_default();
                }
                self.leave(endpoint);
                if let Some(domain) = to {
                    self.attached.insert(endpoint, domain);
                }
            }
        }
        let attached = &self.attached;
        self.domains
            .retain(|id, _| attached.values().any(|d| d == id));
        for endpoint in ALL {
            let seen = iommu.endpoint(endpoint).expect("an endpoint");
            assert_eq!(seen.domain, self.attached.get(&endpoint).copied());
        }
        let ids: Vec<_> = iommu.domain_ids().collect();
        assert_eq!(ids, self.domains.keys().copied().collect::<Vec<_>>());
        for (&id, mappings) in &self.domains {
            let table: Vec<_> = iommu.mappings(id, Iova(0)).collect();
            assert_eq!(table, mappings.values().copied().collect::<Vec<_>>());
        }
    }
}
