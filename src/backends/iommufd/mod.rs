//! Host IOMMU through iommufd: one I/O address space (IOAS) for each domain, whatever the number of its endpoints. The
//! backend attaches devices to these address spaces. The VMM or this process has bound the devices.
//!
//! With [`Pinning::All`] the backend maps guest RAM once, from its files, into an address space for bypass mode; the
//! mappings of domains are copies of parts of this address space. With [`Pinning::Mapped`] it makes each mapping from
//! the file, and the address space for bypass mode exists only while it is used.
//!
//! Before the VMM has connected, a shared device is not bound and can do no DMA. Once the VMM has connected, the device
//! is in the VMM's own address space, which maps the memory that bypass mode reaches. The device stays there until its
//! target first changes.
//!
//! cloud-hypervisor disconnects at a reboot of its guest, attaches its devices to a new address space of its own, and
//! connects again. No process can keep the VMM from that. So the backend clears the devices' bus-master bits when the VMM
//! disconnects, and moves the devices when it connects: the kernel is called for every target, whatever the last one was.

mod adopt;
mod group;
#[cfg(not(miri))]
pub mod nested;
mod noted;
mod spaces;
mod vmm_files;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::group::{Attachment, DeviceGroup, GroupMember};
use self::noted::{SpaceNotes, SpaceRole};
use self::spaces::Spaces;
use super::reach::{Reach, refused, unmapped};
use super::{
    Adoption, AttachError, BackendCapabilities, BackendError, BackendErrorKind, Contents,
    DmaBackend, MemorySlot, ObjectRecords, Target,
};
use crate::address::{IovaRange, Mapping};
use crate::ids::{DomainId, EndpointId};
use crate::vfio::{AddressSpaces, Attach, DeviceMemory, VmmFiles};
use crate::{error_limited, warn_limited};

pub use self::spaces::Pinning;

/// A device behind the backend.
pub struct PassthroughDevice {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// The host's name for it.
    pub name: String,
    /// The number of its host group. The host cannot isolate devices of one group from each other.
    pub group: u32,
    /// Whether the VMM binds it; otherwise this process has bound it.
    pub shared: bool,
    /// Gives it an address space.
    pub attach: Box<dyn Attach>,
    /// Its memory.
    pub memory: Arc<dyn DeviceMemory>,
}

/// The backend.
pub struct Iommufd {
    capabilities: BackendCapabilities,
    connected: bool,
    spaces: Spaces,
    domains: BTreeMap<DomainId, u32>,
    /// The domain of a `map` that has failed, and the number of bytes that the `map` had mapped. The core unmaps them
    /// next.
    partial_map: Option<(DomainId, u64)>,
    groups: Vec<DeviceGroup>,
    group_of: BTreeMap<EndpointId, usize>,
    /// Endpoints for [`DmaBackend::take_stopped`].
    stopped: Vec<EndpointId>,
    /// The files of the VMM, if they come and go.
    vmm_files: Option<Box<dyn VmmFiles>>,
    /// Where records are kept, if they are.
    records: Option<Arc<dyn ObjectRecords>>,
    /// [`DmaBackend::adopt`] is still to come.
    awaits_take_over: bool,
}

impl Iommufd {
    /// The backend for `devices`.
    pub fn new(
        kernel: Arc<dyn AddressSpaces>,
        capabilities: BackendCapabilities,
        pinning: Pinning,
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
        let groups = numbers.into_iter().zip(members);
        let groups = groups.map(|(number, members)| DeviceGroup::new(number, members));
        let groups = groups.collect();
        Self {
            capabilities,
            connected: false,
            spaces: Spaces::new(kernel, pinning, reach),
            domains: BTreeMap::new(),
            partial_map: None,
            groups,
            group_of,
            stopped: Vec::new(),
            vmm_files: None,
            records: None,
            awaits_take_over: false,
        }
    }

    /// Says which of the devices an earlier process has bound: perhaps to another iommufd than this one's.
    #[must_use]
    pub fn with_bound_before(mut self, endpoints: &[EndpointId]) -> Self {
        for endpoint in endpoints {
            if let Some(&index) = self.group_of.get(endpoint) {
                self.groups[index].set_bound_before();
            }
        }
        self
    }

    /// Records which groups need no verification.
    fn note_verified_groups(&mut self) {
        for index in 0..self.groups.len() {
            self.note_group(index);
        }
    }

