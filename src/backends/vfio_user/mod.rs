//! An emulated device in a process of its own, behind an interposer. The backend sends the device's server a window for
//! each mapping, and the server's messages reach memory through these windows only.
//!
//! Each endpoint has a backend of its own, so that cutting off one server affects no other device.
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
//!    the mapping besides the table.
//! 2. UNMAP: the core removes the mappings from the table before it asks the backends to unmap them. Before that,
//!    [`DmaBackend::begin_unmap`] takes the range out of the view, finds the windows there and sends their removal.
//!    [`DmaBackend::unmap`] waits for the server. It also waits until the interposer's thread has left the table, so the
//!    core may then reuse the frames.

mod view;
mod watch;
mod windows;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::view::{DeviceView, DmaWindow, Gate, windows_of};
use self::windows::Space;
use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target, UnmapPart,
};
use crate::address::{Iova, IovaRange, Mapping, PageMask};
use crate::faults::FaultSink;
use crate::ids::{DomainId, EndpointId};
use crate::vfio_user::{
    Announced, BatchTicket, DmaUpdate, DmaUpdateError, Interposer, InterposerSettings, Link,
};

pub use self::watch::{EmulatedState, Watch};
pub use self::windows::Isolation;
pub use crate::vfio_user::MAX_BATCH_TIMEOUT;

/// An emulated device.
#[derive(Clone, Debug)]
pub struct EmulatedDevice {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Its name, for the log.
    pub name: String,
    /// The socket at which its server listens.
    pub server: PathBuf,
    /// How its server is isolated from guest RAM.
    pub isolation: Isolation,
    /// The addresses that bypass mode does not reach.
    pub reserved: Vec<IovaRange>,
    /// How long its server may take to answer while the guest waits.
    pub deadline: Duration,
    /// See [`InterposerSettings::answers_all_accesses`].
    pub answers_all_accesses: bool,
}

/// The backend.
pub struct VfioUser {
    endpoint: EndpointId,
    name: String,
    space: Arc<Space>,
    link: Arc<Link>,
    /// Guest RAM, in ascending order and disjoint.
    slots: Vec<Arc<MemorySlot>>,
    target: Target,
    /// The addresses that bypass mode does not reach.
    reserved: Arc<[IovaRange]>,
    /// The ranges of the UNMAP in progress.
    begun: Vec<Removal>,
    /// Stopped before the other fields are dropped.
    interposer: Option<Interposer>,
}

/// The removal of one range's windows.
struct Removal {
    first: Iova,
    /// The number of windows.
    windows: usize,
    /// `None` if there are no windows.
    ticket: Option<BatchTicket>,
}

