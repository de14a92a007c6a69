//! Endpoints of one host group stay in one domain.
//!
//! Members of a group cannot be isolated from each other, so at any time all *active* members are
//! in the same domain. A driver moves a group one endpoint at a time; while it does, the members
//! that have not followed yet are *suspended*: attached as before, but blocked.
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

/// Members other than the one a request names whose DMA changes with it.
#[derive(Debug, Default, PartialEq, Eq)]
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

    /// Makes `endpoint` an active member in `domain`; [`Groups::conflict`] has found none.
    pub(super) fn join(
        &mut self,
        group: GroupId,
        endpoint: EndpointId,
        domain: DomainId,
    ) -> Changes {
        let group = self.groups.entry(group).or_default();
        group.active.remove(&endpoint);
        group.suspended.remove(&endpoint);
        let mut changes = Changes::default();
        if group.domain != Some(domain) {
            changes.suspended = group.active.keys().copied().collect();
            group.suspended.append(&mut group.active);
            group.domain = Some(domain);
            changes.resumed = group.resume(domain);
            changes.suspended.retain(|e| !changes.resumed.contains(e));
        }
        group.active.insert(endpoint, domain);
        changes
    }

    /// Takes `endpoint` out. Where it was the last active member, the suspended ones of one domain
    /// are active again.
    pub(super) fn leave(&mut self, id: GroupId, endpoint: EndpointId) -> Changes {
        let mut changes = Changes::default();
        let Some(group) = self.groups.get_mut(&id) else {
            return changes;
        };
        group.active.remove(&endpoint);
        group.suspended.remove(&endpoint);
        if group.active.is_empty() {
            group.domain = group.suspended.values().next().copied();
            if let Some(domain) = group.domain {
                changes.resumed = group.resume(domain);
            } else {
                self.groups.remove(&id);
            }
        }
        changes
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.groups.clear();
    }
}

impl Group {
    fn resume(&mut self, domain: DomainId) -> Vec<EndpointId> {
        let back: Vec<_> = self
            .suspended
            .iter()
            .filter(|(_, d)| **d == domain)
            .map(|(&e, _)| e)
            .collect();
        for endpoint in &back {
            self.suspended.remove(endpoint);
            self.active.insert(*endpoint, domain);
        }
        back
    }
}
