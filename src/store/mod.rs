//! The store: what must survive the daemon's death, beside the page tables, in a sealed memfd of its own.
//!
//! ```text
//! Store (memfd): | header: state, features, offer, ring | journal: one entry a request | records ... |
//!                    |                                       |                             |
//!                what the VM got                        the batch in progress      domains, endpoints,
//!                what the VM got                        the batch in progress      kernel objects
//! ```
//!
//! [`Store`] writes it as the core's state changes, [`Journal`] writes the requests of the batch in progress, and
//! [`Loaded`] is what a later process finds. `layout` has the words. `docs/restart.md` describes the whole.
//!
//! A process dies as a whole, so only the order of one thread's stores counts: each change is one store of a word, or
//! becomes valid with one. All of them are release stores, which cost nothing on x86-64.

mod journal;
mod layout;
mod loaded;
mod records;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
#[cfg(not(miri))]
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::address::{Iova, IovaRange};
use crate::ids::{DomainId, EndpointId};
use crate::locks::{Mutex, Rank};
use crate::page_table::words::SharedWords;
use crate::page_table::{ArenaError, Levels};

use self::layout::{
    COMPLETE, GLOBAL_FEATURES, GLOBAL_MEMORY, GLOBAL_OFFER, GLOBAL_STATE, HEADER_BYTES,
    HEADER_GENERATION, HEADER_MAGIC, HEADER_OWNER, HEADER_RECORDS, HEADER_VERSION, JOURNAL_ENTRIES,
    MAGIC, RECORD_WORDS, RECORDS_AT, SUPERSEDED, VERSION, header_salt, seal,
};
use self::records::Places;

#[cfg(test)]
pub(crate) use crate::page_table::crash;

pub use self::journal::{
    EntryState, Journal, KEPT_BYTES, KEPT_WORDS, MALFORMED, Phase, RingBatch, STATUS_DEVERR,
    STATUS_OK, UNREADABLE, UNWRITTEN,
};
pub use self::layout::VERSION as FORMAT_VERSION;
pub use self::loaded::{Effect, JournalEntry, Loaded, StoreError, newest};

/// The room for records of kernel objects beside one for each domain.
const MORE_OBJECTS: u64 = 2048;
/// The most requests in a batch: the room of the journal.
pub const MAX_BATCH: usize = JOURNAL_ENTRIES;

/// The state of the guest's driver, as the core's `DriverState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredDriver {
    /// The core has its domains.
    Known = 0,
    /// No request ring has started since the VMM shared memory.
    Awaited = 1,
    /// It has domains that the core does not have.
    Unknown = 2,
}

/// The state of the whole device, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalState {
    /// Whether endpoints without a domain are in bypass mode.
    pub bypass: bool,
    /// The state of the driver.
    pub driver: StoredDriver,
    /// All domains are being ended: a later process must not take any over.
    pub resetting: bool,
    /// The driver of the ring that starts next has domains that the core does not have, whatever the ring's index.
    pub is_next_foreign: bool,
}

impl GlobalState {
    fn bits(self) -> u64 {
        u64::from(self.bypass)
            | (self.driver as u64) << 1
            | u64::from(self.resetting) << 3
            | u64::from(self.is_next_foreign) << 4
    }

    fn from_bits(bits: u64) -> Option<Self> {
        let driver = match bits >> 1 & 3 {
            0 => StoredDriver::Known,
            1 => StoredDriver::Awaited,
            2 => StoredDriver::Unknown,
            _ => return None,
        };
        (bits < 32).then_some(Self {
            bypass: bits & 1 != 0,
            driver,
            resetting: bits & 8 != 0,
            is_next_foreign: bits & 16 != 0,
        })
    }
}

/// The offer to the guest, which a later process must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferWords {
    /// The addresses that MAP accepts.
    pub input: IovaRange,
    /// The page sizes.
    pub page_sizes: u64,
    /// The depth of every table.
    pub levels: Levels,
    /// The highest domain ID.
    pub last_domain: u32,
    /// Bytes of PROBE's property list.
    pub probe_size: u32,
}

impl OfferWords {
    const COUNT: usize = 5;

    fn words(&self) -> [u64; Self::COUNT] {
        [
            self.input.first().0,
            self.input.last().0,
            self.page_sizes,
            u64::from(self.levels.count()),
            u64::from(self.last_domain) | u64::from(self.probe_size) << 32,
        ]
    }

    fn from_words(words: [u64; Self::COUNT]) -> Option<Self> {
        let [first, last, page_sizes, levels, sizes] = words;
        Some(Self {
            input: IovaRange::new(Iova(first), Iova(last))?,
            page_sizes,
            levels: match levels {
                4 => Levels::Four,
                5 => Levels::Five,
                _ => return None,
            },
            last_domain: u32::try_from(sizes & u64::from(u32::MAX)).ok()?,
            probe_size: u32::try_from(sizes >> 32).ok()?,
        })
    }
}

