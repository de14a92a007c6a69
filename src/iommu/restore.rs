//! Going on where an earlier process has died, from nothing but the memory that it has left.
//!
//! 1. [`Iommu::successor`] makes a core with an arena and a store of its own. Its backends touch no endpoint yet.
//! 2. [`Iommu::restore`] reads the old store, and each death of the old process is counted in the journal.
//! 3. The tables are rebuilt in the new arena, without the ranges of requests that were in progress. The records and the
//!    journal are written to the new store, which is then complete, and the old one obsolete.
//! 4. The backends adopt their endpoints: each gets the target that its record says.
//! 5. What was in progress gets a phase that the device can go on from.
//!
//! If the process dies before the end of step 3, the next one restores from the old memory; afterwards, from the new one.
//! Both describe the same state. If the memory does not add up, it is refused as a whole: every endpoint is blocked until
//! the driver starts anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;

use log::{error, info};
use thiserror::Error;

use super::adopt::LeftInBackends;
use super::stored::identity_of;
use super::{DriverState, EndpointRecord, Iommu, Settings};
use crate::address::IovaRange;
use crate::backends::{ObjectRecord, RecordId, Target};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{ArenaError, MapRefusal, OutOfFrames, Table, TornTable};
use crate::store::{
    Effect, JournalEntry, Loaded, Phase, RingBatch, STATUS_DEVERR, STATUS_OK, Store, StoreError,
    UNWRITTEN,
};
use crate::topology::{PciRange, Topology};

/// A request that was in progress when so many processes died is not executed again.
const MAX_DEATHS: u8 = 2;
/// Nor if so many have died while they took over from one that had executed it.
const MAX_RESTORES: u8 = 8;

/// The memory that an earlier process has left.
#[derive(Clone, Copy, Debug)]
pub struct Predecessor<'a> {
    /// The words of its arena.
    pub arena: &'a [AtomicU64],
    /// The words of its store. Deaths are counted there.
    pub store: &'a [AtomicU64],
}

/// An earlier process's state cannot be taken over. Every endpoint is blocked until the driver starts anew.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The store is refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The arena is refused.
    #[error("the page tables of the daemon before cannot be read: {0}; reset the VM")]
    Arena(ArenaError),
    /// A table is not whole.
    #[error("the page table of domain {domain} is damaged: {cause}; reset the VM")]
    Torn {
        /// The domain.
        domain: DomainId,
        /// What is wrong.
        cause: TornTable,
    },
    /// The guest was offered something else.
    #[error(
        "the guest was offered other addresses, page sizes, domains or room for reserved regions than this daemon supports; start the daemon with \
         the configuration and the devices of the one before, or reset the VM"
    )]
    Offer,
    /// The arena is too small for the mappings.
    #[error(
        "the mappings do not fit: {0}; give this daemon the `arena-limit` of the one before, or reset the VM"
    )]
    OutOfFrames(OutOfFrames),
    /// A mapping is refused.
    #[error("a mapping of domain {domain} is refused: {cause}; reset the VM")]
    Refused {
        /// The domain.
        domain: DomainId,
        /// Why.
        cause: MapRefusal,
    },
    /// The core has been in use.
    #[error("the core has a state of its own already; restore the old one before anything else")]
    NotNew,
}

/// A summary of what was taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The number of this life.
    pub generation: u64,
    /// Domains.
    pub domains: usize,
    /// Endpoints that are attached or quarantined.
    pub endpoints: usize,
    /// Quarantined endpoints.
    pub quarantined: usize,
    /// Mappings.
    pub mappings: u64,
    /// The feature bits that the driver has accepted.
    pub features: u64,
}

/// The ring's indices, and the batch that was in progress.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterruptedBatch {
    /// The batch; `None` if the ring has served no request.
    pub batch: Option<RingBatch>,
    /// Its requests, with the phases after the restore: waiting or done.
    pub entries: Vec<JournalEntry>,
    /// The number of requests whose answers the driver has at least. Its used index says whether it has more.
    pub published: u16,
}

