//! What a VMM has told its backend, as far as a new backend must be told.
//!
//! It follows the crate `vhost-user-backend`, version 0.24: [`VmmState::apply`] changes the state as the crate does when it
//! has accepted a message, and the messages of `VmmState::before_restore` and `VmmState::after_restore` (`told`) bring a new
//! crate into that state. A message that the crate refuses ends the connection, so none is applied.

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, VhostUserVirtioFeatures};

use super::message::{MessageBytes, word32, word64};
use crate::device::{MAX_QUEUE_SIZE, QUEUES};

/// The most regions of memory. The crate promises room for 509.
pub(super) const MAX_REGIONS: usize = 512;
/// Bytes of a region in a message: guest-physical address, size, address in the VMM, offset in the file.
const REGION_LEN: usize = 32;
/// Bytes before the regions.
const REGIONS_AT: usize = 8;
/// The flag for a missing descriptor in the messages of a ring's events.
pub(super) const NO_DESCRIPTOR: u64 = 1 << 8;
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What a VMM has said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmmState {
    /// It has asked for the features. Only then does the crate reply to messages that ask for it.
    pub has_asked: bool,
    /// It has sent a message with which the device counts it as present.
    pub is_announced: bool,
    /// SET_OWNER.
    pub is_owner: bool,
    /// SET_PROTOCOL_FEATURES.
    pub protocol_features: u64,
    /// The last SET_FEATURES.
    pub features: Option<u64>,
    /// What has dropped these features since.
    pub dropped_by: Option<Dropper>,
    /// Guest memory, in the crate's order.
    pub memory: Vec<VmmRegion>,
    /// The rings.
    pub rings: [VmmRingState; QUEUES],
}

/// A message that drops the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Dropper {
    /// RESET_OWNER. The device is not told.
    Owner,
    /// RESET_DEVICE, which also disables the rings.
    Device,
}

/// A region of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmmRegion {
    /// First guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// First address in the VMM.
    pub user: u64,
    /// Offset in its file.
    pub offset: u64,
    /// It came with ADD_MEM_REG, which checks less than SET_MEM_TABLE.
    pub added: bool,
    /// The name under which its file is kept.
    pub file: String,
}

impl VmmRegion {
    fn read(bytes: &[u8], added: bool, file: String) -> Option<Self> {
        Some(Self {
            guest: word64(bytes, 0)?,
            size: word64(bytes, 8)?,
            user: word64(bytes, 16)?,
            offset: word64(bytes, 24)?,
            added,
            file,
        })
    }

    /// The bytes of the region in a message.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let words = [self.guest, self.size, self.user, self.offset];
        words.into_iter().flat_map(u64::to_ne_bytes).collect()
    }

    /// The guest-physical address behind an address of the VMM.
    fn to_guest(&self, user: u64) -> Option<u64> {
        let offset = user.checked_sub(self.user)?;
        let is_inside = offset < self.size;
        is_inside.then(|| self.guest.wrapping_add(offset))
    }

    /// The address of the VMM behind a guest-physical address.
    fn to_user(&self, guest: u64) -> Option<u64> {
        let offset = guest.checked_sub(self.guest)?;
        let is_inside = offset < self.size;
        is_inside.then(|| self.user.wrapping_add(offset))
    }
}

/// What a VMM has said about one ring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmmRingState {
    /// Its entries; `None` for the crate's default.
    pub size: Option<u16>,
    /// Where it is.
    pub place: Option<GuestRing>,
    /// The index at which it starts, or at which it was stopped.
    pub base: u16,
    /// The name of the kick descriptor.
    pub kick: Option<String>,
    /// The name of the call descriptor.
    pub call: Option<String>,
    /// It has started: by a kick descriptor, until GET_VRING_BASE stops it.
    pub is_started: bool,
    /// It had started, GET_VRING_BASE has stopped it, and it has not run since.
    pub was_stopped: bool,
    /// It is enabled.
    pub is_enabled: bool,
}

/// The guest-physical addresses of a ring's parts, as they were when the VMM set them: a later memory table does not move
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GuestRing {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// The flags of the message.
    pub flags: u32,
    /// The address of the log.
    pub log: u64,
}

impl VmmRingState {
    /// The device serves it.
    pub(super) fn is_running(&self) -> bool {
        self.is_started && self.is_enabled
    }
}