/// The mappings' root in a domain's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredDomain {
    /// A bypass domain.
    Bypass,
    /// The offset of the root of its table in the arena, in bytes.
    Table(u64),
}

/// The state of an endpoint in its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredEndpoint {
    /// The domain that it is attached to.
    pub domain: Option<DomainId>,
    /// Blocked until it follows its group.
    pub suspended: bool,
    /// Blocked because a backend failed.
    pub quarantined: bool,
}

/// The record of a kernel object of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredObject {
    /// The backend.
    pub owner: u64,
    /// The object: no two of one owner are the same.
    pub object: u64,
    /// Its state, below bit 48.
    pub state: u64,
}

/// Writes the records of kernel objects. Each record is made, changed and removed in one store.
#[derive(Clone, Debug)]
pub struct ObjectWriter {
    places: Arc<Mutex<Places>>,
}

impl ObjectWriter {
    /// Makes a record. Returns its place; `None` if there is no room.
    pub fn add(&self, object: StoredObject) -> Option<u32> {
        let mut places = self.places.lock();
        let place = places.take()?;
        places.write_object(place, object);
        Some(place)
    }

    /// Changes the state of the record at a place of [`Self::add`].
    pub fn set_state(&self, place: u32, object: StoredObject) {
        self.places.lock().set_object(place, object);
    }

    /// Removes the record at a place of [`Self::add`].
    pub fn remove(&self, place: u32) {
        self.places.lock().release(place);
    }
}

/// Writes the store of a running core.
#[derive(Debug)]
pub struct Store {
    memory: Arc<SharedWords>,
    state: GlobalState,
    places: Arc<Mutex<Places>>,
    domains: BTreeMap<DomainId, u32>,
    endpoints: BTreeMap<EndpointId, u32>,
    journal: Journal,
}

impl Store {
    /// Makes a store with room for this many records. It is not [complete](Self::complete).
    ///
    /// # Errors
    /// The system refuses the memfd or its mapping.
    pub fn new(domains: u64, endpoints: u64) -> Result<Self, ArenaError> {
        let too_large = ArenaError::TooLarge {
            limit_bytes: domains.saturating_mul(64),
        };
        // Each domain may have an object in a backend, and a few objects belong to no domain.
        let objects = domains.saturating_add(MORE_OBJECTS);
        let room = domains.saturating_add(endpoints).saturating_add(objects);
        let Ok(room) = u32::try_from(room) else {
            return Err(too_large);
        };
        let bytes = (RECORDS_AT + room as usize * RECORD_WORDS) * size_of::<u64>();
        let bytes = bytes.next_multiple_of(4096);
        let memory = Arc::new(SharedWords::new(c"viommu-store", bytes)?);
        let state = GlobalState {
            bypass: false,
            driver: StoredDriver::Known,
            resetting: false,
            is_next_foreign: false,
        };
        memory.store(HEADER_VERSION, VERSION);
        memory.store(HEADER_BYTES, bytes as u64);
        memory.store(HEADER_RECORDS, u64::from(room));
        memory.store(HEADER_MAGIC, MAGIC);
        let journal = Journal::new(memory.clone());
        let store = Self {
            places: Arc::new(Mutex::new(
                Rank::StoreRecords,
                Places::new(memory.clone(), room),
            )),
            journal,
            memory,
            state,
            domains: BTreeMap::new(),
            endpoints: BTreeMap::new(),
        };
        store.set_generation(1);
        store.set_features(0);
        store.set_memory(0);
        store.set_state_word();
        Ok(store)
    }

    /// The memory, for the descriptor that a later process gets.
    pub fn memory(&self) -> &Arc<SharedWords> {
        &self.memory
    }

    /// The memfd.
    #[cfg(not(miri))]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Says that the store is whole: a later process may take it over.
    pub fn complete(&self) {
        self.memory.store(HEADER_OWNER, COMPLETE);
    }

    /// Numbers the lives. The number only counts after [`Self::complete`].
    pub fn set_generation(&self, generation: u64) {
        self.set_header(HEADER_GENERATION, generation);
    }

    /// The journal.
    #[inline(always)]
    pub fn journal(&mut self) -> &mut Journal {
        &mut self.journal
    }

    /// See [`Journal::plan`].
    #[inline(always)]
    pub fn plan(&self) {
        self.journal.plan();
    }

    /// The journal, to change phases.
    #[inline(always)]
    pub fn phases(&self) -> &Journal {
        &self.journal
    }

