//! An emulated device in a process of its own, behind an interposer: the device's server is told of
//! a window for each mapping, and its messages reach memory through those windows only.
//!
//! One backend for each endpoint, so that a server that has to be cut off takes no other device with
//! it.
//!
//! What the server may reach is changed first where its messages are served, which ends accesses
//! that are under way, and then at the server's, whose reply is waited for. Both happen under the
//! link's lock up to the waiting, so that a server that connects meanwhile is told either by us or,
//! with all the rest, by the interposer.

mod windows;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::windows::{Gate, Piece, Pieces, Space, pieces_of};
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
    /// Its name, for messages.
    pub name: String,
    /// Where its server listens.
    pub server: PathBuf,
    /// How far its server is kept from guest RAM.
    pub isolation: Isolation,
    /// What bypass mode does not reach.
    pub reserved: Vec<IovaRange>,
    /// What its server has to answer in where the guest waits for it.
    pub deadline: Duration,
}

/// The backend.
pub struct VfioUser {
    endpoint: EndpointId,
    name: String,
    space: Arc<Space>,
    link: Arc<Link>,
    /// In the order of addresses, disjoint.
    slots: Vec<Arc<MemorySlot>>,
    target: Target,
    /// Ended first of all.
    interposer: Option<Interposer>,
}

impl VfioUser {
    /// The backend of one device, whose clients connect to `listener`.
    ///
    /// # Errors
    /// Where the system has no descriptor or thread left.
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

    /// What tells how the device is doing, whoever owns the backend.
    pub fn watch(&self) -> Watch {
        Watch {
            endpoint: self.endpoint,
            link: self.link.clone(),
            space: self.space.clone(),
        }
    }

    /// Replaces all the device sees. Returns what it saw before, also on error.
    fn replace(&self, gate: Gate, pieces: Pieces) -> (Gate, Pieces, Result<(), DmaUpdateError>) {
        let mut orders = self.link.lock();
        let maps: Vec<_> = pieces.values().map(|p| self.map_order(p)).collect();
        let (old_gate, old) = {
            let mut view = self.space.change();
            let old_gate = std::mem::replace(&mut view.gate, gate);
            (old_gate, std::mem::replace(&mut view.pieces, pieces))
        };
        let unmaps = old.values().map(|p| DmaUpdate::Unmap(p.range));
        let ticket = orders.send(unmaps.chain(maps));
        drop(orders);
        (old_gate, old, self.link.wait(ticket))
    }

    /// Adds windows; on error there is none of them.
    fn add(&self, pieces: Vec<Piece>) -> Result<(), DmaUpdateError> {
        let mut orders = self.link.lock();
        let maps: Vec<_> = pieces.iter().map(|p| self.map_order(p)).collect();
        let keys: Vec<_> = pieces.iter().map(|p| p.range).collect();
        let by_first = pieces.into_iter().map(|p| (p.range.first().0, p));
        self.space.change().pieces.extend(by_first);
        let ticket = orders.send(maps);
        drop(orders);
        let added = self.link.wait(ticket);
        if added.is_err() {
            self.remove_in(&keys, |_| true)?;
        }
        added
    }

    /// Removes windows. When this returns `Ok` the server has given them up.
    fn remove(&self, gone: impl Fn(&Piece) -> bool) -> Result<(), DmaUpdateError> {
        self.remove_in(&[IovaRange::ALL], gone)
    }

    /// Removes the windows that begin in one of `ranges`; where that fails, all of them.
    fn unmap_ranges(&self, ranges: &[IovaRange]) -> Result<(), BackendError> {
        self.remove_in(ranges, |_| true).map_err(|cause| {
            let first = ranges.first().map_or(Iova(0), |range| range.first());
            self.stop(Gate::Quarantined);
            self.space.report_stop(first);
            self.refused(
                format_args!("what was mapped from {first} on may stay mapped"),
                &cause,
            )
        })
    }

