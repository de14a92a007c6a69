//! The records of an iommufd's address spaces.
//!
//! Each record names an address space that exists and is this daemon's: it is written after the kernel has made the address
//! space, and removed before the kernel destroys it. Not the other way around: the VMM may share the iommufd, and the kernel
//! gives it the number of a destroyed object. A process that dies between both leaves an empty address space without a
//! record. The next one notices by a mark, and can only count it.
//!
//! The anchor is an address space with a single mapping, at a random address. It shows that the numbers in the records are
//! numbers of this iommufd.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::address::{Access, Iova, IovaRange};
use crate::backends::objects::{Ledger, Noted, ObjectRecord, ObjectRecords, RecordId};
use crate::ids::{DomainId, EndpointId};
use crate::vfio::{AddressSpaces, DmaSource};
use crate::warn_limited;

/// The owner in the records of the backend of a daemon's start.
const OWNER: u64 = 1 << 32;

/// The owner also has this bit, and the endpoint, in the records of the backend of an endpoint whose device was plugged in.
const PLUGGED: u64 = 1 << 33;

/// What an object is, in the high byte of its number.
const KIND_SHIFT: u32 = 56;
const SPACE: u64 = 1;
/// A host group whose devices are bound to this iommufd.
const GROUP: u64 = 2;
const ANCHOR: u64 = 3;
/// The endpoint of a device in a host group of several that is bound to this iommufd. The state is the group's number.
const MEMBER: u64 = 4;

/// The state of a group each of whose bound devices has a record. Daemons that recorded no devices wrote the other one.
const MEMBERS_KNOWN: u64 = 0;
const MEMBERS_UNKNOWN: u64 = 1;

/// The bits of an anchor's state: the page of its mapping, how many address spaces may have been lost, and whether one is
/// being made or destroyed.
const PAGE_BITS: u32 = 36;
const LOST_BITS: u32 = 11;
const PENDING: u64 = 1 << (PAGE_BITS + LOST_BITS);
const PAGE: u64 = 4096;

/// The use of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpaceRole {
    /// None: it is to be destroyed.
    Spare,
    /// Bypass mode.
    Bypass,
    /// The mappings of a domain.
    Domain(DomainId),
}

/// The recorded state of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpaceState {
    pub(super) role: SpaceRole,
    /// It has the mappings of its role, apart from those of a request in progress. Devices enter only such a one.
    pub(super) is_whole: bool,
    /// Some of its mappings lead to addresses of the process that made them. The kernel cannot pin their pages anew once
    /// that process is dead.
    pub(super) by_address: bool,
}

impl SpaceState {
    const WHOLE: u64 = 1 << 2;
    const BY_ADDRESS: u64 = 1 << 3;
    const DOMAIN_SHIFT: u32 = 8;

    fn bits(self) -> u64 {
        let role = match self.role {
            SpaceRole::Spare => 0,
            SpaceRole::Bypass => 1,
            SpaceRole::Domain(id) => 2 | u64::from(id.0) << Self::DOMAIN_SHIFT,
        };
        let flag = |is_set, bit| if is_set { bit } else { 0 };
        role | flag(self.is_whole, Self::WHOLE) | flag(self.by_address, Self::BY_ADDRESS)
    }

    fn from_bits(bits: u64) -> Self {
        let domain = u32::try_from(bits >> Self::DOMAIN_SHIFT).ok().map(DomainId);
        let role = match (bits & 3, domain) {
            (1, _) => SpaceRole::Bypass,
            (2, Some(domain)) => SpaceRole::Domain(domain),
            _ => SpaceRole::Spare,
        };
        Self {
            role,
            is_whole: bits & Self::WHOLE != 0,
            by_address: bits & Self::BY_ADDRESS != 0,
        }
    }
}

/// The records.
pub(super) struct SpaceNotes {
    ledger: Ledger,
    spaces: BTreeMap<u32, Noted>,
    /// Those of groups and of their devices, by object.
    groups: BTreeMap<u64, Noted>,
    anchor: Option<Noted>,
}

impl SpaceNotes {
    pub(super) fn new() -> Self {
        Self::of(OWNER)
    }

