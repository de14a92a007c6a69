//! Nested translation: the host's SMMU walks the page tables of this process as its first stage, below a second stage with
//! guest RAM. A MAP needs no system call. An UNMAP needs one, whatever the number of ranges, which invalidates the cached
//! translations.
//!
//! ```text
//!  device --> stream table entry --> context descriptor --> page table of the domain --> guest-physical address
//!             (nested table)         (`Contexts`)           (arena)                      --> second stage --> RAM
//! ```
//!
//! The second stage maps guest RAM for reading and writing, and the arena and the descriptors for reading only. Each SMMU of
//! the host has a second stage of its own, made of the one address space (`ParentSpace`). A device in bypass mode is in
//! another one, which has guest RAM alone: in the second stage it could read the tables.
//!
//! Only devices that this process has bound can be here: the kernel asks for the ID that it returns when a device is bound.

mod contexts;
mod instance;
mod parent;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::contexts::Contexts;
use self::instance::{Instance, suitable_hardware};
use self::parent::ParentSpace;
use super::PassthroughDevice;
use super::group::{Attachment, DeviceGroup, GroupMember};
use crate::address::{Gpa, IovaRange, Mapping, PageMask};
use crate::backends::reach::{Reach, refused};
use crate::backends::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target, UnmapPart,
};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::Levels;
use crate::vfio::AddressSpaces;
use crate::vfio::nesting::{
    BoundDevice, ContextDescriptor, NestingError, NestingKernel, SmmuCommand,
};
use crate::warn_limited;

pub use self::parent::WalkedTables;

/// One UNMAP takes at most this many commands. More are replaced by one for all translations of the domain.
const MAX_COMMANDS: usize = 64;

/// A device behind the backend. This process has bound it.
pub struct NestedDevice {
    /// The device.
    pub device: PassthroughDevice,
    /// The kernel's number for it.
    pub bound: BoundDevice,
    /// The host's IOMMU above it, by a number that devices behind the same IOMMU have in common.
    pub instance: u32,
}

/// The backend.
pub struct Nested {
    // Before what they are made of: the tables of an instance before the address space.
    instances: Vec<Instance>,
    parent: ParentSpace,
    contexts: Contexts,
    base: Gpa,
    /// Each with the index of its instance.
    groups: Vec<(DeviceGroup, usize)>,
    group_of: BTreeMap<EndpointId, usize>,
}

impl Nested {
    /// The backend for `devices`, which are blocked. `tables` is the memory of the page tables, in the format of VMSAv8-64.
    ///
    /// # Errors
    /// An IOMMU cannot nest, or the kernel refuses.
    pub fn new(
        spaces: Arc<dyn AddressSpaces>,
        kernel: &Arc<dyn NestingKernel>,
        tables: &WalkedTables,
        devices: Vec<NestedDevice>,
    ) -> Result<Self, BackendError> {
        let hardware = devices
            .iter()
            .map(|device| suitable_hardware(&**kernel, device.bound))
            .collect::<Result<Vec<_>, _>>()?;
        let asid_bits = hardware.iter().map(|found| found.asid_bits).min();
        let asid_bits = asid_bits.unwrap_or(8);
        let contexts = Contexts::new(Gpa(tables.base.0.saturating_add(tables.bytes)), asid_bits)
            .map_err(|cause| BackendError {
                kind: BackendErrorKind::NoMem,
                message: format!("no memory for context descriptors: {cause}"),
            })?;
        let reach = Reach::new(devices.iter().map(|d| d.device.memory.clone()).collect());
        let context_memory = (contexts.fd(), Contexts::bytes(asid_bits));
        let parent = ParentSpace::new(spaces, reach, tables, context_memory)?;

        let mut instances: Vec<Instance> = Vec::new();
        let mut instance_numbers: Vec<u32> = Vec::new();
        let mut members: BTreeMap<u32, (usize, Vec<GroupMember>)> = BTreeMap::new();
        for (
            NestedDevice {
                device,
                bound,
                instance,
            },
            hardware,
        ) in devices.into_iter().zip(hardware)
        {
            let known = instance_numbers.iter().position(|n| *n == instance);
            let index = match known {
                Some(index) => index,
                None => {
                    instances.push(Instance::new(kernel, hardware, parent.ioas, bound)?);
                    instance_numbers.push(instance);
                    instances.len() - 1
                }
            };
            if let Some(found) = instances.get_mut(index) {
                found.add(device.endpoint, bound)?;
            }
            let PassthroughDevice {
                endpoint,
                name,
                group,
                attach,
                ..
            } = device;
            let member = GroupMember::new(endpoint, name, false, attach);
            let (_, group) = members.entry(group).or_insert_with(|| (index, Vec::new()));
            group.push(member);
        }
        let groups: Vec<_> = members
            .into_iter()
            .map(|(number, (index, members))| (DeviceGroup::new(number, members), index))
            .collect();
        let group_of = groups.iter().enumerate().flat_map(|(index, (group, _))| {
            group.endpoints().map(move |endpoint| (endpoint, index))
        });
        Ok(Self {
            group_of: group_of.collect(),
            instances,
            parent,
            contexts,
            base: tables.base,
            groups,
        })
    }

