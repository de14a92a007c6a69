//! The daemon's side: which readers there are, what they are told, and how they are waited for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use log::debug;
use thiserror::Error;

use super::process::{Process, has_hung_up, own_user, peer_user};
use super::sys::{send, wait_for_room};
use super::wire::{
    EPOCH_BYTES, EPOCH_WORDS, Frame, MAGIC, Refusal, VERSION, epoch_word, epoch_words, kind,
};
use crate::address::{GpaRange, IovaRange};
use crate::ids::EndpointId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::metrics::Counter;
use crate::page_table::epoch::GracePeriod;
use crate::page_table::words::SharedWords;
use crate::page_table::{Arena, ArenaError, EndpointSlots, EndpointWord, OutOfFrames};
use crate::{error_limited, info_limited, warn_limited};

/// How often a writer that waits looks whether readers have left, before it lets other threads run.
const SPINS: u32 = 2000;
/// How long a writer that still waits then sleeps between two looks.
const NAP: Duration = Duration::from_micros(50);

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

/// A process that reads for one endpoint.
#[derive(Debug)]
pub struct Reader {
    number: u64,
    endpoint: EndpointId,
    stream: UnixStream,
    epochs: SharedWords,
    process: Process,
    /// The generation of memory it has acknowledged.
    taken: AtomicU64,
    /// It has left, or it was killed.
    gone: AtomicBool,
}

impl Reader {
    /// Its number, which no other reader gets.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What it reads for.
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// Its socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Whether one of its threads is inside an access.
    pub fn is_inside(&self) -> bool {
        // A process that has hung up begins no access after that: one whose word is not seen here
        // finds that there is no connection.
        fence(Ordering::SeqCst);
        let mut words = epoch_words(self.epochs.words());
        words.any(|word| word.load(Ordering::Acquire) & 1 == 1)
    }

    fn begin_wait(&self) -> GracePeriod {
        GracePeriod::begin(epoch_words(self.epochs.words()))
    }

    fn has_left(&self, grace: &mut GracePeriod) -> bool {
        grace.is_over(|index| epoch_word(self.epochs.words(), index))
    }

    /// It accesses nothing any more.
    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

/// All readers of one daemon.
#[derive(Debug)]
pub struct Registry {
    arena: OwnedFd,
    slots: EndpointSlots,
    endpoints: BTreeMap<EndpointId, (usize, ShadowEndpoint)>,
    limits: Limits,
    counters: ReaderCounters,
    state: Mutex<State>,
    /// A reader has acknowledged, or is gone.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
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
            state: Mutex::new(Rank::Readers, State::default()),
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

    /// Lets the process at the other end of `stream` in, which has said `greeting` and wants one of
    /// `served`.
    ///
    /// # Errors
    /// Why not, and a number that explains it; the other end has been told.
    pub fn register(
        &self,
        stream: UnixStream,
        greeting: &Frame,
        served: &[EndpointId],
    ) -> Result<Arc<Reader>, Refusal> {
        let refused = match self.admit(&stream, greeting, served) {
            Ok((endpoint, process)) => match self.welcome(stream, endpoint, process) {
                Ok(reader) => {
                    self.counters.registered.inc();
                    info_limited!("reader {} of endpoint {endpoint} has come", reader.number);
                    return Ok(reader);
                }
                Err((stream, refusal, number)) => (stream, refusal, number),
            },
            Err((refusal, number)) => (stream, refusal, number),
        };
        let (stream, refusal, number) = refused;
        self.refuse(&stream, refusal, number);
        Err(refusal)
    }

    /// Tells a process that it is not let in.
    pub fn refuse(&self, stream: &UnixStream, refusal: Refusal, number: u64) {
        self.counters.refused.inc();
        if refusal == Refusal::Full {
            self.counters.refused_full.inc();
        }
        let frame = Frame::new(kind::REFUSED, refusal.code(), [number, 0, 0, 0]);
        // It may have hung up.
        if let Err(cause) = send(stream, &frame.to_wire(), &[]) {
            debug!("a refused reader is not told: {cause}");
        }
    }

