//! Host IOMMU through iommufd: one I/O address space (IOAS) per domain, whatever the number of its
//! endpoints, replaced under devices that the VMM, or this process, has bound.
//!
//! With [`Pinning::All`] guest RAM is mapped once, from its files, into an address space that endpoints
//! in bypass mode use, and mappings of domains are copies of pieces of it. With [`Pinning::Mapped`]
//! each mapping is made from the file, and the address space for bypass mode is only there while it
//! is used.
//!
//! Before the VMM has connected, a device of the VMM's is not bound and can do no DMA. When it has,
//! the device is in the VMM's own address space, which is that of bypass mode, and stays there
//! until it is to be somewhere else for the first time.

mod group;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use self::group::{Attachment, DeviceGroup, GroupMember};
use super::reach::{Piece, PieceTarget, Reach, no_peer_access, not_mapped, refused, unmapped};
use super::{
    AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents, DmaBackend,
    MemorySlot, Target,
};
use crate::address::{Access, Iova, IovaRange, Mapping};
use crate::ids::{DomainId, EndpointId};
use crate::vfio::{AddressSpaces, Attach, DeviceMemory, DmaSource};
use crate::warn_limited;

/// What guest RAM is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pinning {
    /// All of it, once; mappings are copies.
    All,
    /// What is mapped, and all of it while an endpoint is in bypass mode.
    Mapped,
}

/// A device behind the backend.
pub struct PassthroughDevice {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// The host's name for it.
    pub name: String,
    /// The number of its group: the host keeps devices of one group together.
    pub group: u32,
    /// Whether the VMM binds it; else this process has.
    pub shared: bool,
    /// What switches it.
    pub attach: Box<dyn Attach>,
    /// Its memory.
    pub memory: Arc<dyn DeviceMemory>,
}

/// The backend.
pub struct Iommufd {
    kernel: Arc<dyn AddressSpaces>,
    capabilities: BackendCapabilities,
    pin: Pinning,
    /// Whether mappings are copies of pieces of the address space of bypass mode. While a device is
    /// there, its pages are pinned: where the VMM has discarded some since, a copy would lead to
    /// those, and not to the ones the guest has now.
    copies: bool,
    connected: bool,
    reach: Reach,
    bypass: Option<Bypass>,
    domains: BTreeMap<DomainId, u32>,
    /// A domain that `map` has failed in, and the bytes that were mapped before it did: the core is
    /// about to unmap them.
    half_way: Option<(DomainId, u64)>,
    groups: Vec<DeviceGroup>,
    group_of: BTreeMap<EndpointId, usize>,
    /// Address spaces that could not be destroyed, with the memory that may be mapped there.
    condemned: Vec<(u32, Vec<MemorySlot>)>,
}

/// The address space of bypass mode.
struct Bypass {
    ioas: u32,
    /// What is mapped there, at its guest-physical addresses.
    slots: Vec<MemorySlot>,
}

impl Iommufd {
    /// The backend for `devices`.
    pub fn new(
        kernel: Arc<dyn AddressSpaces>,
        capabilities: BackendCapabilities,
        pin: Pinning,
        devices: Vec<PassthroughDevice>,
    ) -> Self {
        let reach = Reach::new(devices.iter().map(|d| d.memory.clone()).collect());
        let mut numbers: Vec<u32> = Vec::new();
        let mut members: Vec<Vec<GroupMember>> = Vec::new();
        let mut group_of = BTreeMap::new();
        for device in devices {
            let known = numbers.iter().position(|n| *n == device.group);
            let index = known.unwrap_or_else(|| {
                numbers.push(device.group);
                members.push(Vec::new());
                numbers.len() - 1
            });
            group_of.insert(device.endpoint, index);
            members[index].push(GroupMember::new(
                device.endpoint,
                device.name,
                device.shared,
                device.attach,
            ));
        }
        let groups = members.into_iter().map(DeviceGroup::new).collect();
        Self {
            kernel,
            capabilities,
            pin,
            copies: pin == Pinning::All,
            connected: false,
            reach,
            bypass: None,
            domains: BTreeMap::new(),
            half_way: None,
            groups,
            group_of,
            condemned: Vec::new(),
        }
    }

    /// Makes the address space of a domain and fills it.
    fn make_domain(
        &mut self,
        domain: DomainId,
        contents: &dyn Contents,
    ) -> Result<u32, BackendError> {
        let ioas = self.kernel.alloc().map_err(|cause| {
            refused(
                format_args!("domain {domain} gets no address space"),
                &cause,
            )
        })?;
        let filled = contents
            .mappings(domain)
            .try_for_each(|mapping| self.map_into(ioas, &mapping, &mut 0));
        if let Err(cause) = filled {
            self.destroy(ioas);
            return Err(cause);
        }
        Ok(ioas)
    }

