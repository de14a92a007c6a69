//! Endpoints of one host group stay in one domain.
//!
//! Members of a group cannot be isolated from each other, so at any time all *active* members are
//! in the same domain. A driver moves a group one endpoint at a time; while it does, the members
//! that have not followed yet are *suspended*: attached as before, but blocked. Members that are
//! attached to nothing are blocked while another one is active, whatever `bypass` says.
//!
//! ```text
//!             ATTACH, and no active member is elsewhere
//! (outside) ------------------------------------------> active
//!     ^                                                 |    ^
//!     | DETACH            another active member is      |    | own ATTACH to where the group is,
//!     |                   attached to another domain    v    | or the group is back
//!     +---------------------------------------------- suspended
//! ```

use std::collections::BTreeMap;

use crate::ids::{DomainId, EndpointId};
use crate::topology::GroupId;

/// The members of every group that are attached to a domain.
#[derive(Debug, Default)]
pub(super) struct Groups {
    groups: BTreeMap<GroupId, Group>,
}

#[derive(Debug, Default)]
struct Group {
    /// Where the active members are; `None` while nobody is active.
    domain: Option<DomainId>,
    active: BTreeMap<EndpointId, DomainId>,
    suspended: BTreeMap<EndpointId, DomainId>,
}

/// Members whose DMA changes when another one is attached.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// These are blocked from now on.
    pub suspended: Vec<EndpointId>,
    /// These use their domain again.
    pub resumed: Vec<EndpointId>,
}

impl Groups {
    /// The member that keeps `endpoint` from being attached to `domain`, and where it is.
    pub(super) fn conflict(
        &self,
        group: GroupId,
        endpoint: EndpointId,
        domain: DomainId,
    ) -> Option<(EndpointId, DomainId)> {
        let group = self.groups.get(&group)?;
        let at = group.domain?;
        if at == domain || group.active.contains_key(&endpoint) {
            return None;
        }
        group.active.first_key_value().map(|(&e, &d)| (e, d))
    }

    /// Whether a member is active, so that the others may not be in bypass mode.
    pub(super) fn is_active(&self, group: GroupId) -> bool {
        self.groups.get(&group).is_some_and(|g| g.domain.is_some())
    }

    /// What [`Groups::join`] will change.
    pub(super) fn plan_join(
        &self,
        group: GroupId,
        endpoint: EndpointId,
        domain: DomainId,
    ) -> Changes {
        let Some(group) = self.groups.get(&group) else {
            return Changes::default();
        };
        if group.domain == Some(domain) {
            return Changes::default();
        }
        let mut changes = Changes {
            suspended: group.active.keys().copied().collect(),
            resumed: group.suspended_in(domain),
        };
        changes.suspended.retain(|e| *e != endpoint);
        changes.resumed.retain(|e| *e != endpoint);
        changes
    }

    /// Makes `endpoint` an active member in `domain`; [`Groups::conflict`] has found none.
    pub(super) fn join(&mut self, group: GroupId, endpoint: EndpointId, domain: DomainId) {
        let group = self.groups.entry(group).or_default();
        group.active.remove(&endpoint);
        group.suspended.remove(&endpoint);
        if group.domain != Some(domain) {
            group.suspended.append(&mut group.active);
            group.resume(domain);
        }
        group.active.insert(endpoint, domain);
    }

    /// Takes `endpoint` out. Where it was the last active member, the suspended ones of one domain
    /// are active again: these are returned.
    pub(super) fn leave(&mut self, id: GroupId, endpoint: EndpointId) -> Vec<EndpointId> {
        let Some(group) = self.groups.get_mut(&id) else {
            return Vec::new();
        };
        group.active.remove(&endpoint);
        group.suspended.remove(&endpoint);
        if group.active.is_empty() {
            if let Some(&domain) = group.suspended.values().next() {
                return group.resume(domain);
            }
            self.groups.remove(&id);
        }
        Vec::new()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.groups.clear();
    }
}

impl Group {
    fn suspended_in(&self, domain: DomainId) -> Vec<EndpointId> {
        let there = self.suspended.iter().filter(|(_, d)| **d == domain);
        there.map(|(&endpoint, _)| endpoint).collect()
    }

    /// Makes `domain` the group's, and the suspended members there active.
    fn resume(&mut self, domain: DomainId) -> Vec<EndpointId> {
        self.domain = Some(domain);
        let back = self.suspended_in(domain);
        for endpoint in &back {
            self.suspended.remove(endpoint);
            self.active.insert(*endpoint, domain);
        }
        back
    }
}
