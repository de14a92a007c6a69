//! The messages that bring a new crate into the state of the one before.

use vhost::vhost_user::message::FrontendReq;

use super::state::{Dropper, NO_DESCRIPTOR, PROTOCOL_FEATURES, VmmState};
use crate::device::QUEUES;

/// A message for a new crate, with the names of its descriptors. An empty name stands for an event descriptor that nobody
/// else has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub request: FrontendReq,
    pub body: Vec<u8>,
    pub files: Vec<String>,
}

impl Told {
    fn new(request: FrontendReq, body: &[u8]) -> Self {
        Self {
            request,
            body: body.to_vec(),
            files: Vec::new(),
        }
    }

    fn number(request: FrontendReq, number: u64) -> Self {
        Self::new(request, &number.to_ne_bytes())
    }

    fn of_ring(request: FrontendReq, index: usize, value: u32) -> Self {
        Self::new(request, &ring_words(index, value))
    }

    fn event(request: FrontendReq, index: usize, file: Option<&String>) -> Self {
        let flag = if file.is_some() { 0 } else { NO_DESCRIPTOR };
        let index = u64::try_from(index).unwrap_or(u64::MAX);
        Self {
            files: file.cloned().into_iter().collect(),
            ..Self::number(request, index | flag)
        }
    }
}

fn ring_words(index: usize, value: u32) -> Vec<u8> {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

impl VmmState {
    /// The messages that a new crate must get before the core is restored: the negotiation, and guest memory.
    pub(super) fn before_restore(&self) -> Vec<Told> {
        let mut told = Vec::new();
        if self.is_owner {
            told.push(Told::new(FrontendReq::SET_OWNER, &[]));
        }
        if self.is_announced {
            told.push(Told::new(FrontendReq::GET_PROTOCOL_FEATURES, &[]));
        }
        told.push(Told::number(
            FrontendReq::SET_PROTOCOL_FEATURES,
            self.protocol_features,
        ));
        if let Some(features) = self.features
            && self.dropped_by != Some(Dropper::Device)
        {
            told.push(Told::number(FrontendReq::SET_FEATURES, features));
        }
        let (added, table): (Vec<_>, Vec<_>) = self.memory.iter().partition(|region| region.added);
        if !table.is_empty() {
            let count = u64::try_from(table.len()).unwrap_or(0);
            let mut message = Told::number(FrontendReq::SET_MEM_TABLE, count);
            for region in table {
                message.body.extend(region.bytes());
                message.files.push(region.file.clone());
            }
            told.push(message);
        }
        for region in added {
            let mut message = Told::number(FrontendReq::ADD_MEM_REG, 0);
            message.body.extend(region.bytes());
            message.files.push(region.file.clone());
            told.push(message);
        }
        told
    }

    /// The messages that a new crate must get once the core is restored: the rings, which start at `bases`.
    ///
    /// # Errors
    /// Names the part of a ring that is in no region of memory. [`Self::forget_unreachable_rings`] has forgotten the places of
    /// stopped ones.
    pub(super) fn after_restore(&self, bases: [u16; QUEUES]) -> Result<Vec<Told>, String> {
        let mut told = Vec::new();
        // The event ring first: requests may cause faults.
        for (index, (ring, base)) in self.rings.iter().zip(bases).enumerate().rev() {
            if let Some(size) = ring.size {
                told.push(Told::of_ring(
                    FrontendReq::SET_VRING_NUM,
                    index,
                    size.into(),
                ));
            }
            if let Some(place) = ring.place {
                let user = |what, guest| {
                    let user = self.to_user(guest);
                    user.ok_or_else(|| format!("the {what} of ring {index} is at {guest:#x}, where the guest has no memory any more"))
                };
                let mut message = Told::of_ring(FrontendReq::SET_VRING_ADDR, index, place.flags);
                for address in [
                    user("descriptor table", place.descriptors)?,
                    user("used ring", place.used)?,
                    user("available ring", place.available)?,
                    place.log,
                ] {
                    message.body.extend(address.to_ne_bytes());
                }
                told.push(message);
            }
            told.push(Told::of_ring(
                FrontendReq::SET_VRING_BASE,
                index,
                base.into(),
            ));
            if ring.call.is_some() {
                told.push(Told::event(
                    FrontendReq::SET_VRING_CALL,
                    index,
                    ring.call.as_ref(),
                ));
            }
            if ring.is_started {
                // The VMM may have taken the kick descriptor of a started ring away.
                let kick = ring.kick.clone().unwrap_or_default();
                told.push(Told::event(FrontendReq::SET_VRING_KICK, index, Some(&kick)));
            }
            if ring.is_started && ring.kick.is_none() {
                told.push(Told::event(FrontendReq::SET_VRING_KICK, index, None));
            }
            let has_protocol = self.features.is_some_and(|f| f & PROTOCOL_FEATURES != 0);
            if ring.is_enabled && has_protocol {
                told.push(Told::of_ring(FrontendReq::SET_VRING_ENABLE, index, 1));
            }
        }
        if self.dropped_by == Some(Dropper::Owner) {
            told.push(Told::new(FrontendReq::RESET_OWNER, &[]));
            if self.is_owner {
                told.push(Told::new(FrontendReq::SET_OWNER, &[]));
            }
        }
        Ok(told)
    }
}