    /// The address space of bypass mode, made if it is not there, with all of guest RAM.
    fn bypass_ioas(&mut self) -> Result<u32, BackendError> {
        if self.bypass.is_none() {
            let ioas = self
                .kernel
                .alloc()
                .map_err(|cause| refused("bypass mode gets no address space", &cause))?;
            self.bypass = Some(Bypass {
                ioas,
                slots: Vec::new(),
            });
        }
        self.fill_bypass()
    }

    /// Maps what bypass mode lacks. On error it has all but one slot of it, or more.
    fn fill_bypass(&mut self) -> Result<u32, BackendError> {
        let mut bypass = self.bypass.take().ok_or_else(|| BackendError {
            kind: BackendErrorKind::DevErr,
            message: "bypass mode has no address space".into(),
        })?;
        let mut done = Ok(bypass.ioas);
        for slot in self.reach.slots() {
            if bypass.slots.contains(slot) {
                continue;
            }
            match self.map_slot(bypass.ioas, slot) {
                Ok(()) => bypass.slots.push(slot.clone()),
                // The others are of use all the same.
                Err(cause) => done = Err(cause),
            }
        }
        self.bypass = Some(bypass);
        done
    }

    /// Maps a slot at its guest-physical addresses.
    fn map_slot(&self, ioas: u32, slot: &MemorySlot) -> Result<(), BackendError> {
        let range = slot.range.identity();
        self.map_ram(ioas, range, Access::READ_WRITE, slot, 0)
            .map_err(|cause| {
                refused(
                    format_args!("guest RAM at {} stays unmapped", slot.range),
                    &cause,
                )
            })
    }