    /// Records the group if it needs no verification any more, and which of its devices are bound if their files can come and
    /// go one by one.
    fn note_group(&mut self, index: usize) {
        let group = &self.groups[index];
        if !group.is_verified() {
            return;
        }
        let notes = self.spaces.notes.get_mut();
        if self.vmm_files.is_some() && group.has_several() {
            notes.add_members(group.number(), &group.bound_endpoints());
        } else {
            notes.add_group(group.number());
        }
    }

    /// Names the owner of this backend's records: that of an endpoint whose device was plugged in.
    #[must_use]
    pub fn of_plugged(mut self, endpoint: EndpointId) -> Self {
        *self.spaces.notes.get_mut() = SpaceNotes::of_plugged(endpoint);
        self
    }

    /// Updates the address spaces after devices have moved.
    fn moved(&mut self) {
        let bypass = self.spaces.bypass().map(Attachment::Ioas);
        let is_used = bypass.is_some_and(|b| self.groups.iter().any(|g| g.attachment() == b));
        self.spaces.moved(is_used);
    }

    /// Moves the devices of a group to another address space. On error, moves them back to the former one; their DMA
    /// faults for a moment.
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
            return Err(AttachError::Blocked(group.wrong_iommufd()));
        }
        let Err(cause) = verified.and_then(|_| self.groups[index].move_to(attachment)) else {
            return Ok(());
        };
        let former = match before {
            Attachment::Ioas(ioas) => Some(ioas),
            _ => None,
        };
        let refusing = self.groups[index].refusing().iter().copied();
        if !self.groups[index].refusing().is_empty() {
            let suspects: Vec<_> = refusing.chain(former).collect();
            suspects
                .into_iter()
                .for_each(|ioas| self.spaces.suspect(ioas));
        }
        let back = match before {
            Attachment::Ioas(_) | Attachment::Detached => Some(before),
            // Only the VMM can move devices back to its own address space. This process's address space for bypass mode
            // maps the same memory.
            Attachment::Vmm => self.spaces.bypass_ioas().ok().map(Attachment::Ioas),
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

    /// Attaches all devices anew in the address spaces that the group at `index` has just failed to enter. Their DMA
    /// faults for a moment; a device that cannot be attached again is blocked.
    ///
    /// Otherwise the IOMMU could still use cached translations after an UNMAP. The VT-d driver of Linux 7.3.4 sends no
    /// invalidations for a page table that it counts no devices in, and a failed attach takes one off that count without
    /// having added it: `dmar_domain_attach_device` calls `device_block_translation`, which unassigns a cache tag that
    /// was not assigned. The page table, and with it the count, ends with the last device in it, so all devices leave
    /// before the first one returns. A new address space would have to be filled, while the host probably lacks memory.
    fn renew_refusing(&mut self, index: usize) {
        let mut refusing = self.groups[index].take_refusing();
        // A group that cannot return is blocked, so there are at most as many rounds as groups.
        while let Some(ioas) = refusing.pop() {
            let mut inside: Vec<_> = (0..self.groups.len())
                .filter(|&i| self.groups[i].attachment() == Attachment::Ioas(ioas))
                .collect();
            if inside.is_empty() {
                continue;
            }
            warn_limited!(
                "a device could not be attached to address space {ioas}: the devices in it are attached anew, their DMA \
                 may have faulted for a moment"
            );
            inside.retain(|&i| match self.groups[i].move_to(Attachment::Detached) {
                Ok(()) => true,
                Err(cause) => {
                    self.stop(i, &cause);
                    false
                }
            });
            for i in inside {
                if let Err(cause) = self.groups[i].move_to(Attachment::Ioas(ioas)) {
                    self.stop(i, &cause);
                }
                refusing.extend(self.groups[i].take_refusing());
            }
        }
    }

    /// Blocks a group that cannot stay in its address space.
    fn stop(&mut self, index: usize, cause: &BackendError) {
        error_limited!("a device cannot stay in its address space: {cause}");
        let endpoints: Vec<_> = self.groups[index].endpoints().collect();
        for endpoint in endpoints {
            self.groups[index].quarantine(endpoint);
            self.stopped.push(endpoint);
        }
    }

    /// Verifies, once, that devices which the VMM has bound are bound to this process's iommufd. In another iommufd,
    /// the ID of an address space of this process would name a different address space, such as the VMM's.
    ///
    /// The test: attach them to a new address space and try to destroy it. The kernel refuses with EBUSY only if a device
    /// is attached to it.
    fn verify_iommufd(&mut self, index: usize) -> Result<bool, BackendError> {
        if self.groups[index].is_verified() {
            return Ok(true);
        }
        let failure = "no address space to verify a device's iommufd with";
        let ioas = self.spaces.alloc(SpaceRole::Spare, failure)?;
        let moved = self.groups[index].move_to(Attachment::Ioas(ioas));
        let destroyed = self.spaces.destroy_or_condemn(ioas);
        moved?;
        match destroyed {
            Ok(()) => Ok(false),
            Err(cause) if cause.raw_os_error() == Some(libc::EBUSY) => {
                self.groups[index].set_verified();
                self.note_group(index);
                Ok(true)
            }
            Err(cause) => Err(refused("cannot verify a device's iommufd", &cause)),
        }
    }

    /// The address space for the target of a group.
    fn attachment_for(&mut self, index: usize) -> Result<Attachment, BackendError> {
        let group = &self.groups[index];
        match group.target() {
            Target::Blocked => Ok(Attachment::Detached),
            Target::Bypass if group.attachment() == Attachment::Vmm => Ok(Attachment::Vmm),
            Target::Bypass => self.spaces.bypass_ioas().map(Attachment::Ioas),
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

    fn record_owner(&self) -> Option<u64> {
        Some(self.spaces.notes.borrow().owner())
    }

    fn keep_records(&mut self, records: Arc<dyn ObjectRecords>, adopts: bool) {
        self.records = Some(records.clone());
        self.awaits_take_over = adopts;
        self.spaces.adopting = adopts || self.lacks_iommufd();
        let notes = self.spaces.notes.get_mut();
        notes.begin(records);
        if !self.spaces.adopting {
            notes.make_anchor(&*self.spaces.kernel);
            self.note_verified_groups();
        }
    }

    fn forget_records(&mut self) {
        self.spaces.notes.get_mut().end();
    }

    fn prepare_adoption(&mut self, adoption: &Adoption<'_>) -> Vec<(EndpointId, BackendError)> {
        self.block_moving(adoption)
    }

    fn adopt(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        self.take_over(adoption, contents)
    }

    fn vmm_present(&mut self, present: bool) {
        self.connected = present;
        for group in &mut self.groups {
            if present {
                group.notice_binding();
            } else {
                group.stop_shared();
            }
        }
        if present {
            self.notice_files(None);
        } else {
            self.release_files();
        }
    }

    fn files_came(&mut self) {
        self.notice_files(None);
    }

    fn condemned_spaces(&self) -> usize {
        self.spaces.condemned()
    }

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.notice_files(None);
        self.spaces.add_memory(slot)
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.spaces.remove_memory(slot)
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
        self.fetch_for(index, target);
        if self.has_lost_files(index) {
            self.groups[index].restore_wanted(endpoint, before);
            return Err(AttachError::Unchanged(self.lost_files(index)));
        }
        let is_deferred =
            !self.connected || self.vmm_files.is_some() && !matches!(target, Target::Domain(_));
        if is_deferred && self.groups[index].attachment() == Attachment::Unbound {
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
                    let ioas = self.spaces.make_domain(domain, contents)?;
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
            self.place_arrived(index);
        }
        self.renew_refusing(index);
        self.spaces.trust_again();
        self.spaces.sweep();
        self.moved();
        switched
    }

    fn take_stopped(&mut self) -> Vec<EndpointId> {
        std::mem::take(&mut self.stopped)
    }

    fn destroy_domain(&mut self, domain: DomainId) {
        self.partial_map.take_if(|(of, _)| *of == domain);
        if let Some(ioas) = self.domains.remove(&domain) {
            self.spaces.destroy(ioas);
        }
    }

    fn quarantine(&mut self, endpoint: EndpointId) {
        if let Some(&index) = self.group_of.get(&endpoint) {
            self.groups[index].quarantine(endpoint);
        }
        self.spaces.sweep();
        self.moved();
    }

    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError> {
        let Some(&ioas) = self.domains.get(&domain) else {
            return Ok(());
        };
        let mut done = 0;
        let result = self.spaces.map_into(ioas, mapping, &mut done);
        self.partial_map = result.is_err().then_some((domain, done));
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
        let partial_map = self.partial_map.take().filter(|(of, _)| *of == domain);
        let least = least.saturating_add(partial_map.map_or(0, |(_, bytes)| bytes));
        let bytes = match self.spaces.kernel.unmap(ioas, range) {
            // Nothing was mapped. That alone is no failure: a mapping may have no rights, or its memory may be gone.
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
