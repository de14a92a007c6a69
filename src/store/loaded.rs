//! The store that an earlier process has left: read once, checked in full, and refused as a whole if it does not add up.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::AtomicU64;

use thiserror::Error;

use super::journal::{EntryState, KEPT_WORDS, Phase, RingBatch};
use super::layout::{
    BYPASS_DOMAIN, COMPLETE, DOMAIN_RECORD, ENDPOINT_RECORD, ENTRY_BYTES, ENTRY_PHASE, ENTRY_REST,
    ENTRY_WORDS, GLOBAL_FEATURES, GLOBAL_MEMORY, GLOBAL_OFFER, GLOBAL_STATE, HEADER_BYTES,
    HEADER_ENTRIES, HEADER_GENERATION, HEADER_MAGIC, HEADER_OWNER, HEADER_RECORDS,
    HEADER_RECORDS_USED, HEADER_VERSION, JOURNAL_AT, JOURNAL_ENTRIES, LEVELS_BITS, MAGIC,
    NO_RECORD, OBJECT_RECORD, RECORD_WORDS, RECORDS_AT, RING_BATCH, RING_PUBLISHED, VERSION, check,
    endpoint_salt, header_salt, load, object_check, unseal,
};
use super::{GlobalState, OfferWords, StoredDomain, StoredEndpoint, StoredObject};
use crate::address::IovaRange;
use crate::ids::{DomainId, EndpointId};
use crate::page_table::words::SharedWords;
use crate::protocol::request::Request;

/// A store cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The memory is no store.
    #[error(
        "the memory is no store of this daemon's state; give the descriptor that the daemon before has left"
    )]
    NotAStore,
    /// The store has another layout.
    #[error(
        "the store has version {found}, and this daemon reads version {VERSION}; start a daemon of the version before, or reset the VM"
    )]
    Version {
        /// Its version.
        found: u64,
    },
    /// The store was not finished, or a later process has taken it over.
    #[error("the store is not that of the last daemon; give the newest store")]
    NotNewest,
    /// The process has kept no journal, so the state of its last requests is unknown.
    #[error(
        "the daemon before has kept no journal of its requests: it had no keeper, or the server of an emulated device had \
         guest memory (isolation = \"mappings\"), which nobody can take away from it; reset the VM"
    )]
    NoJournal,
    /// A word has an impossible value.
    #[error("the store is damaged at word {word}; reset the VM")]
    Damaged {
        /// The index of the word.
        word: usize,
    },
    /// Two records have the same ID.
    #[error("the store has two records of {0}; reset the VM")]
    Twice(String),
}

/// A request of the batch that was in progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    /// Its state.
    pub state: EntryState,
    /// The words of its bytes.
    pub words: [u64; KEPT_WORDS],
}

impl JournalEntry {
    /// Its bytes, up to [`KEPT_BYTES`](super::KEPT_BYTES). `None` if its chain is malformed, or the bytes are not in guest
    /// memory.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let len = usize::from(self.state.len);
        if self.state.len >= super::MALFORMED {
            return None;
        }
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        // All bytes of a longer request beyond those that are kept are reserved.
        bytes.resize(len.min(crate::protocol::request::MAX_REQUEST_LEN), 0);
        Some(bytes)
    }

    /// The request; `None` if it is none.
    pub fn request(&self) -> Option<Request> {
        Request::decode(&self.bytes()?).ok()
    }
}

/// What an earlier process has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The number of its life.
    pub generation: u64,
    /// `bypass` and the state of the driver.
    pub state: GlobalState,
    /// The feature bits that the driver has accepted.
    pub features: u64,
    /// The offer to the guest.
    pub offer: OfferWords,
    /// The domains.
    pub domains: BTreeMap<DomainId, StoredDomain>,
    /// The endpoints that are attached or quarantined.
    pub endpoints: BTreeMap<EndpointId, StoredEndpoint>,
    /// The kernel objects of backends.
    pub objects: Vec<StoredObject>,
    /// What identifies guest memory; 0 if the process was changing it.
    pub memory: u64,
    /// The batch, and the ring's indices; `None` if the ring has served no request.
    pub batch: Option<RingBatch>,
    /// The requests of the batch.
    pub entries: Vec<JournalEntry>,
    /// The number of requests of the batch whose answers the driver has at least. Its used index says whether it has more.
    pub published: u16,
    /// The ranges of requests that were in progress, and that are refused now because they have ended too many processes.
    pub refused: Vec<(DomainId, IovaRange)>,
}

