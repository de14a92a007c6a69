//! The backend that sends the device's server a window for each mapping.
//!
//! The page table is the only list of windows. The interposer's thread looks an access up there, and the link the windows
//! of a server that connects. FIRST and LAST of the leaves give the range of each mapping, as DMA_UNMAP must name it. So
//! a mapping costs no memory here, however many emulated endpoints its domain has.
//!
//! The backend makes each change twice. First it changes the view through which the interposer serves the server's
//! messages, and waits for accesses in progress. Then it sends the change to the server, which must reply. The backend
//! holds the link's lock for both, but not while it waits for the reply. So a server that connects meanwhile gets the
//! change once: from the backend, or with all windows from the link.
//!
//! The view is what the table says, with two differences that bridge the core's steps:
//!
//! 1. MAP: the core commits the mapping after the backends have made it reachable. Until the next request the view has
//!    the mapping besides the table, and in a run of MAPs all of their mappings (see [`MapRun`]).
//! 2. UNMAP: the core removes the mappings from the table before it asks the backends to unmap them. Before that,
//!    [`DmaBackend::begin_unmap`] takes the range out of the view, finds the windows there and sends their removal.
//!    [`DmaBackend::unmap`] waits for the server. It also waits until the interposer's thread has left the table, so the
//!    core may then reuse the frames.

use std::sync::Arc;

use super::dma_window::windows_of;
use super::interposed::{CAPABILITIES, Interposed};
use super::map_run::MapRun;
use super::view::DeviceView;
use crate::address::{Iova, IovaRange, Mapping};
use crate::backends::{
    Adoption, AttachError, BackendCapabilities, BackendError, Contents, DmaBackend, MemorySlot,
    Target, UnmapPart,
};
use crate::ids::{DomainId, EndpointId};
use crate::vfio_user::{Announced, BatchTicket, DmaUpdate, DmaUpdateError, Window};

/// The backend.
pub(super) struct Exact {
    pub(super) device: Interposed,
    /// The ranges of the UNMAP in progress.
    begun: Vec<Removal>,
    /// The run of MAPs in progress.
    run: Option<MapRun>,
    /// Why windows of a refused MAP could not be taken back from the server. The core unmaps the MAP's range next, and
    /// that fails.
    kept: Option<DmaUpdateError>,
    /// The server may have memory that it must not have, since a memory slot could not be taken back.
    is_stopped: bool,
    /// The connection whose server has not hung up while the removal of a memory slot waited for that.
    waited_for: Option<u64>,
}

/// The removal of one range's windows.
struct Removal {
    first: Iova,
    /// The number of windows.
    windows: usize,
    /// `None` if there are no windows.
    ticket: Option<BatchTicket>,
}

impl Exact {
    /// The backend of `device`.
    pub(super) fn new(device: Interposed) -> Self {
        Self {
            device,
            begun: Vec::new(),
            run: None,
            kept: None,
            is_stopped: false,
            waited_for: None,
        }
    }

    /// The outcome of a mapping of the run; `None` if it is not one of its mappings.
    fn run_outcome(&mut self, range: IovaRange) -> Option<Result<(), DmaUpdateError>> {
        let run = self.run.as_mut()?;
        let outcome = run.take(&self.device, range);
        if let Some(cause) = run.take_kept() {
            self.kept = Some(cause);
        }
        if run.is_complete() {
            self.run = None;
        }
        outcome
    }

    /// Replaces the view. Returns the former one, also on error.
    fn replace(&self, view: DeviceView) -> (DeviceView, Result<(), DmaUpdateError>) {
        let mut updates = self.device.link.lock();
        let announced = updates.announced();
        updates.note_windows_of(None);
        updates.hold_back();
        let windows = view.count;
        let mut old = std::mem::replace(&mut *self.device.space.change(), view);
        old.settle();
        // A server that was cut off may still have windows of a view before this one.
        let mut removal = updates.open(true);
        drop(updates);
        self.device.link.remove_all(&mut removal, || {
            let windows = old.windows_in(IovaRange::ALL).map(|window| window.range);
            windows.filter(|window| announced.has(*window))
        });
        let done = self.device.link.wait(removal.clone()).and_then(|()| {
            let announcement = self.device.link.lock().announce(&removal, windows);
            self.device.link.wait(announcement)
        });
        (old, done)
    }

    /// Sends the removal of windows, of those that the server has.
    fn send_unmaps(
        &self,
        ticket: &mut BatchTicket,
        announced: &Announced,
        windows: impl Iterator<Item = IovaRange>,
    ) {
        let known = windows.filter(|window| announced.has(*window));
        self.device
            .link
            .send_all(ticket, known.map(DmaUpdate::Unmap));
    }

    /// Announces windows, which are few, after `change`; see [`Interposed::add`].
    fn add(
        &self,
        windows: &[Window],
        change: impl FnOnce(&mut DeviceView),
    ) -> Result<(), DmaUpdateError> {
        self.device.add(windows, || {
            let mut view = self.device.space.change();
            change(&mut view);
            view.count += windows.len();
        })
    }

