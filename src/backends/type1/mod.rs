//! Host IOMMU through a VFIO type1 container: one backend for the devices of one group, which share the container's
//! only address space.
//!
//! To switch the devices to a new target, the backend empties the address space and fills it again. An access that a
//! device makes in the meantime faults.

mod adopt;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::address::{Access, IovaRange, Mapping};
use crate::backends::group_target::common_target;
use crate::backends::objects::{Ledger, Noted};
use crate::backends::reach::{
    Piece, PieceTarget, Reach, no_peer_access, not_mapped, refused, unmapped,
};
use crate::backends::{
    Adoption, AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents,
    DmaBackend, MemorySlot, ObjectRecords, Target,
};
use crate::error_limited;
use crate::ids::{DomainId, EndpointId};
use crate::vfio::{Attach, DeviceMemory, Type1};

/// The owner in the records of a group's backend, with the group's number.
const OWNER: u64 = 2 << 32;
/// The record of the target whose mappings the container holds.
const FILLED: u64 = 1;
/// The record of the number of mappings for which an empty container has room.
const ROOM: u64 = 2;

/// A device in the container's group.
pub struct GroupDevice {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// The host's name for it.
    pub name: String,
    /// The device, to stop its DMA; `None` if this process was given the container alone.
    pub device: Option<Box<dyn Attach>>,
}

/// The backend.
pub struct Type1Group {
    kernel: Box<dyn Type1>,
    capabilities: BackendCapabilities,
    reach: Reach,
    members: BTreeMap<EndpointId, ContainerMember>,
    /// The target whose mappings the address space holds; `None` if it holds others.
    filled_for: Option<Target>,
    /// The number of mappings that the empty container has room for, if the kernel says so.
    room: Option<u32>,
    /// An earlier process may have filled the container.
    is_left: bool,
    ledger: Ledger,
    noted_filled: Option<Noted>,
    noted_room: Option<Noted>,
}

struct ContainerMember {
    name: String,
    device: Option<Box<dyn Attach>>,
    wanted: Target,
    quarantined: bool,
}

impl Type1Group {
    /// The backend for the devices of a group. The first `attach` removes all mappings that the container has already.
    /// Mappings may lead to the memory of `peers`.
    pub fn new(
        kernel: Box<dyn Type1>,
        capabilities: BackendCapabilities,
        devices: Vec<GroupDevice>,
        peers: Vec<Arc<dyn DeviceMemory>>,
    ) -> Self {
        let members = devices.into_iter().map(|device| {
            let member = ContainerMember {
                name: device.name,
                device: device.device,
                wanted: Target::Blocked,
                quarantined: false,
            };
            (device.endpoint, member)
        });
        Self {
            kernel,
            capabilities,
            reach: Reach::new(peers),
            members: members.collect(),
            filled_for: None,
            room: None,
            is_left: false,
            ledger: Ledger::none(OWNER),
            noted_filled: None,
            noted_room: None,
        }
    }

    /// Names the host's number of the group, which identifies the container's records. `is_left` says whether an earlier
    /// process may have filled the container.
    #[must_use]
    pub fn of_group(mut self, number: u32, is_left: bool) -> Self {
        self.ledger = Ledger::none(OWNER | u64::from(number));
        self.is_left = is_left;
        self
    }

    fn target(&self) -> Target {
        common_target(self.members.values().map(|m| (m.wanted, m.quarantined)))
    }

    /// Fills the empty address space.
    fn fill(&self, target: Target, contents: &dyn Contents) -> Result<(), BackendError> {
        match target {
            Target::Blocked => Ok(()),
            Target::Bypass => self.reach.slots().iter().try_for_each(|s| self.map_slot(s)),
            Target::Domain(domain) => contents
                .mappings(domain)
                .try_for_each(|mapping| self.map_pieces(&mapping)),
        }
    }

    fn empty(&self) -> Result<(), BackendError> {
        const FAILURE: &str = "a type1 container cannot be emptied";
        let emptied = self.kernel.unmap_all();
        emptied.map_err(|cause| refused(FAILURE, &cause))?;
        // Some kernels leave the mappings of another process without an error.
        if self.is_left {
            let room = self.room.unwrap_or(USUAL_ROOM);
            let now = self.kernel.available();
            let now = now.map_err(|cause| refused(FAILURE, &cause))?;
            if now != Some(room) {
                return Err(stale(format_args!(
                    "{FAILURE}: it has mappings of the daemon before"
                )));
            }
        }
        Ok(())
    }