    /// The records of the backend of one plugged endpoint.
    pub(super) fn of_plugged(endpoint: EndpointId) -> Self {
        Self::of(OWNER | PLUGGED | u64::from(endpoint.0))
    }

    fn of(owner: u64) -> Self {
        Self {
            ledger: Ledger::none(owner),
            spaces: BTreeMap::new(),
            groups: BTreeMap::new(),
            anchor: None,
        }
    }

    pub(super) fn owner(&self) -> u64 {
        self.ledger.owner()
    }

    /// Keeps records from now on.
    pub(super) fn begin(&mut self, records: Arc<dyn ObjectRecords>) {
        self.ledger.begin(records);
    }

    /// Removes all records, and keeps none from now on.
    pub(super) fn end(&mut self) {
        let spaces = std::mem::take(&mut self.spaces).into_values();
        let groups = std::mem::take(&mut self.groups).into_values();
        for noted in spaces.chain(groups).chain(self.anchor.take()) {
            self.ledger.forget(&noted);
        }
        self.ledger.end();
    }

    /// Makes the anchor. Keeps no records without it.
    pub(super) fn make_anchor(&mut self, kernel: &dyn AddressSpaces) {
        match new_anchor(kernel) {
            Ok((ioas, page)) => {
                self.anchor = self
                    .ledger
                    .note(ANCHOR << KIND_SHIFT | u64::from(ioas), page);
            }
            Err(cause) => {
                warn_limited!(
                    "the address spaces of the host's IOMMU will be made anew if the daemon restarts: {cause}"
                );
            }
        }
        if self.anchor.is_none() {
            self.ledger.end();
        }
    }

    /// Takes the records of an earlier process over. Forgets them if they are not of this iommufd.
    pub(super) fn take_over(
        &mut self,
        left: &[(RecordId, ObjectRecord)],
        kernel: &dyn AddressSpaces,
    ) {
        for &(id, record) in left {
            let noted = self.ledger.left(id, record);
            let number = u32::try_from(record.object & !(u64::MAX << KIND_SHIFT));
            match (record.object >> KIND_SHIFT, number) {
                (SPACE, Ok(number)) => drop(self.spaces.insert(number, noted)),
                (GROUP | MEMBER, Ok(_)) => drop(self.groups.insert(record.object, noted)),
                (ANCHOR, Ok(_)) if self.anchor.is_none() => self.anchor = Some(noted),
                _ => self.ledger.forget(&noted),
            }
        }
        self.count_lost();
        self.set_pending(true);
        let is_anchored = self.is_anchored(kernel);
        self.set_pending(false);
        if is_anchored {
            return;
        }
        if !left.is_empty() {
            warn_limited!(
                "the address spaces of the daemon before are not in this iommufd, and are made anew"
            );
        }
        let spaces = std::mem::take(&mut self.spaces).into_values();
        let groups = std::mem::take(&mut self.groups).into_values();
        for noted in spaces.chain(groups).chain(self.anchor.take()) {
            self.ledger.forget(&noted);
        }
        self.make_anchor(kernel);
    }

    /// Forgets the records of an earlier process, whose iommufd is gone.
    pub(super) fn forget_left(&mut self, left: &[(RecordId, ObjectRecord)]) {
        for &(id, record) in left {
            let noted = self.ledger.left(id, record);
            self.ledger.forget(&noted);
        }
    }

    /// Destroys the anchor and forgets all records: the iommufd is about to be closed.
    pub(super) fn forget_all(&mut self, kernel: &dyn AddressSpaces) {
        let anchor = self.anchor.take();
        if let Some(anchor) = &anchor
            && let Ok(ioas) = u32::try_from(anchor.object() & !(u64::MAX << KIND_SHIFT))
        {
            // It ends with the iommufd in any case.
            drop(kernel.destroy(ioas));
        }
        let spaces = std::mem::take(&mut self.spaces).into_values();
        let groups = std::mem::take(&mut self.groups).into_values();
        for noted in spaces.chain(groups).chain(anchor) {
            self.ledger.forget(&noted);
        }
    }

