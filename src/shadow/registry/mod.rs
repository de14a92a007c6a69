//! The daemon's registry of readers: it admits them, announces guest memory to them, and waits for their accesses.

mod admission;
mod left;
mod memory;
mod reader;
mod stuck;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use log::debug;
use thiserror::Error;

use self::stuck::StuckReader;

pub use self::left::EndedReaders;
pub use self::reader::Reader;
use crate::address::{GpaRange, IovaRange};
use crate::ids::EndpointId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::metrics::Counter;
use crate::page_table::{Arena, ArenaError, EndpointSlots, OutOfFrames};
use crate::process::keeper::Keeper;
use crate::process::rate_limit::RateLimit;
use crate::process::wait_budget::WaitBudget;
use crate::shadow::kept::{KeptReader, ReaderIdentity};
use crate::{error_limited, info_limited};

/// Limits of the readers.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The longest time a reader may stay inside one access that the writer waits for, and the longest time
    /// it may take to release removed memory. After that the daemon kills it. It is also the budget of each
    /// endpoint for all such waits ([`WaitBudget`]).
    pub patience: Duration,
    /// The longest time a killed process may take to end.
    pub exit: Duration,
    /// The most readers of one endpoint.
    pub readers: usize,
    /// Users whose processes may register, besides the daemon's own user.
    pub users: Vec<u32>,
    /// The most faults of one endpoint that the guest gets in a second.
    pub fault_rate: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(1),
            exit: Duration::from_secs(5),
            readers: 16,
            users: Vec::new(),
            fault_rate: 100,
        }
    }
}

/// An endpoint whose DMA is done by readers.
#[derive(Clone, Debug)]
pub struct ShadowEndpoint {
    /// The endpoint's ID.
    pub id: EndpointId,
    /// Addresses that bypass mode does not reach.
    pub reserved: Vec<IovaRange>,
}

/// A piece of guest RAM.
#[derive(Clone, Debug)]
pub struct Ram {
    /// Its guest-physical addresses.
    pub range: GpaRange,
    /// The file that holds it.
    pub file: Arc<File>,
    /// Offset of its first byte in the file. Bytes.
    pub offset: u64,
}

/// Why a registry cannot be made.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// The page tables cannot be shared.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The arena has no frame left for endpoint slots.
    #[error(transparent)]
    Slots(#[from] OutOfFrames),
}

/// A reader that may still use memory, and cannot be killed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("reader {reader} of endpoint {endpoint} may still use guest memory: {why}")]
pub struct Stuck {
    /// The reader's number.
    pub reader: u64,
    /// The reader's endpoint.
    pub endpoint: EndpointId,
    /// Why the daemon cannot end that.
    pub why: String,
}

/// Counters of the readers, since the daemon's start.
#[derive(Debug, Default)]
pub struct ReaderCounters {
    /// Readers that registered.
    pub registered: Counter,
    /// Processes whose registration was refused.
    pub refused: Counter,
    /// Refusals because the endpoint had as many readers as it may have.
    pub refused_full: Counter,
    /// Refusals because the endpoint had too many new readers, whose descriptors would have been kept for the next daemon.
    pub refused_often: Counter,
    /// Readers that the daemon killed.
    pub killed: Counter,
    /// Those of them whose endpoint had used its budget for waits up.
    pub killed_slow: Counter,
    /// Readers whose process ended while another process had their connection.
    pub inherited: Counter,
    /// Faults of readers that were passed on.
    pub faults: Counter,
    /// Faults of readers that were dropped, because they exceeded the rate or the queue.
    pub faults_suppressed: Counter,
}

/// All readers of one daemon.
#[derive(Debug)]
pub struct Registry {
    arena: OwnedFd,
    slots: EndpointSlots,
    endpoints: BTreeMap<EndpointId, (usize, ShadowEndpoint)>,
    limits: Limits,
    counters: ReaderCounters,
    /// Keeps the descriptors of the readers for the next daemon.
    keeper: Arc<Keeper>,
    state: Mutex<RegistryState>,
    /// Signalled when a reader acknowledges a generation of memory, and when one is gone.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct RegistryState {
    readers: Vec<Arc<Reader>>,
    /// Readers that are gone, and whose descriptors the keeper still has.
    unreleased: Vec<KeptReader>,
    /// Endpoints with readers of the daemon before that nobody can wait for.
    lost: BTreeSet<EndpointId>,
    /// Readers that could neither be waited for nor killed.
    stuck: Vec<StuckReader>,
    next_number: u64,
    memory: Vec<Ram>,
    generation: u64,
    /// By endpoint, not by reader: a device gets no new budget by registering another process.
    budgets: BTreeMap<EndpointId, WaitBudget>,
    /// Limits the registrations of each endpoint whose descriptors are kept.
    registrations: BTreeMap<EndpointId, RateLimit>,
}

