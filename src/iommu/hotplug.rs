//! Adding and removing endpoints while a guest runs.

use std::collections::BTreeSet;

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

/// An endpoint was not added; nothing has changed.
#[derive(Debug, Error)]
pub enum AddError {
    /// The endpoint conflicts with the topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The endpoint has more reserved regions than a PROBE of this guest has room for.
    #[error(
        "{count} reserved regions are too many for the running VM, which has room for {room}; \
         give fewer, or add the endpoint to the configuration file and restart the VM"
    )]
    NoRoom {
        /// The number of its regions.
        count: usize,
        /// The number of regions that a PROBE has room for.
        room: usize,
    },
    /// The endpoint's backend supports less than the guest was offered.
    #[error(
        "its device supports only {offers}, but the guest was offered {promised}; add the endpoint \
         to the configuration file and restart the VM"
    )]
    TooWeak {
        /// Page sizes and addresses that the backend supports.
        offers: String,
        /// Page sizes and addresses that the guest was offered.
        promised: String,
    },
    /// Guest RAM has changed each time that the endpoint's backend was filled with it.
    #[error(
        "the VMM changed the guest's memory each time the device's address space was filled with it; add \
         the endpoint again when the memory stays as it is"
    )]
    Unsettled,
    /// The endpoint's backend failed to take the endpoint over.
    #[error("its device cannot be used: {0}; fix the device, then add the endpoint again")]
    Backend(BackendError),
}

/// Endpoints were not removed; nothing has changed.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// The range does not lie within one configured range.
    #[error(transparent)]
    NoSuch(#[from] NoSuchEndpoints),
    /// The host cannot isolate one of the endpoints from an endpoint that would remain.
    #[error(
        "the host cannot isolate this device from the device of endpoint {mate}, so both must stay in \
         one domain; keep both endpoints until the VM ends"
    )]
    HostGroup {
        /// The remaining endpoint, which is in the same host group.
        mate: PciAddress,
    },
}

/// Endpoints to add. Several differ only in their address.
#[derive(Debug)]
pub struct NewEndpoints<'a> {
    /// Their functions.
    pub range: PciRange,
    /// Their host group.
    pub group: Option<&'a GroupName>,
    /// All their reserved regions.
    pub reserved: ReservedRegions,
    /// The number of regions that a PROBE of this guest has room for.
    pub room: usize,
}

/// Why endpoints were not added, with the backend for the first one.
type NotAdded = (AddError, Option<Box<dyn DmaBackend>>);

impl Iommu {
    /// Adds endpoints, all of them unattached. Puts the first one behind `backend`, if there is
    /// one.
    ///
    /// # Errors
    /// See [`AddError`]. Also returns the backend to the caller.
    pub fn add_endpoints(
        &mut self,
        new: NewEndpoints<'_>,
        backend: Option<Box<dyn DmaBackend>>,
    ) -> Result<(), NotAdded> {
        let range = new.range;
        let Some(backend) = self.admit(new, backend)? else {
            return Ok(());
        };
        let endpoint = range.first().endpoint_id();
        let index = self.install_backend(backend);
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
        let backend = self.remove_backend(index);
        // Cannot fail: the range was added above.
        let _ = self.topology.remove(range);
        Err((AddError::Backend(refusal.cause().clone()), Some(backend)))
    }

    /// Adds endpoints that were added while an earlier process served the guest, whose state [`Self::restore`] takes over.
    /// Must be called after the backends of the start are added, and before the guest runs. Unlike
    /// [`Self::add_backend`], it does not narrow the offer.
    ///
    /// # Errors
    /// See [`AddError`]. Also returns the backend to the caller.
    pub fn add_late_endpoints(
        &mut self,
        new: NewEndpoints<'_>,
        backend: Option<Box<dyn DmaBackend>>,
    ) -> Result<(), NotAdded> {
        let first = new.range.first().endpoint_id();
        if let Some(backend) = self.admit(new, backend)? {
            self.push_backend(backend, &[first]);
        }
        Ok(())
    }

    /// Checks new endpoints, and adds them to the topology. Returns the backend for the first one.
    fn admit(
        &mut self,
        new: NewEndpoints<'_>,
        backend: Option<Box<dyn DmaBackend>>,
    ) -> Result<Option<Box<dyn DmaBackend>>, NotAdded> {
        let can = backend.as_ref().map(|backend| backend.capabilities());
        let admitted = self.check_new(&new, can).and_then(|()| {
            let regions = new.reserved;
            let added = self
                .topology
                .add_with_regions(new.range, new.group, regions);
            added.map_err(AddError::from)
        });
        match admitted {
            Ok(_) => Ok(backend),
            Err(cause) => Err((cause, backend)),
        }
    }