    /// Records the offer to the guest.
    pub fn set_offer(&self, offer: &OfferWords) {
        for (index, word) in (GLOBAL_OFFER..).zip(offer.words()) {
            self.memory.store(index, word);
        }
    }

    /// Records the feature bits that the driver has accepted: below bit 48.
    pub fn set_features(&self, features: u64) {
        self.set_header(GLOBAL_FEATURES, features);
    }

    /// Identifies guest memory, below bit 48. 0 while the mappings in backends are not those of any memory.
    pub fn set_memory(&self, identity: u64) {
        self.set_header(GLOBAL_MEMORY, identity);
    }

    /// Writes the records of kernel objects.
    pub fn objects(&self) -> ObjectWriter {
        ObjectWriter {
            places: self.places.clone(),
        }
    }

    /// Records `bypass` and the state of the driver.
    pub fn set_state(&mut self, bypass: bool, driver: StoredDriver) {
        let state = GlobalState {
            bypass,
            driver,
            ..self.state
        };
        if state != self.state {
            self.state = state;
            self.set_state_word();
        }
    }

    /// Records whether the driver of the ring that starts next has domains that the core does not have.
    pub fn set_next_foreign(&mut self, is_next_foreign: bool) {
        if self.state.is_next_foreign != is_next_foreign {
            self.state.is_next_foreign = is_next_foreign;
            self.set_state_word();
        }
    }

    /// Whether the driver of the ring that starts next has domains that the core does not have.
    pub fn is_next_foreign(&self) -> bool {
        self.state.is_next_foreign
    }

    /// Begins the end of all domains, and records the state that follows it, in one store. If the driver is known then, so is
    /// that of the ring that starts next.
    pub fn begin_reset(&mut self, bypass: bool, driver: StoredDriver) {
        self.state = GlobalState {
            bypass,
            driver,
            resetting: true,
            is_next_foreign: self.state.is_next_foreign && driver != StoredDriver::Known,
        };
        self.set_state_word();
    }

    /// All domains have ended.
    pub fn end_reset(&mut self) {
        self.state.resetting = false;
        self.set_state_word();
    }

    /// Makes the record of a domain. Returns whether there was room.
    #[must_use = "a domain without a record does not survive"]
    pub fn add_domain(&mut self, id: DomainId, domain: StoredDomain, levels: Levels) -> bool {
        let Some(place) = self.places.lock().take() else {
            return false;
        };
        self.places.lock().write_domain(place, id, domain, levels);
        self.domains.insert(id, place);
        true
    }

    /// Removes the record of a domain.
    pub fn remove_domain(&mut self, id: DomainId) {
        if let Some(place) = self.domains.remove(&id) {
            self.places.lock().release(place);
        }
    }

    /// Records the state of an endpoint, in one store if it has a record.
    pub fn set_endpoint(&mut self, id: EndpointId, endpoint: StoredEndpoint) {
        let mut places = self.places.lock();
        if let Some(&place) = self.endpoints.get(&id) {
            places.set_endpoint(place, id, endpoint);
        } else if let Some(place) = places.take() {
            places.add_endpoint(place, id, endpoint);
            self.endpoints.insert(id, place);
        } else {
            // There is room for every endpoint that a topology can have.
            log::error!("endpoint {id} has no record: it will be blocked when the daemon restarts");
        }
    }

    /// Removes the record of an endpoint, which is then neither attached nor quarantined.
    pub fn remove_endpoint(&mut self, id: EndpointId) {
        if let Some(place) = self.endpoints.remove(&id) {
            self.places.lock().release(place);
        }
    }

    /// Writes each request to the journal from now on. Only then can a later process take the store over.
    pub fn keep_journal(&mut self) {
        self.journal.keep();
    }

    /// Writes no request to the journal any more. A later process refuses the store.
    pub fn forgo_journal(&mut self) {
        self.journal.forgo();
    }

    /// Takes the journal of a store over, with the same phases. This store must [keep one](Self::keep_journal).
    pub fn adopt_journal(&mut self, loaded: &Loaded) {
        for (index, entry) in loaded.entries.iter().enumerate() {
            self.journal.write(index, entry.state, &entry.words);
        }
        self.journal.adopt(loaded.batch, loaded.published);
    }

    /// Says that a later process has taken the store in `words` over.
    pub fn supersede(words: &[AtomicU64]) {
        if let Some(owner) = words.get(HEADER_OWNER) {
            SharedWords::set(owner, SUPERSEDED);
        }
    }

    fn set_state_word(&self) {
        self.set_header(GLOBAL_STATE, self.state.bits());
    }

    fn set_header(&self, index: usize, value: u64) {
        self.memory.store(index, seal(value, header_salt(index)));
    }
}