    /// Records the target whose mappings the address space holds.
    fn set_filled(&mut self, filled: Option<Target>) {
        self.filled_for = filled;
        let state = filled_bits(filled);
        match &mut self.noted_filled {
            Some(noted) => self.ledger.update(noted, state),
            None => self.noted_filled = self.ledger.note(FILLED, state),
        }
    }

    /// Records the room of the container, which is empty.
    fn note_room(&mut self) {
        if self.room.is_none()
            && let Ok(Some(room)) = self.kernel.available()
        {
            self.room = Some(room);
            self.noted_room = self.ledger.note(ROOM, room.into());
        }
    }

    fn map_slot(&self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.map_pieces(&identity(slot))
    }

    #[inline]
    fn map_pieces(&self, mapping: &Mapping) -> Result<(), BackendError> {
        match self.reach.in_one_slot(mapping) {
            Some((slot, offset)) => self.map_part(mapping, slot, offset),
            None => self.map_piecewise(mapping),
        }
    }

    /// Maps a mapping that does not lead into a single slot.
    #[cold]
    fn map_piecewise(&self, mapping: &Mapping) -> Result<(), BackendError> {
        self.reach
            .for_each_piece(mapping, |piece| self.map_piece(&piece))
    }

    /// Maps a part that leads into one slot.
    #[inline]
    fn map_part(&self, part: &Mapping, slot: &MemorySlot, offset: u64) -> Result<(), BackendError> {
        if part.access == Access::NONE {
            // A mapping without rights stays out of the container: the kernel refuses it, and no device may use it.
            return Ok(());
        }
        self.kernel
            .map(part.range, part.access, &slot.memory, offset)
            .map_err(|cause| not_mapped(part, &cause))
    }

    fn map_piece(&self, piece: &Piece<'_>) -> Result<(), BackendError> {
        let part = &piece.part;
        match &piece.target {
            PieceTarget::Ram(slot) => self.map_part(part, slot, piece.offset),
            PieceTarget::Bar(..) if part.access == Access::NONE => Ok(()),
            PieceTarget::Bar(device, bar) => {
                let refuse = |cause| no_peer_access(part, &cause);
                let memory = device.map(*bar).map_err(refuse)?;
                self.kernel
                    .map(part.range, part.access, &memory, piece.offset)
                    .map_err(refuse)
            }
        }
    }

    /// Empties the address space and fills it with the mappings of `target`. If that fails, fills it with the former
    /// mappings again.
    fn switch(&mut self, target: Target, contents: &dyn Contents) -> Result<(), AttachError> {
        if self.filled_for == Some(target) {
            return Ok(());
        }
        // The common refusal is a mapping that leads to no memory. Check for it before the first change, so that the
        // refusal does not disturb DMA.
        if let Target::Domain(domain) = target {
            contents
                .mappings(domain)
                .try_for_each(|m| self.reach.for_each_piece(&m, |_| Ok(())))
                .map_err(AttachError::Unchanged)?;
        }
        let before = self.filled_for;
        self.set_filled(None);
        let switched = self.empty().and_then(|()| {
            self.note_room();
            self.fill(target, contents)
        });
        let Err(cause) = switched else {
            self.set_filled(Some(target));
            return Ok(());
        };
        if let Some(before) = before
            && self
                .empty()
                .and_then(|()| self.fill(before, contents))
                .is_ok()
        {
            self.set_filled(Some(before));
            return Err(AttachError::Unchanged(cause));
        }
        self.block();
        Err(AttachError::Blocked(cause))
    }

    /// Ends all DMA of the group.
    fn block(&mut self) {
        self.set_filled(None);
        let Err(cause) = self.empty() else {
            self.set_filled(Some(Target::Blocked));
            return;
        };
        error_limited!("{cause}: the devices' bus-master bits are cleared");
        for member in self.members.values() {
            if let Some(device) = &member.device
                && let Err(cause) = device.clear_bus_master()
            {
                error_limited!("{} cannot be stopped: {cause}", member.name);
            }
        }
    }
}

/// Mappings that an empty container has room for, if `dma_entry_limit` of the module vfio_iommu_type1 has its default.
const USUAL_ROOM: u32 = 65535;

