//! Host groups: the endpoints of one group must stay in one domain.
//!
//! The hardware cannot isolate the members of a group from each other, so all *active* members are
//! always in the same domain. A driver moves a group one endpoint at a time. During the move, the
//! members that have not followed yet are *suspended*: they stay attached, but blocked. Unattached
//! members are blocked while another member is active, whatever the value of `bypass`.
//!
//! ```text
//!             ATTACH, and no active member is elsewhere
//! (outside) ------------------------------------------> active
//!     ^                                                 |    ^
//!     | DETACH            another active member is      |    | own ATTACH to the group's domain,
//!     |                   attached to another domain    v    | or the group returns
//!     +---------------------------------------------- suspended
//! ```

use std::collections::BTreeMap;

use crate::ids::{DomainId, EndpointId};
use crate::topology::GroupId;

/// The attached members of every group.
#[derive(Debug, Default)]
pub(super) struct Groups {
    groups: BTreeMap<GroupId, GroupMembers>,
}

#[derive(Debug, Default)]
struct GroupMembers {
    /// The domain of the active members; `None` while no member is active.
    domain: Option<DomainId>,
    active: BTreeMap<EndpointId, DomainId>,
    suspended: BTreeMap<EndpointId, DomainId>,
}

/// The members of a group whose DMA changes when another member is attached.
#[derive(Debug, Default)]
pub(super) struct GroupChanges {
    /// Members to block.
    pub suspended: Vec<EndpointId>,
    /// Members to switch back to their domain.
    pub resumed: Vec<EndpointId>,
}

impl Groups {
    /// The member that prevents an ATTACH of `endpoint` to `domain`, and that member's domain.
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

    /// Whether a member is active, so that no other may be in bypass mode.
    pub(super) fn is_active(&self, group: GroupId) -> bool {
        self.groups.get(&group).is_some_and(|g| g.domain.is_some())
    }

    /// The changes that [`Groups::join`] will make.
    pub(super) fn plan_join(
        &self,
        group: GroupId,
        endpoint: EndpointId,
        domain: DomainId,
    ) -> GroupChanges {
        let Some(group) = self.groups.get(&group) else {
            return GroupChanges::default();
        };
        if group.domain == Some(domain) {
            return GroupChanges::default();
        }
        let mut changes = GroupChanges {
            suspended: group.active.keys().copied().collect(),
            resumed: group.suspended_in(domain),
        };
        changes.suspended.retain(|e| *e != endpoint);
        changes.resumed.retain(|e| *e != endpoint);
        changes
    }

    /// Makes `endpoint` an active member in `domain`. [`Groups::conflict`] must have returned `None`.
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

    /// Removes `endpoint`. If it was the last active member, the suspended members of one domain
    /// become active again; returns these.
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

    /// Removes every member of every group.
    pub(super) fn clear(&mut self) {
        self.groups.clear();
    }
}

impl GroupMembers {
    fn suspended_in(&self, domain: DomainId) -> Vec<EndpointId> {
        let there = self.suspended.iter().filter(|(_, d)| **d == domain);
        there.map(|(&endpoint, _)| endpoint).collect()
    }

    /// Makes `domain` the domain of the group. Makes the suspended members in that domain active, and returns them.
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
