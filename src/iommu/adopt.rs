//! Having the backends take over the endpoints and the kernel's objects of an earlier process.

use std::collections::BTreeSet;

use super::domain::BackendOf;
use super::target::{DomainContents, target_of};
use super::{EndpointRecord, Iommu};
use crate::address::IovaRange;
use crate::backends::{Adoption, BackendError, BackendErrorKind, ObjectRecord, RecordId, Target};
use crate::ids::{DomainId, EndpointId};

/// What an earlier process has left in the backends.
#[derive(Default)]
pub(super) struct LeftInBackends {
    /// See [`Adoption::in_progress`].
    pub in_progress: Vec<(DomainId, IovaRange)>,
    /// The records of all kernel objects.
    pub objects: Vec<(RecordId, ObjectRecord)>,
    /// See [`Adoption::is_memory_same`].
    pub is_memory_same: bool,
}

impl Iommu {
    /// Has every backend adopt its endpoints, and quarantines those that it fails to adopt. Returns these.
    pub(super) fn adopt_endpoints(&mut self, left: &LeftInBackends) -> BTreeSet<EndpointId> {
        let mut all_failed = BTreeSet::new();
        for index in 0..self.backends.len() {
            let endpoints: Vec<(EndpointId, Target)> = self
                .backend_of
                .iter()
                .filter(|(_, of)| **of == index)
                .map(|(&id, _)| (id, self.adopted_target(id)))
                .collect();
            let contents = DomainContents {
                domains: &self.domains,
                new_domain: None,
                arena: &self.arena,
            };
            let owner = self.backends[index].record_owner();
            let objects = left.objects.iter();
            let records: Vec<_> = objects
                .filter(|(_, record)| Some(record.owner) == owner)
                .copied()
                .collect();
            let is_quarantined = |id: &EndpointId| {
                let record = self.endpoints.get(id);
                record.is_some_and(|record| record.quarantined)
            };
            let ids = endpoints.iter().map(|(id, _)| *id);
            let quarantined: Vec<_> = ids.filter(is_quarantined).collect();
            let adoption = Adoption {
                endpoints: &endpoints,
                quarantined: &quarantined,
                in_progress: &left.in_progress,
                records: &records,
                is_memory_same: left.is_memory_same,
            };
            let failed = self.backends[index].adopt(&adoption, &contents);
            for (endpoint, cause) in &failed {
                self.quarantine(*endpoint, cause);
                all_failed.insert(*endpoint);
            }
            let stopped = BackendError {
                kind: BackendErrorKind::DevErr,
                message: "another endpoint could not be adopted".into(),
            };
            self.quarantine_stopped(index, &stopped);
            for (endpoint, target) in endpoints {
                if let Target::Domain(domain) = target
                    && !failed.iter().any(|(id, _)| *id == endpoint)
                {
                    self.note_present(domain, index);
                }
            }
        }
        all_failed
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

    /// The target that the record of an endpoint says.
    fn adopted_target(&self, endpoint: EndpointId) -> Target {
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
