//! Filling the backend of a new endpoint before the core has it, and emptying the backend of a removed endpoint after
//! the core has given it up, so that the guest's requests and the other devices do not wait: meanwhile the kernel pins or
//! unpins all of guest RAM.

use std::collections::BTreeSet;

use super::Iommu;
use super::hotplug::{AddError, NewEndpoints, RemoveError};
use super::memory::difference;
use crate::address::Mapping;
use crate::backends::{BackendError, Contents, DmaBackend, MemorySlot, Target};
use crate::error_limited;
use crate::ids::{DomainId, EndpointId};
use crate::locks::Mutex;
use crate::page_table::{Levels, TableOffset, TableReader};
use crate::topology::PciRange;

/// How often the backend follows guest RAM that has changed while it was filled.
const MAX_ROUNDS: usize = 16;

/// The part of the VM's state that the backend of an endpoint without a domain depends on.
#[derive(Clone, Debug, PartialEq)]
struct VmState {
    is_present: bool,
    memory: Vec<MemorySlot>,
    target: Target,
}

/// A backend that has followed the VM's state, and that the core does not have.
struct FilledBackend {
    backend: Box<dyn DmaBackend>,
    endpoint: EndpointId,
    /// `None` before the first state.
    state: Option<VmState>,
}

impl Iommu {
    /// As [`Self::add_endpoints`] with a backend, but fills the backend while the core is unlocked. Then compares the
    /// VM's state with the one that the backend was filled for, and repeats this until they are the same.
    ///
    /// The device must do no DMA before this returns: until then the core does not know what it reaches.
    ///
    /// # Errors
    /// See [`AddError`]. Also returns the backend, so that it is dropped while the core is unlocked.
    pub fn add_filled(
        iommu: &Mutex<Self>,
        new: &NewEndpoints<'_>,
        backend: Box<dyn DmaBackend>,
    ) -> Result<(), (AddError, Box<dyn DmaBackend>)> {
        let mut filled = FilledBackend {
            backend,
            endpoint: new.range.first().endpoint_id(),
            state: None,
        };
        // Before it makes any object, and while the core is unlocked, because the kernel is asked for one.
        let records = iommu.lock().object_records();
        filled.backend.keep_records(records, false);
        for _ in 0..MAX_ROUNDS {
            let state = {
                let mut core = iommu.lock();
                if let Err(cause) = core.check_new(new, Some(filled.backend.capabilities())) {
                    drop(core);
                    return Err((cause, filled.given_up()));
                }
                let state = core.state_for(new);
                if filled.state.as_ref() == Some(&state) {
                    return core.install_filled(new, filled);
                }
                state
            };
            if let Err(cause) = filled.follow(state) {
                return Err((AddError::Backend(cause), filled.given_up()));
            }
        }
        Err((AddError::Unsettled, filled.given_up()))
    }

    /// As [`Self::remove_endpoints`], but blocks the endpoints in `silent` after the core is unlocked, if their backend
    /// has no others. Their devices must do no DMA: from the moment that the core gives them up, it answers UNMAP without
    /// them.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn remove_emptied(
        iommu: &Mutex<Self>,
        range: PciRange,
        silent: &BTreeSet<EndpointId>,
    ) -> Result<Vec<Box<dyn DmaBackend>>, RemoveError> {
        let mut unused = iommu.lock().take_endpoints(range, silent)?;
        for backend in &mut unused {
            // A backend refuses an endpoint that it does not have, and is left without others.
            for &endpoint in silent {
                if backend
                    .attach(endpoint, Target::Blocked, &NoDomains)
                    .is_err()
                {
                    backend.quarantine(endpoint);
                }
            }
        }
        Ok(unused)
    }

    /// The state for the backend of a new endpoint.
    fn state_for(&self, new: &NewEndpoints<'_>) -> VmState {
        let group = new.group.and_then(|name| self.topology.group_named(name));
        let follows_group = group.is_some_and(|group| self.groups.is_active(group));
        let is_withheld = self.is_withheld(new.range.first().endpoint_id());
        VmState {
            is_present: self.vmm_present,
            memory: self.memory.clone(),
            target: if self.vmm_present && !follows_group && !is_withheld {
                self.bypass_target()
            } else {
                Target::Blocked
            },
        }
    }

    fn install_filled(
        &mut self,
        new: &NewEndpoints<'_>,
        filled: FilledBackend,
    ) -> Result<(), (AddError, Box<dyn DmaBackend>)> {
        let regions = new.reserved.clone();
        if let Err(cause) = self
            .topology
            .add_with_regions(new.range, new.group, regions)
        {
            return Err((cause.into(), filled.given_up()));
        }
        let index = self.place_backend(filled.backend);
        self.backend_of.insert(filled.endpoint, index);
        Ok(())
    }
}

impl FilledBackend {
    /// The backend of an endpoint that is not added. Its objects end with it.
    fn given_up(mut self) -> Box<dyn DmaBackend> {
        self.backend.forget_records();
        self.backend
    }

    /// Brings the backend into a state of the VM.
    fn follow(&mut self, state: VmState) -> Result<(), BackendError> {
        let (was_present, memory) = match &self.state {
            Some(before) => (before.is_present, before.memory.as_slice()),
            None => (false, &[][..]),
        };
        if state.is_present != was_present {
            self.backend.vmm_present(state.is_present);
        }
        for slot in difference(memory, &state.memory) {
            self.backend.remove_memory(&slot)?;
        }
        for slot in difference(&state.memory, memory) {
            if let Err(cause) = self.backend.add_memory(&slot) {
                error_limited!("cannot reach the memory at {slot:?} in bypass mode: {cause}");
            }
        }
        self.backend
            .attach(self.endpoint, state.target, &NoDomains)
            .map_err(|refusal| refusal.cause().clone())?;
        self.state = Some(state);
        Ok(())
    }
}

/// The contents for an endpoint that is in no domain.
struct NoDomains;

impl Contents for NoDomains {
    fn mappings(&self, _domain: DomainId) -> Box<dyn Iterator<Item = Mapping> + '_> {
        Box::new(std::iter::empty())
    }

    fn table(&self, _domain: DomainId) -> Option<(TableOffset, Levels)> {
        None
    }

    fn reader(&self, _domain: DomainId) -> Option<TableReader> {
        None
    }
}
