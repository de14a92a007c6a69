//! Connection and disconnection of the VMM, and changes of guest RAM: both reach every backend.

use std::collections::BTreeMap;

use log::debug;

use super::inspect::Dma;
use super::reachable::{is_all_reachable, reachable_bytes};
use super::stored::identity_of;
use super::{DriverState, Iommu};
use crate::address::{Iova, Mapping};
use crate::backends::{BackendError, BackendErrorKind, DmaBackend, MemorySlot, Target};
use crate::error_limited;
use crate::ids::{DomainId, EndpointId};

impl Iommu {
    /// A VMM has connected. The backends take control of the devices it shares.
    pub fn connect(&mut self) {
        self.vmm_present = true;
        for backend in &mut self.backends {
            backend.vmm_present(true);
        }
        self.retarget_unattached();
    }

    /// The VMM has gone. When this returns, every endpoint is blocked, the state of the guest is
    /// dropped, and `bypass` has its value at boot.
    pub fn disconnect(&mut self) {
        self.begin_reset(self.bypass_at_boot, DriverState::Known);
        self.detach_all(Target::Blocked);
        self.set_memory(Vec::new());
        self.bypass = self.bypass_at_boot;
        self.driver = DriverState::Known;
        self.store.end_reset();
        self.vmm_present = false;
        for backend in &mut self.backends {
            backend.vmm_present(false);
        }
    }

    /// Switches every endpoint without a domain to its target. Includes endpoints whose switch has
    /// failed before: the VMM may not have bound the device at that time.
    pub fn retarget_unattached(&mut self) {
        let unattached: Vec<_> = self
            .backend_of
            .keys()
            .copied()
            .filter(|e| self.endpoints.get(e).is_none_or(|s| s.domain.is_none()))
            .collect();
        for endpoint in unattached {
            self.retarget(endpoint, self.unattached_target(endpoint));
        }
    }

    /// Open files of devices have come from the VMM. When this returns, these devices are where their endpoints are.
    pub fn files_came(&mut self) {
        let cause = BackendError {
            kind: BackendErrorKind::DevErr,
            message:
                "its device has come from the VMM and cannot be moved to where its endpoint is"
                    .into(),
        };
        for index in 0..self.backends.len() {
            self.backends[index].files_came();
            self.quarantine_stopped(index, &cause);
        }
    }

    /// Replaces guest RAM by `slots`. When this returns, no endpoint can reach a removed slot, and
    /// mappings into a new slot reach it. There is one exception: a process that maps guest RAM, was cut off and does not
    /// hang up may map a removed slot. Its backend waits for it, and says so.
    ///
    /// A mapping outlives the memory behind it. While the memory is missing, the mapping's addresses
    /// are unreachable.
    pub fn set_memory(&mut self, slots: Vec<MemorySlot>) {
        let removed: Vec<_> = difference(&self.memory, &slots);
        let added: Vec<_> = difference(&slots, &self.memory);
        if removed.is_empty() && added.is_empty() {
            return;
        }
        // Until the end, a later process must not take the mappings in backends for those of any memory.
        self.store.set_memory(0);
        // Keep the old value of an unchanged slot, with its mapping in this process: a backend may
        // use that mapping.
        self.memory.retain(|slot| !removed.contains(slot));
        self.memory.extend(added.iter().cloned());
        if !self.backends.is_empty() {
            self.remove_slots(&removed);
            self.add_slots(&added);
            self.count_unreachable();
        }
        self.store.set_memory(identity_of(&self.memory));
    }

    /// Counts, in every domain, the mappings that backends do not have in full.
    pub(super) fn count_unreachable(&mut self) {
        for domain in self.domains.values_mut() {
            let Some(table) = &domain.table else { continue };
            let mappings = table.mappings(&self.arena, Iova(0));
            let unreachable = mappings
                .filter(|m| !is_all_reachable(&self.memory, m))
                .count();
            domain.unreachable = unreachable as u64;
        }
    }

    fn remove_slots(&mut self, removed: &[MemorySlot]) {
        if removed.is_empty() {
            return;
        }
        debug!("{} memory slots removed", removed.len());
        self.for_each_part(removed, |backend, domain, part| {
            let least = reachable_bytes(removed, part);
            backend.unmap(domain, part.range, least)
        });
        for slot in removed {
            for index in 0..self.backends.len() {
                let backend = &mut self.backends[index];
                let reads_page_table = backend.reads_page_table();
                if let Err(cause) = backend.remove_memory(slot) {
                    self.quarantine_those(index, &cause, |dma| {
                        dma == Dma::Bypass || reads_page_table && dma == Dma::Translated
                    });
                }
            }
        }
    }

    fn add_slots(&mut self, added: &[MemorySlot]) {
        if added.is_empty() {
            return;
        }
        debug!("{} memory slots added", added.len());
        for slot in added {
            for index in 0..self.backends.len() {
                let backend = &mut self.backends[index];
                let Err(cause) = backend.add_memory(slot) else {
                    continue;
                };
                error_limited!("cannot reach the memory at {slot:?}: {cause}");
                self.quarantine_stopped(index, &cause);
                if self.backends[index].reads_page_table() {
                    self.quarantine_those(index, &cause, |dma| dma == Dma::Translated);
                }
            }
        }
        self.for_each_part(added, |backend, domain, part| backend.map(domain, part));
    }

    /// Calls `act` for the part of every mapping that lies in `slots`, for every backend that has the
    /// domain and does not look mappings up in the page table. If it fails, the members of the domain behind that
    /// backend are quarantined.
    fn for_each_part(
        &mut self,
        slots: &[MemorySlot],
        mut act: impl FnMut(&mut dyn DmaBackend, DomainId, &Mapping) -> Result<(), BackendError>,
    ) {
        let mut failed: BTreeMap<(DomainId, usize), BackendError> = BTreeMap::new();
        for (&id, domain) in &self.domains {
            let Some(table) = &domain.table else { continue };
            let backends: Vec<_> = domain
                .backends
                .present()
                .filter(|&index| !self.backends[index].reads_page_table())
                .collect();
            if backends.is_empty() {
                continue;
            }
            for mapping in table.mappings(&self.arena, Iova(0)) {
                for part in slots.iter().filter_map(|s| mapping.part_in(s.range)) {
                    for &index in &backends {
                        if failed.contains_key(&(id, index)) {
                            continue;
                        }
                        if let Err(cause) = act(&mut *self.backends[index], id, &part) {
                            failed.insert((id, index), cause);
                        }
                    }
                }
            }
        }
        for ((domain, index), cause) in failed {
            self.quarantine_members(domain, index, &cause);
        }
    }

    /// Quarantines every endpoint behind a backend whose DMA is treated in a way for which `concerned` is true.
    fn quarantine_those(
        &mut self,
        index: usize,
        cause: &BackendError,
        concerned: impl Fn(Dma) -> bool,
    ) {
        let endpoints: Vec<EndpointId> = self
            .backend_of
            .iter()
            .filter(|(_, i)| **i == index)
            .map(|(&endpoint, _)| endpoint)
            .filter(|&e| {
                let state = self.endpoints.get(&e).copied().unwrap_or_default();
                concerned(self.dma(e, &state))
            })
            .collect();
        for endpoint in endpoints {
            self.quarantine(endpoint, cause);
        }
    }
}

/// The slots of `from` that are not in `other`.
pub(super) fn difference(from: &[MemorySlot], other: &[MemorySlot]) -> Vec<MemorySlot> {
    let missing = from.iter().filter(|slot| !other.contains(slot));
    missing.cloned().collect()
}
