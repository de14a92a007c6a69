//! A VMM that comes and goes, and its memory: what backends have of the guest is kept in step.

use std::collections::BTreeMap;

use log::debug;

use super::Iommu;
use super::domain::present_in;
use super::inspect::Dma;
use super::reachable::{is_all_reachable, reachable_bytes};
use crate::address::{Iova, Mapping};
use crate::backends::{BackendError, DmaBackend, MemorySlot, Target};
use crate::error_limited;
use crate::ids::{DomainId, EndpointId};

impl Iommu {
    /// A VMM is there, with its devices: they obey from now on.
    pub fn connect(&mut self) {
        self.vmm_present = true;
        for backend in &mut self.backends {
            backend.vmm_present(true);
        }
        self.settle_unattached();
    }

    /// The VMM is gone: no endpoint reaches anything any more, nothing of its guest is kept, and
    /// `bypass` is what it is at boot.
    pub fn disconnect(&mut self) {
        self.detach_all(Target::Blocked);
        self.set_memory(Vec::new());
        self.bypass = self.bypass_at_boot;
        self.vmm_present = false;
        for backend in &mut self.backends {
            backend.vmm_present(false);
        }
    }

    /// Switches endpoints without a domain to where they belong, those too that could not be
    /// switched when that was tried before: a device may not have been the VMM's yet.
    pub fn settle_unattached(&mut self) {
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

    /// Guest RAM is `slots` from now on. When this returns, no endpoint can reach what has gone;
    /// mappings that lead to what has come lead there.
    ///
    /// A mapping stays the guest's while the memory behind it goes and comes: its addresses lead
    /// nowhere in between.
    pub fn set_memory(&mut self, slots: Vec<MemorySlot>) {
        let gone: Vec<_> = difference(&self.memory, &slots);
        let new: Vec<_> = difference(&slots, &self.memory);
        // What stays keeps its first mapping in this process: backends may have been given it.
        self.memory.retain(|slot| !gone.contains(slot));
        self.memory.extend(new.iter().cloned());
        if self.backends.is_empty() {
            return;
        }
        self.take_memory(&gone);
        self.give_memory(&new);
        self.count_unreachable();
    }

    /// Counts anew, in every domain, the mappings that backends have not got, or not wholly.
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

    fn take_memory(&mut self, gone: &[MemorySlot]) {
        if gone.is_empty() {
            return;
        }
        debug!("{} memory slots go", gone.len());
        self.for_each_part(gone, |backend, domain, part| {
            let least = reachable_bytes(gone, part);
            backend.unmap(domain, part.range, least)
        });
        for slot in gone {
            for index in 0..self.backends.len() {
                if let Err(cause) = self.backends[index].remove_memory(slot) {
                    self.quarantine_bypass(index, &cause);
                }
            }
        }
    }

    fn give_memory(&mut self, new: &[MemorySlot]) {
        if new.is_empty() {
            return;
        }
        debug!("{} memory slots come", new.len());
        for slot in new {
            for backend in &mut self.backends {
                if let Err(cause) = backend.add_memory(slot) {
                    error_limited!("bypass mode does not reach the memory at {slot:?}: {cause}");
                }
            }
        }
        self.for_each_part(new, |backend, domain, part| backend.map(domain, part));
    }

    /// Does something with the parts of all mappings that lead into `slots`, in every backend that
    /// has them. Where that fails, the members of the domain behind that backend are quarantined.
    fn for_each_part(
        &mut self,
        slots: &[MemorySlot],
        mut act: impl FnMut(&mut dyn DmaBackend, DomainId, &Mapping) -> Result<(), BackendError>,
    ) {
        let mut failed: BTreeMap<(DomainId, usize), BackendError> = BTreeMap::new();
        for (&id, domain) in &self.domains {
            let Some(table) = &domain.table else { continue };
            let backends: Vec<_> = present_in(&domain.backends).collect();
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

    /// Blocks every endpoint in bypass mode behind a backend that still reaches what has gone.
    fn quarantine_bypass(&mut self, index: usize, cause: &BackendError) {
        let in_bypass: Vec<EndpointId> = self
            .backend_of
            .iter()
            .filter(|(_, i)| **i == index)
            .map(|(&endpoint, _)| endpoint)
            .filter(|&e| {
                let state = self.endpoints.get(&e).copied().unwrap_or_default();
                self.dma(e, &state) == Dma::Bypass
            })
            .collect();
        for endpoint in in_bypass {
            self.quarantine(endpoint, cause);
        }
    }
}

/// The slots of `from` that are not in `other`.
fn difference(from: &[MemorySlot], other: &[MemorySlot]) -> Vec<MemorySlot> {
    let missing = from.iter().filter(|slot| !other.contains(slot));
    missing.cloned().collect()
}