    /// Maps a piece of RAM from its file, or where the kernel cannot from where it is mapped here.
    #[inline]
    fn map_ram(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        slot: &MemorySlot,
        offset: u64,
    ) -> io::Result<()> {
        let here = DmaSource::Host(&slot.memory, offset);
        if !slot.is_shared_memory {
            // The kernel would find only when a device is attached that it cannot pin such a file.
            return self.kernel.map(ioas, range, access, here);
        }
        let at = slot.offset.saturating_add(offset);
        let by_file = DmaSource::File(slot.file.as_fd(), at);
        match self.kernel.map(ioas, range, access, by_file) {
            // Kernels before 6.13 have no such command.
            Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.kernel.map(ioas, range, access, here)
            }
            done => done,
        }
    }

    /// Adds to `done` the bytes that are mapped, also where it fails.
    #[inline]
    fn map_into(&self, ioas: u32, mapping: &Mapping, done: &mut u64) -> Result<(), BackendError> {
        match self.reach.in_one_slot(mapping) {
            Some((slot, offset)) if mapping.access != Access::NONE => {
                self.map_part(ioas, mapping, slot, offset)?;
                *done += mapping.range.len_bytes().unwrap_or(0);
                Ok(())
            }
            Some(_) | None => self.map_otherwise(ioas, mapping, done),
        }
    }

    /// The same for a mapping without rights, or one that does not lead into one slot of RAM.
    #[cold]
    fn map_otherwise(
        &self,
        ioas: u32,
        mapping: &Mapping,
        done: &mut u64,
    ) -> Result<(), BackendError> {
        self.reach.for_each_piece(mapping, |piece| {
            if mapping.access == Access::NONE {
                // Nobody may use it, and the kernel knows no such mapping.
                return Ok(());
            }
            self.map_piece(ioas, &piece)?;
            *done += piece.part.range.len_bytes().unwrap_or(0);
            Ok(())
        })
    }

    /// Maps what leads into one slot.
    #[inline]
    fn map_part(
        &self,
        ioas: u32,
        part: &Mapping,
        slot: &MemorySlot,
        offset: u64,
    ) -> Result<(), BackendError> {
        let copied = self.bypass.as_ref().filter(|_| self.copies);
        let done = match copied.filter(|b| b.slots.contains(slot)) {
            Some(bypass) => {
                let from = Iova(part.gpa.0);
                self.kernel
                    .copy(ioas, part.range, part.access, bypass.ioas, from)
            }
            None => self.map_ram(ioas, part.range, part.access, slot, offset),
        };
        done.map_err(|cause| not_mapped(part, &cause))
    }

    fn map_piece(&self, ioas: u32, piece: &Piece<'_>) -> Result<(), BackendError> {
        let Piece {
            part,
            target,
            offset,
        } = piece;
        match target {
            PieceTarget::Ram(slot) => self.map_part(ioas, part, slot, *offset),
            PieceTarget::Bar(device, bar) => {
                let refuse = |cause| no_peer_access(part, &cause);
                let len = part.range.len_bytes().unwrap_or(u64::MAX);
                let buffer = device.export(*bar, *offset, len).map_err(refuse)?;
                let source = DmaSource::File(buffer.as_fd(), 0);
                self.kernel
                    .map(ioas, part.range, part.access, source)
                    .map_err(refuse)
            }
        }
    }

    fn is_bypass_used(&self) -> bool {
        self.bypass.as_ref().is_some_and(|b| {
            self.groups
                .iter()
                .any(|g| g.attachment() == Attachment::Ioas(b.ioas))
        })
    }

    fn destroy(&mut self, ioas: u32) {
        self.destroy_with(ioas, Vec::new());
    }

    /// Destroys an address space. What memory of this process may still be mapped there stays.
    fn destroy_with(&mut self, ioas: u32, slots: Vec<MemorySlot>) {
        if let Err(cause) = self.kernel.destroy(ioas) {
            warn_limited!("address space {ioas} cannot be destroyed yet: {cause}");
            let all = self.reach.slots().iter().chain(&slots).cloned().collect();
            self.condemned.push((ioas, all));
        }
    }

    /// Tries once more to get rid of what could not be destroyed.
    fn sweep(&mut self) {
        let kernel = &self.kernel;
        self.condemned
            .retain(|(ioas, _)| kernel.destroy(*ioas).is_err());
    }

    /// Devices have been moved: what follows for bypass mode's address space, which is given up
    /// where nobody needs it.
    fn moved(&mut self) {
        self.copies = self.pin == Pinning::All && !self.is_bypass_used();
        if self.pin == Pinning::Mapped
            && !self.is_bypass_used()
            && let Some(bypass) = self.bypass.take()
        {
            self.destroy_with(bypass.ioas, bypass.slots);
        }
    }

    /// Puts the devices of a group somewhere else, or back where they were; in the latter case their
    /// DMA meets nothing for a moment.
    fn switch(&mut self, index: usize, attachment: Attachment) -> Result<(), AttachError> {
        let before = self.groups[index].attachment();
        let verified = match attachment {
            Attachment::Ioas(_) => self.verify_iommufd(index),
            Attachment::Unbound | Attachment::Vmm | Attachment::Detached | Attachment::Unknown => {
                Ok(true)
            }
        };
        if let Ok(false) = verified {
            let group = &mut self.groups[index];
            group.block();
            return Err(AttachError::Blocked(group.is_foreign()));
        }
        let Err(cause) = verified.and_then(|_| self.groups[index].move_to(attachment)) else {
            return Ok(());
        };
        let back = match before {
            Attachment::Ioas(_) | Attachment::Detached => Some(before),
            // Only the VMM can put them into its own; ours has the same in it.
            Attachment::Vmm => self.bypass_ioas().ok().map(Attachment::Ioas),
            Attachment::Unbound | Attachment::Unknown => None,
        };
        let group = &mut self.groups[index];
        match back {
            Some(back) if group.reattach(back).is_ok() => Err(AttachError::Unchanged(cause)),
            Some(_) | None => {
                group.block();
                Err(AttachError::Blocked(cause))
            }
        }
    }

    /// Makes certain, once, that devices which somebody else has bound are bound to our iommufd: if
    /// they are not, the number of an address space of ours names another one, that of the VMM for
    /// example. An address space that a device obeys cannot be destroyed, so one is made for this.
    fn verify_iommufd(&mut self, index: usize) -> Result<bool, BackendError> {
        if self.groups[index].is_verified() {
            return Ok(true);
        }
        let ioas = self
            .kernel
            .alloc()
            .map_err(|cause| refused("there is no address space to try a device with", &cause))?;
        let put = self.groups[index].move_to(Attachment::Ioas(ioas));
        let destroyed = self.kernel.destroy(ioas);
        if destroyed.is_err() {
            self.condemned.push((ioas, Vec::new()));
        }
        put?;
        match destroyed {
            Ok(()) => Ok(false),
            Err(cause) if cause.raw_os_error() == Some(libc::EBUSY) => {
                self.groups[index].set_verified();
                Ok(true)
            }
            Err(cause) => Err(refused("a device cannot be tried", &cause)),
        }
    }

    /// Where the devices of a group belong.
    fn attachment_for(&mut self, index: usize) -> Result<Attachment, BackendError> {
        let group = &self.groups[index];
        match group.target() {
            Target::Blocked => Ok(Attachment::Detached),
            Target::Bypass if group.attachment() == Attachment::Vmm => Ok(Attachment::Vmm),
            Target::Bypass => self.bypass_ioas().map(Attachment::Ioas),
            Target::Domain(domain) => match self.domains.get(&domain) {
                Some(&ioas) => Ok(Attachment::Ioas(ioas)),
                None => Err(BackendError {
                    kind: BackendErrorKind::DevErr,
                    message: format!("domain {domain} has no address space"),
                }),
            },
        }
    }
}