    /// Removes windows, which are few, after `change`; see [`Interposed::take_back`].
    fn take_back(
        &self,
        windows: &[Window],
        change: impl FnOnce(&mut DeviceView),
    ) -> Result<(), DmaUpdateError> {
        self.device.take_back(windows, || {
            let mut view = self.device.space.change();
            change(&mut view);
            view.discount(windows.len());
        })
    }

    /// Sends the windows of a mapping, and waits for the server.
    fn map_one(&mut self, mapping: &Mapping) -> Result<(), DmaUpdateError> {
        let is_in_run = self.run.is_some();
        let add = |view: &mut DeviceView| {
            // The core has committed all mappings of the view but those of a run in progress.
            if !is_in_run {
                view.settle();
            }
            view.add(mapping);
        };
        let windows = self.device.wire(windows_of(*mapping, &self.device.slots));
        if windows.is_empty() {
            // The view must know all the same that the core is about to change the table there.
            add(&mut self.device.space.change());
            return Ok(());
        }
        let added = self.add(&windows, add);
        if added.is_err() {
            let taken = self.take_back(&windows, |view| view.withdraw(mapping.range));
            self.kept = taken.err();
        }
        added
    }

    /// Waits until nobody can use the ranges of the UNMAP that has begun.
    fn finish_unmap(&mut self) -> Result<(), BackendError> {
        let begun = std::mem::take(&mut self.begun);
        // The interposer's thread has left the frames that the table has lost, and sees none of them any more.
        let windows = begun.iter().map(|removal| removal.windows).sum();
        self.device.space.change().left(windows);
        let mut failed = None;
        for Removal { first, ticket, .. } in begun {
            if let Some(ticket) = ticket
                && let Err(cause) = self.device.link.wait(ticket)
            {
                failed.get_or_insert((first, cause));
            }
        }
        match failed {
            None => Ok(()),
            Some((first, cause)) => Err(self.device.removal_failed(first, &cause)),
        }
    }

    /// Announces the windows of the present domain in a new memory slot.
    fn add_slot_to_domain(&self, slot: &Arc<MemorySlot>) -> Result<(), DmaUpdateError> {
        let mut updates = self.device.link.lock();
        let announced = updates.announced();
        let part = {
            let mut view = self.device.space.change();
            view.settle();
            view.add_slot(slot);
            view.in_slot(slot)
        };
        let mut ticket = updates.open(false);
        drop(updates);
        let mut added = 0;
        let mut windows = part.windows_in(IovaRange::ALL).inspect(|_| added += 1);
        // An announcement in progress has the others.
        let known = windows.by_ref().filter(|w| announced.has(w.range));
        let maps = known.map(|w| DmaUpdate::Map(self.device.space.wire_window(&w)));
        self.device.link.send_all(&mut ticket, maps);
        windows.for_each(drop);
        self.device.space.change().count += added;
        self.device.link.wait(ticket)
    }
}

impl DmaBackend for Exact {
    fn capabilities(&self) -> BackendCapabilities {
        CAPABILITIES
    }

    fn vmm_present(&mut self, _present: bool) {
        // There is nothing to bind: the VMM's client connects by itself.
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let slot = self.device.insert_slot(slot);
        let added = match self.device.target {
            Target::Blocked => Ok(()),
            Target::Domain(_) => self.add_slot_to_domain(&slot),
            Target::Bypass => {
                let alone = DeviceView::bypass(vec![slot.clone()], self.device.reserved.clone());
                let windows = self.device.wire(alone.windows_in(IovaRange::ALL));
                let added = self.add(&windows, |view| view.add_slot(&slot));
                if added.is_err() {
                    let taken = self.take_back(&windows, |view| view.remove_slot(&slot));
                    self.is_stopped = taken.is_err();
                }
                added
            }
        };
        added.map_err(|cause| {
            let failure = format_args!("guest RAM at {} stays out of reach", slot.range);
            self.device.refused(failure, &cause)
        })
    }