    /// Whether the anchor is in this iommufd. False if the kernel does not let that be found out.
    fn is_anchored(&self, kernel: &dyn AddressSpaces) -> bool {
        const ATTEMPTS: usize = 3;
        (0..ATTEMPTS)
            .find_map(|_| self.look_for_anchor(kernel).ok())
            .unwrap_or(false)
    }

    fn look_for_anchor(&self, kernel: &dyn AddressSpaces) -> io::Result<bool> {
        let Some(anchor) = &self.anchor else {
            return Ok(false);
        };
        let page = anchor.state() & ((1 << PAGE_BITS) - 1);
        let number = u32::try_from(anchor.object() & !(u64::MAX << KIND_SHIFT));
        let (Ok(ioas), Some(at), Some(next)) = (number, page_range(page), page_range(page + 1))
        else {
            return Ok(false);
        };
        let scratch = kernel.alloc()?;
        // A copy succeeds only if all of its source is mapped.
        let has = |range: IovaRange| {
            let copied = kernel.copy(scratch, range, Access::READ, ioas, range.first());
            match copied.map_err(|cause| (cause.raw_os_error(), cause)) {
                Ok(()) => Ok(true),
                // No such address space or mapping; another object.
                Err((Some(libc::ENOENT | libc::EINVAL), _)) => Ok(false),
                Err((_, cause)) => Err(cause),
            }
        };
        let is_anchored = has(next).and_then(|next| Ok(!next && has(at)?));
        // It has no device, so nothing keeps the kernel from it.
        drop(kernel.destroy(scratch));
        is_anchored
    }

    fn count_lost(&mut self) {
        let Some(anchor) = &mut self.anchor else {
            return;
        };
        let state = anchor.state();
        if state & PENDING == 0 {
            return;
        }
        let lost = (state >> PAGE_BITS & ((1 << LOST_BITS) - 1)) + 1;
        warn_limited!(
            "the daemon before has died while it made or destroyed an address space: up to {lost} empty ones stay until \
             the VM ends"
        );
        let page = state & ((1 << PAGE_BITS) - 1);
        let lost = lost.min((1 << LOST_BITS) - 1);
        self.ledger.update(anchor, page | lost << PAGE_BITS);
    }

    /// Notes that an address space is being made or destroyed.
    pub(super) fn set_pending(&mut self, is_pending: bool) {
        if let Some(anchor) = &mut self.anchor {
            let others = anchor.state() & !PENDING;
            let state = if is_pending { others | PENDING } else { others };
            self.ledger.update(anchor, state);
        }
    }

    /// Records a new address space.
    pub(super) fn add(&mut self, ioas: u32, role: SpaceRole) {
        let state = SpaceState {
            role,
            is_whole: false,
            by_address: false,
        };
        let noted = self
            .ledger
            .note(SPACE << KIND_SHIFT | u64::from(ioas), state.bits());
        if let Some(noted) = noted {
            self.spaces.insert(ioas, noted);
        }
    }

    /// The state of an address space; `None` if it has no record.
    pub(super) fn state(&self, ioas: u32) -> Option<SpaceState> {
        let noted = self.spaces.get(&ioas)?;
        Some(SpaceState::from_bits(noted.state()))
    }

    /// Changes the state of an address space.
    pub(super) fn change(&mut self, ioas: u32, change: impl FnOnce(&mut SpaceState)) {
        if let Some(noted) = self.spaces.get_mut(&ioas) {
            let mut state = SpaceState::from_bits(noted.state());
            change(&mut state);
            self.ledger.update(noted, state.bits());
        }
    }

    /// Removes the record of an address space.
    pub(super) fn remove(&mut self, ioas: u32) {
        if let Some(noted) = self.spaces.remove(&ioas) {
            self.ledger.forget(&noted);
        }
    }

    /// All recorded address spaces.
    pub(super) fn spaces(&self) -> Vec<(u32, SpaceState)> {
        let spaces = self.spaces.iter();
        spaces
            .map(|(&ioas, noted)| (ioas, SpaceState::from_bits(noted.state())))
            .collect()
    }

