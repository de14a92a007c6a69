//! An emulated device in a process of its own, behind an interposer. The backend sends the device's server a window for
//! each mapping, and the server's messages reach memory through these windows only.
//!
//! Each endpoint has a backend of its own, so that cutting off one server affects no other device.
//!
//! The backend makes each change twice. First it changes the windows through which the interposer serves the server's
//! messages, and waits for accesses in progress. Then it sends the change to the server, which must reply. The backend
//! holds the link's lock for both, but not while it waits for the reply. So a server that connects meanwhile gets the
//! change once: from the backend, or with all windows from the interposer.

mod windows;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::windows::{DmaWindow, DmaWindows, Gate, Space, windows_of};
use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target, UnmapPart,
};
use crate::address::{Iova, IovaRange, Mapping, PageMask};
use crate::faults::FaultSink;
use crate::ids::{DomainId, EndpointId};
use crate::vfio_user::{DmaUpdate, DmaUpdateError, Ends, Interposer, InterposerSettings, Link};

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
    /// Stopped before the other fields are dropped.
    interposer: Option<Interposer>,
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
        let space = Space::new(endpoint, device.isolation, device.reserved, sink);
        let space = Arc::new(space);
        let link = Arc::new(Link::new(device.name.clone(), device.deadline)?);
        let settings = InterposerSettings {
            name: device.name.clone(),
            server: device.server,
        };
        let interposer = Interposer::start(settings, listener, link.clone(), space.clone())?;
        Ok(Self {
            endpoint,
            name: device.name,
            space,
            link,
            slots: Vec::new(),
            target: Target::Blocked,
            interposer: Some(interposer),
        })
    }

    /// A handle to read the device's state without access to the backend, which the core owns.
    pub fn watch(&self) -> Watch {
        Watch {
            endpoint: self.endpoint,
            link: self.link.clone(),
            space: self.space.clone(),
        }
    }

    /// Replaces the gate and all windows. Returns the former ones, also on error.
    fn replace(
        &self,
        gate: Gate,
        windows: DmaWindows,
    ) -> (Gate, DmaWindows, Result<(), DmaUpdateError>) {
        let mut updates = self.link.lock();
        let maps: Vec<_> = windows.values().map(|p| self.map_update(p)).collect();
        let (old_gate, old) = {
            let mut view = self.space.change();
            let old_gate = std::mem::replace(&mut view.gate, gate);
            (old_gate, std::mem::replace(&mut view.windows, windows))
        };
        let unmaps = old.values().map(|p| DmaUpdate::Unmap(p.range));
        let ticket = updates.send(unmaps.chain(maps));
        drop(updates);
        (old_gate, old, self.link.wait(ticket))
    }

    /// Adds windows. On error, it has removed all of them again.
    fn add(&self, windows: Vec<DmaWindow>) -> Result<(), DmaUpdateError> {
        let mut updates = self.link.lock();
        let maps: Vec<_> = windows.iter().map(|p| self.map_update(p)).collect();
        let keys: Vec<_> = windows.iter().map(|p| p.range).collect();
        let by_first = windows.into_iter().map(|p| (p.range.first().0, p));
        self.space.change().windows.extend(by_first);
        let ticket = updates.send(maps);
        drop(updates);
        let added = self.link.wait(ticket);
        if added.is_err() {
            self.remove_in(&keys, |_| true)?;
        }
        added
    }

    /// Removes windows. After `Ok`, the server has given them up.
    fn remove(&self, gone: impl Fn(&DmaWindow) -> bool) -> Result<(), DmaUpdateError> {
        self.remove_in(&[IovaRange::ALL], gone)
    }

    /// Removes the windows that begin in one of `ranges`. If that fails, quarantines the device, which removes all
    /// windows.
    fn unmap_ranges(&self, ranges: &[IovaRange]) -> Result<(), BackendError> {
        self.remove_in(ranges, |_| true).map_err(|cause| {
            let first = ranges.first().map_or(Iova(0), |range| range.first());
            self.stop(Gate::Quarantined);
            self.space.report_stop(first);
            self.refused(
                format_args!("mappings from {first} on may stay in place"),
                &cause,
            )
        })
    }

    /// Removes the windows that begin in one of `ranges` and for which `gone` is true.
    fn remove_in(
        &self,
        ranges: &[IovaRange],
        gone: impl Fn(&DmaWindow) -> bool,
    ) -> Result<(), DmaUpdateError> {
        let mut updates = self.link.lock();
        let mut unmaps = Vec::new();
        {
            let mut view = self.space.change();
            for range in ranges {
                let bounds = range.first().0..=range.last().0;
                let inside = view.windows.range(bounds).map(|(_, p)| p);
                let before = unmaps.len();
                unmaps.extend(inside.filter(|p| gone(p)).map(|p| p.range));
                // Remove these windows before the next range, which may cover them, too.
                for range in unmaps.iter().skip(before) {
                    view.windows.remove(&range.first().0);
                }
            }
        }
        let ticket = updates.send(unmaps.into_iter().map(DmaUpdate::Unmap));
        drop(updates);
        self.link.wait(ticket)
    }

    fn map_update(&self, window: &DmaWindow) -> DmaUpdate {
        DmaUpdate::Map(self.space.wire_window(window))
    }

    /// Removes all windows and sets the gate.
    fn stop(&self, gate: Gate) {
        let _updates = self.link.lock();
        let mut view = self.space.change();
        view.gate = gate;
        view.windows.clear();
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

/// Observes an emulated device.
#[derive(Clone)]
pub struct Watch {
    endpoint: EndpointId,
    link: Arc<Link>,
    space: Arc<Space>,
}

/// The state of an emulated device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmulatedState {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Whether its client and its server are connected.
    pub ends: Ends,
    /// The number of its windows into guest RAM. Its server has them while it is connected.
    pub windows: usize,
    /// The number of refused accesses.
    pub refused: u64,
}

