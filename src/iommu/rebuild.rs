//! Rebuilding the core's state from the memory that an earlier process has left: tables, domains, endpoints, groups.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;

use log::{error, warn};

use super::domain::Domain;
use super::groups::Groups;
use super::restore::RestoreError;
use super::{EndpointRecord, Iommu};
use crate::address::IovaRange;
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{LeftArena, MapRefusal, Table, TableOffset, TableRefusal, TornTable};
use crate::store::{JournalEntry, Loaded, StoredDomain};
use crate::topology::GroupId;

/// The state that is rebuilt before it replaces that of the new core.
#[derive(Default)]
pub(super) struct Rebuilt {
    pub domains: BTreeMap<DomainId, Domain>,
    pub endpoints: BTreeMap<EndpointId, EndpointRecord>,
    pub groups: Groups,
}

impl Iommu {
    /// Rebuilds domains, endpoints and groups. Changes nothing but the arena.
    pub(super) fn rebuild(
        &mut self,
        loaded: &Loaded,
        old: &[AtomicU64],
    ) -> Result<Rebuilt, RestoreError> {
        let mut arena = LeftArena::new(old).map_err(RestoreError::Arena)?;
        let mut rebuilt = Rebuilt::default();
        let outcome = self.rebuild_domains(loaded, &mut arena, &mut rebuilt.domains);
        if let Err(cause) = outcome {
            for domain in rebuilt.domains.into_values() {
                if let Some(table) = domain.table {
                    table.destroy(&mut self.arena);
                    self.arena.reclaim();
                }
            }
            return Err(cause);
        }
        self.rebuild_endpoints(loaded, &mut rebuilt);
        Ok(rebuilt)
    }

    fn rebuild_domains(
        &mut self,
        loaded: &Loaded,
        old: &mut LeftArena<'_>,
        domains: &mut BTreeMap<DomainId, Domain>,
    ) -> Result<(), RestoreError> {
        let used: BTreeSet<DomainId> = loaded
            .endpoints
            .iter()
            .filter(|(id, _)| self.topology.endpoint(**id).is_some())
            .filter_map(|(_, endpoint)| endpoint.domain)
            .collect();
        let planned = planned_ranges(loaded);
        // A domain exists as long as it has members. Those that are not configured any more do not count.
        for id in used {
            if id.0 > self.last_domain {
                return Err(RestoreError::Offer);
            }
            let stored = loaded.domains.get(&id);
            if stored == Some(&StoredDomain::Bypass) {
                domains.insert(id, Domain::new(None));
                continue;
            }
            let left_out = planned.get(&id).map_or(&[][..], Vec::as_slice);
            let table = Table::new(&mut self.arena, self.levels);
            let table = table.map_err(|refusal| match refusal {
                TableRefusal::OutOfFrames(cause) => RestoreError::OutOfFrames(cause),
                TableRefusal::TooDeep(_) => RestoreError::Offer,
            })?;
            let made = domains.entry(id).or_insert_with(|| Domain::new(None));
            let table = made.table.insert(table);
            // A domain without a record is empty. Its endpoints are quarantined in it, and not detached: without a domain,
            // they would be in bypass mode from the VMM's connection on.
            let Some(&StoredDomain::Table(root)) = stored else {
                continue;
            };
            let arena = &mut self.arena;
            let copied = old.mappings(TableOffset(root), self.levels, left_out, |mapping| {
                let plan = table.plan_map(arena, mapping).map_err(Uncopied::Refused)?;
                table.commit_map(arena, plan);
                Ok(())
            });
            copied.map_err(|cause| match cause {
                Uncopied::Torn(cause) => RestoreError::Torn { domain: id, cause },
                Uncopied::Refused(MapRefusal::OutOfFrames(cause)) => {
                    RestoreError::OutOfFrames(cause)
                }
                Uncopied::Refused(cause) => RestoreError::Refused { domain: id, cause },
            })?;
        }
        Ok(())
    }

    fn rebuild_endpoints(&self, loaded: &Loaded, rebuilt: &mut Rebuilt) {
        for (&id, &stored) in &loaded.endpoints {
            let Some(info) = self.topology.endpoint(id) else {
                warn!(
                    "endpoint {id} was attached to the daemon before, and is not configured any more"
                );
                continue;
            };
            let mut record = EndpointRecord::from(stored);
            if let Some(domain) = record.domain
                && let Some(entered) = rebuilt.domains.get_mut(&domain)
            {
                let backend = self.backend_of.get(&id).map(|&index| self.use_of(index));
                entered.enter(id, backend, info.reserved);
                if !loaded.domains.contains_key(&domain) {
                    error!("endpoint {id} is quarantined: domain {domain} has no record");
                    record.quarantined = true;
                }
                if let Some(table) = &entered.table
                    && let Some(region) = info.reserved.iter().find(|region| {
                        table
                            .mappings_in(&self.arena, region.range)
                            .next()
                            .is_some()
                    })
                {
                    error!(
                        "endpoint {id} is quarantined: domain {domain} has mappings in the reserved region \
                         {region}, which the endpoint did not have before"
                    );
                    record.quarantined = true;
                }
            }
            rebuilt.endpoints.insert(id, record);
        }
        self.rebuild_groups(rebuilt);
    }

    /// Makes the groups from the records. An ATTACH or DETACH that was in progress may have suspended or resumed some of
    /// a group's members and not the others: no member is suspended in the domain of the active ones.
    fn rebuild_groups(&self, rebuilt: &mut Rebuilt) {
        let mut groups: BTreeMap<GroupId, Vec<EndpointId>> = BTreeMap::new();
        for (&id, record) in &rebuilt.endpoints {
            if record.domain.is_some()
                && let Some(group) = self.topology.endpoint(id).and_then(|info| info.group)
            {
                groups.entry(group).or_default().push(id);
            }
        }
        for (group, members) in groups {
            let in_domain = |id: &EndpointId| rebuilt.endpoints.get(id).copied();
            let records: Vec<_> = members
                .iter()
                .filter_map(|id| Some((*id, in_domain(id)?)))
                .collect();
            let active = records.iter().find(|(_, record)| !record.suspended);
            let Some(at) = active.or(records.first()).and_then(|(_, r)| r.domain) else {
                continue;
            };
            let (inside, outside): (Vec<_>, Vec<_>) = records
                .into_iter()
                .partition(|(_, record)| record.domain == Some(at));
            for (list, suspended) in [(outside, true), (inside, false)] {
                for (id, record) in list {
                    if let Some(domain) = record.domain {
                        rebuilt.groups.join(group, id, domain);
                    }
                    if let Some(record) = rebuilt.endpoints.get_mut(&id) {
                        record.suspended = suspended;
                    }
                }
            }
        }
    }
}

/// A mapping that cannot be copied.
enum Uncopied {
    Torn(TornTable),
    Refused(MapRefusal),
}

impl From<TornTable> for Uncopied {
    fn from(cause: TornTable) -> Self {
        Self::Torn(cause)
    }
}

/// The ranges that requests in progress explain, by domain.
fn planned_ranges(loaded: &Loaded) -> BTreeMap<DomainId, Vec<IovaRange>> {
    let entries = loaded
        .entries
        .iter()
        .filter_map(JournalEntry::planned_range);
    let mut planned: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (domain, range) in entries.chain(loaded.refused.iter().copied()) {
        planned.entry(domain).or_default().push(range);
    }
    planned
}