/// The mapping of a slot in bypass mode.
fn identity(slot: &MemorySlot) -> Mapping {
    Mapping {
        range: slot.range.identity(),
        gpa: slot.range.first(),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

/// The error for mappings of an earlier process that may have stayed.
fn stale(failure: impl fmt::Display) -> BackendError {
    BackendError {
        kind: BackendErrorKind::DevErr,
        message: failure.to_string(),
    }
}

/// The state in the record of a container.
fn filled_bits(filled: Option<Target>) -> u64 {
    match filled {
        None => 0,
        Some(Target::Blocked) => 1,
        Some(Target::Bypass) => 2,
        Some(Target::Domain(domain)) => 3 | u64::from(domain.0) << 2,
    }
}

fn target_of_bits(bits: u64) -> Option<Target> {
    match bits & 3 {
        1 => Some(Target::Blocked),
        2 => Some(Target::Bypass),
        3 => u32::try_from(bits >> 2)
            .ok()
            .map(|id| Target::Domain(DomainId(id))),
        _ => None,
    }
}

impl DmaBackend for Type1Group {
    fn capabilities(&self) -> BackendCapabilities {
        self.capabilities
    }

    fn record_owner(&self) -> Option<u64> {
        Some(self.ledger.owner())
    }

    fn keep_records(&mut self, records: Arc<dyn ObjectRecords>, adopts: bool) {
        self.ledger.begin(records);
        if !adopts {
            self.set_filled(None);
        }
    }

    fn forget_records(&mut self) {
        let noted = [self.noted_filled.take(), self.noted_room.take()];
        for noted in noted.iter().flatten() {
            self.ledger.forget(noted);
        }
        self.ledger.end();
    }

    fn prepare_adoption(&mut self, adoption: &Adoption<'_>) -> Vec<(EndpointId, BackendError)> {
        self.adopt_records(adoption);
        self.block_moving(adoption)
    }

    fn adopt(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        let mut failed = self.adopt_targets(adoption);
        if let Err(cause) = self.take_over(self.target(), adoption, contents) {
            self.block();
            let members = self.members.keys();
            failed.extend(members.map(|&endpoint| (endpoint, cause.clone())));
        }
        failed
    }

    fn vmm_present(&mut self, _present: bool) {
        // This process has opened the devices, or was given a container that is ready.
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.reach.add(slot);
        if self.filled_for == Some(Target::Bypass) {
            self.map_slot(slot)
        } else {
            Ok(())
        }
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.reach.remove(slot);
        if self.filled_for != Some(Target::Bypass) {
            return Ok(());
        }
        match self.kernel.unmap(slot.range.identity()) {
            Ok(_) => Ok(()),
            Err(cause) => Err(refused(
                format_args!("guest RAM at {} stays mapped", slot.range),
                &cause,
            )),
        }
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let Some(member) = self.members.get_mut(&endpoint) else {
            return Err(AttachError::Unchanged(unknown(endpoint)));
        };
        let before = (member.wanted, member.quarantined);
        (member.wanted, member.quarantined) = (target, false);
        let switched = self.switch(self.target(), contents);
        if let Err(refusal) = &switched
            && let Some(member) = self.members.get_mut(&endpoint)
        {
            (member.wanted, member.quarantined) = before;
            if let AttachError::Blocked(_) = refusal {
                member.quarantined = true;
            }
        }
        switched
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        // A group that still has this target is a bug in the core: block it.
        if self.filled_for == Some(Target::Domain(domain)) {
            self.block();
        }
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        if let Some(member) = self.members.get_mut(&endpoint) {
            member.quarantined = true;
        }
        self.block();
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        if self.filled_for == Some(Target::Domain(domain)) {
            self.map_pieces(mapping)
        } else {
            // The group is blocked now. A mapping that leads to no memory is refused all the same.
            self.reach.for_each_piece(mapping, |_| Ok(()))
        }
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        least: u64,
    ) -> Result<(), BackendError> {
        if self.filled_for != Some(Target::Domain(domain)) {
            return Ok(());
        }
        unmapped(range, least, self.kernel.unmap(range))
    }
}

fn unknown(endpoint: EndpointId) -> BackendError {
    stale(format_args!(
        "endpoint {endpoint} has no device of the host"
    ))
}