impl Registry {
    /// A registry for readers of `endpoints`, each of which is blocked. The arena is shared from now on.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn new(
        arena: &mut Arena,
        endpoints: Vec<ShadowEndpoint>,
        limits: Limits,
    ) -> Result<Self, RegistryError> {
        let slots = EndpointSlots::new(arena, endpoints.len())?;
        Ok(Self {
            arena: arena.share()?,
            slots,
            endpoints: endpoints
                .into_iter()
                .enumerate()
                .map(|(slot, endpoint)| (endpoint.id, (slot, endpoint)))
                .collect(),
            limits,
            counters: ReaderCounters::default(),
            keeper: Arc::new(Keeper::none()),
            state: Mutex::new(Rank::Readers, RegistryState::default()),
            changed: Condvar::new(),
        })
    }

    /// Has `keeper` keep the descriptors of each reader, so that the next daemon can end its registration.
    #[must_use]
    pub fn kept_by(self, keeper: Arc<Keeper>) -> Self {
        let names = keeper.names();
        let left = names.iter().filter_map(|name| ReaderIdentity::parse(name));
        let last = left.map(|(identity, _)| identity.number).max();
        let next = last.map_or(0, |last| last.saturating_add(1));
        self.state.lock().next_number = next;
        Self { keeper, ..self }
    }

    /// Whether the readers' registrations outlive this process, until the next one ends them.
    pub fn is_kept(&self) -> bool {
        self.keeper.is_present()
    }

    /// Lets the keeper close the descriptors of the readers that are gone. Only the thread that serves the readers may call
    /// it: not every thread may send messages to the keeper.
    pub fn release_gone(&self) {
        if !self.is_kept() {
            return;
        }
        let unreleased = std::mem::take(&mut self.state.lock().unreleased);
        for kept in unreleased {
            kept.release();
        }
    }

    /// The counters.
    pub fn counters(&self) -> &ReaderCounters {
        &self.counters
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The number of readers of the endpoint that has the most.
    pub fn most_readers(&self) -> usize {
        let state = self.state.lock();
        let mut counts: BTreeMap<EndpointId, usize> = BTreeMap::new();
        for reader in state.readers.iter().filter(|r| !r.is_gone()) {
            *counts.entry(reader.endpoint).or_default() += 1;
        }
        counts.into_values().max().unwrap_or(0)
    }

    /// The number of readers now.
    pub fn reader_count(&self) -> usize {
        let mut state = self.state.lock();
        state.drop_gone();
        state.readers.len()
    }

    /// Closes a reader's connection. A reader that is inside no access is removed at once; another one is
    /// removed when its process is gone, or when [`Self::wait_for_readers`] or
    /// [`Self::remove_memory`] has killed it.
    pub fn hang_up(&self, reader: &Reader) {
        // Only this direction: the other one shows whether the reader, or a process with a copy of its connection, has hung
        // up. Fails if it has.
        let _ = reader.stream.shutdown(std::net::Shutdown::Write);
        if !reader.is_inside() || reader.process.is_gone() {
            self.remove(reader);
        } else {
            self.wake();
        }
    }

    /// Kills a reader that breaks the protocol. It is removed once its process is gone. Returns whether the
    /// kill succeeded.
    pub fn expel(&self, reader: &Reader, why: &str) -> bool {
        error_limited!(
            "reader {} of endpoint {} {why}: its process is killed",
            reader.number,
            reader.endpoint
        );
        match reader.process.kill() {
            Ok(()) => {
                // Its connection stays open on this side: it would not show any more whether another process has it.
                self.counters.killed.inc();
                true
            }
            Err(cause) => {
                debug!("cannot kill reader {}: {cause}", reader.number);
                self.hang_up(reader);
                false
            }
        }
    }

    /// Removes a reader that accesses nothing any more.
    pub fn remove(&self, reader: &Reader) {
        let mut state = self.state.lock();
        if !reader.gone.swap(true, Ordering::AcqRel) {
            state.unreleased.extend(reader.kept.clone());
            info_limited!(
                "reader {} of endpoint {} is gone",
                reader.number,
                reader.endpoint
            );
        }
        state.drop_gone();
        drop(state);
        self.changed.notify_all();
    }

    /// Notes that a reader has acknowledged `generation`: it uses no memory removed in it or before.
    pub fn acknowledge(&self, reader: &Reader, generation: u64) {
        reader.acknowledged.store(generation, Ordering::Release);
        self.wake();
    }

    /// Wakes the threads that wait for acknowledgements, so that they check again.
    fn wake(&self) {
        // Taking the lock makes sure that no thread is between its check and its sleep.
        drop(self.state.lock());
        self.changed.notify_all();
    }
}

impl RegistryState {
    fn drop_gone(&mut self) {
        for reader in &self.readers {
            if reader.is_over() && !reader.gone.swap(true, Ordering::AcqRel) {
                self.unreleased.extend(reader.kept.clone());
            }
        }
        self.readers.retain(|r| !r.is_gone());
        self.stuck.retain(|stuck| !stuck.reader.is_gone());
    }
}