impl Iommu {
    /// Makes an IOMMU that takes the state of an earlier process over. Until [`Self::restore`], its backends switch no
    /// endpoint.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn successor(settings: Settings, topology: Topology) -> Result<Self, ArenaError> {
        Self::build(settings, topology, true)
    }

    /// Takes over what an earlier process has left. The core must be a [successor](Self::successor), and must have its
    /// backends, and guest memory if there is a VMM. Afterwards the device must finish the batch that
    /// [`Self::take_interrupted`] returns, before it does anything else.
    ///
    /// Takes time in proportion to the mappings and to the frames of the arena.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(&mut self, old: Predecessor<'_>) -> Result<Restored, RestoreError> {
        if !self.adopting {
            return Err(RestoreError::NotNew);
        }
        let taken = self.take_over(old);
        if let Err(cause) = &taken {
            error!(
                "the state of the daemon before is refused, so all endpoints are blocked: {cause}"
            );
            self.refuse_predecessor(old);
        }
        taken
    }

    /// The batch that was in progress when the earlier process died. The first call after [`Self::restore`] returns it.
    pub fn take_interrupted(&mut self) -> Option<InterruptedBatch> {
        self.interrupted.take()
    }

    /// The same, which stays with the core.
    pub fn interrupted(&self) -> Option<&InterruptedBatch> {
        self.interrupted.as_ref()
    }

    /// Whether an earlier process has served the guest's driver, and the device has not gone on with its ring yet.
    pub fn is_interrupted(&self) -> bool {
        let interrupted = self.interrupted.as_ref();
        interrupted.is_some_and(|interrupted| interrupted.batch.is_some())
    }

    /// Has [`Self::restore`] quarantine the endpoints in a range that have a backend, or that the earlier process had
    /// attached: what became of them is unknown.
    pub fn suspect(&mut self, range: PciRange) {
        self.suspects.push(range);
    }

    /// Refuses the state of an earlier process: blocks every endpoint until the driver starts anew, as [`Self::restore`] does
    /// when it fails.
    pub fn refuse(&mut self, old: Predecessor<'_>) {
        if self.adopting {
            self.refuse_predecessor(old);
        }
    }

    /// Whether this core waits for [`Self::restore`].
    pub fn is_adopting(&self) -> bool {
        self.adopting
    }

    fn take_over(&mut self, old: Predecessor<'_>) -> Result<Restored, RestoreError> {
        let mut loaded = Loaded::read(old.store)?;
        if loaded.offer != self.offer_words() {
            return Err(RestoreError::Offer);
        }
        if loaded.state.resetting {
            // The earlier process was ending all domains, and the ring with them.
            loaded.domains.clear();
            loaded.endpoints.retain(|_, e| e.quarantined);
            for endpoint in loaded.endpoints.values_mut() {
                endpoint.domain = None;
                endpoint.suspended = false;
            }
            loaded.entries.clear();
            loaded.batch = None;
            loaded.published = 0;
        }
        // Before a move that has ended too many processes is refused.
        let moving = self.moving_endpoints(&loaded);
        count_deaths(&mut loaded, old.store);
        refuse_deadly_requests(&mut loaded);
        for entry in &mut loaded.entries {
            if entry.state.phase == Phase::Taken {
                entry.state.phase = Phase::Waiting;
            }
        }
        self.bypass = loaded.state.bypass;
        self.driver = DriverState::from(loaded.state.driver);
        let mut rebuilt = self.rebuild(&loaded, old.arena)?;
        // A backend of this process has failed already, for example to remove a memory slot.
        for (&id, _) in self.endpoints.iter().filter(|(_, e)| e.quarantined) {
            rebuilt.endpoints.entry(id).or_default().quarantined = true;
        }
        self.quarantine_suspects(&mut rebuilt.endpoints);
        self.domains = rebuilt.domains;
        self.endpoints = rebuilt.endpoints;
        self.groups = rebuilt.groups;
        self.spare_attached();
        self.count_records();
        let is_memory_same = loaded.memory == identity_of(&self.memory);
        let objects = self.publish_store(&loaded, old, is_memory_same);
        self.adopting = false;
        let left = LeftInBackends {
            moving,
            in_progress: in_progress(&loaded, self),
            objects,
            is_memory_same,
        };
        let failed = self.adopt_endpoints(&left);
        self.forget_objects(&left.objects);
        self.store.set_memory(identity_of(&self.memory));
        if loaded.state.resetting {
            self.finish_reset();
        }
        if !self.backends.is_empty() {
            self.count_unreachable();
        }
        self.settle(&mut loaded, &failed);
        let restored = Restored {
            generation: loaded.generation + 1,
            domains: self.domains.len(),
            endpoints: self.endpoints.len(),
            quarantined: self.endpoints.values().filter(|e| e.quarantined).count(),
            mappings: self
                .domains
                .values()
                .filter_map(|d| d.table.as_ref())
                .map(Table::mapping_count)
                .sum(),
            features: loaded.features,
        };
        info!(
            "life {}: {} domains with {} mappings, {} endpoints ({} quarantined), {} requests to finish",
            restored.generation,
            restored.domains,
            restored.mappings,
            restored.endpoints,
            restored.quarantined,
            loaded.entries.len()
        );
        self.interrupted = Some(InterruptedBatch {
            batch: loaded.batch,
            entries: loaded.entries,
            published: loaded.published,
        });
        Ok(restored)
    }

    fn quarantine_suspects(&self, endpoints: &mut BTreeMap<EndpointId, EndpointRecord>) {
        for range in &self.suspects {
            let ids = range.first().endpoint_id()..=range.last().endpoint_id();
            for (&id, _) in self.backend_of.range(ids.clone()) {
                endpoints.entry(id).or_default();
            }
            for (id, endpoint) in endpoints.range_mut(ids) {
                error!("endpoint {id} is quarantined: what became of it is unknown");
                endpoint.quarantined = true;
            }
        }
    }

    /// Writes the state to the new store, and makes it the newest. Returns the records of kernel objects.
    fn publish_store(
        &mut self,
        loaded: &Loaded,
        old: Predecessor<'_>,
        is_memory_same: bool,
    ) -> Vec<(RecordId, ObjectRecord)> {
        if !is_memory_same {
            // Until the backends have adopted their endpoints, the next process must find that memory has changed, too.
            self.store.set_memory(0);
        }
        self.store.set_generation(loaded.generation + 1);
        self.store.set_features(loaded.features);
        self.store.set_next_foreign(loaded.state.is_next_foreign);
        if loaded.state.resetting {
            self.store
                .begin_reset(loaded.state.bypass, loaded.state.driver);
        } else {
            self.record_state();
        }
        let domains = std::mem::take(&mut self.domains);
        for (&id, domain) in &domains {
            self.record_domain(id, domain, self.levels);
        }
        self.domains = domains;
        let endpoints: Vec<_> = self.endpoints.keys().copied().collect();
        for endpoint in endpoints {
            self.record_endpoint(endpoint);
        }
        let objects = self.record_objects(loaded);
        self.store.adopt_journal(loaded);
        self.store.complete();
        Store::supersede(old.store);
        objects
    }

    /// Writes the records of the kernel's objects to the new store.
    fn record_objects(&self, loaded: &Loaded) -> Vec<(RecordId, ObjectRecord)> {
        let records = self.object_records();
        let objects = loaded.objects.iter().filter_map(|&object| {
            let record = object.into();
            Some((records.add(record)?, record))
        });
        objects.collect()
    }

    /// Finishes a reset, or the VMM's end: both switch quarantined endpoints, too.
    fn finish_reset(&mut self) {
        let target = if self.vmm_present {
            self.bypass_target()
        } else {
            Target::Blocked
        };
        let quarantined: Vec<_> = self.endpoints.keys().copied().collect();
        for endpoint in quarantined {
            self.retarget(endpoint, target);
            if self
                .endpoints
                .get(&endpoint)
                .is_some_and(|e| !e.quarantined)
            {
                self.endpoints.remove(&endpoint);
                self.record_endpoint(endpoint);
            }
        }
        self.store.end_reset();
        self.count_records();
    }

    /// Gives each request that was in progress a phase that the device can go on from.
    fn settle(&mut self, loaded: &mut Loaded, failed: &BTreeSet<EndpointId>) {
        for (index, entry) in loaded.entries.iter_mut().enumerate() {
            if !matches!(entry.state.phase, Phase::Planned | Phase::Interrupted) {
                continue;
            }
            let done = match entry.effect() {
                // The mappings are in no table, and the backends have unmapped them, or have no such domain.
                Effect::Unmap { domain, .. } => {
                    let members = self.domains.get(&domain).map(|d| &d.members);
                    let is_failed = members.is_some_and(|m| !m.is_disjoint(failed));
                    Some(if is_failed { STATUS_DEVERR } else { STATUS_OK })
                }
                Effect::Detach { endpoint, domain } => {
                    let record = self.endpoints.get(&endpoint);
                    let is_there = record.and_then(|r| r.domain) == Some(domain);
                    (!is_there).then_some(STATUS_OK)
                }
                // Nothing is left of it: execute it again.
                Effect::Map { .. } | Effect::Attach { .. } | Effect::None => None,
            };
            entry.state.phase = match done {
                Some(status) => {
                    entry.state.status = status;
                    Phase::Done
                }
                None => Phase::Waiting,
            };
            self.store.journal().settle(index, entry.state);
        }
    }

    /// Blocks every endpoint until the driver starts anew.
    fn refuse_predecessor(&mut self, old: Predecessor<'_>) {
        self.domains.clear();
        self.endpoints.retain(|_, e| e.quarantined);
        self.groups.clear();
        self.bypass = self.bypass_at_boot;
        self.driver = DriverState::Unknown;
        self.adopting = false;
        // The kernel's objects of the earlier process are known if its store can be read.
        let loaded = Loaded::read(old.store);
        let objects = loaded.map_or_else(|_| Vec::new(), |loaded| self.record_objects(&loaded));
        self.record_state();
        self.distrust_next_driver();
        // Before the backends destroy the first object: the old store must not name one that is gone.
        self.store.complete();
        Store::supersede(old.store);
        let left = LeftInBackends {
            objects,
            ..LeftInBackends::default()
        };
        self.adopt_endpoints(&left);
        self.forget_objects(&left.objects);
        self.block_unknown_driver();
    }
}