impl Watch {
    /// The device's endpoint.
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// The device's state now. Waits at most for a copy in progress.
    pub fn state(&self) -> EmulatedState {
        let (windows, refused) = self.space.figures();
        EmulatedState {
            endpoint: self.endpoint,
            ends: self.link.ends(),
            windows,
            refused,
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
        if self.target != Target::Bypass {
            return Ok(());
        }
        let windows = self.space.identity(&slot);
        self.add(windows).map_err(|cause| {
            let failure = format_args!("guest RAM at {} stays out of reach", slot.range);
            self.refused(failure, &cause)
        })
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.slots.retain(|s| **s != *slot);
        self.remove(|p| p.is_in(slot)).map_err(|cause| {
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
        let (gate, windows): (_, Vec<DmaWindow>) = match target {
            Target::Blocked => (Gate::Blocked, Vec::new()),
            Target::Bypass => {
                let all = self.slots.iter().flat_map(|s| self.space.identity(s));
                (Gate::Bypass, all.collect())
            }
            Target::Domain(domain) => {
                let mut windows = Vec::new();
                for mapping in contents.mappings(domain) {
                    windows.extend(windows_of(&mapping, &self.slots));
                }
                (Gate::Translated, windows)
            }
        };
        let by_first = windows.into_iter().map(|p| (p.range.first().0, p));
        let (old_gate, old, done) = self.replace(gate, by_first.collect());
        let Err(cause) = done else {
            self.target = target;
            return Ok(());
        };
        let refusal = self.refused(format_args!("it cannot be switched to {target}"), &cause);
        let back = match cause {
            DmaUpdateError::Refused(_) => self.replace(old_gate, old).2,
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
        let windows: Vec<_> = windows_of(mapping, &self.slots).collect();
        if windows.is_empty() {
            return Ok(());
        }
        self.add(windows)
            .map_err(|cause| self.refused(format_args!("{mapping} stays unmapped"), &cause))
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        if self.target != Target::Domain(domain) {
            return Ok(());
        }
        self.unmap_ranges(&[range])
    }

    /// Removes all parts at once: one wait for all replies of the server.
    fn unmap_all(&mut self, domain: DomainId, parts: &[UnmapPart]) -> Result<(), BackendError> {
        if self.target != Target::Domain(domain) {
            return Ok(());
        }
        let ranges: Vec<_> = parts.iter().map(|part| part.range).collect();
        self.unmap_ranges(&ranges)
    }
}

impl Drop for VfioUser {
    fn drop(&mut self) {
        self.stop(Gate::Blocked);
        drop(self.interposer.take());
    }
}