impl Loaded {
    /// Reads the store in `words`. Takes time in proportion to the records that were ever in use.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn read(words: &[AtomicU64]) -> Result<Self, StoreError> {
        let room = check_header(words)?;
        let damaged = |word| StoreError::Damaged { word };
        let header = |index| {
            let value = unseal(load(words, index), header_salt(index));
            value.ok_or(damaged(index))
        };
        let generation = header(HEADER_GENERATION)?;
        let state = GlobalState::from_bits(header(GLOBAL_STATE)?).ok_or(damaged(GLOBAL_STATE))?;
        let mut offer = [0; OfferWords::COUNT];
        for (index, word) in (GLOBAL_OFFER..).zip(&mut offer) {
            *word = load(words, index);
        }
        let mut loaded = Self {
            generation,
            state,
            features: header(GLOBAL_FEATURES)?,
            offer: OfferWords::from_words(offer).ok_or(damaged(GLOBAL_OFFER))?,
            domains: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            objects: Vec::new(),
            memory: header(GLOBAL_MEMORY)?,
            batch: RingBatch::from_bits(header(RING_BATCH)?),
            entries: Vec::new(),
            published: 0,
            refused: Vec::new(),
        };
        let used = header(HEADER_RECORDS_USED)?;
        if used > room {
            return Err(damaged(HEADER_RECORDS_USED));
        }
        let used = usize::try_from(used).unwrap_or(0);
        for place in 0..used {
            loaded.read_record(words, RECORDS_AT + place * RECORD_WORDS)?;
        }
        let mut objects = BTreeSet::new();
        for StoredObject { owner, object, .. } in &loaded.objects {
            if !objects.insert((owner, object)) {
                return Err(StoreError::Twice(format!("kernel object {object:#x}")));
            }
        }
        let count = loaded.batch.map_or(0, |batch| usize::from(batch.count));
        if count > JOURNAL_ENTRIES {
            return Err(damaged(RING_BATCH));
        }
        for index in 0..count {
            loaded.entries.push(read_entry(words, index)?);
        }
        if count > 0 {
            let damaged = damaged(RING_PUBLISHED);
            let published = header(RING_PUBLISHED)?;
            loaded.published = u16::try_from(published).map_err(|_| damaged.clone())?;
            let answered = loaded.entries.get(..usize::from(loaded.published));
            let all_done =
                |entries: &[JournalEntry]| entries.iter().all(|e| e.state.phase == Phase::Done);
            if !answered.is_some_and(all_done) {
                return Err(damaged);
            }
        }
        Ok(loaded)
    }

    fn read_record(&mut self, words: &[AtomicU64], at: usize) -> Result<(), StoreError> {
        let word = |index| load(words, at + index);
        let damaged = |index| StoreError::Damaged { word: at + index };
        match word(0) {
            NO_RECORD => Ok(()),
            DOMAIN_RECORD => {
                let (id, target) = (word(1), word(2));
                let id = u32::try_from(id).map_err(|_| damaged(1))?;
                if word(3) != check(target, u64::from(id) + 1) {
                    return Err(damaged(3));
                }
                let domain = match target {
                    BYPASS_DOMAIN => StoredDomain::Bypass,
                    _ if target & LEVELS_BITS == u64::from(self.offer.levels.count()) => {
                        StoredDomain::Table(target & !LEVELS_BITS)
                    }
                    _ => return Err(damaged(2)),
                };
                match self.domains.insert(DomainId(id), domain) {
                    Some(_) => Err(StoreError::Twice(format!("domain {id}"))),
                    None => Ok(()),
                }
            }
            ENDPOINT_RECORD => {
                let id = u32::try_from(word(1)).map_err(|_| damaged(1))?;
                let state = unseal(word(2), endpoint_salt(id)).ok_or(damaged(2))?;
                let state = StoredEndpoint::from_bits(state).ok_or(damaged(2))?;
                let id = EndpointId(id);
                match self.endpoints.insert(id, state) {
                    Some(_) => Err(StoreError::Twice(format!("endpoint {id}"))),
                    None => Ok(()),
                }
            }
            OBJECT_RECORD => {
                let (owner, object) = (word(1), word(2));
                let check = object_check(owner, object);
                if word(3) != check {
                    return Err(damaged(3));
                }
                let state = unseal(word(4), check).ok_or(damaged(4))?;
                self.objects.push(StoredObject {
                    owner,
                    object,
                    state,
                });
                Ok(())
            }
            _ => Err(damaged(0)),
        }
    }

    /// Counts the death of the process that was executing the request of an entry, here and in the store in `words`, in which
    /// a further process would find it. If that death is counted already, counts that of a process that has taken over.
    pub fn count_death(&mut self, words: &[AtomicU64], index: usize) {
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        let state = &mut entry.state;
        match state.phase {
            Phase::Taken | Phase::Planned => state.attempts = state.attempts.saturating_add(1),
            Phase::Waiting | Phase::Interrupted => {
                state.restores = state.restores.saturating_add(1);
            }
            Phase::Done => return,
        }
        state.phase = match state.phase {
            Phase::Planned | Phase::Interrupted => Phase::Interrupted,
            Phase::Taken | Phase::Waiting | Phase::Done => Phase::Waiting,
        };
        let at = JOURNAL_AT + index * ENTRY_WORDS;
        for (at, word) in [
            (at + ENTRY_REST, state.rest_word()),
            (at + ENTRY_PHASE, state.phase_word()),
        ] {
            if let Some(place) = words.get(at) {
                SharedWords::set(place, word);
            }
        }
    }
}