/// Counts the death of the earlier process for every request that was in progress.
fn count_deaths(loaded: &mut Loaded, store: &[AtomicU64]) {
    let published = usize::from(loaded.published);
    let mut is_first = true;
    for index in published..loaded.entries.len() {
        let phase = loaded.entries[index].state.phase;
        // Requests are executed in their order, so no later one has begun, unless it is planned. A waiting one has not
        // begun either: the process has died for another reason, such as a configuration that it refused.
        let was_executed = loaded.entries[index].state.attempts > 0;
        let counts = match phase {
            Phase::Planned | Phase::Interrupted => true,
            Phase::Taken => is_first,
            Phase::Waiting => was_executed && is_first,
            Phase::Done => false,
        };
        if counts {
            loaded.count_death(store, index);
        }
        is_first &= phase == Phase::Done;
    }
}

/// Refuses the requests that have ended too many processes, and quarantines the endpoints that they concern.
fn refuse_deadly_requests(loaded: &mut Loaded) {
    let published = usize::from(loaded.published);
    for entry in loaded.entries.iter_mut().skip(published) {
        let state = entry.state;
        let is_deadly = state.attempts >= MAX_DEATHS || state.restores >= MAX_RESTORES;
        if state.phase == Phase::Done || !is_deadly {
            continue;
        }
        let effect = entry.effect();
        error!(
            "the daemon has died {} times while it executed a request ({effect}), and {} times while it took over from such a \
             daemon; the request is refused, and its endpoints are quarantined",
            state.attempts, state.restores
        );
        match effect {
            Effect::Map { domain, .. } | Effect::Unmap { domain, .. } => {
                let members = loaded.endpoints.values_mut();
                for endpoint in members.filter(|e| e.domain == Some(domain)) {
                    endpoint.quarantined = true;
                }
            }
            Effect::Attach { endpoint, .. } | Effect::Detach { endpoint, .. } => {
                loaded.endpoints.entry(endpoint).or_default().quarantined = true;
            }
            Effect::None => {}
        }
        loaded.refused.extend(entry.planned_range());
        entry.state.phase = Phase::Done;
        // A request of an unknown type is never written to.
        entry.state.status = match entry.request() {
            Some(_) => STATUS_DEVERR,
            None => UNWRITTEN,
        };
    }
}

/// What backends must unmap: the ranges of requests in progress, as whole pages.
fn in_progress(loaded: &Loaded, iommu: &Iommu) -> Vec<(DomainId, IovaRange)> {
    let ranges = loaded
        .entries
        .iter()
        .filter_map(JournalEntry::planned_range);
    let ranges = ranges.filter(|(domain, _)| iommu.domains.contains_key(domain));
    let whole = |(domain, range): (DomainId, IovaRange)| {
        let range = range.intersection(iommu.input)?;
        Some((domain, range.whole_pages(iommu.page_sizes.granule())?))
    };
    ranges.filter_map(whole).collect()
}
