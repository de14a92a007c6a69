//! What the core writes to the store as its state changes.

use super::domain::Domain;
use super::{DriverState, EndpointRecord, Iommu};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::Levels;
use crate::store::{Journal, OfferWords, Store, StoredDomain, StoredDriver, StoredEndpoint};

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

    /// Records the feature bits that the driver has accepted, for a later process.
    pub fn note_features(&self, features: u64) {
        self.store.set_features(features);
    }

    pub(super) fn offer_words(&self) -> OfferWords {
        OfferWords {
            input: self.input,
            page_sizes: self.page_sizes.bits(),
            levels: self.levels,
            last_domain: self.last_domain,
        }
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
