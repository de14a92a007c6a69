//! The daemon's side: which readers there are, what they are told, and how they are waited for.

mod admission;
mod memory;
mod reader;
mod waiting;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use log::debug;
use thiserror::Error;

pub use self::reader::Reader;
use crate::address::{GpaRange, IovaRange};
use crate::ids::EndpointId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::metrics::Counter;
use crate::page_table::{Arena, ArenaError, EndpointSlots, OutOfFrames};
use crate::{error_limited, info_limited};

/// What readers are allowed.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long a reader may stay inside one access while the writer waits for it, and how long it
    /// may take to let go of memory. Then it is killed.
    pub patience: Duration,
    /// How long a killed process may take to be gone.
    pub exit: Duration,
    /// The most readers of one endpoint.
    pub readers: usize,
    /// Users whose processes may read besides the daemon's own.
    pub users: Vec<u32>,
    /// The most faults of one endpoint that are passed on in a second.
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

/// An endpoint that readers serve.
#[derive(Clone, Debug)]
pub struct ShadowEndpoint {
    /// Its ID.
    pub id: EndpointId,
    /// What bypass mode does not reach.
    pub reserved: Vec<IovaRange>,
}

/// A piece of guest RAM.
#[derive(Clone, Debug)]
pub struct Ram {
    /// The guest-physical addresses.
    pub range: GpaRange,
    /// The file.
    pub file: Arc<File>,
    /// Where in it the memory begins, in bytes.
    pub offset: u64,
}

/// Why there can be no readers.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// The page tables cannot be shared.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// No frame is left for endpoint slots.
    #[error(transparent)]
    Slots(#[from] OutOfFrames),
}

/// A reader that could not be made to leave.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("reader {reader} of endpoint {endpoint} is inside an access and cannot be ended: {why}")]
pub struct Stuck {
    /// The reader's number.
    pub reader: u64,
    /// What it reads for.
    pub endpoint: EndpointId,
    /// Why it cannot be ended.
    pub why: String,
}

/// What has happened to readers.
#[derive(Debug, Default)]
pub struct ReaderCounters {
    /// Readers that were let in.
    pub registered: Counter,
    /// Those that were not.
    pub refused: Counter,
    /// Those of them for whom the endpoint had too many already.
    pub refused_full: Counter,
    /// Those that were killed.
    pub killed: Counter,
    /// Faults that were reported.
    pub faults: Counter,
    /// Faults beyond the rate that is passed on.
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
    state: Mutex<RegistryState>,
    /// A reader has acknowledged, or is gone.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct RegistryState {
    readers: Vec<Arc<Reader>>,
    next_number: u64,
    memory: Vec<Ram>,
    generation: u64,
}

impl Registry {
    /// The readers of `endpoints`, all blocked, in the tables of `arena`, which is shared from now on.
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
            state: Mutex::new(Rank::Readers, RegistryState::default()),
            changed: Condvar::new(),
        })
    }

    /// What has happened so far.
    pub fn counters(&self) -> &ReaderCounters {
        &self.counters
    }

    /// What readers are allowed.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The readers that the endpoint with the most of them has now.
    pub fn most_readers(&self) -> usize {
        let state = self.state.lock();
        let mut counts: BTreeMap<EndpointId, usize> = BTreeMap::new();
        for reader in state.readers.iter().filter(|r| !r.is_gone()) {
            *counts.entry(reader.endpoint).or_default() += 1;
        }
        counts.into_values().max().unwrap_or(0)
    }

    /// The readers there are now.
    pub fn reader_count(&self) -> usize {
        let state = self.state.lock();
        state.readers.iter().filter(|r| !r.is_gone()).count()
    }

    /// A reader has hung up, or said what it must not. It is out at once if it is inside no access;
    /// else when its process is gone, or has been waited for in vain.
    pub fn hang_up(&self, reader: &Reader) {
        // It may be closed already.
        let _ = reader.stream.shutdown(std::net::Shutdown::Both);
        if !reader.is_inside() || reader.process.is_gone() {
            self.forget(reader);
        } else {
            self.wake();
        }
    }

    /// A reader breaks the protocol: it is killed, and is out once its process is gone. Returns
    /// whether it could be.
    pub fn expel(&self, reader: &Reader, why: &str) -> bool {
        error_limited!(
            "reader {} of endpoint {} {why}: its process is killed",
            reader.number,
            reader.endpoint
        );
        match reader.process.kill() {
            Ok(()) => {
                self.counters.killed.inc();
                // It may be closed already.
                let _ = reader.stream.shutdown(std::net::Shutdown::Both);
                true
            }
            Err(cause) => {
                debug!("reader {} is not killed: {cause}", reader.number);
                self.hang_up(reader);
                false
            }
        }
    }

    /// A reader's process is gone.
    pub fn forget(&self, reader: &Reader) {
        if !reader.gone.swap(true, Ordering::AcqRel) {
            info_limited!(
                "reader {} of endpoint {} is gone",
                reader.number,
                reader.endpoint
            );
        }
        self.state.lock().forget_gone();
        self.changed.notify_all();
    }

    /// A reader has let go of the memory that went in `generation` or before.
    pub fn taken(&self, reader: &Reader, generation: u64) {
        reader.taken.store(generation, Ordering::Release);
        self.wake();
    }

    /// Makes those who wait for readers to say something look again.
    fn wake(&self) {
        // The lock is taken so that nobody is about to sleep.
        drop(self.state.lock());
        self.changed.notify_all();
    }
}

impl RegistryState {
    fn forget_gone(&mut self) {
        self.readers
            .retain(|r| !r.is_gone() && !r.process.is_gone());
    }
}
