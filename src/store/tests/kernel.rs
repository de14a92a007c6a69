//! A backend whose kernel outlives the process: it is as strict as the kernel, fails on demand, and the process can die
//! before and after each of its effects.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bed::{G1, G2, G3};
use crate::address::{Iova, IovaRange, Mapping, PageMask};
use crate::backends::{
    Adoption, AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents,
    DmaBackend, MemorySlot, Target,
};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::crash;

/// The state that outlives the process.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct KernelState {
    /// Mappings by domain and first address.
    pub domains: BTreeMap<DomainId, BTreeMap<u64, Mapping>>,
    /// The target of each endpoint.
    pub targets: BTreeMap<EndpointId, Target>,
}

/// The kernel.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub state: KernelState,
    /// Unmaps that found nothing.
    pub empty_unmaps: u64,
    /// The calls so far.
    pub calls: u64,
    /// The call that fails, counted from 1.
    pub fail_call: Option<u64>,
    /// A process adopts its endpoints.
    is_adopting: bool,
}

impl Kernel {
    /// Switches an endpoint. While endpoints are adopted, none is switched to a target while another member of its group
    /// reaches another one. A process that died in the middle of a reset may have left a group so: then its members are
    /// blocked first.
    fn switch(&mut self, endpoint: EndpointId, target: Target) {
        self.state.targets.insert(endpoint, target);
        if target == Target::Blocked {
            return;
        }
        let mates = [G1, G2, G3].map(|mate| self.state.targets.get(&mate));
        let reached = mates.into_iter().flatten();
        let mut reached = reached.filter(|target| **target != Target::Blocked);
        if let Some(one) = reached.next().filter(|_| self.is_adopting) {
            let other = reached.find(|other| *other != one);
            assert_eq!(
                other, None,
                "a group's members reach {one} and another target"
            );
        }
    }

    /// Whether `range` has a part of a mapping.
    fn splits(&self, domain: DomainId, range: IovaRange) -> bool {
        let mappings = self.state.domains.get(&domain).into_iter().flatten();
        let mut ranges = mappings.map(|(_, mapping)| mapping.range);
        ranges.any(|of| range.overlaps(of) && !range.covers(of))
    }
}

/// The backend of one process.
#[derive(Debug)]
pub(super) struct KernelBackend {
    kernel: Arc<Mutex<Kernel>>,
    /// The domains that this process knows of.
    known: BTreeSet<DomainId>,
    /// Outcomes of the mappings of a run.
    begun: BTreeMap<u64, Result<(), BackendError>>,
    batches_maps: bool,
}

/// A handle to a kernel.
#[derive(Clone, Debug, Default)]
pub(super) struct KernelHandle(Arc<Mutex<Kernel>>);

impl KernelHandle {
    pub(super) fn lock(&self) -> MutexGuard<'_, Kernel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backend of a new process.
    pub(super) fn backend(&self, batches_maps: bool) -> KernelBackend {
        KernelBackend {
            kernel: self.0.clone(),
            known: BTreeSet::new(),
            begun: BTreeMap::new(),
            batches_maps,
        }
    }
}

fn failure() -> BackendError {
    BackendError {
        kind: BackendErrorKind::DevErr,
        message: "fails on demand".into(),
    }
}

impl KernelBackend {
    /// A system call.
    fn call<T>(&self, effect: impl FnOnce(&mut Kernel) -> T) -> Result<T, BackendError> {
        crash::point();
        let outcome = {
            let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
            kernel.calls += 1;
            if kernel.fail_call == Some(kernel.calls) {
                Err(failure())
            } else {
                Ok(effect(&mut kernel))
            }
        };
        crash::point();
        outcome
    }

    /// A system call that cannot fail.
    fn sure_call<T>(&self, effect: impl FnOnce(&mut Kernel) -> T) -> T {
        crash::point();
        let outcome = effect(&mut self.kernel.lock().unwrap_or_else(PoisonError::into_inner));
        crash::point();
        outcome
    }

    fn map_one(&self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        self.call(|kernel| {
            let mappings = kernel.state.domains.get_mut(&domain).expect("a domain");
            let overlaps = mappings.values().any(|m| m.range.overlaps(mapping.range));
            assert!(!overlaps, "{mapping} overlaps a mapping in the kernel");
            mappings.insert(mapping.range.first().0, *mapping);
        })
    }

    fn unmap_range(&self, domain: DomainId, range: IovaRange) -> Result<u64, BackendError> {
        self.call(|kernel| {
            assert!(!kernel.splits(domain, range), "the kernel splits nothing");
            let mappings = kernel.state.domains.get_mut(&domain).expect("a domain");
            let gone: u64 = mappings
                .values()
                .filter(|m| range.covers(m.range))
                .map(|m| m.range.span() + 1)
                .sum();
            mappings.retain(|_, m| !range.covers(m.range));
            kernel.empty_unmaps += u64::from(gone == 0);
            gone
        })
    }

    fn remove_domain(&self, domain: DomainId) {
        self.sure_call(|kernel| {
            let mut targets = kernel.state.targets.values();
            let is_used = targets.any(|t| *t == Target::Domain(domain));
            assert!(!is_used, "domain {domain} still has endpoints");
            let was_there = kernel.state.domains.remove(&domain).is_some();
            assert!(was_there, "domain {domain} is unknown");
        });
    }