/// Of several stores, the index of the one that the latest life has completed. A process that dies while it takes a store
/// over leaves two.
pub fn newest(stores: &[&[AtomicU64]]) -> Option<usize> {
    let generation = |words: &[AtomicU64]| {
        check_header(words).ok()?;
        let salt = header_salt(HEADER_GENERATION);
        unseal(load(words, HEADER_GENERATION), salt)
    };
    let found = stores.iter().enumerate();
    let found = found.filter_map(|(index, words)| Some((generation(words)?, index)));
    found.max().map(|(_, index)| index)
}

/// Checks the words that never change. Returns the room for records.
fn check_header(words: &[AtomicU64]) -> Result<u64, StoreError> {
    let header = |index| load(words, index);
    if header(HEADER_MAGIC) != MAGIC {
        return Err(StoreError::NotAStore);
    }
    let found = header(HEADER_VERSION);
    if found != VERSION {
        return Err(StoreError::Version { found });
    }
    let damaged = |word| Err(StoreError::Damaged { word });
    let bytes = size_of_val(words) as u64;
    if header(HEADER_BYTES) != bytes {
        return damaged(HEADER_BYTES);
    }
    match header(HEADER_ENTRIES) {
        0 => return Err(StoreError::NoJournal),
        entries if entries != JOURNAL_ENTRIES as u64 => return damaged(HEADER_ENTRIES),
        _ => {}
    }
    let room = header(HEADER_RECORDS);
    let records = room.checked_mul((RECORD_WORDS * size_of::<u64>()) as u64);
    let needed =
        records.and_then(|bytes| bytes.checked_add((RECORDS_AT * size_of::<u64>()) as u64));
    if needed.is_none_or(|needed| needed > bytes) {
        return damaged(HEADER_RECORDS);
    }
    if header(HEADER_OWNER) != COMPLETE {
        return Err(StoreError::NotNewest);
    }
    Ok(room)
}

