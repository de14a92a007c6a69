//! One emulated device, as both kinds of backends have it: its interposer, its address space and its target.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::dma_window::DmaWindow;
use super::view::{DeviceView, Gate};
use super::windows::Space;
use super::{EmulatedDevice, Watch};
use crate::address::{Iova, IovaRange, Mapping, PageMask};
use crate::backends::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, MemorySlot, Target,
};
use crate::error_limited;
use crate::faults::FaultSink;
use crate::ids::EndpointId;
use crate::vfio_user::{
    BatchTicket, DmaUpdate, DmaUpdateError, DmaUpdates, Interposer, InterposerSettings, KeptDevice,
    Link, Window,
};

/// The limits of both kinds of backends.
pub(super) const CAPABILITIES: BackendCapabilities = BackendCapabilities {
    page_sizes: PageMask::TABLE,
    aperture: IovaRange::ALL,
};

/// An emulated device. Dropping it stops its interposer.
pub(super) struct Interposed {
    pub(super) endpoint: EndpointId,
    name: String,
    pub(super) space: Arc<Space>,
    pub(super) link: Arc<Link>,
    /// Guest RAM, in ascending order and disjoint.
    pub(super) slots: Vec<Arc<MemorySlot>>,
    pub(super) target: Target,
    /// The addresses that bypass mode does not reach.
    pub(super) reserved: Arc<[IovaRange]>,
    /// Stopped before the other fields are dropped.
    interposer: Option<Interposer>,
}