    fn fill(&self, domain: DomainId, contents: &dyn Contents) -> Result<(), BackendError> {
        self.call(|kernel| {
            let before = kernel.state.domains.insert(domain, BTreeMap::new());
            assert!(before.is_none(), "domain {domain} was there");
        })?;
        for mapping in contents.mappings(domain) {
            if let Err(cause) = self.map_one(domain, &mapping) {
                self.remove_domain(domain);
                return Err(cause);
            }
        }
        Ok(())
    }
}

impl DmaBackend for KernelBackend {
    fn capabilities(&self) -> BackendCapabilities {
        BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        }
    }

    fn vmm_present(&mut self, _present: bool) {}

    fn add_memory(&mut self, _slot: &MemorySlot) -> Result<(), BackendError> {
        Ok(())
    }

    fn remove_memory(&mut self, _slot: &MemorySlot) -> Result<(), BackendError> {
        Ok(())
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let made = match target {
            Target::Domain(domain) if !self.known.contains(&domain) => Some(domain),
            Target::Domain(_) | Target::Bypass | Target::Blocked => None,
        };
        if let Some(domain) = made {
            self.fill(domain, contents)
                .map_err(AttachError::Unchanged)?;
        }
        let switched = self.call(|kernel| kernel.switch(endpoint, target));
        match (switched, made) {
            (Ok(()), made) => {
                self.known.extend(made);
                Ok(())
            }
            (Err(cause), made) => {
                if let Some(domain) = made {
                    self.remove_domain(domain);
                }
                Err(AttachError::Unchanged(cause))
            }
        }
    }

    fn adopt(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        let (there, targets) = self.sure_call(|kernel| {
            let there: BTreeSet<_> = kernel.state.domains.keys().copied().collect();
            kernel.is_adopting = true;
            (there, kernel.state.targets.clone())
        });
        let wanted: BTreeSet<_> = adoption
            .endpoints
            .iter()
            .filter_map(|(_, target)| match target {
                Target::Domain(domain) => Some(*domain),
                Target::Bypass | Target::Blocked => None,
            })
            .collect();
        // A domain that no endpoint uses in the kernel may be half filled.
        let used = |domain: &DomainId| targets.values().any(|t| *t == Target::Domain(*domain));
        let kept: BTreeSet<_> = there
            .iter()
            .copied()
            .filter(|domain| wanted.contains(domain) && used(domain))
            .collect();
        let mut failed = Vec::new();
        for domain in there.iter().filter(|domain| !kept.contains(domain)) {
            if !used(domain) {
                self.remove_domain(*domain);
            }
        }
        let mut lost = BTreeMap::new();
        for (domain, range) in adoption.in_progress {
            if !kept.contains(domain) {
                continue;
            }
            let is_damaged = {
                let kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
                kernel.splits(*domain, *range)
            };
            let unmapped = if is_damaged {
                Err(failure())
            } else {
                self.unmap_range(*domain, *range)
            };
            if let Err(cause) = unmapped {
                lost.insert(*domain, cause);
            }
        }
        self.known = kept.clone();
        let mut blocked = Vec::new();
        for &(endpoint, target) in adoption.endpoints {
            let cause = match target {
                Target::Domain(domain) => lost.get(&domain).cloned(),
                Target::Bypass | Target::Blocked => None,
            };
            let is_same = targets.get(&endpoint) == Some(&target);
            let outcome = match cause {
                Some(cause) => Err(cause),
                None if is_same => Ok(()),
                None => self.call(|kernel| kernel.switch(endpoint, Target::Blocked)),
            };
            match outcome {
                Err(cause) => {
                    self.quarantine(endpoint);
                    failed.push((endpoint, cause));
                }
                Ok(()) if is_same || target == Target::Blocked => {}
                Ok(()) => blocked.push((endpoint, target)),
            }
        }
        for (endpoint, target) in blocked {
            if let Err(refusal) = self.attach(endpoint, target, contents) {
                self.quarantine(endpoint);
                failed.push((endpoint, refusal.cause().clone()));
            }
        }
        self.sure_call(|kernel| kernel.is_adopting = false);
        let still = |kernel: &mut Kernel, domain: &DomainId| {
            let mut targets = kernel.state.targets.values();
            targets.any(|t| *t == Target::Domain(*domain))
        };
        for domain in there {
            let is_there = |kernel: &mut Kernel| {
                kernel.state.domains.contains_key(&domain) && !still(kernel, &domain)
            };
            if self.sure_call(is_there) {
                self.known.remove(&domain);
                self.remove_domain(domain);
            }
        }
        failed
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        self.known.remove(&domain);
        self.remove_domain(domain);
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        self.begun.clear();
        self.sure_call(|kernel| kernel.switch(endpoint, Target::Blocked));
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        match self.begun.remove(&mapping.range.first().0) {
            Some(outcome) => outcome,
            None => self.map_one(domain, mapping),
        }
    }

    fn batches_maps(&self) -> bool {
        self.batches_maps
    }

    fn begin_maps(&mut self, domain: DomainId, mappings: &[Mapping]) {
        for mapping in mappings {
            let outcome = self.map_one(domain, mapping);
            self.begun.insert(mapping.range.first().0, outcome);
        }
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        least: u64,
    ) -> Result<(), BackendError> {
        self.begun.retain(|first, _| !range.contains(Iova(*first)));
        let gone = self.unmap_range(domain, range)?;
        assert!(gone >= least, "{least} bytes in {range} were promised");
        Ok(())
    }
}