fn read_entry(words: &[AtomicU64], index: usize) -> Result<JournalEntry, StoreError> {
    let at = JOURNAL_AT + index * ENTRY_WORDS;
    let (phase, rest) = (load(words, at + ENTRY_PHASE), load(words, at + ENTRY_REST));
    let state = EntryState::from_words(phase, rest).ok_or(StoreError::Damaged {
        word: at + ENTRY_PHASE,
    })?;
    let mut kept = [0; KEPT_WORDS];
    for (offset, word) in (ENTRY_BYTES..).zip(&mut kept) {
        *word = load(words, at + offset);
    }
    Ok(JournalEntry { state, words: kept })
}

/// What a request changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// MAP.
    Map {
        /// The domain.
        domain: DomainId,
        /// The addresses.
        range: IovaRange,
    },
    /// UNMAP.
    Unmap {
        /// The domain.
        domain: DomainId,
        /// The addresses.
        range: IovaRange,
    },
    /// ATTACH.
    Attach {
        /// The endpoint.
        endpoint: EndpointId,
        /// The domain.
        domain: DomainId,
    },
    /// DETACH.
    Detach {
        /// The endpoint.
        endpoint: EndpointId,
        /// The domain.
        domain: DomainId,
    },
    /// Nothing: PROBE, or no request.
    None,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map { domain, range } => write!(f, "map {range} in domain {domain}"),
            Self::Unmap { domain, range } => write!(f, "unmap {range} in domain {domain}"),
            Self::Attach { endpoint, domain } => {
                write!(f, "attach endpoint {endpoint} to domain {domain}")
            }
            Self::Detach { endpoint, domain } => {
                write!(f, "detach endpoint {endpoint} from domain {domain}")
            }
            Self::None => f.write_str("one that changes nothing"),
        }
    }
}

impl JournalEntry {
    /// What the request changes.
    pub fn effect(&self) -> Effect {
        let ranged = |first, last, make: &dyn Fn(IovaRange) -> Effect| {
            IovaRange::new(first, last).map_or(Effect::None, make)
        };
        match self.request() {
            Some(Request::Map {
                domain,
                virt_start,
                virt_end,
                ..
            }) => ranged(virt_start, virt_end, &|range| Effect::Map { domain, range }),
            Some(Request::Unmap {
                domain,
                virt_start,
                virt_end,
            }) => ranged(virt_start, virt_end, &|range| Effect::Unmap {
                domain,
                range,
            }),
            Some(Request::Attach {
                endpoint, domain, ..
            }) => Effect::Attach { endpoint, domain },
            Some(Request::Detach { endpoint, domain }) => Effect::Detach { endpoint, domain },
            Some(Request::Probe { .. }) | None => Effect::None,
        }
    }

    /// The range that a MAP or UNMAP in progress explains: all its mappings, in the table and in backends, are this
    /// request's.
    pub fn planned_range(&self) -> Option<(DomainId, IovaRange)> {
        if !matches!(self.state.phase, Phase::Planned | Phase::Interrupted) {
            return None;
        }
        match self.effect() {
            Effect::Map { domain, range } | Effect::Unmap { domain, range } => {
                Some((domain, range))
            }
            Effect::Attach { .. } | Effect::Detach { .. } | Effect::None => None,
        }
    }

    /// The endpoint of an ATTACH or DETACH in progress: it and the members of its group may be at their former targets or at
    /// their new ones.
    pub fn planned_move(&self) -> Option<EndpointId> {
        if !matches!(self.state.phase, Phase::Planned | Phase::Interrupted) {
            return None;
        }
        match self.effect() {
            Effect::Attach { endpoint, .. } | Effect::Detach { endpoint, .. } => Some(endpoint),
            Effect::Map { .. } | Effect::Unmap { .. } | Effect::None => None,
        }
    }
}
