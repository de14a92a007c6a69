//! A backend for tests: keeps what it was told under the kernel's rules, and fails on demand.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{BackendError, BackendErrorKind, Capabilities, DmaBackend, Target};
use crate::address::{IovaRange, Mapping, PageMask};
use crate::ids::{DomainId, EndpointId};

/// What the recorder holds; shared with the test that looks at it.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Mappings by domain and first address.
    pub domains: BTreeMap<DomainId, BTreeMap<u64, Mapping>>,
    /// Where each endpoint is.
    pub targets: BTreeMap<EndpointId, Target>,
    /// Endpoints that were quarantined.
    pub quarantined: Vec<EndpointId>,
    /// Calls made that may fail.
    pub calls: u64,
    /// The call that fails, counted from 1.
    pub fail_call: Option<u64>,
}

impl State {
    fn step(&mut self) -> Result<(), BackendError> {
        self.calls += 1;
        if self.fail_call == Some(self.calls) {
            return Err(BackendError {
                kind: BackendErrorKind::DevErr,
                message: "told to fail".into(),
            });
        }
        Ok(())
    }
}

/// The backend; clones share their state.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    state: Arc<Mutex<State>>,
    capabilities: Capabilities,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self::with(Capabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        })
    }

    pub(crate) fn with(capabilities: Capabilities) -> Self {
        Self {
            state: Arc::default(),
            capabilities,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }
}

impl DmaBackend for Recorder {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn create_domain(&mut self, domain: DomainId) -> Result<(), BackendError> {
        let mut state = self.state();
        state.step()?;
        assert!(
            state.domains.insert(domain, BTreeMap::new()).is_none(),
            "domain {domain} made twice"
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

    fn attach(&mut self, endpoint: EndpointId, target: Target) -> Result<(), BackendError> {
        let mut state = self.state();
        state.step()?;
        if let Target::Domain(domain) = target {
            assert!(
                state.domains.contains_key(&domain),
                "domain {domain} unknown"
            );
        }
        state.targets.insert(endpoint, target);
        Ok(())
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        let mut state = self.state();
        state.quarantined.push(endpoint);
        state.targets.insert(endpoint, Target::Blocked);
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        let mut state = self.state();
        state.step()?;
        let mappings = state.domains.get_mut(&domain).expect("domain exists");
        assert!(
            !mappings.values().any(|m| m.range.overlaps(mapping.range)),
            "the kernel refuses overlaps"
        );
        mappings.insert(mapping.range.first().0, *mapping);
        Ok(())
    }

    fn unmap(&mut self, domain: DomainId, range: IovaRange) -> Result<(), BackendError> {
        let mut state = self.state();
        state.step()?;
        let mappings = state.domains.get_mut(&domain).expect("domain exists");
        assert!(
            mappings
                .values()
                .all(|m| range.covers(m.range) || !range.overlaps(m.range)),
            "the kernel splits nothing"
        );
        mappings.retain(|_, m| !range.covers(m.range));
        Ok(())
    }
}
