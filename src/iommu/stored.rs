//! What the core writes to the store as its state changes.

use std::sync::Arc;

use super::domain::Domain;
use super::{DriverState, EndpointRecord, Iommu};
use crate::backends::{MemorySlot, ObjectRecord, ObjectRecords, RecordId};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::Levels;
use crate::store::{
    Journal, ObjectWriter, Store, StoredDomain, StoredDriver, StoredEndpoint, StoredObject,
};

impl Iommu {
    /// The store, which outlives this process.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The journal of requests, which the device writes.
    #[inline(always)]
    pub fn journal(&mut self) -> &mut Journal {
        self.store.journal()
    }

    /// Has each request journaled from now on, so that another process can go on after the death of this one. Costs about
    /// 3 ns a request. Must be called before the first request.
    pub fn keep_journal(&mut self) {
        self.store.keep_journal();
    }

    /// Has no later process go on after the death of this one: it will refuse the store, and block every endpoint until the
    /// driver starts anew. For a process that is about to let others use guest memory in a way that its death does not end
    /// at once.
    pub fn forgo_restart(&mut self) {
        self.store.forgo_journal();
    }

    /// Records the feature bits that the driver has accepted, for a later process.
    pub fn note_features(&self, features: u64) {
        self.store.set_features(features);
    }

    /// Keeps the records of a backend.
    pub(super) fn object_records(&self) -> Arc<dyn ObjectRecords> {
        Arc::new(StoreObjects(self.store.objects()))
    }

    /// Records the state of an endpoint, after it has changed.
    pub(super) fn record_endpoint(&mut self, endpoint: EndpointId) {
        match self.endpoints.get(&endpoint) {
            Some(record) => self.store.set_endpoint(endpoint, (*record).into()),
            None => self.store.remove_endpoint(endpoint),
        }
    }

    /// Records `bypass` and the state of the driver, after one of them has changed.
    pub(super) fn record_state(&mut self) {
        self.store.set_state(self.bypass, self.driver.into());
    }

    /// Records a domain that is about to get its first member.
    pub(super) fn record_domain(&mut self, id: DomainId, domain: &Domain, levels: Levels) {
        let stored = match &domain.table {
            Some(table) => StoredDomain::Table(table.root().0),
            None => StoredDomain::Bypass,
        };
        if !self.store.add_domain(id, stored, levels) {
            // ATTACH has checked that there is room.
            log::error!(
                "domain {id} has no record: its endpoints will be blocked when the daemon restarts"
            );
        }
    }

    /// Begins the end of all domains: if this process dies before [`Store::end_reset`], the next one finishes it.
    pub(super) fn begin_reset(&mut self, bypass: bool, driver: DriverState) {
        self.store.begin_reset(bypass, driver.into());
        self.store.journal().clear();
        self.interrupted = None;
    }
}

/// Keeps the records of backends in the store.
struct StoreObjects(ObjectWriter);

impl ObjectRecords for StoreObjects {
    fn add(&self, record: ObjectRecord) -> Option<RecordId> {
        self.0.add(record.into()).map(RecordId)
    }

    fn set_state(&self, id: RecordId, record: ObjectRecord) {
        self.0.set_state(id.0, record.into());
    }

    fn remove(&self, id: RecordId) {
        self.0.remove(id.0);
    }
}

/// A number that identifies guest memory: the places of all slots, and their bytes. Never 0, and below bit 48.
pub(super) fn identity_of(slots: &[MemorySlot]) -> u64 {
    let mut sorted: Vec<_> = slots
        .iter()
        .map(|slot| {
            let (device, inode) = slot.identity;
            let (first, last) = (slot.range.first().0, slot.range.last().0);
            [first, last, slot.offset, device, inode]
        })
        .collect();
    sorted.sort_unstable();
    // FNV-1a, by words. It protects against mistakes, not against a forger: a VMM owns its guest's memory.
    let hash = sorted
        .iter()
        .flatten()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, word| {
            let hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
            hash ^ hash >> 29
        });
    (hash ^ hash >> 48) & ((1 << 48) - 1) | 1
}

impl From<ObjectRecord> for StoredObject {
    fn from(record: ObjectRecord) -> Self {
        Self {
            owner: record.owner,
            object: record.object,
            state: record.state,
        }
    }
}

impl From<StoredObject> for ObjectRecord {
    fn from(stored: StoredObject) -> Self {
        Self {
            owner: stored.owner,
            object: stored.object,
            state: stored.state,
        }
    }
}

impl From<DriverState> for StoredDriver {
    fn from(driver: DriverState) -> Self {
        match driver {
            DriverState::Known => Self::Known,
            DriverState::Awaited => Self::Awaited,
            DriverState::Unknown => Self::Unknown,
        }
    }
}

impl From<StoredDriver> for DriverState {
    fn from(driver: StoredDriver) -> Self {
        match driver {
            StoredDriver::Known => Self::Known,
            StoredDriver::Awaited => Self::Awaited,
            StoredDriver::Unknown => Self::Unknown,
        }
    }
}

impl From<EndpointRecord> for StoredEndpoint {
    fn from(record: EndpointRecord) -> Self {
        Self {
            domain: record.domain,
            suspended: record.suspended,
            quarantined: record.quarantined,
        }
    }
}

impl From<StoredEndpoint> for EndpointRecord {
    fn from(stored: StoredEndpoint) -> Self {
        Self {
            domain: stored.domain,
            suspended: stored.suspended,
            quarantined: stored.quarantined,
        }
    }
}
