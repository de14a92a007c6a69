//! Endpoints that come and go while a guest runs.

use thiserror::Error;

use super::Iommu;
use crate::address::IovaRange;
use crate::backends::vacant::Vacant;
use crate::backends::{BackendCapabilities, BackendError, DmaBackend, Target};
use crate::error_limited;
use crate::ids::EndpointId;
use crate::topology::{
    GroupName, NoSuchEndpoints, PciAddress, PciRange, ReservedRegions, TopologyError,
};

/// Why an endpoint was not added. Nothing has changed then.
#[derive(Debug, Error)]
pub enum AddError {
    /// It does not go with the endpoints there are.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// It has more reserved regions than PROBE has room for, and the guest was told how much.
    #[error(
        "{count} reserved regions are too many for a running VM, which was told of room for {room}; \
         give fewer, or put the endpoint into the file and start the VM anew"
    )]
    NoRoom {
        /// Its regions.
        count: usize,
        /// How many PROBE has room for.
        room: usize,
    },
    /// Its backend can do less than the guest was told of.
    #[error(
        "its device takes {offers} only, and the guest was told of {promised}; put the endpoint into \
         the file and start the VM anew"
    )]
    TooWeak {
        /// What the backend can do.
        offers: String,
        /// What the guest was told.
        promised: String,
    },
    /// Its backend could not take it over.
    #[error("its device cannot be used: {0}; see to the device and add the endpoint again")]
    Backend(BackendError),
}

/// Why endpoints are not removed. Nothing has changed then.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// There are no such endpoints.
    #[error(transparent)]
    NoSuch(#[from] NoSuchEndpoints),
    /// The host cannot keep one of them apart from another that stays.
    #[error(
        "the host cannot tell this device from that of endpoint {mate}, which would take it along \
         into its domain; leave it there until the VM ends"
    )]
    HostGroup {
        /// An endpoint in the same host group.
        mate: PciAddress,
    },
}

/// An endpoint to add, or several that have all but the address in common.
#[derive(Debug)]
pub struct NewEndpoints<'a> {
    /// The functions.
    pub range: PciRange,
    /// Their host group.
    pub group: Option<&'a GroupName>,
    /// All their reserved regions.
    pub reserved: ReservedRegions,
    /// How many regions a PROBE of this guest has room for.
    pub room: usize,
}

impl Iommu {
    /// Adds endpoints, and the backend that makes the first of them obey if there is one. They are
    /// attached to nothing.
    ///
    /// # Errors
    /// See [`AddError`]. The backend is given back.
    pub fn add_endpoints(
        &mut self,
        new: NewEndpoints<'_>,
        backend: Option<Box<dyn DmaBackend>>,
    ) -> Result<(), (AddError, Option<Box<dyn DmaBackend>>)> {
        if let Err(cause) = self.check_new(&new, backend.as_ref().map(|b| b.capabilities())) {
            return Err((cause, backend));
        }
        if let Err(cause) = self.topology.add_with(new.range, new.group, new.reserved) {
            return Err((cause.into(), backend));
        }
        let Some(backend) = backend else {
            return Ok(());
        };
        let endpoint = new.range.first().endpoint_id();
        let index = self.put_backend(backend);
        self.backend_of.insert(endpoint, index);
        let target = if self.vmm_present {
            self.unattached_target(endpoint)
        } else {
            Target::Blocked
        };
        let Err(refusal) = self.switch(index, endpoint, target, None) else {
            return Ok(());
        };
        self.backend_of.remove(&endpoint);
        let backend = self.take_backend(index);
        // It was added above.
        let _ = self.topology.remove(new.range);
        Err((AddError::Backend(refusal.cause().clone()), Some(backend)))
    }