    fn admit(
        &self,
        stream: &UnixStream,
        greeting: &Frame,
        served: &[EndpointId],
    ) -> Result<(EndpointId, Process), (Refusal, u64)> {
        let [magic, wanted, ..] = greeting.numbers;
        if greeting.kind != kind::HELLO || magic != MAGIC {
            return Err((Refusal::NoGreeting, 0));
        }
        if greeting.value != VERSION {
            return Err((Refusal::Version, VERSION.into()));
        }
        let endpoint = u32::try_from(wanted).ok().map(EndpointId);
        let Some(endpoint) = endpoint.filter(|e| served.contains(e)) else {
            return Err((Refusal::Endpoint, wanted));
        };
        let own = own_user();
        let user = peer_user(stream).map_err(|_| (Refusal::Process, 0))?;
        if user != own && !self.limits.users.contains(&user) {
            return Err((Refusal::User, own.into()));
        }
        let process = Process::of_peer(stream).map_err(|cause| {
            debug!("a reader's process cannot be held: {cause}");
            (Refusal::Process, 0)
        })?;
        Ok((endpoint, process))
    }

    fn welcome(
        &self,
        stream: UnixStream,
        endpoint: EndpointId,
        process: Process,
    ) -> Result<Arc<Reader>, (UnixStream, Refusal, u64)> {
        let Some((slot, facts)) = self.endpoints.get(&endpoint) else {
            return Err((stream, Refusal::Endpoint, endpoint.0.into()));
        };
        let mut state = self.state.lock();
        state.forget_gone();
        let present = state.readers.iter().filter(|r| r.endpoint == endpoint);
        if present.count() >= self.limits.readers {
            return Err((stream, Refusal::Full, self.limits.readers as u64));
        }
        let sealed = SharedWords::new(EPOCH_BYTES).and_then(|epochs| {
            epochs.add_seals(libc::F_SEAL_SEAL)?;
            Ok(epochs)
        });
        let epochs = match sealed {
            Ok(epochs) => epochs,
            Err(cause) => {
                debug!("no epoch memory for a reader: {cause}");
                return Err((stream, Refusal::Resources, 0));
            }
        };
        let word = self.slots.word(*slot) as u64;
        let numbers = [word, EPOCH_WORDS as u64, facts.reserved.len() as u64, 0];
        let welcome = Frame::new(kind::WELCOME, VERSION, numbers);
        let fds = [self.arena.as_fd(), epochs.fd()];
        let until = Instant::now() + self.limits.patience;
        let mut said = say(&stream, &welcome, &fds, until);
        for range in &facts.reserved {
            let numbers = [range.first().0, range.last().0, 0, 0];
            let frame = Frame::new(kind::RESERVED, 0, numbers);
            said = said.and_then(|()| say(&stream, &frame, &[], until));
        }
        for ram in &state.memory {
            said = said.and_then(|()| say_ram(&stream, ram, until));
        }
        said = said.and_then(|()| say(&stream, &memory(state.generation), &[], until));
        if let Err(cause) = said {
            debug!("a reader does not take its welcome: {cause}");
            return Err((stream, Refusal::Resources, 0));
        }
        let reader = Arc::new(Reader {
            number: state.next_number,
            endpoint,
            stream,
            epochs,
            process,
            taken: AtomicU64::new(state.generation),
            gone: AtomicBool::new(false),
        });
        state.next_number += 1;
        // Whatever changes after this is told to it, and whoever unmaps after this waits for it. What
        // changed before, it has found: it was let in later.
        state.readers.push(reader.clone());
        Ok(reader)
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

    /// Switches an endpoint over. When this returns `Ok`, no access is in progress that found where
    /// it went before.
    ///
    /// # Errors
    /// A reader cannot be made to leave; the endpoint is blocked.
    pub fn switch(&self, endpoint: EndpointId, to: EndpointWord) -> Result<(), Stuck> {
        let Some((slot, _)) = self.endpoints.get(&endpoint) else {
            return Ok(());
        };
        self.slots.set(*slot, to);
        let done = self.wait_for_readers(|e| e == endpoint);
        if done.is_err() {
            self.slots.set(*slot, EndpointWord::Blocked);
        }
        done
    }

    /// Waits for every access that was in progress before this call, by readers of the endpoints that
    /// are `concerned`. A reader that does not leave in time is killed.
    ///
    /// # Errors
    /// A reader cannot be made to leave: what was unmapped before this call may still be reached.
    pub fn wait_for_readers(&self, concerned: impl Fn(EndpointId) -> bool) -> Result<(), Stuck> {
        // Readers that come later find what was stored before this lock.
        let readers: Vec<_> = {
            let state = self.state.lock();
            let concerned = state.readers.iter().filter(|r| concerned(r.endpoint));
            concerned.cloned().collect()
        };
        let mut left: Vec<_> = readers
            .into_iter()
            .map(|reader| (reader.begin_wait(), reader))
            .collect();
        left.retain_mut(|(waiting, reader)| !reader.has_left(waiting));
        if left.is_empty() {
            return Ok(());
        }
        for _ in 0..SPINS {
            std::hint::spin_loop();
            left.retain_mut(|(waiting, reader)| !reader.has_left(waiting));
            if left.is_empty() {
                return Ok(());
            }
        }
        let until = Instant::now() + self.limits.patience;
        while !left.is_empty() && Instant::now() < until {
            if let Some((_, reader)) = left.first() {
                reader.process.wait_until_gone(NAP);
            }
            left.retain_mut(|(waiting, reader)| {
                !reader.has_left(waiting) && !reader.process.is_gone()
            });
        }
        left.iter()
            .try_for_each(|(_, reader)| self.end(reader, "stays inside an access"))
    }

    /// Kills a reader. When this returns `Ok` it accesses nothing any more.
    fn end(&self, reader: &Reader, why: &str) -> Result<(), Stuck> {
        if reader.is_gone() {
            return Ok(());
        }
        error_limited!(
            "reader {} of endpoint {} {why}: its process is killed",
            reader.number,
            reader.endpoint
        );
        let stuck = |why| Stuck {
            reader: reader.number,
            endpoint: reader.endpoint,
            why,
        };
        reader.process.kill().map_err(|e| stuck(e.to_string()))?;
        if !reader.process.wait_until_gone(self.limits.exit) {
            return Err(stuck("its process does not end".into()));
        }
        self.counters.killed.inc();
        self.forget(reader);
        Ok(())
    }

    /// Guest RAM has come. When this returns, the readers have it, so that what the guest is answered
    /// after that holds for them too.
    ///
    /// A reader that does not take it in time does not reach it until it does, and is not waited for
    /// again before it has caught up. Only what is needed for that is waited for: a thread that
    /// registers readers or hears them does not need what the caller may hold.
    pub fn add_memory(&self, ram: Ram) {
        let mut state = self.state.lock();
        let up_to_date = state.generation;
        state.generation += 1;
        let generation = state.generation;
        let done = memory(generation);
        let until = Instant::now() + self.limits.patience;
        let awaited: Vec<_> = state
            .readers
            .iter()
            .filter(|r| r.taken.load(Ordering::Acquire) >= up_to_date)
            .cloned()
            .collect();
        let deaf = state.tell(|reader| {
            say_ram(&reader.stream, &ram, until)
                .and_then(|()| say(&reader.stream, &done, &[], until))
        });
        state.memory.push(ram);
        for reader in deaf {
            // What it does not know of it does not reach. It goes on with what it knows until it has
            // read as far as to here, and is waited for: it is out when it has hung up itself.
            let _ = reader.stream.shutdown(std::net::Shutdown::Write);
        }
        let behind = |r: &&Arc<Reader>| {
            !r.is_gone()
                && r.taken.load(Ordering::Acquire) < generation
                && !has_hung_up(&r.stream)
                && !r.process.is_gone()
        };
        while let Some(reader) = awaited.iter().find(behind) {
            if self.changed.wait_until(&mut state, until) {
                warn_limited!(
                    "reader {} of endpoint {} does not take the memory that has come",
                    reader.number,
                    reader.endpoint
                );
                return;
            }
        }
    }

    /// Guest RAM goes. When this returns `Ok`, no reader reaches it any more.
    ///
    /// # Errors
    /// A reader does not let go and cannot be ended.
    pub fn remove_memory(&self, range: GpaRange) -> Result<(), Stuck> {
        let mut state = self.state.lock();
        state.memory.retain(|ram| ram.range != range);
        state.generation += 1;
        let generation = state.generation;
        let goes = Frame::new(kind::MEMORY_GOES, 0, [range.first().0, 0, 0, 0]);
        let until = Instant::now() + self.limits.patience;
        let deaf = state.tell(|reader| {
            say(&reader.stream, &goes, &[], until)
                .and_then(|()| say(&reader.stream, &memory(generation), &[], until))
        });
        let mut holding: Vec<_>;
        loop {
            let holds =
                |r: &&Arc<Reader>| !r.is_gone() && r.taken.load(Ordering::Acquire) < generation;
            holding = state.readers.iter().filter(holds).cloned().collect();
            holding.retain(|r| !r.process.is_gone());
            if holding
                .iter()
                .all(|r| deaf.iter().any(|d| Arc::ptr_eq(r, d)))
            {
                break;
            }
            if self.changed.wait_until(&mut state, until) {
                break;
            }
        }
        drop(state);
        // Those that have hung up have let go of all memory, unless they are still at it.
        for reader in holding.extract_if(.., |r| has_hung_up(&r.stream) && !r.is_inside()) {
            self.forget(&reader);
        }
        holding
            .iter()
            .try_for_each(|reader| self.end(reader, "does not let go of memory that goes"))
    }
}

impl State {
    fn forget_gone(&mut self) {
        self.readers
            .retain(|r| !r.is_gone() && !r.process.is_gone());
    }