    /// The table for the target of a group. Makes it if there is none.
    fn attachment_for(
        &mut self,
        index: usize,
        contents: &dyn Contents,
    ) -> Result<Attachment, BackendError> {
        let (group, instance) = &self.groups[index];
        let (target, instance) = (group.target(), &mut self.instances[*instance]);
        match target {
            Target::Blocked => Ok(Attachment::Detached),
            Target::Bypass => Ok(Attachment::Ioas(self.parent.bypass)),
            Target::Domain(domain) => {
                let (root, levels) = contents.table(domain).ok_or_else(|| BackendError {
                    kind: BackendErrorKind::DevErr,
                    message: format!("domain {domain} has no page table"),
                })?;
                let table = Gpa(self.base.0.saturating_add(root.0));
                let output_bits = instance.hardware().output_bits;
                let context = self.contexts.descriptor(domain, |asid| ContextDescriptor {
                    table,
                    asid,
                    input_bits: input_bits(levels),
                    output_bits,
                })?;
                instance.table(domain, context).map(Attachment::Ioas)
            }
        }
    }

    /// Moves the devices of a group to another table. On error, moves them back to the former one.
    fn switch(&mut self, index: usize, attachment: Attachment) -> Result<(), AttachError> {
        let (group, _) = &mut self.groups[index];
        let before = group.attachment();
        let Err(cause) = group.move_to(attachment) else {
            return Ok(());
        };
        group.take_refusing();
        let can_return = matches!(before, Attachment::Ioas(_) | Attachment::Detached);
        if can_return && group.reattach(before).is_ok() {
            return Err(AttachError::Unchanged(cause));
        }
        group.block();
        Err(AttachError::Blocked(cause))
    }

    /// Invalidates what the SMMUs have cached of `parts` of a domain.
    fn invalidate(&self, domain: DomainId, parts: &[UnmapPart]) -> Result<(), BackendError> {
        let Some(asid) = self.contexts.asid(domain) else {
            return Ok(());
        };
        for instance in self.instances.iter().filter(|i| i.has(domain)) {
            let has_ranges = instance.hardware().invalidates_ranges;
            let mut commands = Vec::new();
            for part in parts {
                // Not of leaves alone: a table may have left the tree.
                let more = SmmuCommand::invalidate_range(asid, part.range, false, has_ranges);
                commands.extend(more);
                if commands.len() > MAX_COMMANDS {
                    commands = vec![SmmuCommand::invalidate_asid(asid)];
                    break;
                }
            }
            instance.invalidate(&commands)?;
        }
        Ok(())
    }

    /// Whether it is unknown where a device is.
    fn has_stuck(&self) -> bool {
        let mut groups = self.groups.iter();
        groups.any(|(group, _)| group.attachment() == Attachment::Unknown)
    }
}

impl DmaBackend for Nested {
    fn capabilities(&self) -> BackendCapabilities {
        BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: Levels::Four.range(),
        }
    }

    fn vmm_present(&mut self, _present: bool) {
        // This process has bound the devices, and the core blocks them while there is no VMM.
    }

    fn condemned_spaces(&self) -> usize {
        self.contexts.condemned()
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.parent.add(slot)
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.parent.remove(slot)
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let Some(&index) = self.group_of.get(&endpoint) else {
            return Err(AttachError::Unchanged(super::unknown(endpoint)));
        };
        let made = match target {
            Target::Domain(domain) if self.contexts.asid(domain).is_none() => Some(domain),
            Target::Domain(_) | Target::Bypass | Target::Blocked => None,
        };
        let before = self.groups[index].0.set_wanted(endpoint, target);
        let switched = self
            .attachment_for(index, contents)
            .map_err(AttachError::Unchanged)
            .and_then(|attachment| self.switch(index, attachment));
        if let Err(refusal) = &switched {
            let (group, _) = &mut self.groups[index];
            group.restore_wanted(endpoint, before);
            if let AttachError::Blocked(_) = refusal {
                group.quarantine(endpoint);
            }
            if let Some(domain) = made {
                self.destroy_domain(domain);
            }
        }
        switched
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        let Some(asid) = self.contexts.invalidate(domain) else {
            return;
        };
        let is_stuck = self.has_stuck();
        let mut is_forgotten = true;
        for instance in &mut self.instances {
            if !instance.destroy(domain) {
                continue;
            }
            let mut commands = vec![SmmuCommand::invalidate_asid(asid)];
            if is_stuck {
                // The device that cannot be moved reads an invalid descriptor from now on.
                commands.extend(instance.forget_contexts());
            }
            if let Err(cause) = instance.invalidate(&commands) {
                warn_limited!("the ASID {asid} of domain {domain} is not used again: {cause}");
                is_forgotten = false;
            }
        }
        if is_forgotten && !is_stuck {
            self.contexts.release(asid);
        } else {
            self.contexts.condemn();
        }
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        if let Some(&index) = self.group_of.get(&endpoint) {
            self.groups[index].0.quarantine(endpoint);
        }
    }

    fn map(&mut self, _domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        // The SMMU finds the mapping in the page table.
        self.parent.check(mapping)
    }

    fn reads_page_table(&self) -> bool {
        true
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        least: u64,
    ) -> Result<(), BackendError> {
        self.invalidate(domain, &[UnmapPart { range, least }])
    }

    fn unmap_all(&mut self, domain: DomainId, parts: &[UnmapPart]) -> Result<(), BackendError> {
        self.invalidate(domain, parts)
    }
}

/// The width of an address that a table of `levels` translates.
fn input_bits(levels: Levels) -> u8 {
    u8::try_from(levels.address_bits()).unwrap_or(u8::MAX)
}

/// The failure of a call about nested translation.
fn refused_object(error: NestingError) -> BackendError {
    let cure = error
        .cure
        .map(|cure| format!("; {cure}"))
        .unwrap_or_default();
    let failure = format!("{} of {}{cure}", error.call, error.object);
    refused(failure, &error.source)
}