impl VmmState {
    /// How many of a message's descriptors must be kept, if it has `count`.
    pub(super) fn keeps(message: &MessageBytes, count: usize) -> usize {
        match message.request() {
            Some(FrontendReq::SET_MEM_TABLE) => count,
            Some(
                FrontendReq::ADD_MEM_REG
                | FrontendReq::SET_VRING_KICK
                | FrontendReq::SET_VRING_CALL,
            ) => count.min(1),
            _ => 0,
        }
    }

    /// The crate has accepted `message`, whose descriptors are kept under these names, and has replied. Returns the names
    /// that the state does not have any more.
    pub(super) fn apply(
        &mut self,
        message: &MessageBytes,
        mut names: Vec<String>,
        reply: Option<&MessageBytes>,
    ) -> Vec<String> {
        let body = message.body();
        let number = word64(body, 0).unwrap_or(0);
        let Some(request) = message.request() else {
            return names;
        };
        match request {
            FrontendReq::GET_FEATURES => self.has_asked = true,
            FrontendReq::GET_PROTOCOL_FEATURES => self.is_announced = true,
            FrontendReq::SET_OWNER => self.is_owner = true,
            FrontendReq::SET_PROTOCOL_FEATURES => self.protocol_features = number,
            FrontendReq::SET_FEATURES => {
                self.features = Some(number);
                self.dropped_by = None;
                if number & PROTOCOL_FEATURES == 0 {
                    for ring in &mut self.rings {
                        ring.is_enabled = true;
                        ring.was_stopped &= !ring.is_started;
                    }
                }
            }
            FrontendReq::RESET_OWNER => {
                self.is_owner = false;
                self.dropped_by.get_or_insert(Dropper::Owner);
            }
            FrontendReq::RESET_DEVICE => {
                self.dropped_by = Some(Dropper::Device);
                for ring in &mut self.rings {
                    ring.is_enabled = false;
                    ring.was_stopped = false;
                }
            }
            FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG => {
                self.is_announced = true;
                return self.change_memory(request, body, names);
            }
            _ => return self.change_ring(request, body, &mut names, reply),
        }
        names
    }

    fn change_memory(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        names: Vec<String>,
    ) -> Vec<String> {
        let regions = body.get(REGIONS_AT..).unwrap_or(&[]).chunks(REGION_LEN);
        let is_added = request == FrontendReq::ADD_MEM_REG;
        if request == FrontendReq::REM_MEM_REG {
            let gone = word64(body, REGIONS_AT);
            let is_gone = |region: &VmmRegion| Some(region.guest) == gone;
            let removed = self.memory.iter().filter(|region| is_gone(region));
            let removed = removed.map(|region| region.file.clone()).collect();
            self.memory.retain(|region| !is_gone(region));
            return removed;
        }
        let mut removed = Vec::new();
        if !is_added {
            removed = self.memory.drain(..).map(|region| region.file).collect();
        }
        for (bytes, file) in regions.zip(names) {
            self.memory.extend(VmmRegion::read(bytes, is_added, file));
        }
        removed
    }

