//! Switching endpoints to new targets in their backends, and quarantining endpoints when a backend
//! fails.

use std::collections::BTreeMap;

use super::domain::Domain;
use super::error::RequestError;
use super::{DriverState, Iommu};
use crate::address::{Iova, Mapping};
use crate::backends::{AttachError, BackendError, Contents, Target};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Arena, Levels, Table, TableOffset, TableReader};
use crate::topology::GroupId;
use crate::{error_limited, warn_limited};

impl Iommu {
    /// The target of an endpoint without a domain and without a group.
    pub(super) fn bypass_target(&self) -> Target {
        if self.bypass && self.driver == DriverState::Known {
            Target::Bypass
        } else {
            Target::Blocked
        }
    }

    /// The target of an endpoint without a domain.
    pub(super) fn unattached_target(&self, endpoint: EndpointId) -> Target {
        let group = self.topology.endpoint(endpoint).and_then(|i| i.group);
        match group {
            Some(group) if self.groups.is_active(group) => Target::Blocked,
            _ => self.bypass_target(),
        }
    }

    /// Switches the unattached members of a group, except one, to `target`.
    pub(super) fn retarget_unattached_mates(
        &mut self,
        group: Option<GroupId>,
        except: EndpointId,
        target: Target,
    ) {
        if group.is_none() {
            return;
        }
        let mates: Vec<_> = self
            .backend_of
            .keys()
            .copied()
            .filter(|e| *e != except)
            .filter(|e| self.endpoints.get(e).is_none_or(|s| s.domain.is_none()))
            .filter(|e| self.topology.endpoint(*e).and_then(|i| i.group) == group)
            .collect();
        for endpoint in mates {
            self.retarget(endpoint, target);
        }
    }

    /// Switches `endpoint` to `target` in its backend, the one at `index`. The backend reads the
    /// mappings from the page tables. Changes no state of the core. `new_domain` is the target's
    /// domain if it is not published yet.
    pub(super) fn switch(
        &mut self,
        index: usize,
        endpoint: EndpointId,
        target: Target,
        new_domain: Option<&Domain>,
    ) -> Result<(), AttachError> {
        let target = self.allowed_target(endpoint, target);
        let contents = DomainContents {
            domains: &self.domains,
            new_domain,
            arena: &self.arena,
        };
        self.backends[index].attach(endpoint, target, &contents)
    }

    /// Switches an endpoint in its backend, if it has one. On failure the endpoint is quarantined.
    pub(super) fn retarget(&mut self, endpoint: EndpointId, target: Target) {
        if self.adopting {
            return;
        }
        let Some(&index) = self.backend_of.get(&endpoint) else {
            return;
        };
        let target = self.allowed_target(endpoint, target);
        match self.switch(index, endpoint, target, None) {
            Ok(()) => {
                if let Some(state) = self.endpoints.get_mut(&endpoint)
                    && std::mem::replace(&mut state.quarantined, false)
                {
                    self.record_endpoint(endpoint);
                }
                // A restored core gives a backend a domain only when a member may use it.
                if let Target::Domain(domain) = target {
                    self.note_present(domain, index);
                }
            }
            Err(refusal) => {
                self.quarantine_stopped(index, refusal.cause());
                self.quarantine(endpoint, refusal.cause());
            }
        }
    }

    /// Notes that the backend at `index` has a domain and all its mappings.
    pub(super) fn note_present(&mut self, domain: DomainId, index: usize) {
        let domain = self.domains.get_mut(&domain);
        if let Some(used) = domain.and_then(|d| d.backends.get_mut(&index)) {
            used.present = true;
        }
    }

    /// Quarantines the endpoints that the backend at `index` has blocked because the switch of another endpoint failed.
    /// Returns their number.
    pub(super) fn quarantine_stopped(&mut self, index: usize, cause: &BackendError) -> usize {
        let stopped = self.backends[index].take_stopped();
        for &endpoint in &stopped {
            self.quarantine(endpoint, cause);
        }
        stopped.len()
    }

    /// Quarantines the members of a domain that are behind a failed backend, and returns their
    /// number. Makes the backend destroy the domain, because it is unknown which mappings it still
    /// has.
    pub(super) fn quarantine_members(
        &mut self,
        domain: DomainId,
        index: usize,
        cause: &BackendError,
    ) -> usize {
        let members: Vec<_> = self
            .domains
            .get(&domain)
            .into_iter()
            .flat_map(|d| &d.members)
            .copied()
            .filter(|e| self.backend_of.get(e) == Some(&index))
            .collect();
        for &endpoint in &members {
            self.quarantine(endpoint, cause);
        }
        if let Some(used) = self
            .domains
            .get_mut(&domain)
            .and_then(|d| d.backends.get_mut(&index))
        {
            used.present = false;
            self.backends[index].destroy_domain(domain);
        }
        members.len()
    }