impl DmaBackend for Iommufd {
    fn capabilities(&self) -> BackendCapabilities {
        self.capabilities
    }

    fn vmm_present(&mut self, present: bool) {
        self.connected = present;
        if present {
            for group in &mut self.groups {
                group.notice_binding();
            }
        }
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.sweep();
        self.reach.add(slot);
        if self.pin == Pinning::All || self.bypass.is_some() {
            self.bypass_ioas()?;
        }
        Ok(())
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.reach.remove(slot);
        let Some(bypass) = &mut self.bypass else {
            return Ok(());
        };
        let Some(at) = bypass.slots.iter().position(|s| s == slot) else {
            return Ok(());
        };
        match self.kernel.unmap(bypass.ioas, slot.range.identity()) {
            Ok(_) => {
                bypass.slots.swap_remove(at);
                Ok(())
            }
            Err(cause) => {
                // Whoever is there is quarantined now, and finds another one later.
                if let Some(Bypass { ioas, slots }) = self.bypass.take() {
                    self.condemned.push((ioas, slots));
                }
                let what = format_args!("guest RAM at {} stays mapped", slot.range);
                Err(refused(what, &cause))
            }
        }
    }

    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let Some(&index) = self.group_of.get(&endpoint) else {
            return Err(AttachError::Unchanged(unknown(endpoint)));
        };
        let before = self.groups[index].set_wanted(endpoint, target);
        if !self.connected && self.groups[index].attachment() == Attachment::Unbound {
            return Ok(());
        }
        let made = match target {
            Target::Domain(domain) if !self.domains.contains_key(&domain) => Some(domain),
            Target::Domain(_) | Target::Bypass | Target::Blocked => None,
        };
        let switched = self.groups[index]
            .check_bound(endpoint)
            .and_then(|()| match made {
                Some(domain) => {
                    let ioas = self.make_domain(domain, contents)?;
                    self.domains.insert(domain, ioas);
                    Ok(())
                }
                None => Ok(()),
            })
            .and_then(|()| self.attachment_for(index))
            .map_err(AttachError::Unchanged)
            .and_then(|attachment| self.switch(index, attachment));
        if let Err(refusal) = &switched {
            self.groups[index].restore_wanted(endpoint, before);
            if let AttachError::Blocked(_) = refusal {
                self.groups[index].quarantine(endpoint);
            }
            if let Some(domain) = made {
                self.destroy_domain(domain);
            }
        }
        self.sweep();
        self.moved();
        switched
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        self.half_way.take_if(|(of, _)| *of == domain);
        if let Some(ioas) = self.domains.remove(&domain) {
            self.destroy(ioas);
        }
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        if let Some(&index) = self.group_of.get(&endpoint) {
            self.groups[index].quarantine(endpoint);
        }
        self.sweep();
        self.moved();
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        let Some(&ioas) = self.domains.get(&domain) else {
            return Ok(());
        };
        let mut done = 0;
        let result = self.map_into(ioas, mapping, &mut done);
        self.half_way = result.is_err().then_some((domain, done));
        result
    }

    fn unmap(
        &mut self,
        domain: DomainId,
        range: IovaRange,
        least: u64,
    ) -> Result<(), BackendError> {
        let Some(&ioas) = self.domains.get(&domain) else {
            return Ok(());
        };
        let half_way = self.half_way.take().filter(|(of, _)| *of == domain);
        let least = least.saturating_add(half_way.map_or(0, |(_, bytes)| bytes));
        let bytes = match self.kernel.unmap(ioas, range) {
            // There was nothing. That is no failure as such: a mapping may have no rights, or its
            // memory may have gone.
            Err(cause) if cause.raw_os_error() == Some(libc::ENOENT) => Ok(0),
            done => done,
        };
        unmapped(range, least, bytes)
    }
}

fn unknown(endpoint: EndpointId) -> BackendError {
    BackendError {
        kind: BackendErrorKind::DevErr,
        message: format!("endpoint {endpoint} has no device of the host"),
    }
}