    /// Removes endpoints, all of one configured range. When this returns, none of them can reach
    /// memory. Returns the backends that are left without endpoints.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn remove_endpoints(
        &mut self,
        range: PciRange,
    ) -> Result<Vec<Box<dyn DmaBackend>>, RemoveError> {
        self.take_endpoints(range, &BTreeSet::new())
    }

    /// Whether [`Self::remove_endpoints`] can remove endpoints.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn check_removal(&self, range: PciRange) -> Result<(), RemoveError> {
        self.topology.check_within_one_range(range)?;
        match self.remaining_group_mate(range) {
            Some(mate) => Err(RemoveError::HostGroup { mate }),
            None => Ok(()),
        }
    }

    /// As [`Self::remove_endpoints`]. Does not switch the endpoints in `silent` if their backend has no others: the
    /// caller must block them in the backend. They must do no DMA.
    pub(super) fn take_endpoints(
        &mut self,
        range: PciRange,
        silent: &BTreeSet<EndpointId>,
    ) -> Result<Vec<Box<dyn DmaBackend>>, RemoveError> {
        self.check_removal(range)?;
        let ids = range.first().endpoint_id()..=range.last().endpoint_id();
        let touched = self.endpoints.range(ids.clone()).map(|(&id, _)| id);
        let behind = self.backend_of.range(ids).map(|(&id, _)| id);
        let mut gone: Vec<_> = touched.chain(behind).collect();
        gone.sort_unstable();
        gone.dedup();
        let mut unused = Vec::new();
        for endpoint in gone {
            if silent.contains(&endpoint)
                && let Some(&index) = self.backend_of.get(&endpoint)
                && self.backend_of.values().filter(|i| **i == index).count() == 1
            {
                self.backend_of.remove(&endpoint);
                // Its tombstone stands for it in the endpoint's domain, which the endpoint leaves below.
                unused.push(self.remove_backend(index));
                self.remove_endpoint(endpoint, Some(index));
                continue;
            }
            let index = self.backend_of.get(&endpoint).copied();
            self.remove_endpoint(endpoint, index);
            if let Some(index) = index
                && !self.backend_of.values().any(|other| *other == index)
            {
                unused.push(self.remove_backend(index));
            }
        }
        self.count_records();
        self.topology.remove(range)?;
        Ok(unused)
    }

    /// Blocks an endpoint behind the backend at an index, and removes it from everything but the topology.
    fn remove_endpoint(&mut self, endpoint: EndpointId, backend: Option<usize>) {
        let info = self.topology.endpoint(endpoint);
        let Some((group, reserved)) = info.map(|info| (info.group, info.reserved.clone())) else {
            return;
        };
        if let Some(index) = backend
            && let Err(refusal) = self.switch(index, endpoint, Target::Blocked, None)
        {
            // The last resort. The record that the endpoint is quarantined is removed below.
            self.quarantine(endpoint, refusal.cause());
        }
        let state = self.endpoints.remove(&endpoint).unwrap_or_default();
        self.record_endpoint(endpoint);
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
    }

    /// An endpoint outside `range` that shares backend and host group with one inside.
    fn remaining_group_mate(&self, range: PciRange) -> Option<PciAddress> {
        let in_group = |id: EndpointId, backend: usize| {
            let group = self.topology.endpoint(id)?.group?;
            Some((PciAddress::from_endpoint_id(id), (backend, group)))
        };
        let members: Vec<_> = self
            .backend_of
            .iter()
            .filter_map(|(&id, &backend)| in_group(id, backend))
            .collect();
        let is_removed = |member: &PciAddress| range.contains(*member);
        members
            .iter()
            .find(|(mate, group)| {
                let mut others = members.iter();
                !is_removed(mate) && others.any(|(other, of)| is_removed(other) && of == group)
            })
            .map(|(mate, _)| *mate)
    }

    /// Checks new endpoints against the offer that the guest got at its start.
    pub(super) fn check_new(
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

    /// Installs a backend, and reports a connected VMM and its memory slots to it. Returns its
    /// index.
    fn install_backend(&mut self, mut backend: Box<dyn DmaBackend>) -> usize {
        backend.keep_records(self.object_records(), false);
        if self.vmm_present {
            backend.vmm_present(true);
        }
        for slot in &self.memory {
            if let Err(cause) = backend.add_memory(slot) {
                error_limited!("cannot reach the memory at {slot:?} in bypass mode: {cause}");
            }
        }
        self.place_backend(backend)
    }

    /// Gives a backend an index.
    pub(super) fn place_backend(&mut self, backend: Box<dyn DmaBackend>) -> usize {
        self.batches_maps |= backend.batches_maps();
        match self.vacant.pop() {
            Some(index) => {
                self.backends[index] = backend;
                index
            }
            None => {
                self.backends.push(backend);
                // Domains do not count unreachable mappings while there is no backend.
                self.count_unreachable();
                self.backends.len() - 1
            }
        }
    }

    /// Removes a backend without endpoints. The indexes of the others stay valid.
    fn remove_backend(&mut self, index: usize) -> Box<dyn DmaBackend> {
        self.vacant.push(index);
        let mut backend = std::mem::replace(&mut self.backends[index], Box::new(Vacant));
        // A later backend may have the same owner, and a later process must find no object twice.
        backend.forget_records();
        debug_assert!(!self.backend_of.values().any(|other| *other == index));
        backend
    }
}
