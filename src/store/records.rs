//! The records of domains, endpoints and kernel objects: places of one cache line, whose first word is the kind.
//!
//! The kind of a record is written last when the record is made, and is cleared first when the record goes.

use std::sync::Arc;

use super::layout::{
    BYPASS_DOMAIN, DOMAIN_RECORD, ENDPOINT_RECORD, HEADER_RECORDS_USED, LEVELS_BITS, NO_RECORD,
    OBJECT_RECORD, RECORD_WORDS, RECORDS_AT, check, endpoint_salt, header_salt, object_check, seal,
};
use super::{StoredDomain, StoredEndpoint, StoredObject};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::Levels;
use crate::page_table::words::SharedWords;

/// The places of all records.
#[derive(Debug)]
pub(super) struct Places {
    memory: Arc<SharedWords>,
    room: u32,
    /// The first place that was never used.
    used: u32,
    free: Vec<u32>,
}

impl Places {
    pub(super) fn new(memory: Arc<SharedWords>, room: u32) -> Self {
        let places = Self {
            memory,
            room,
            used: 0,
            free: Vec::new(),
        };
        places.note_used();
        places
    }

    /// Takes a free place; `None` if there is none.
    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(place) = self.free.pop() {
            return Some(place);
        }
        if self.used >= self.room {
            return None;
        }
        self.used += 1;
        self.note_used();
        Some(self.used - 1)
    }

    /// Removes the record of a place.
    pub(super) fn release(&mut self, place: u32) {
        self.set(place, 0, NO_RECORD);
        self.free.push(place);
    }

    pub(super) fn write_domain(
        &self,
        place: u32,
        id: DomainId,
        domain: StoredDomain,
        levels: Levels,
    ) {
        let id = u64::from(id.0);
        let target = target_word(domain, levels);
        self.set(place, 1, id);
        self.set(place, 2, target);
        self.set(place, 3, check(target, id + 1));
        self.set(place, 0, DOMAIN_RECORD);
    }

    pub(super) fn add_endpoint(&self, place: u32, id: EndpointId, endpoint: StoredEndpoint) {
        self.set(place, 1, id.0.into());
        self.set_endpoint(place, id, endpoint);
        self.set(place, 0, ENDPOINT_RECORD);
    }

    pub(super) fn set_endpoint(&self, place: u32, id: EndpointId, endpoint: StoredEndpoint) {
        let word = seal(endpoint.bits(), endpoint_salt(id.0));
        self.set(place, 2, word);
    }

    pub(super) fn write_object(&self, place: u32, object: StoredObject) {
        self.set(place, 1, object.owner);
        self.set(place, 2, object.object);
        self.set(place, 3, object_check(object.owner, object.object));
        self.set_object(place, object);
        self.set(place, 0, OBJECT_RECORD);
    }

    pub(super) fn set_object(&self, place: u32, object: StoredObject) {
        let salt = object_check(object.owner, object.object);
        self.set(place, 4, seal(object.state, salt));
    }

    fn set(&self, place: u32, word: usize, value: u64) {
        let at = RECORDS_AT + place as usize * RECORD_WORDS + word;
        self.memory.store(at, value);
    }

    fn note_used(&self) {
        let salt = header_salt(HEADER_RECORDS_USED);
        self.memory
            .store(HEADER_RECORDS_USED, seal(self.used.into(), salt));
    }
}

/// Word 2 of a domain's record.
pub(super) fn target_word(domain: StoredDomain, levels: Levels) -> u64 {
    match domain {
        StoredDomain::Bypass => BYPASS_DOMAIN,
        StoredDomain::Table(root) => root & !LEVELS_BITS | u64::from(levels.count()),
    }
}

impl StoredEndpoint {
    const ATTACHED: u64 = 1 << 32;
    const SUSPENDED: u64 = 1 << 33;
    const QUARANTINED: u64 = 1 << 34;

    /// The value of the sealed word.
    pub(super) fn bits(self) -> u64 {
        let domain = self.domain.map_or(0, |id| u64::from(id.0) | Self::ATTACHED);
        let flag = |is_set, bit| if is_set { bit } else { 0 };
        domain | flag(self.suspended, Self::SUSPENDED) | flag(self.quarantined, Self::QUARANTINED)
    }

    /// Decodes the value; `None` if unknown bits are set.
    pub(super) fn from_bits(bits: u64) -> Option<Self> {
        let [a, b, c, d, ..] = bits.to_le_bytes();
        let known = Self::ATTACHED | Self::SUSPENDED | Self::QUARANTINED | u64::from(u32::MAX);
        (bits & !known == 0).then_some(Self {
            domain: (bits & Self::ATTACHED != 0)
                .then_some(DomainId(u32::from_le_bytes([a, b, c, d]))),
            suspended: bits & Self::SUSPENDED != 0,
            quarantined: bits & Self::QUARANTINED != 0,
        })
    }
}