    /// Blocks an endpoint by every means its backend has.
    pub(super) fn quarantine(&mut self, endpoint: EndpointId, cause: &BackendError) {
        error_limited!("endpoint {endpoint} is quarantined, its DMA blocked: {cause}");
        self.endpoints.entry(endpoint).or_default().quarantined = true;
        self.record_endpoint(endpoint);
        if let Some(&index) = self.backend_of.get(&endpoint) {
            self.backends[index].quarantine(endpoint);
        }
        let record = self.endpoints.get(&endpoint);
        if let Some(domain) = record.and_then(|record| record.domain) {
            self.note_unconfirmed(endpoint, domain);
        }
    }

    /// Notes a quarantined endpoint that may still use mappings of a domain.
    pub(super) fn note_unconfirmed(&mut self, endpoint: EndpointId, domain: DomainId) {
        if self.confirm_quarantine(endpoint).is_err()
            && let Some(domain) = self.domains.get_mut(&domain)
        {
            domain.unconfirmed.insert(endpoint);
        }
    }

    fn confirm_quarantine(&mut self, endpoint: EndpointId) -> Result<(), BackendError> {
        match self.backend_of.get(&endpoint) {
            Some(&index) => self.backends[index].confirm_quarantine(endpoint),
            None => Ok(()),
        }
    }

    /// Confirms that no quarantined endpoint uses mappings of a domain.
    ///
    /// # Errors
    /// One may still use mappings that were removed.
    #[cold]
    pub(super) fn confirm_quarantines(&mut self, domain: DomainId) -> Result<(), RequestError> {
        let found = self.domains.get(&domain).map(|d| &d.unconfirmed);
        let unconfirmed: Vec<_> = found.into_iter().flatten().copied().collect();
        let mut outcome = Ok(());
        for endpoint in unconfirmed {
            match self.confirm_quarantine(endpoint) {
                // Quarantined before.
                Err(cause) => outcome = Err(RequestError::Quarantined { cause, count: 0 }),
                Ok(()) => {
                    if let Some(domain) = self.domains.get_mut(&domain) {
                        domain.unconfirmed.remove(&endpoint);
                    }
                }
            }
        }
        outcome
    }

    /// Blocks members of a group until they follow it to its new domain.
    pub(super) fn suspend(&mut self, endpoints: &[EndpointId]) {
        if let [first, ..] = endpoints {
            warn_limited!(
                "{} endpoints from {first} on are blocked until they follow their group to \
                 another domain",
                endpoints.len()
            );
        }
        for &endpoint in endpoints {
            self.set_suspended(endpoint, true);
        }
    }

    /// Switches suspended members of a group back to their domain.
    pub(super) fn resume(&mut self, endpoints: &[EndpointId]) {
        for &endpoint in endpoints {
            self.set_suspended(endpoint, false);
        }
    }

    fn set_suspended(&mut self, endpoint: EndpointId, suspended: bool) {
        let Some(state) = self.endpoints.get_mut(&endpoint) else {
            return;
        };
        state.suspended = suspended;
        let state = *state;
        self.record_endpoint(endpoint);
        if state.quarantined {
            return;
        }
        let target = match state.domain {
            _ if suspended => Target::Blocked,
            Some(d) => target_of(d, self.domains.get(&d).is_some_and(Domain::is_bypass)),
            None => self.unattached_target(endpoint),
        };
        self.retarget(endpoint, target);
    }
}

/// The target of an endpoint that is attached to a domain.
pub(super) fn target_of(domain: DomainId, bypass: bool) -> Target {
    if bypass {
        Target::Bypass
    } else {
        Target::Domain(domain)
    }
}

/// The contents of the domains, for a backend that switches an endpoint.
pub(super) struct DomainContents<'a> {
    pub domains: &'a BTreeMap<DomainId, Domain>,
    /// A domain that is not published yet.
    pub new_domain: Option<&'a Domain>,
    pub arena: &'a Arena,
}

impl DomainContents<'_> {
    fn table_of(&self, domain: DomainId) -> Option<&Table> {
        let domain = self.domains.get(&domain).or(self.new_domain)?;
        domain.table.as_ref()
    }
}

impl Contents for DomainContents<'_> {
    fn mappings(&self, domain: DomainId) -> Box<dyn Iterator<Item = Mapping> + '_> {
        let table = self.domains.get(&domain).and_then(|d| d.table.as_ref());
        let mappings = table.map(|t| t.mappings(self.arena, Iova(0)));
        Box::new(mappings.into_iter().flatten())
    }

    fn table(&self, domain: DomainId) -> Option<(TableOffset, Levels)> {
        let table = self.table_of(domain)?;
        Some((table.root(), table.levels()))
    }

    fn reader(&self, domain: DomainId) -> Option<TableReader> {
        Some(self.table_of(domain)?.reader(self.arena))
    }
}