impl Interposed {
    /// Starts the interposer. The VMM's clients connect to `listener`.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub(super) fn start(
        device: EmulatedDevice,
        listener: UnixListener,
        sink: Arc<dyn FaultSink>,
        kept: Option<KeptDevice>,
    ) -> io::Result<Self> {
        let endpoint = device.endpoint;
        let reserved: Arc<[IovaRange]> = device.reserved.into();
        let space = Space::new(endpoint, device.isolation, reserved.clone(), sink);
        let space = Arc::new(space);
        let link = Link::new(device.name.clone(), space.clone(), device.deadlines)?;
        let link = Arc::new(link.with_max_windows(device.max_windows));
        let settings = InterposerSettings {
            name: device.name.clone(),
            server: device.server,
            answers_all_accesses: device.answers_all_accesses,
        };
        let interposer = Interposer::start(settings, listener, link.clone(), space.clone(), kept)?;
        Ok(Self {
            endpoint,
            name: device.name,
            space,
            link,
            slots: Vec::new(),
            target: Target::Blocked,
            reserved,
            interposer: Some(interposer),
        })
    }

    /// A handle to read the device's state without access to the backend, which the core owns.
    pub(super) fn watch(&self) -> Watch {
        Watch::new(self.endpoint, self.link.clone(), self.space.clone())
    }

    /// Adds guest RAM to the slots.
    pub(super) fn insert_slot(&mut self, slot: &MemorySlot) -> Arc<MemorySlot> {
        let slot = Arc::new(slot.clone());
        let at = self.slots.partition_point(|s| s.range < slot.range);
        self.slots.insert(at, slot.clone());
        slot
    }

    /// Removes guest RAM from the slots; `None` if it is not there.
    pub(super) fn take_slot(&mut self, slot: &MemorySlot) -> Option<Arc<MemorySlot>> {
        let at = self.slots.iter().position(|s| **s == *slot)?;
        Some(self.slots.remove(at))
    }

    /// What the device sees of `target`, not counted yet.
    ///
    /// # Errors
    /// The endpoint is another one, or the domain has no page table.
    pub(super) fn view_of(
        &self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<DeviceView, AttachError> {
        let kind = BackendErrorKind::DevErr;
        if endpoint != self.endpoint {
            let message = format!(
                "endpoint {endpoint} is not behind the backend of {}",
                self.name
            );
            return Err(AttachError::Unchanged(BackendError { kind, message }));
        }
        let (slots, reserved) = (self.slots.clone(), self.reserved.clone());
        match target {
            Target::Blocked => Ok(DeviceView::closed(Gate::Blocked, reserved)),
            Target::Bypass => Ok(DeviceView::bypass(slots, reserved)),
            Target::Domain(domain) => match contents.reader(domain) {
                Some(table) => Ok(DeviceView::translated(table, slots, reserved)),
                None => {
                    let message = format!("domain {domain} has no page table");
                    Err(AttachError::Unchanged(BackendError { kind, message }))
                }
            },
        }
    }

    /// Makes a change that adds `windows`, which are few. On error, the caller must make up for it with
    /// [`Self::take_back`].
    pub(super) fn add(
        &self,
        windows: &[Window],
        change: impl FnOnce(),
    ) -> Result<(), DmaUpdateError> {
        self.add_with(windows, |_| change())
    }

    /// As [`Self::add`]; the change may record something, too.
    pub(super) fn add_with(
        &self,
        windows: &[Window],
        change: impl FnOnce(&mut DmaUpdates<'_>),
    ) -> Result<(), DmaUpdateError> {
        let mut updates = self.link.lock();
        change(&mut updates);
        let ticket = updates.add(windows);
        drop(updates);
        self.link.wait(ticket)
    }

    /// The first half of [`Self::add`]. The caller must wait for the ticket.
    pub(super) fn send_maps(&self, windows: &[Window], change: impl FnOnce()) -> BatchTicket {
        let mut updates = self.link.lock();
        change();
        updates.add(windows)
    }

    /// Makes a change that removes `windows`, which are few.
    pub(super) fn take_back(
        &self,
        windows: &[Window],
        change: impl FnOnce(),
    ) -> Result<(), DmaUpdateError> {
        self.take_back_with(windows, |_| change())
    }

    /// As [`Self::take_back`]; the change may record something, too.
    pub(super) fn take_back_with(
        &self,
        windows: &[Window],
        change: impl FnOnce(&mut DmaUpdates<'_>),
    ) -> Result<(), DmaUpdateError> {
        let mut updates = self.link.lock();
        let announced = updates.announced();
        change(&mut updates);
        let known = windows.iter().filter(|w| announced.has(w.range));
        let unmaps = known.map(|w| DmaUpdate::Unmap(w.range)).collect();
        let ticket = updates.send(unmaps, !windows.is_empty());
        drop(updates);
        self.link.wait(ticket)
    }

    /// What goes on with the peers of an earlier process: they get no answers before the device has `view`. Waits for a server
    /// that may have memory and that nobody goes on with.
    ///
    /// # Errors
    /// That server has not hung up.
    pub(super) fn go_on(&mut self, target: Target, view: DeviceView) -> Result<(), BackendError> {
        *self.space.change() = view;
        self.target = target;
        self.link.go_on();
        let waited = self.link.wait_for_hang_up();
        waited.map_err(|cause| self.refused(format_args!("it cannot be taken over"), &cause))
    }

    /// The windows as the link sends them.
    pub(super) fn wire(&self, windows: impl IntoIterator<Item = DmaWindow>) -> Vec<Window> {
        let windows = windows.into_iter();
        windows.map(|w| self.space.wire_window(&w)).collect()
    }

    /// Ends all accesses, and sets the gate.
    pub(super) fn stop(&self, gate: Gate) {
        let _updates = self.link.lock();
        *self.space.change() = DeviceView::closed(gate, self.reserved.clone());
    }

    /// Ends all accesses because of a failure, and cuts the server off.
    pub(super) fn quarantine(&mut self) {
        self.target = Target::Blocked;
        self.stop(Gate::Quarantined);
        self.link.cut_off("its endpoint is quarantined");
    }

    /// The server may still have windows from `first` on: stops the device.
    pub(super) fn removal_failed(&self, first: Iova, cause: &DmaUpdateError) -> BackendError {
        self.stop(Gate::Quarantined);
        self.space.report_stop(first);
        let failure = format_args!("mappings from {first} on may stay in place");
        self.refused(failure, cause)
    }

    /// The VMM removes guest RAM that a former server may still map, which has not hung up. Counts that, and says it: the
    /// endpoint is quarantined, so nobody else does.
    pub(super) fn slot_kept(&self, slot: &MemorySlot) -> BackendError {
        self.space.kept_slots.inc();
        let message = format!(
            "{}: guest RAM at {} is removed, and the device's former server may still map it: it has not hung up since \
             its connection was closed; end that server",
            self.name, slot.range
        );
        error_limited!("{message}");
        let kind = BackendErrorKind::DevErr;
        BackendError { kind, message }
    }

    /// The server has not applied the update of a MAP. If it has no room for the mapping, the guest gets a fault event:
    /// the stock driver ignores the status of a MAP, so the guest's log would say nothing.
    pub(super) fn map_refused(&self, mapping: &Mapping, cause: &DmaUpdateError) -> BackendError {
        let refusal = self.refused(format_args!("{mapping} stays unmapped"), cause);
        if refusal.kind == BackendErrorKind::NoMem {
            self.space.report_missing(mapping);
        }
        refusal
    }

    /// The server has not applied an update.
    pub(super) fn refused(
        &self,
        failure: impl std::fmt::Display,
        cause: &DmaUpdateError,
    ) -> BackendError {
        let kind = match cause {
            DmaUpdateError::Refused(refusal)
                if refusal.is_limit() || matches!(refusal.errno, libc::ENOMEM | libc::ENOSPC) =>
            {
                BackendErrorKind::NoMem
            }
            DmaUpdateError::Refused(_) | DmaUpdateError::CutOff(_) => BackendErrorKind::DevErr,
        };
        BackendError {
            kind,
            message: format!("{}: {failure}: {cause}", self.name),
        }
    }
}

impl Drop for Interposed {
    fn drop(&mut self) {
        self.stop(Gate::Blocked);
        drop(self.interposer.take());
    }
}