    /// Records that the devices of a host group are bound to this iommufd.
    pub(super) fn add_group(&mut self, number: u32) {
        if !self.has_group(number) {
            self.add_to_groups(group_object(number), MEMBERS_UNKNOWN);
        }
    }

    /// Records which devices of a host group are bound to this iommufd, before any of them enters an address space. Those that
    /// are recorded already stay so.
    pub(super) fn add_members(&mut self, number: u32, endpoints: &[EndpointId]) {
        let is_new = !self.has_group(number);
        let mut are_known = is_new || self.members_of(number).is_some();
        for endpoint in endpoints {
            let object = MEMBER << KIND_SHIFT | u64::from(endpoint.0);
            are_known &= self.add_to_groups(object, u64::from(number));
        }
        let state = if are_known {
            MEMBERS_KNOWN
        } else {
            MEMBERS_UNKNOWN
        };
        if is_new {
            self.add_to_groups(group_object(number), state);
        } else if let Some(noted) = self.groups.get_mut(&group_object(number)) {
            self.ledger.update(noted, state);
        }
    }

    /// Records an object with a state. Returns whether it has that record now.
    fn add_to_groups(&mut self, object: u64, state: u64) -> bool {
        if let Some(noted) = self.groups.get_mut(&object) {
            self.ledger.update(noted, state);
            return true;
        }
        let noted = self.ledger.note(object, state);
        let is_noted = noted.is_some();
        self.groups.extend(noted.map(|noted| (object, noted)));
        is_noted
    }

    /// Whether the devices of a host group are known to be bound to this iommufd.
    pub(super) fn has_group(&self, number: u32) -> bool {
        self.groups.contains_key(&group_object(number))
    }

    /// The endpoints of the devices of a host group that were bound to this iommufd; `None` if that is not known of all.
    pub(super) fn members_of(&self, number: u32) -> Option<BTreeSet<EndpointId>> {
        let group = self.groups.get(&group_object(number))?;
        if group.state() != MEMBERS_KNOWN {
            return None;
        }
        let members = self.groups.range(MEMBER << KIND_SHIFT..);
        let members = members.filter(|(_, noted)| noted.state() == u64::from(number));
        let endpoint = |object: &u64| u32::try_from(object & !(u64::MAX << KIND_SHIFT)).ok();
        Some(
            members
                .filter_map(|(object, _)| endpoint(object).map(EndpointId))
                .collect(),
        )
    }
}

fn group_object(number: u32) -> u64 {
    GROUP << KIND_SHIFT | u64::from(number)
}

fn page_range(page: u64) -> Option<IovaRange> {
    IovaRange::from_len(Iova(page.checked_mul(PAGE)?), PAGE)
}

/// An address space with one mapping. The kernel pins no page of it, because no device is attached.
fn new_anchor(kernel: &dyn AddressSpaces) -> io::Result<(u32, u64)> {
    let random = RandomState::new().hash_one(0u64) >> (u64::BITS - PAGE_BITS);
    // Not the last page, which has no next one.
    let page = random.clamp(1, (1 << PAGE_BITS) - 2);
    let range = page_range(page).ok_or(io::ErrorKind::InvalidInput)?;
    let size = usize::try_from(PAGE).map_err(io::Error::other)?;
    let memory = MmapRegion::new(size).map_err(io::Error::other)?;
    let ioas = kernel.alloc()?;
    let source = DmaSource::Host(&memory, 0);
    if let Err(cause) = kernel.map(ioas, range, Access::READ, source) {
        drop(kernel.destroy(ioas));
        return Err(cause);
    }
    Ok((ioas, page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_what_its_bits_say() {
        let roles = [
            SpaceRole::Spare,
            SpaceRole::Bypass,
            SpaceRole::Domain(DomainId(0)),
            SpaceRole::Domain(DomainId(u32::MAX)),
        ];
        for role in roles {
            for (is_whole, by_address) in [(false, false), (true, false), (true, true)] {
                let state = SpaceState {
                    role,
                    is_whole,
                    by_address,
                };
                assert_eq!(SpaceState::from_bits(state.bits()), state);
                assert!(state.bits() < 1 << 48);
            }
        }
    }
}
