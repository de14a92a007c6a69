//! Host IOMMU through a VFIO type1 container: one backend for the devices of one group, which share the container's
//! only address space.
//!
//! To switch the devices to a new target, the backend empties the address space and fills it again. An access that a
//! device makes in the meantime faults.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::group_target::common_target;
use super::reach::{Piece, PieceTarget, Reach, no_peer_access, not_mapped, refused, unmapped};
use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target,
};
use crate::address::{Access, IovaRange, Mapping};
use crate::error_limited;
use crate::ids::{DomainId, EndpointId};
use crate::vfio::{Attach, DeviceMemory, Type1};

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
    /// The target whose mappings the address space holds; `None` if it holds mappings that could not be removed.
    filled_for: Option<Target>,
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
        }
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
        self.kernel
            .unmap_all()
            .map_err(|cause| refused("a type1 container cannot be emptied", &cause))
    }

    fn map_slot(&self, slot: &MemorySlot) -> Result<(), BackendError> {
        let identity = Mapping {
            range: slot.range.identity(),
            gpa: slot.range.first(),
            access: Access::READ_WRITE,
            mmio: false,
        };
        self.map_pieces(&identity)
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
        let switched = self.empty().and_then(|()| self.fill(target, contents));
        let Err(cause) = switched else {
            self.filled_for = Some(target);
            return Ok(());
        };
        if let Some(before) = before
            && self
                .empty()
                .and_then(|()| self.fill(before, contents))
                .is_ok()
        {
            return Err(AttachError::Unchanged(cause));
        }
        self.block();
        Err(AttachError::Blocked(cause))
    }

    /// Ends all DMA of the group.
    fn block(&mut self) {
        self.filled_for = Some(Target::Blocked);
        let Err(cause) = self.empty() else { return };
        self.filled_for = None;
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

impl DmaBackend for Type1Group {
    fn capabilities(&self) -> BackendCapabilities {
        self.capabilities
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
            return Err(AttachError::Unchanged(BackendError {
                kind: BackendErrorKind::DevErr,
                message: format!("endpoint {endpoint} has no device of the host"),
            }));
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
