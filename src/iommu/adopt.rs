//! Having the backends take over the endpoints and the kernel's objects of an earlier process.

use std::collections::{BTreeMap, BTreeSet};

use super::domain::BackendOf;
use super::target::{DomainContents, target_of};
use super::{EndpointRecord, Iommu};
use crate::address::IovaRange;
use crate::backends::{Adoption, BackendError, BackendErrorKind, ObjectRecord, RecordId, Target};
use crate::ids::{DomainId, EndpointId};
use crate::store::{JournalEntry, Loaded};
use crate::topology::GroupId;

/// What an earlier process has left in the backends.
#[derive(Default)]
pub(super) struct LeftInBackends {
    /// See [`Adoption::moving`].
    pub moving: BTreeSet<EndpointId>,
    /// See [`Adoption::in_progress`].
    pub in_progress: Vec<(DomainId, IovaRange)>,
    /// The records of all kernel objects.
    pub objects: Vec<(RecordId, ObjectRecord)>,
    /// See [`Adoption::is_memory_same`].
    pub is_memory_same: bool,
}

/// What one backend takes over.
struct AdoptionParts {
    endpoints: Vec<(EndpointId, Target)>,
    quarantined: Vec<EndpointId>,
    moving: Vec<EndpointId>,
    records: Vec<(RecordId, ObjectRecord)>,
}

impl AdoptionParts {
    fn adoption<'a>(&'a self, left: &'a LeftInBackends) -> Adoption<'a> {
        Adoption {
            endpoints: &self.endpoints,
            quarantined: &self.quarantined,
            moving: &self.moving,
            in_progress: &left.in_progress,
            records: &self.records,
            is_memory_same: left.is_memory_same,
        }
    }
}

impl Iommu {
    /// Has every backend adopt its endpoints, and quarantines those that it fails to adopt. Returns these.
    pub(super) fn adopt_endpoints(&mut self, left: &LeftInBackends) -> BTreeSet<EndpointId> {
        let mut all_failed = BTreeSet::new();
        for index in 0..self.backends.len() {
            let parts = self.adoption_parts(index, left);
            let failed = self.backends[index].prepare_adoption(&parts.adoption(left));
            for (endpoint, cause) in &failed {
                self.quarantine(*endpoint, cause);
                all_failed.insert(*endpoint);
            }
        }
        for index in 0..self.backends.len() {
            // With those that have just been quarantined.
            let parts = self.adoption_parts(index, left);
            let contents = DomainContents {
                domains: &self.domains,
                new_domain: None,
                arena: &self.arena,
            };
            let failed = self.backends[index].adopt(&parts.adoption(left), &contents);
            for (endpoint, cause) in &failed {
                self.quarantine(*endpoint, cause);
                all_failed.insert(*endpoint);
            }
            let stopped = BackendError {
                kind: BackendErrorKind::DevErr,
                message: "another endpoint could not be adopted".into(),
            };
            self.quarantine_stopped(index, &stopped);
            for (endpoint, target) in parts.endpoints {
                if let Target::Domain(domain) = target
                    && !failed.iter().any(|(id, _)| *id == endpoint)
                {
                    self.note_present(domain, index);
                }
            }
        }
        all_failed
    }

    /// What the backend at `index` takes over.
    fn adoption_parts(&self, index: usize, left: &LeftInBackends) -> AdoptionParts {
        let backend_of = self.backend_of.iter();
        let ids: Vec<_> = backend_of
            .filter(|(_, of)| **of == index)
            .map(|(&id, _)| id)
            .collect();
        let owner = self.backends[index].record_owner();
        let objects = left.objects.iter();
        let records = objects.filter(|(_, record)| Some(record.owner) == owner);
        let is_quarantined = |id: &EndpointId| {
            let record = self.endpoints.get(id);
            record.is_some_and(|record| record.quarantined)
        };
        AdoptionParts {
            records: records.copied().collect(),
            quarantined: ids.iter().copied().filter(is_quarantined).collect(),
            moving: ids
                .iter()
                .copied()
                .filter(|id| left.moving.contains(id))
                .collect(),
            endpoints: ids
                .into_iter()
                .map(|id| (id, self.adopted_target(id)))
                .collect(),
        }
    }

    /// The members of the groups that the earlier process was moving: each may be at its former target or at its new one.
    /// Only those of groups that have several members behind backends.
    pub(super) fn moving_endpoints(&self, loaded: &Loaded) -> BTreeSet<EndpointId> {
        let group_of = |id: EndpointId| self.topology.endpoint(id).and_then(|info| info.group);
        let mut groups: BTreeMap<GroupId, BTreeSet<EndpointId>> = BTreeMap::new();
        for &id in self.backend_of.keys() {
            if let Some(group) = group_of(id) {
                groups.entry(group).or_default().insert(id);
            }
        }
        groups.retain(|_, members| members.len() > 1);
        if !loaded.state.resetting {
            let moved: BTreeSet<_> = loaded
                .entries
                .iter()
                .filter_map(JournalEntry::planned_move)
                .filter_map(group_of)
                .collect();
            groups.retain(|group, _| moved.contains(group));
        }
        groups.into_values().flatten().collect()
    }

    /// Removes the records of kernel objects whose backend is not there any more. Its objects end with their descriptors.
    pub(super) fn forget_objects(&self, objects: &[(RecordId, ObjectRecord)]) {
        let owners: BTreeSet<_> = self
            .backends
            .iter()
            .filter_map(|backend| backend.record_owner())
            .collect();
        let records = self.object_records();
        let gone = objects.iter().filter(|(_, o)| !owners.contains(&o.owner));
        for (id, _) in gone {
            records.remove(*id);
        }
    }

    /// The target that the record of an endpoint says, unless the endpoint is withheld.
    fn adopted_target(&self, endpoint: EndpointId) -> Target {
        if self.is_withheld(endpoint) {
            return Target::Blocked;
        }
        match self.endpoints.get(&endpoint) {
            Some(record) if record.quarantined || record.suspended => Target::Blocked,
            Some(EndpointRecord {
                domain: Some(id), ..
            }) => match self.domains.get(id) {
                Some(domain) => target_of(*id, domain.is_bypass()),
                None => Target::Blocked,
            },
            // Without a VMM, the endpoints wait for it.
            _ if self.vmm_present => self.unattached_target(endpoint),
            _ => Target::Blocked,
        }
    }

    /// How a domain counts a backend.
    pub(super) fn use_of(&self, index: usize) -> BackendOf {
        BackendOf {
            index,
            reads_page_table: self.backends[index].reads_page_table(),
            batches_maps: self.backends[index].batches_maps(),
        }
    }
}
