//! A backend for tests: it records its calls, checks the kernel's rules, and fails on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target,
};
use crate::address::{Iova, IovaRange, Mapping, PageMask};
use crate::ids::{DomainId, EndpointId};

/// The recorder's state, which it shares with the test.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    /// Mappings by domain and first address.
    pub domains: BTreeMap<DomainId, BTreeMap<u64, Mapping>>,
    /// The target of each endpoint.
    pub targets: BTreeMap<EndpointId, Target>,
    /// Quarantined endpoints.
    pub quarantined: Vec<EndpointId>,
    /// The number of calls so far that could fail.
    pub calls: u64,
    /// The call that fails, counted from 1.
    pub fail_call: Option<u64>,
    /// Whether it gains from `begin_maps`.
    pub batches_maps: bool,
    /// The mappings of a run whose MAP has not come yet, by first address, and their outcomes.
    pub begun: BTreeMap<u64, Result<(), BackendError>>,
    /// The largest number of mappings that `begin_maps` got at once.
    pub longest_run: usize,
    /// Every mapping at one of these first addresses is refused.
    pub refused_maps: BTreeSet<u64>,
    /// A failed `attach` blocks the endpoint instead of leaving it where it was.
    pub fail_blocks: bool,
    /// Guest RAM.
    pub memory: Vec<MemorySlot>,
    /// A VMM has connected.
    pub connected: bool,
    /// `attach` calls it first.
    pub at_attach: Option<Hook>,
}

/// A function of the test.
#[derive(Clone)]
pub(crate) struct Hook(pub Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

impl Recorded {
    fn step(&mut self) -> Result<(), BackendError> {
        self.calls += 1;
        if self.fail_call == Some(self.calls) {
            return Err(failure());
        }
        Ok(())
    }

    fn add(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        self.step()?;
        let first = mapping.range.first().0;
        if self.refused_maps.contains(&first) {
            return Err(failure());
        }
        let mappings = self.domains.get_mut(&domain).expect("domain exists");
        assert!(
            !mappings.values().any(|m| m.range.overlaps(mapping.range)),
            "the kernel refuses overlaps"
        );
        mappings.insert(first, *mapping);
        Ok(())
    }
}

fn failure() -> BackendError {
    BackendError {
        kind: BackendErrorKind::DevErr,
        message: "fails on demand".into(),
    }
}

/// The backend; clones share their state.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    state: Arc<Mutex<Recorded>>,
    capabilities: BackendCapabilities,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self::with(BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        })
    }

    pub(crate) fn with(capabilities: BackendCapabilities) -> Self {
        Self {
            state: Arc::default(),
            capabilities,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, Recorded> {
        self.state.lock().expect("not poisoned")
    }
}

impl DmaBackend for Recorder {
    fn capabilities(&self) -> BackendCapabilities {
        self.capabilities
    }

    fn vmm_present(&mut self, present: bool) {
        self.state().connected = present;
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let mut state = self.state();
        state.step()?;
        assert!(
            !state
                .memory
                .iter()
                .any(|s| s.range.intersection(slot.range).is_some()),
            "the kernel refuses overlaps"
        );
        state.memory.push(slot.clone());
        Ok(())
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let mut state = self.state();
        state.memory.retain(|s| s != slot);
        state.step()?;
        let leads_there = |m: &Mapping| m.part_in(slot.range).is_some();
        assert!(
            !state
                .domains
                .values()
                .flat_map(BTreeMap::values)
                .any(leads_there),
            "unmapped before"
        );
        Ok(())
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        let mut state = self.state();
        assert!(
            !state.targets.values().any(|t| *t == Target::Domain(domain)),
            "domain {domain} still has endpoints"
        );
        assert!(
            state.domains.remove(&domain).is_some(),
            "domain {domain} unknown"
        );
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let hook = self.state().at_attach.clone();
        if let Some(Hook(call)) = hook {
            call();
        }
        let mut state = self.state();
        let made = match target {
            Target::Domain(domain) if !state.domains.contains_key(&domain) => Some(domain),
            Target::Domain(_) | Target::Bypass | Target::Blocked => None,
        };
        let mut filled = BTreeMap::new();
        let mut done = state.step();
        if let Some(domain) = made {
            for mapping in contents.mappings(domain) {
                done = done.and_then(|()| state.step());
                filled.insert(mapping.range.first().0, mapping);
            }
        }
        match done {
            Ok(()) => {
                if let Some(domain) = made {
                    state.domains.insert(domain, filled);
                }
                state.targets.insert(endpoint, target);
                Ok(())
            }
            Err(cause) if state.fail_blocks => {
                state.targets.insert(endpoint, Target::Blocked);
                Err(AttachError::Blocked(cause))
            }
            Err(cause) => Err(AttachError::Unchanged(cause)),
        }
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        let mut state = self.state();
        state.begun.clear();
        state.quarantined.push(endpoint);
        state.targets.insert(endpoint, Target::Blocked);
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        let mut state = self.state();
        match state.begun.remove(&mapping.range.first().0) {
            Some(outcome) => outcome,
            None => state.add(domain, mapping),
        }
    }

    fn batches_maps(&self) -> bool {
        self.state().batches_maps
    }

    fn begin_maps(&mut self, domain: DomainId, mappings: &[Mapping]) {
        let mut state = self.state();
        assert!(state.begun.is_empty(), "the run before is complete");
        state.longest_run = state.longest_run.max(mappings.len());
        for mapping in mappings {
            let outcome = state.add(domain, mapping);
            state.begun.insert(mapping.range.first().0, outcome);
        }
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        least: u64,
    ) -> Result<(), BackendError> {
        let mut state = self.state();
        state.begun.retain(|first, _| !range.contains(Iova(*first)));
        state.step()?;
        let mappings = state.domains.get_mut(&domain).expect("domain exists");
        assert!(
            mappings
                .values()
                .all(|m| range.covers(m.range) || !range.overlaps(m.range)),
            "the kernel splits nothing"
        );
        let gone = mappings.values().filter(|m| range.covers(m.range));
        let gone: u64 = gone.map(|m| m.range.span() + 1).sum();
        assert!(gone >= least, "{least} bytes in {range} were promised");
        mappings.retain(|_, m| !range.covers(m.range));
        Ok(())
    }
}
