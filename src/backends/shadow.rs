//! Endpoints whose devices are processes that walk the page tables themselves.
//!
//! The backend copies no mapping: the readers find it in the page table. The backend switches the endpoints' words in
//! the arena, and waits until no reader is inside an access that began before.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target,
};
use crate::address::{IovaRange, Mapping, PageMask};
use crate::error_limited;
use crate::ids::{DomainId, EndpointId};
use crate::page_table::EndpointWord;
use crate::shadow::{Ram, Registry, Stuck};

/// The backend.
#[derive(Debug)]
pub struct Shadow {
    registry: Arc<Registry>,
    targets: BTreeMap<EndpointId, Target>,
}

impl Shadow {
    /// The backend of `endpoints`, all of which must be in `registry`.
    pub fn new(registry: Arc<Registry>, endpoints: &[EndpointId]) -> Self {
        let blocked = endpoints.iter().map(|&e| (e, Target::Blocked));
        Self {
            registry,
            targets: blocked.collect(),
        }
    }

    fn block(&mut self, endpoint: EndpointId) {
        self.targets.insert(endpoint, Target::Blocked);
        if let Err(stuck) = self.registry.switch(endpoint, EndpointWord::Blocked) {
            error_limited!("endpoint {endpoint} is blocked, but {stuck}");
        }
    }
}

impl DmaBackend for Shadow {
    fn capabilities(&self) -> BackendCapabilities {
        BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        }
    }

    fn vmm_present(&mut self, _present: bool) {
        // The VMM does not run the devices.
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.registry.add_memory(Ram {
            range: slot.range,
            file: slot.file.clone(),
            offset: slot.offset,
        });
        Ok(())
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.registry.remove_memory(slot.range).map_err(failed)
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let word = match target {
            Target::Blocked => EndpointWord::Blocked,
            Target::Bypass => EndpointWord::Bypass,
            Target::Domain(domain) => match contents.table(domain) {
                Some((root, levels)) => EndpointWord::Domain { root, levels },
                None => {
                    return Err(AttachError::Unchanged(BackendError {
                        kind: BackendErrorKind::DevErr,
                        message: format!("domain {domain} has no page table"),
                    }));
                }
            },
        };
        match self.registry.switch(endpoint, word) {
            Ok(()) => {
                self.targets.insert(endpoint, target);
                Ok(())
            }
            Err(stuck) => {
                self.targets.insert(endpoint, Target::Blocked);
                Err(AttachError::Blocked(failed(stuck)))
            }
        }
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        // The core has moved every endpoint away. An endpoint that is left is a bug in the core: block it.
        let left: Vec<_> = self.members(domain).collect();
        for endpoint in left {
            self.block(endpoint);
        }
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        self.block(endpoint);
    }

    fn confirm_quarantine(&mut self, endpoint: EndpointId) -> Result<(), BackendError> {
        self.registry.confirm_blocked(endpoint).map_err(failed)
    }

    fn map(&mut self, _domain: DomainId, _mapping: &Mapping) -> Result<(), BackendError> {
        // The readers find the mapping in the page table.
        Ok(())
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        _range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        let targets = &self.targets;
        let concerned = |e| targets.get(&e) == Some(&Target::Domain(domain));
        self.registry.wait_for_readers(concerned).map_err(failed)
    }
}

impl Shadow {
    fn members(&self, domain: DomainId) -> impl Iterator<Item = EndpointId> {
        let inside = move |target: &Target| *target == Target::Domain(domain);
        let members = self.targets.iter().filter(move |(_, t)| inside(t));
        members.map(|(&endpoint, _)| endpoint)
    }
}

fn failed(stuck: Stuck) -> BackendError {
    BackendError {
        kind: BackendErrorKind::DevErr,
        message: stuck.to_string(),
    }
}