impl VfioUser {
    /// The backend of one device. The VMM's clients connect to `listener`.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn start(
        device: EmulatedDevice,
        listener: UnixListener,
        sink: Arc<dyn FaultSink>,
    ) -> io::Result<Self> {
        let endpoint = device.endpoint;
        let reserved: Arc<[IovaRange]> = device.reserved.into();
        let space = Space::new(endpoint, device.isolation, reserved.clone(), sink);
        let space = Arc::new(space);
        let link = Link::new(device.name.clone(), space.clone(), device.deadline)?;
        let link = Arc::new(link);
        let settings = InterposerSettings {
            name: device.name.clone(),
            server: device.server,
            answers_all_accesses: device.answers_all_accesses,
        };
        let interposer = Interposer::start(settings, listener, link.clone(), space.clone())?;
        Ok(Self {
            endpoint,
            name: device.name,
            space,
            link,
            slots: Vec::new(),
            target: Target::Blocked,
            reserved,
            begun: Vec::new(),
            interposer: Some(interposer),
        })
    }

    /// A handle to read the device's state without access to the backend, which the core owns.
    pub fn watch(&self) -> Watch {
        Watch::new(self.endpoint, self.link.clone(), self.space.clone())
    }

    /// Replaces the view. Returns the former one, also on error.
    fn replace(&self, view: DeviceView) -> (DeviceView, Result<(), DmaUpdateError>) {
        let mut updates = self.link.lock();
        let announced = updates.announced();
        updates.hold_back();
        let windows = view.count;
        let mut old = std::mem::replace(&mut *self.space.change(), view);
        old.settle();
        let mut removal = updates.open(old.count > 0, old.count + windows);
        drop(updates);
        let gone = old.windows_in(IovaRange::ALL).map(|window| window.range);
        self.send_unmaps(&mut removal, &announced, gone);
        let done = self.link.wait(removal.clone()).and_then(|()| {
            let announcement = self.link.lock().announce(&removal);
            self.link.wait(announcement)
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
        self.link.send_all(ticket, known.map(DmaUpdate::Unmap));
    }

    /// Makes a change that adds `windows`, which are few. On error, the caller must make up for it with
    /// [`Self::take_back`].
    fn add(
        &self,
        windows: &[DmaWindow],
        change: impl FnOnce(&mut DeviceView),
    ) -> (Announced, Result<(), DmaUpdateError>) {
        let mut updates = self.link.lock();
        let announced = updates.announced();
        let count = {
            let mut view = self.space.change();
            change(&mut view);
            view.count += windows.len();
            view.count
        };
        let maps = windows.iter().map(|w| self.map_update(w)).collect();
        let ticket = updates.send(maps, false, count);
        drop(updates);
        (announced, self.link.wait(ticket))
    }

    /// Makes a change that removes `windows`, which are few. `sent` tells the server to which [`Self::add`] has sent them
    /// all.
    fn take_back(
        &self,
        windows: &[DmaWindow],
        sent: Option<Announced>,
        change: impl FnOnce(&mut DeviceView),
    ) -> Result<(), DmaUpdateError> {
        let mut updates = self.link.lock();
        let announced = updates.announced();
        let all = sent.is_some_and(|sent| sent.is_same_server(&announced));
        let count = {
            let mut view = self.space.change();
            change(&mut view);
            view.discount(windows.len());
            view.count
        };
        let known = windows.iter().filter(|w| all || announced.has(w.range));
        let unmaps = known.map(|w| DmaUpdate::Unmap(w.range)).collect();
        let ticket = updates.send(unmaps, !windows.is_empty(), count);
        drop(updates);
        self.link.wait(ticket)
    }

    /// Waits until nobody can use the ranges of the UNMAP that has begun.
    fn finish_unmap(&mut self) -> Result<(), BackendError> {
        let begun = std::mem::take(&mut self.begun);
        // The interposer's thread has left the frames that the table has lost, and sees none of them any more.
        let windows = begun.iter().map(|removal| removal.windows).sum();
        self.space.change().left(windows);
        let mut failed = None;
        for Removal { first, ticket, .. } in begun {
            if let Some(ticket) = ticket
                && let Err(cause) = self.link.wait(ticket)
            {
                failed.get_or_insert((first, cause));
            }
        }
        match failed {
            None => Ok(()),
            Some((first, cause)) => Err(self.removal_failed(first, &cause)),
        }
    }

    /// The server may still have windows from `first` on: quarantines the device, which removes all windows.
    fn removal_failed(&self, first: Iova, cause: &DmaUpdateError) -> BackendError {
        self.stop(Gate::Quarantined);
        self.space.report_stop(first);
        let failure = format_args!("mappings from {first} on may stay in place");
        self.refused(failure, cause)
    }

    /// Announces the windows of the present domain in a new memory slot.
    fn add_slot_to_domain(&self, slot: &Arc<MemorySlot>) -> Result<(), DmaUpdateError> {
        let mut updates = self.link.lock();
        let announced = updates.announced();
        let part = {
            let mut view = self.space.change();
            view.settle();
            view.add_slot(slot);
            view.in_slot(slot)
        };
        let mut ticket = updates.open(false, part.count);
        drop(updates);
        let mut added = 0;
        let mut windows = part.windows_in(IovaRange::ALL).inspect(|_| added += 1);
        // An announcement in progress has the others.
        let known = windows.by_ref().filter(|w| announced.has(w.range));
        let maps = known.map(|w| self.map_update(&w));
        self.link.send_all(&mut ticket, maps);
        windows.for_each(drop);
        self.space.change().count += added;
        self.link.wait(ticket)
    }

    fn map_update(&self, window: &DmaWindow) -> DmaUpdate {
        DmaUpdate::Map(self.space.wire_window(window))
    }

    /// Removes all windows and sets the gate.
    fn stop(&self, gate: Gate) {
        let _updates = self.link.lock();
        *self.space.change() = DeviceView::closed(gate, self.reserved.clone());
    }

    fn refused(&self, failure: impl std::fmt::Display, cause: &DmaUpdateError) -> BackendError {
        let kind = match cause {
            DmaUpdateError::Refused(libc::ENOMEM | libc::ENOSPC) => BackendErrorKind::NoMem,
            DmaUpdateError::Refused(_) | DmaUpdateError::CutOff(_) => BackendErrorKind::DevErr,
        };
        BackendError {
            kind,
            message: format!("{}: {failure}: {cause}", self.name),
        }
    }
}

impl DmaBackend for VfioUser {
    fn capabilities(&self) -> BackendCapabilities {
        BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        }
    }

    fn vmm_present(&mut self, _present: bool) {
        // There is nothing to bind: the VMM's client connects by itself.
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let slot = Arc::new(slot.clone());
        let at = self.slots.partition_point(|s| s.range < slot.range);
        self.slots.insert(at, slot.clone());
        let added = match self.target {
            Target::Blocked => Ok(()),
            Target::Domain(_) => self.add_slot_to_domain(&slot),
            Target::Bypass => {
                let alone = DeviceView::bypass(vec![slot.clone()], self.reserved.clone());
                let windows: Vec<_> = alone.windows_in(IovaRange::ALL).collect();
                let (sent, added) = self.add(&windows, |view| view.add_slot(&slot));
                added.or_else(|cause| {
                    self.take_back(&windows, Some(sent), |view| view.remove_slot(&slot))?;
                    Err(cause)
                })
            }
        };
        added.map_err(|cause| {
            let failure = format_args!("guest RAM at {} stays out of reach", slot.range);
            self.refused(failure, &cause)
        })
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let Some(at) = self.slots.iter().position(|s| **s == *slot) else {
            return Ok(());
        };
        let slot = self.slots.remove(at);
        let mut updates = self.link.lock();
        let announced = updates.announced();
        let part = {
            let mut view = self.space.change();
            view.settle();
            let part = view.in_slot(&slot);
            view.remove_slot(&slot);
            part
        };
        let gone = part.windows_in(IovaRange::ALL).map(|window| window.range);
        let mut gone = gone.peekable();
        let Some(first) = gone.peek().map(|window| window.first()) else {
            return Ok(());
        };
        let mut ticket = updates.open(true, part.count);
        drop(updates);
        let mut removed = 0;
        let mut gone = gone.inspect(|_| removed += 1);
        self.send_unmaps(&mut ticket, &announced, gone.by_ref());
        gone.for_each(drop);
        self.space.change().discount(removed);
        self.link.wait(ticket).map_err(|cause| {
            if let Target::Domain(_) = self.target {
                return self.removal_failed(first, &cause);
            }
            let failure = format_args!("guest RAM at {} may stay in reach", slot.range);
            self.refused(failure, &cause)
        })
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        if endpoint != self.endpoint {
            let message = format!(
                "endpoint {endpoint} is not behind the backend of {}",
                self.name
            );
            let kind = BackendErrorKind::DevErr;
            return Err(AttachError::Unchanged(BackendError { kind, message }));
        }
        let (slots, reserved) = (self.slots.clone(), self.reserved.clone());
        let view = match target {
            Target::Blocked => DeviceView::closed(Gate::Blocked, reserved),
            Target::Bypass => DeviceView::bypass(slots, reserved),
            Target::Domain(domain) => match contents.reader(domain) {
                Some(table) => DeviceView::translated(table, slots, reserved),
                None => {
                    let message = format!("domain {domain} has no page table");
                    let kind = BackendErrorKind::DevErr;
                    return Err(AttachError::Unchanged(BackendError { kind, message }));
                }
            },
        };
        let (old, done) = self.replace(view);
        let Err(cause) = done else {
            self.target = target;
            return Ok(());
        };
        let refusal = self.refused(format_args!("it cannot be switched to {target}"), &cause);
        let back = match cause {
            DmaUpdateError::Refused(_) => self.replace(old).1,
            DmaUpdateError::CutOff(_) => Err(cause),
        };
        if back.is_ok() {
            return Err(AttachError::Unchanged(refusal));
        }
        self.quarantine(endpoint);
        Err(AttachError::Blocked(refusal))
    }

    fn destroy_domain(&mut self, _domain: DomainId) {
        // The windows belong to the endpoint, not to the domain, and the core has moved the endpoint elsewhere.
    }

    fn quarantine(&mut self, _endpoint: EndpointId) {
        self.target = Target::Blocked;
        self.stop(Gate::Quarantined);
        self.link.cut_off("its endpoint is quarantined");
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        if self.target != Target::Domain(domain) {
            // The next attach to the domain makes the window.
            return Ok(());
        }
        let windows: Vec<_> = windows_of(*mapping, &self.slots).collect();
        if windows.is_empty() {
            // The view must know all the same that the core is about to change the table there.
            self.space.change().add(mapping);
            return Ok(());
        }
        let (sent, added) = self.add(&windows, |view| view.add(mapping));
        let added = added.or_else(|cause| {
            self.take_back(&windows, Some(sent), DeviceView::settle)?;
            Err(cause)
        });
        added.map_err(|cause| self.refused(format_args!("{mapping} stays unmapped"), &cause))
    }

    fn reads_page_table(&self) -> bool {
        true
    }

    /// Sends the removal of the windows in `range`. If they are very many, it waits for the server to remove the first
    /// ones.
    fn begin_unmap(&mut self, domain: DomainId, range: IovaRange) {
        if self.target != Target::Domain(domain) {
            return;
        }
        let mut updates = self.link.lock();
        let (table, count) = {
            let mut view = self.space.change();
            (view.leave(range), view.count)
        };
        let Some(table) = table else { return };
        let announced = updates.announced();
        let mappings = table.mappings_in(range);
        let windows = mappings.flat_map(|mapping| windows_of(mapping, &self.slots));
        let mut gone = windows.map(|window| window.range).peekable();
        let mut ticket = gone.peek().is_some().then(|| updates.open(true, count));
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

    /// Waits for all that [`Self::begin_unmap`] has begun. Without that, `range` is the latest mapping, which another backend
    /// has refused.
    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        if self.target != Target::Domain(domain) {
            return Ok(());
        }
        if !self.begun.is_empty() {
            return self.finish_unmap();
        }
        let latest = self.space.change().latest();
        let Some(mapping) = latest.filter(|latest| range.covers(latest.range)) else {
            return Ok(());
        };
        let windows: Vec<_> = windows_of(mapping, &self.slots).collect();
        self.take_back(&windows, None, DeviceView::settle)
            .map_err(|cause| self.removal_failed(range.first(), &cause))
    }

    /// Waits for the removal of all parts at once.
    fn unmap_all(&mut self, domain: DomainId, _parts: &[UnmapPart]) -> Result<(), BackendError> {
        if self.target != Target::Domain(domain) {
            return Ok(());
        }
        self.finish_unmap()
    }
}

impl Drop for VfioUser {
    fn drop(&mut self) {
        self.stop(Gate::Blocked);
        drop(self.interposer.take());
    }
}