    /// Removes windows that begin in one of `ranges`.
    fn remove_in(
        &self,
        ranges: &[IovaRange],
        gone: impl Fn(&Piece) -> bool,
    ) -> Result<(), DmaUpdateError> {
        let mut orders = self.link.lock();
        let mut unmaps = Vec::new();
        {
            let mut view = self.space.change();
            for range in ranges {
                let bounds = range.first().0..=range.last().0;
                let inside = view.pieces.range(bounds).map(|(_, p)| p);
                let before = unmaps.len();
                unmaps.extend(inside.filter(|p| gone(p)).map(|p| p.range));
                // At once: the next range may cover them too.
                for range in unmaps.iter().skip(before) {
                    view.pieces.remove(&range.first().0);
                }
            }
        }
        let ticket = orders.send(unmaps.into_iter().map(DmaUpdate::Unmap));
        drop(orders);
        self.link.wait(ticket)
    }

    fn map_order(&self, piece: &Piece) -> DmaUpdate {
        DmaUpdate::Map(self.space.window(piece))
    }

    /// Ends all that the device can reach.
    fn stop(&self, gate: Gate) {
        let _orders = self.link.lock();
        let mut view = self.space.change();
        view.gate = gate;
        view.pieces.clear();
    }

    fn refused(&self, what: impl std::fmt::Display, cause: &DmaUpdateError) -> BackendError {
        let kind = match cause {
            DmaUpdateError::Refused(libc::ENOMEM | libc::ENOSPC) => BackendErrorKind::NoMem,
            DmaUpdateError::Refused(_) | DmaUpdateError::CutOff(_) => BackendErrorKind::DevErr,
        };
        BackendError {
            kind,
            message: format!("{}: {what}: {cause}", self.name),
        }
    }
}

/// Looks at an emulated device.
#[derive(Clone)]
pub struct Watch {
    endpoint: EndpointId,
    link: Arc<Link>,
    space: Arc<Space>,
}

/// How an emulated device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmulatedState {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Its client and its server.
    pub ends: Ends,
    /// Windows into guest RAM that it has, or would have if its server were there.
    pub windows: usize,
    /// Accesses that were refused.
    pub refused: u64,
}

impl Watch {
    /// The device's endpoint.
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// How it is doing now. Waits for a copy that is under way, and for nobody else.
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
        // A device is bound to nothing: the VMM's client connects by itself.
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let slot = Arc::new(slot.clone());
        let at = self.slots.partition_point(|s| s.range < slot.range);
        self.slots.insert(at, slot.clone());
        if self.target != Target::Bypass {
            return Ok(());
        }
        let pieces = self.space.identity(&slot);
        self.add(pieces).map_err(|cause| {
            let what = format_args!("guest RAM at {} stays out of reach", slot.range);
            self.refused(what, &cause)
        })
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.slots.retain(|s| **s != *slot);
        self.remove(|p| p.is_in(slot)).map_err(|cause| {
            let what = format_args!("guest RAM at {} may stay in reach", slot.range);
            self.refused(what, &cause)
        })
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        if endpoint != self.endpoint {
            let message = format!("endpoint {endpoint} is not {}", self.name);
            let kind = BackendErrorKind::DevErr;
            return Err(AttachError::Unchanged(BackendError { kind, message }));
        }
        let (gate, pieces): (_, Vec<Piece>) = match target {
            Target::Blocked => (Gate::Blocked, Vec::new()),
            Target::Bypass => {
                let all = self.slots.iter().flat_map(|s| self.space.identity(s));
                (Gate::Bypass, all.collect())
            }
            Target::Domain(domain) => {
                let mut pieces = Vec::new();
                for mapping in contents.mappings(domain) {
                    pieces.extend(pieces_of(&mapping, &self.slots));
                }
                (Gate::Translated, pieces)
            }
        };
        let by_first = pieces.into_iter().map(|p| (p.range.first().0, p));
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
        // There is nothing of a domain here but what its endpoint sees.
    }

    fn quarantine(&mut self, _endpoint: EndpointId) {
        self.target = Target::Blocked;
        self.stop(Gate::Quarantined);
        self.link.cut_off("its endpoint is quarantined");
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        if self.target != Target::Domain(domain) {
            // Filled in when the endpoint comes back.
            return Ok(());
        }
        let pieces: Vec<_> = pieces_of(mapping, &self.slots).collect();
        if pieces.is_empty() {
            return Ok(());
        }
        self.add(pieces)
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

    /// All in one go: the server's replies are waited for together.
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