    /// Tells every reader something; returns those that do not listen.
    fn tell(&self, mut tell: impl FnMut(&Reader) -> io::Result<()>) -> Vec<Arc<Reader>> {
        let deaf = self.readers.iter().filter(|reader| {
            let told = tell(reader);
            if let Err(cause) = &told {
                debug!("reader {} does not listen: {cause}", reader.number);
            }
            told.is_err()
        });
        deaf.cloned().collect()
    }
}

fn memory(generation: u64) -> Frame {
    Frame::new(kind::MEMORY, 0, [generation, 0, 0, 0])
}

fn say_ram(stream: &UnixStream, ram: &Ram, until: Instant) -> io::Result<()> {
    let (first, span) = (ram.range.first().0, ram.range.span());
    // Whole pages, so that there is one more than the span.
    let numbers = [first, span.saturating_add(1), ram.offset, 0];
    let frame = Frame::new(kind::MEMORY_COMES, 0, numbers);
    say(stream, &frame, &[ram.file.as_fd()], until)
}

/// Sends a frame, which does not wait longer than `until` for room.
fn say(
    stream: &UnixStream,
    frame: &Frame,
    fds: &[BorrowedFd<'_>],
    until: Instant,
) -> io::Result<()> {
    let bytes = frame.to_wire();
    let (mut rest, mut fds) = (bytes.as_slice(), fds);
    while !rest.is_empty() {
        match send(stream, rest, fds) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                fds = &[];
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() || !wait_for_room(stream, left)? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}