    fn change_ring(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        names: &mut Vec<String>,
        reply: Option<&MessageBytes>,
    ) -> Vec<String> {
        let mut gone = std::mem::take(names);
        let value = word32(body, 4).unwrap_or(0);
        let place = self.place(body);
        // The two messages with descriptors have a number of 64 bits, and the index in its lowest byte.
        let index = match (request, word32(body, 0)) {
            (FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL, Some(word)) => word & 0xff,
            (_, word) => word.unwrap_or(u32::MAX),
        };
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(ring) = self.rings.get_mut(index) else {
            return gone;
        };
        match request {
            // The crate ignores other numbers.
            FrontendReq::SET_VRING_NUM => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && usize::from(size) <= MAX_QUEUE_SIZE => {
                    ring.size = Some(size);
                }
                _ => {}
            },
            FrontendReq::SET_VRING_ADDR => ring.place = place,
            FrontendReq::SET_VRING_BASE => ring.base = low(value),
            FrontendReq::GET_VRING_BASE => {
                if let Some(base) = reply.and_then(|reply| word32(reply.body(), 4)) {
                    ring.base = low(base);
                }
                // Also if the VMM has disabled it before, as QEMU does.
                ring.was_stopped |= ring.is_started;
                ring.is_started = false;
                gone.extend(ring.kick.take());
                gone.extend(ring.call.take());
            }
            FrontendReq::SET_VRING_KICK => {
                let new = take_first(&mut gone, word64(body, 0));
                gone.extend(std::mem::replace(&mut ring.kick, new));
                ring.is_started |= ring.kick.is_some();
            }
            FrontendReq::SET_VRING_CALL => {
                let new = take_first(&mut gone, word64(body, 0));
                gone.extend(std::mem::replace(&mut ring.call, new));
                ring.is_started |= ring.kick.is_some();
            }
            FrontendReq::SET_VRING_ENABLE => ring.is_enabled = value == 1,
            _ => {}
        }
        ring.was_stopped &= !ring.is_running();
        gone
    }

    /// The addresses in a SET_VRING_ADDR, translated as the crate does.
    fn place(&self, body: &[u8]) -> Option<GuestRing> {
        let guest = |at| self.to_guest(word64(body, at)?);
        Some(GuestRing {
            descriptors: guest(8)?,
            used: guest(16)?,
            available: guest(24)?,
            flags: word32(body, 4)?,
            log: word64(body, 32)?,
        })
    }

    fn to_guest(&self, user: u64) -> Option<u64> {
        self.memory.iter().find_map(|region| region.to_guest(user))
    }

    /// An address of the VMM that the crate translates to `guest`.
    pub(super) fn to_user(&self, guest: u64) -> Option<u64> {
        let users = self
            .memory
            .iter()
            .filter_map(|region| region.to_user(guest));
        users
            .into_iter()
            .find(|user| self.to_guest(*user) == Some(guest))
    }

    /// Forgets the places of the stopped rings that are where the guest has no memory any more. Returns the rings' indices.
    pub(super) fn forget_unreachable_rings(&mut self) -> Vec<usize> {
        let is_gone = |ring: &VmmRingState| {
            let parts = ring.place.map(|p| [p.descriptors, p.available, p.used]);
            let mut parts = parts.into_iter().flatten();
            !ring.is_started && parts.any(|part| self.to_user(part).is_none())
        };
        let rings = self.rings.iter().enumerate();
        let gone: Vec<_> = rings.filter(|(_, r)| is_gone(r)).map(|(i, _)| i).collect();
        for &index in &gone {
            self.rings[index].place = None;
        }
        gone
    }

    /// The names of all descriptors, each as often as the state has it.
    pub(super) fn names(&self) -> Vec<&String> {
        let regions = self.memory.iter().map(|region| &region.file);
        let events = self
            .rings
            .iter()
            .flat_map(|ring| ring.kick.iter().chain(&ring.call));
        regions.chain(events).collect()
    }

    /// Nothing is kept any more.
    pub(super) fn forget_names(&mut self) {
        for region in &mut self.memory {
            region.file.clear();
        }
        let events = self.rings.iter_mut();
        for name in events.flat_map(|ring| ring.kick.iter_mut().chain(&mut ring.call)) {
            name.clear();
        }
    }

    /// Whether a state that an earlier process has left can be one: everything is within its bounds.
    pub(super) fn is_plausible(&self) -> bool {
        let in_table = self.memory.iter().filter(|region| !region.added).count();
        let sizes = self.rings.iter().filter_map(|ring| ring.size);
        self.memory.len() <= MAX_REGIONS
            && in_table <= MAX_ATTACHED_FD_ENTRIES
            && sizes.clone().all(u16::is_power_of_two)
            && sizes
                .clone()
                .all(|size| usize::from(size) <= MAX_QUEUE_SIZE)
            && self
                .rings
                .iter()
                .all(|ring| !(ring.is_running() && ring.was_stopped))
    }
}

/// The name of a descriptor that has just come, which stands first, unless the message says that there is none.
fn take_first(names: &mut Vec<String>, number: Option<u64>) -> Option<String> {
    let has_file = number.is_some_and(|number| number & NO_DESCRIPTOR == 0);
    (has_file && !names.is_empty()).then(|| names.remove(0))
}

/// The index in a number of 32 bits, as the crate reads it.
fn low(value: u32) -> u16 {
    let [a, b, _, _] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}