    /// Waits until the server has removed its windows in the slot. A server that was cut off may map the slot until it hangs
    /// up, although the view of its quarantined endpoint has no window: this waits for it, too, once for all slots. Nothing
    /// takes memory from another process. If the wait is in vain, the log says so, and the removal is counted.
    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let Some(slot) = self.device.take_slot(slot) else {
            return Ok(());
        };
        let mut updates = self.device.link.lock();
        let announced = updates.announced();
        let part = {
            let mut view = self.device.space.change();
            view.settle();
            let part = view.in_slot(&slot);
            view.remove_slot(&slot);
            part
        };
        let gone = part.windows_in(IovaRange::ALL).map(|window| window.range);
        let mut gone = gone.peekable();
        let first = gone.peek().map(|window| window.first());
        let closing = updates.closing_session();
        if first.is_none() {
            if part.knows_windows() || closing.is_none() {
                return Ok(());
            }
            if closing == self.waited_for {
                return Err(self.device.slot_kept(&slot));
            }
        }
        let mut ticket = updates.open(true);
        drop(updates);
        let mut removed = 0;
        let mut gone = gone.inspect(|_| removed += 1);
        self.send_unmaps(&mut ticket, &announced, gone.by_ref());
        gone.for_each(drop);
        self.device.space.change().discount(removed);
        let Err(cause) = self.device.link.wait(ticket) else {
            return Ok(());
        };
        let closing = self.device.link.lock().closing_session();
        if closing.is_some() {
            self.waited_for = closing;
            let kept = self.device.slot_kept(&slot);
            if first.is_none() {
                return Err(kept);
            }
        }
        match (self.device.target, first) {
            (Target::Domain(_), Some(first)) => Err(self.device.removal_failed(first, &cause)),
            _ => {
                let failure = format_args!("guest RAM at {} may stay in reach", slot.range);
                Err(self.device.refused(failure, &cause))
            }
        }
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let view = self.device.view_of(endpoint, target, contents)?.counted();
        let former = self.device.target;
        let (old, done) = self.replace(view);
        let Err(cause) = done else {
            self.device.target = target;
            self.note_windows_of(target);
            return Ok(());
        };
        let refusal = self
            .device
            .refused(format_args!("it cannot be switched to {target}"), &cause);
        let back = match cause {
            DmaUpdateError::Refused(_) => self.replace(old).1,
            DmaUpdateError::CutOff(_) => Err(cause),
        };
        if back.is_ok() {
            self.note_windows_of(former);
            return Err(AttachError::Unchanged(refusal));
        }
        self.quarantine(endpoint);
        Err(AttachError::Blocked(refusal))
    }

    fn adopt(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        self.take_over_all(adoption, contents)
    }

    fn destroy_domain(&mut self, _domain: DomainId) {
        // The windows belong to the endpoint, not to the domain, and the core has moved the endpoint elsewhere.
    }

    fn take_stopped(&mut self) -> Vec<EndpointId> {
        let is_stopped = std::mem::take(&mut self.is_stopped);
        is_stopped
            .then_some(self.device.endpoint)
            .into_iter()
            .collect()
    }

    fn quarantine(&mut self, _endpoint: EndpointId) {
        self.device.quarantine();
        self.kept = None;
        if let Some(mut run) = self.run.take() {
            // Returns at once: the server is cut off.
            run.finish(&self.device);
        }
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        if self.device.target != Target::Domain(domain) {
            // The next attach to the domain makes the window.
            return Ok(());
        }
        let added = match self.run_outcome(mapping.range) {
            Some(outcome) => outcome,
            None => self.map_one(mapping),
        };
        added.map_err(|cause| self.device.map_refused(mapping, &cause))
    }

    fn batches_maps(&self) -> bool {
        true
    }

    /// Sends all windows of the mappings.
    fn begin_maps(&mut self, domain: DomainId, mappings: &[Mapping]) {
        if self.device.target == Target::Domain(domain) && mappings.len() > 1 {
            self.run = MapRun::send(&self.device, mappings);
        }
    }

    fn reads_page_table(&self) -> bool {
        true
    }

    /// Sends the removal of the windows in `range`. If they are very many, it waits for the server to remove the first
    /// ones.
    fn begin_unmap(&mut self, domain: DomainId, range: IovaRange) {
        if self.device.target != Target::Domain(domain) {
            return;
        }
        let mut updates = self.device.link.lock();
        let left = self.device.space.change().leave(range);
        let Some(table) = left else { return };
        let announced = updates.announced();
        let mappings = table.mappings_in(range);
        let windows = mappings.flat_map(|mapping| windows_of(mapping, &self.device.slots));
        let mut gone = windows.map(|window| window.range).peekable();
        let mut ticket = gone.peek().is_some().then(|| updates.open(true));
        drop(updates);
        let mut windows = 0;
        let mut gone = gone.inspect(|_| windows += 1);
        if let Some(ticket) = &mut ticket {
            self.send_unmaps(ticket, &announced, gone.by_ref());
        }
        gone.for_each(drop);
        let first = range.first();
        self.begun.push(Removal {
            first,
            windows,
            ticket,
        });
    }

    /// Waits for all that [`Self::begin_unmap`] has begun. Without that, `range` is a mapping that the core, this backend or
    /// another one has refused.
    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        if self.device.target != Target::Domain(domain) {
            return Ok(());
        }
        if !self.begun.is_empty() {
            return self.finish_unmap();
        }
        // If it is still one of the run, waits for the server. A refused mapping is in the view no more.
        let _ = self.run_outcome(range);
        if let Some(cause) = self.kept.take() {
            return Err(self.device.removal_failed(range.first(), &cause));
        }
        let pending = self.device.space.change().pending(range);
        let Some(mapping) = pending else {
            return Ok(());
        };
        let windows = self.device.wire(windows_of(mapping, &self.device.slots));
        self.take_back(&windows, |view| view.withdraw(range))
            .map_err(|cause| self.device.removal_failed(range.first(), &cause))
    }

    /// Waits for the removal of all parts at once.
    fn unmap_all(&mut self, domain: DomainId, _parts: &[UnmapPart]) -> Result<(), BackendError> {
        if self.device.target != Target::Domain(domain) {
            return Ok(());
        }
        self.finish_unmap()
    }
}
