//! The backend that tells the device's server large regions instead of each mapping.
//!
//! A region has 8 TiB: libvfio-user takes no larger one. The server is told a region, without memory, when the guest maps
//! something there for the first time, and keeps it. The region allows nothing: the interposer looks each access up in
//! the page table of the endpoint's domain, without a lock of the core.
//!
//! So MAP has nothing to do. UNMAP waits for the accesses that are being served: they may have found the mappings before
//! the core has removed them from the table, and may be in frames of the table that the core is about to use again. An
//! access holds the lock of the view from its lookup to the end of its copy, and UNMAP takes that lock once.

use super::dma_window::windows_of;
use super::interposed::{CAPABILITIES, Interposed};
use super::view::DeviceView;
use super::windows::DmaRegion;
use crate::address::{IovaRange, Mapping};
use crate::backends::{
    Adoption, AttachError, BackendCapabilities, BackendError, Contents, DmaBackend, MemorySlot,
    Target, UnmapPart,
};
use crate::ids::{DomainId, EndpointId};
use crate::vfio_user::{DmaUpdateError, DmaUpdates, Window};

/// The backend.
pub(super) struct Coarse {
    device: Interposed,
    /// The regions that the server is told, in ascending order.
    regions: Vec<DmaRegion>,
}

impl Coarse {
    /// The backend of `device`, whose server has been told these regions.
    pub(super) fn new(device: Interposed, mut regions: Vec<DmaRegion>) -> Self {
        regions.sort_unstable();
        device.space.set_regions(&regions);
        Self { device, regions }
    }

    /// Goes on with the server of an earlier process: it has been told regions, and has no memory.
    fn take_over(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), BackendError> {
        let view = self.device.view_of(endpoint, target, contents);
        let view = view.map_err(|refusal| refusal.cause().clone())?;
        let missing = self.missing(&view, IovaRange::ALL);
        self.device.go_on(target, view)?;
        self.announce(missing).map_err(|cause| {
            let failure = format_args!("it cannot be switched to {target}");
            self.device.refused(failure, &cause)
        })
    }

    fn is_announced(&self, region: DmaRegion) -> bool {
        self.regions.binary_search(&region).is_ok()
    }

    /// Whether the server is told all regions that share an address with `range`.
    fn covers(&self, range: IovaRange) -> bool {
        let first = DmaRegion::of(range.first());
        let last = DmaRegion::of(range.last());
        let Ok(at) = self.regions.binary_search(&first) else {
            return false;
        };
        first == last || self.regions.get(at + last.distance(first)) == Some(&last)
    }

    /// The regions of the windows of `view` in `range` that the server is not told yet.
    fn missing(&self, view: &DeviceView, range: IovaRange) -> Vec<DmaRegion> {
        let mut missing = Vec::new();
        let mut rest = Some(range);
        while let Some(window) = rest.and_then(|rest| view.windows_in(rest).next()) {
            missing.extend(self.missing_in(window.range));
            let after = DmaRegion::of(window.range.last()).end();
            rest = after.and_then(|first| IovaRange::new(first, range.last()));
        }
        missing
    }

    /// The regions of one window that the server is not told yet.
    fn missing_in(&self, window: IovaRange) -> impl Iterator<Item = DmaRegion> {
        DmaRegion::all_of(window).filter(|region| !self.is_announced(*region))
    }

    /// Tells the server regions, if any, and waits for its answers. On error, it keeps those it had before.
    fn announce(&mut self, missing: Vec<DmaRegion>) -> Result<(), DmaUpdateError> {
        if missing.is_empty() {
            return Ok(());
        }
        let before = self.regions.clone();
        self.regions.extend(missing.iter().copied());
        self.regions.sort_unstable();
        self.regions.dedup();
        let windows: Vec<_> = missing.into_iter().map(Window::from).collect();
        let set = |updates: &mut DmaUpdates<'_>, regions: &[DmaRegion]| {
            self.device.space.set_regions(regions);
            let firsts: Vec<_> = regions.iter().map(|region| region.first().0).collect();
            updates.note_regions(&firsts);
        };
        let added = self
            .device
            .add_with(&windows, |updates| set(updates, &self.regions));
        let Err(cause) = added else { return Ok(()) };
        let back = self
            .device
            .take_back_with(&windows, |updates| set(updates, &before));
        self.regions = before;
        back.and(Err(cause))
    }

    /// Waits until no access is in progress that began before.
    fn wait_for_accesses(&self, domain: DomainId) {
        if self.device.target == Target::Domain(domain) {
            drop(self.device.space.change());
        }
    }
}

impl DmaBackend for Coarse {
    fn capabilities(&self) -> BackendCapabilities {
        CAPABILITIES
    }

    fn vmm_present(&mut self, _present: bool) {
        // There is nothing to bind: the VMM's client connects by itself.
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let slot = self.device.insert_slot(slot);
        if self.device.target == Target::Blocked {
            return Ok(());
        }
        let mut view = self.device.space.change().clone();
        view.add_slot(&slot);
        let missing = self.missing(&view.in_slot(&slot), IovaRange::ALL);
        self.announce(missing).map_err(|cause| {
            let failure = format_args!("guest RAM at {} stays out of reach", slot.range);
            self.device.refused(failure, &cause)
        })?;
        *self.device.space.change() = view;
        Ok(())
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        if let Some(slot) = self.device.take_slot(slot) {
            self.device.space.change().remove_slot(&slot);
        }
        Ok(())
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let view = self.device.view_of(endpoint, target, contents)?;
        let missing = self.missing(&view, IovaRange::ALL);
        self.announce(missing).map_err(|cause| {
            let failure = format_args!("it cannot be switched to {target}");
            AttachError::Unchanged(self.device.refused(failure, &cause))
        })?;
        // Waits for the accesses in progress.
        *self.device.space.change() = view;
        self.device.target = target;
        Ok(())
    }

    fn adopt(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        let mut failed = Vec::new();
        for &(endpoint, target) in adoption.endpoints {
            if adoption.quarantined.contains(&endpoint) {
                self.device.link.give_up("its endpoint is quarantined");
            }
            if let Err(cause) = self.take_over(endpoint, target, contents) {
                failed.push((endpoint, cause));
            }
        }
        self.device.link.go_on();
        failed
    }

    fn destroy_domain(&mut self, _domain: DomainId) {
        // The core has moved the endpoint elsewhere.
    }

    fn quarantine(&mut self, _endpoint: EndpointId) {
        self.device.quarantine();
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        if self.device.target != Target::Domain(domain) || self.covers(mapping.range) {
            return Ok(());
        }
        let windows = windows_of(*mapping, &self.device.slots);
        let missing = windows.flat_map(|w| self.missing_in(w.range)).collect();
        self.announce(missing)
            .map_err(|cause| self.device.map_refused(mapping, &cause))
    }

    fn reads_page_table(&self) -> bool {
        true
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        _range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        self.wait_for_accesses(domain);
        Ok(())
    }

    fn unmap_all(&mut self, domain: DomainId, _parts: &[UnmapPart]) -> Result<(), BackendError> {
        self.wait_for_accesses(domain);
        Ok(())
    }
}