    /// Removes endpoints that were given together, or some of these. When this returns none of them
    /// reaches anything. Returns the backends that nobody is behind any more.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn remove_endpoints(
        &mut self,
        range: PciRange,
    ) -> Result<Vec<Box<dyn DmaBackend>>, RemoveError> {
        self.topology.are_together(range)?;
        if let Some(mate) = self.host_mate_left_behind(range) {
            return Err(RemoveError::HostGroup { mate });
        }
        let ids = range.first().endpoint_id()..=range.last().endpoint_id();
        let touched = self.endpoints.range(ids.clone()).map(|(&id, _)| id);
        let behind = self.backend_of.range(ids).map(|(&id, _)| id);
        let mut gone: Vec<_> = touched.chain(behind).collect();
        gone.sort_unstable();
        gone.dedup();
        let mut unused = Vec::new();
        for endpoint in gone {
            let index = self.forget(endpoint);
            if let Some(index) = index
                && !self.backend_of.values().any(|other| *other == index)
            {
                unused.push(self.take_backend(index));
            }
        }
        self.topology.remove(range)?;
        Ok(unused)
    }

    /// Blocks an endpoint and takes it out of everything but the topology. Returns its backend.
    fn forget(&mut self, endpoint: EndpointId) -> Option<usize> {
        let info = self.topology.endpoint(endpoint);
        let (group, reserved) = info.map(|info| (info.group, info.reserved.clone()))?;
        let backend = self.backend_of.get(&endpoint).copied();
        if let Some(index) = backend
            && let Err(refusal) = self.switch(index, endpoint, Target::Blocked, None)
        {
            // The last means there is; nobody sees the state, which is about to go.
            self.quarantine(endpoint, refusal.cause());
        }
        let state = self.endpoints.remove(&endpoint).unwrap_or_default();
        if let Some(domain) = state.domain {
            self.leave_domain(endpoint, domain, backend, &reserved);
        }
        self.backend_of.remove(&endpoint);
        if let Some(id) = group {
            let resumed = self.groups.leave(id, endpoint);
            self.resume(&resumed);
            if !self.groups.is_active(id) {
                let target = self.bypass_target();
                self.retarget_unattached_mates(group, endpoint, target);
            }
        }
        backend
    }

    /// An endpoint that is not in `range` and shares backend and host group with one that is.
    fn host_mate_left_behind(&self, range: PciRange) -> Option<PciAddress> {
        let place = |id: EndpointId, backend: usize| {
            let group = self.topology.endpoint(id)?.group?;
            Some((PciAddress::from_endpoint_id(id), (backend, group)))
        };
        let places: Vec<_> = self
            .backend_of
            .iter()
            .filter_map(|(&id, &backend)| place(id, backend))
            .collect();
        let goes = |at: &PciAddress| range.contains(*at);
        places
            .iter()
            .find(|(mate, held)| {
                !goes(mate) && places.iter().any(|(at, with)| goes(at) && with == held)
            })
            .map(|(mate, _)| *mate)
    }

    fn check_new(
        &self,
        new: &NewEndpoints<'_>,
        can: Option<BackendCapabilities>,
    ) -> Result<(), AddError> {
        let (count, room) = (new.reserved.len(), new.room);
        if count > room {
            return Err(AddError::NoRoom { count, room });
        }
        let Some(can) = can else {
            return Ok(());
        };
        let offered = self.page_sizes.bits();
        if !can.aperture.covers(self.input) || can.page_sizes.bits() & offered != offered {
            let words = |pages: u64, range: IovaRange| format!("pages {pages:#x} in {range}");
            return Err(AddError::TooWeak {
                offers: words(can.page_sizes.bits(), can.aperture),
                promised: words(offered, self.input),
            });
        }
        Ok(())
    }

    /// Makes a backend one of those there are, and tells it what the others know.
    fn put_backend(&mut self, mut backend: Box<dyn DmaBackend>) -> usize {
        if self.vmm_present {
            backend.vmm_present(true);
        }
        for slot in &self.memory {
            if let Err(cause) = backend.add_memory(slot) {
                error_limited!("bypass mode does not reach the memory at {slot:?}: {cause}");
            }
        }
        match self.vacant.pop() {
            Some(index) => {
                self.backends[index] = backend;
                index
            }
            None => {
                self.backends.push(backend);
                // Nobody has counted while there was none.
                self.count_unreachable();
                self.backends.len() - 1
            }
        }
    }

    /// Takes out a backend that nobody is behind. The numbers of the others stay.
    fn take_backend(&mut self, index: usize) -> Box<dyn DmaBackend> {
        self.vacant.push(index);
        let backend = std::mem::replace(&mut self.backends[index], Box::new(Vacant));
        debug_assert!(!self.backend_of.values().any(|other| *other == index));
        backend
    }
}
