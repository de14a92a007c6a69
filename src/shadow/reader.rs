//! The reader's side: guest memory through the IOMMU, for devices in processes of their own.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use log::{debug, error};
use thiserror::Error;
use vm_memory::iommu::{Error as IommuError, IotlbIterator, IovaRange as VmIovaRange};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, Iommu,
    IommuMemory, Iotlb, MmapRegion, Permissions,
};

use super::sys::{receive, send, wait_for_room};
use super::wire::{
    EPOCH_BYTES, EPOCH_WORDS, FRAME_LEN, Frame, MAGIC, Refusal, VERSION, access_bits, epoch_word,
    epoch_words, kind,
};
use crate::address::{Access, Gpa, Iova, IovaRange};
use crate::ids::EndpointId;
use crate::locks::{Mutex, MutexGuard, Rank};
use crate::page_table::epoch::{GracePeriod, enter, leave};
use crate::page_table::words::{MappedWords, sealed_size};
use crate::page_table::{ArenaError, EndpointWord, ReadOnlyArena, Translation, reader};

/// How long the daemon may take for its welcome.
const WELCOME_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether this process's own accesses have ended.
const NAP: Duration = Duration::from_micros(50);
/// No access reaches up to here: ranges in `vm-memory` end before an address of 64 bits.
const LAST_REACHED: u64 = u64::MAX - 2;
/// The part of an address within a page.
const PAGE_MASK: u64 = 0xfff;

/// Why a process does not become a reader.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Nobody listens there.
    #[error("cannot connect to {path}: {source}; is the daemon running, with a socket there?")]
    Connect {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon does not want it.
    #[error("{}", refusal_text(*refusal, *number))]
    Refused {
        /// Why.
        refusal: Refusal,
        /// A number that explains it.
        number: u64,
    },
    /// The other end does not keep to the protocol.
    #[error("no daemon of this protocol is at the other end: {0}; connect to a `shadow` socket")]
    Protocol(&'static str),
    /// The page tables are not as they should be.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A system call failed.
    #[error("cannot become a reader: {0}")]
    System(#[from] io::Error),
    /// Guest memory cannot be mapped.
    #[error("guest memory cannot be mapped: {0}")]
    Memory(String),
}

fn refusal_text(refusal: Refusal, number: u64) -> String {
    match refusal {
        Refusal::NoGreeting => "the daemon has not understood the greeting".into(),
        Refusal::Version => format!(
            "the daemon speaks version {number} of the protocol and this library version \
             {VERSION}; build both from the same release"
        ),
        Refusal::User => format!(
            "the daemon lets processes of user {number} in and not of this one; run as that user"
        ),
        Refusal::Endpoint => format!(
            "this socket does not serve endpoint {number:#x}; name it in the daemon's \
             configuration, or connect to its own socket"
        ),
        Refusal::Full => format!("there are {number} readers already; end one of them"),
        Refusal::Process => {
            "the daemon could not end this process, should it have to; run both as the same user"
                .into()
        }
        Refusal::Resources => {
            "the daemon lacks memory or descriptors for another reader; raise its limits".into()
        }
    }
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// The IOMMU does not allow it. The guest is told.
    #[error("endpoint {endpoint} has no {access} access at {address}")]
    Fault {
        /// The endpoint.
        endpoint: EndpointId,
        /// What it tried.
        access: Access,
        /// The first address at which it is refused.
        address: Iova,
    },
    /// The daemon is gone, and nothing is reached any more.
    #[error("the IOMMU is gone; connect anew")]
    Disconnected,
    /// Memory has gone since this view of it was asked for.
    #[error("guest memory has changed; ask for it again")]
    Outdated,
    /// Too many accesses are in progress in this process.
    #[error("{EPOCH_WORDS} accesses are in progress in this process; end one before the next")]
    Busy,
    /// The range is empty, or passes the last address that can be reached.
    #[error("{length} bytes from {address} cannot be reached by one access")]
    Range {
        /// The first address.
        address: Iova,
        /// The length in bytes.
        length: u64,
    },
}

/// Guest memory as an endpoint sees it.
pub type ShadowMemory = IommuMemory<GuestMemoryMmap, ShadowIommu>;

/// A process's registration for one endpoint. Clones share it; it ends with the last of them and
/// of what was got from them.
#[derive(Clone, Debug)]
pub struct ShadowReader {
    connection: Arc<Connection>,
}

impl ShadowReader {
    /// Registers with the daemon that listens at `path`, for DMA of `endpoint`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(path: &Path, endpoint: EndpointId) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(path).map_err(|source| ConnectError::Connect {
            path: path.display().to_string(),
            source,
        })?;
        stream.set_read_timeout(Some(WELCOME_PATIENCE))?;
        let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, endpoint.0.into(), 0, 0]);
        say(&stream, &hello)?;
        let (shared, mut known) = Shared::welcomed(stream, endpoint)?;
        shared.stream.set_read_timeout(None)?;
        let shared = Arc::new(shared);
        let heard = shared.clone();
        let thread = std::thread::Builder::new()
            .name("shadow".into())
            .spawn(move || heard.listen(&mut known))?;
        Ok(Self {
            connection: Arc::new(Connection {
                shared,
                thread: Some(thread),
            }),
        })
    }

    /// What this process reads for.
    pub fn endpoint(&self) -> EndpointId {
        self.connection.shared.endpoint
    }

    /// Whether the daemon is still there.
    pub fn is_connected(&self) -> bool {
        self.connection.shared.connected.load(Ordering::Acquire)
    }

    /// Guest memory as the endpoint sees it from now on.
    ///
    /// When memory has gone since, accesses through what this returns fail with
    /// [`Refused::Outdated`]; memory that has come is not in it. Ask again then.
    pub fn memory(&self) -> ShadowMemory {
        let memory = self.connection.shared.memory.lock().clone();
        let iommu = ShadowIommu {
            connection: self.connection.clone(),
            generation: memory.generation,
        };
        IommuMemory::new(memory.regions, iommu, true, ())
    }

    /// Whether memory has come or gone since `memory` was asked for.
    pub fn has_changed(&self, memory: &ShadowMemory) -> bool {
        self.connection.shared.memory.lock().generation != memory.iommu().generation
    }

    /// Begins an access. What is translated before it ends stays usable until then.
    ///
    /// The guest waits for it where it unmaps something: it must not last, and the process is killed
    /// where it lasts longer than the daemon's patience.
    ///
    /// # Errors
    /// [`Refused::Busy`].
    pub fn enter(&self) -> Result<AccessGuard<'_>, Refused> {
        let shared = &*self.connection.shared;
        let inside = shared.enter().ok_or(Refused::Busy)?;
        Ok(AccessGuard { shared, inside })
    }

    /// Refused accesses the daemon could not be told of, because it did not listen.
    pub fn faults_unsaid(&self) -> u64 {
        self.connection.shared.faults_unsaid.load(Ordering::Relaxed)
    }
}

/// An access in progress.
#[derive(Debug)]
pub struct AccessGuard<'a> {
    shared: &'a Shared,
    inside: Inside<'a>,
}

impl AccessGuard<'_> {
    /// Where `iova` leads. The guest-physical address may be used until this access ends.
    ///
    /// # Errors
    /// See [`Refused`].
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Translation, Refused> {
        debug_assert!(self.inside.word.load(Ordering::Relaxed) & 1 == 1);
        let found = self.shared.find(iova, access);
        if let Err(fault @ Refused::Fault { .. }) = &found {
            self.shared.report(fault);
        }
        found
    }
}

/// What `vm-memory` asks for translations.
#[derive(Clone, Debug)]
pub struct ShadowIommu {
    connection: Arc<Connection>,
    /// The generation of memory it goes with.
    generation: u64,
}

impl Iommu for ShadowIommu {
    type IotlbGuard<'a> = TlbGuard<'a>;

    /// Reports what is refused to the guest.
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<TlbGuard<'_>>, IommuError> {
        let shared = &*self.connection.shared;
        let wanted = Access {
            read: access.allow(Permissions::Read),
            write: access.allow(Permissions::Write),
        };
        let found = shared.fill(Iova(iova.0), length as u64, wanted, self.generation);
        let refused = match found {
            Ok(guard) => match Iotlb::lookup(guard, iova, length, access) {
                Ok(found) => return Ok(found),
                Err(_) => "the translation was lost".to_owned(),
            },
            // The access is over here, so whoever waits for it does not wait for the report.
            Err(refused) => {
                shared.report(&refused);
                refused.to_string()
            }
        };
        Err(IommuError::CannotResolve {
            iova_range: VmIovaRange { base: iova, length },
            reason: refused,
        })
    }
}

/// A translation in use: the access lasts as long as this.
#[derive(Debug)]
pub struct TlbGuard<'a>(Inside<'a>);

impl Deref for TlbGuard<'_> {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.0.tlb.found
    }
}

/// An epoch word in use.
#[derive(Debug)]
struct Inside<'a> {
    word: &'a AtomicU64,
    value: u64,
    /// Nobody else in this process uses the word while this is held.
    tlb: MutexGuard<'a, Tlb>,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        leave(self.word, self.value);
    }
}

/// What `vm-memory` wants to see a translation in. It holds the last one only, and is checked
/// against the tables each time.
#[derive(Debug)]
struct Tlb {
    found: Iotlb,
    /// Addresses in it, where there are any.
    range: Option<(u64, u64)>,
    /// If it is one piece: the address it leads to, and the rights.
    piece: Option<(u64, Access)>,
}

impl Tlb {
    fn new() -> Self {
        let mut found = Iotlb::new();
        // One entry that nothing is looked up in: with it, the map keeps its memory when the others
        // go, and what is translated takes none.
        let kept = found.set_mapping(
            GuestAddress(LAST_REACHED + 1),
            GuestAddress(0),
            1,
            Permissions::No,
        );
        debug_assert!(kept.is_ok());
        Self {
            found,
            range: None,
            piece: None,
        }
    }

    /// Whether it says of `first..=last` what the tables say.
    fn has(&self, first: u64, last: u64, gpa: u64, access: Access) -> bool {
        let (Some((from, to)), Some((leads, rights))) = (self.range, self.piece) else {
            return false;
        };
        from <= first
            && last <= to
            && gpa.wrapping_sub(leads) == first.wrapping_sub(from)
            && rights == access
    }

    fn clear(&mut self) {
        self.piece = None;
        if let Some((first, last)) = self.range.take() {
            let length = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
            self.found.invalidate_mapping(GuestAddress(first), length);
        }
    }

    /// Adds a piece after the ones there are.
    fn add(&mut self, first: u64, last: u64, gpa: u64, access: Access) {
        let rights = match (access.read, access.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        };
        let length = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
        let (at, to) = (GuestAddress(first), GuestAddress(gpa));
        let set = self.found.set_mapping(at, to, length, rights);
        debug_assert!(set.is_ok());
        self.piece = self.range.is_none().then_some((gpa, access));
        let from = self.range.map_or(first, |(from, _)| from);
        self.range = Some((from, last));
    }
}

/// The socket's owner: the last one to go hangs up.
#[derive(Debug)]
struct Connection {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // It may be closed already.
        let _ = self.shared.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the shadow thread has panicked");
        }
    }
}

/// A piece of guest RAM.
type Region = Arc<GuestRegionMmap>;

#[derive(Clone, Debug, Default)]
struct Memory {
    generation: u64,
    regions: GuestMemoryMmap,
}

/// What the thread that listens knows of guest memory.
#[derive(Debug, Default)]
struct Known {
    regions: Vec<Region>,
    /// Some has gone that accesses in progress may still use.
    some_went: bool,
}

/// What the threads of this process work with.
#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    endpoint: EndpointId,
    arena: ReadOnlyArena,
    /// The word of the arena that says where the endpoint's DMA goes.
    slot: usize,
    epochs: MappedWords,
    /// One for each epoch word: who holds it has the word. Only ever tried, never waited for.
    tlbs: Vec<Mutex<Tlb>>,
    /// What bypass mode does not reach.
    reserved: Vec<IovaRange>,
    connected: AtomicBool,
    memory: Mutex<Memory>,
    /// Views of memory of an older generation than this have some that has gone.
    valid_from: AtomicU64,
    faults_unsaid: AtomicU64,
}

impl Shared {
    /// Reads what the daemon says first.
    fn welcomed(stream: UnixStream, endpoint: EndpointId) -> Result<(Self, Known), ConnectError> {
        let (welcome, mut fds) = hear(&stream)?;
        let [slot, words, reserved_count, _] = welcome.numbers;
        match welcome.kind {
            kind::WELCOME if welcome.value == VERSION => {}
            kind::WELCOME => return Err(ConnectError::Protocol("it has another version")),
            kind::REFUSED => {
                return Err(match Refusal::of(welcome.value) {
                    Some(refusal) => ConnectError::Refused {
                        refusal,
                        number: slot,
                    },
                    None => ConnectError::Protocol("it refuses for a reason unknown"),
                });
            }
            _ => return Err(ConnectError::Protocol("it says no welcome")),
        }
        let (Some(epochs), Some(arena), None) = (fds.pop(), fds.pop(), fds.pop()) else {
            return Err(ConnectError::Protocol("it does not pass the page tables"));
        };
        if words != EPOCH_WORDS as u64 || sealed_size(epochs.as_fd())? != EPOCH_BYTES {
            return Err(ConnectError::Protocol("the epoch memory has another size"));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let mut shared = Self {
            stream,
            endpoint,
            arena: ReadOnlyArena::map(arena.as_fd())?,
            slot: usize::try_from(slot).unwrap_or(usize::MAX),
            epochs: MappedWords::map(epochs.as_fd(), EPOCH_BYTES, protection)?,
            tlbs: (0..EPOCH_WORDS)
                .map(|_| Mutex::new(Rank::ReaderCache, Tlb::new()))
                .collect(),
            reserved: Vec::new(),
            connected: AtomicBool::new(true),
            memory: Mutex::new(Rank::ReaderMemory, Memory::default()),
            valid_from: AtomicU64::new(0),
            faults_unsaid: AtomicU64::new(0),
        };
        for _ in 0..reserved_count {
            let (frame, _) = hear(&shared.stream)?;
            let [first, last, ..] = frame.numbers;
            let range = IovaRange::new(Iova(first), Iova(last));
            let range = range.filter(|_| frame.kind == kind::RESERVED);
            let missing = ConnectError::Protocol("it does not tell the reserved regions");
            shared.reserved.push(range.ok_or(missing)?);
        }
        let mut known = Known::default();
        loop {
            let (frame, fds) = hear(&shared.stream)?;
            if shared.heed(&frame, fds, &mut known)? {
                return Ok((shared, known));
            }
        }
    }

    /// What the thread does: hears of memory that comes and goes, until the daemon hangs up.
    fn listen(&self, known: &mut Known) {
        loop {
            match hear(&self.stream).and_then(|(frame, fds)| self.heed(&frame, fds, known)) {
                Ok(_) => {}
                Err(cause) => {
                    debug!("the IOMMU of endpoint {} is gone: {cause}", self.endpoint);
                    break;
                }
            }
        }
        self.connected.store(false, Ordering::Release);
        // It may be closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Does what a frame about memory says. Returns whether memory is complete.
    fn heed(
        &self,
        frame: &Frame,
        mut fds: Vec<OwnedFd>,
        known: &mut Known,
    ) -> Result<bool, ConnectError> {
        let [first, length, offset, _] = frame.numbers;
        match frame.kind {
            kind::MEMORY_COMES => {
                let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
                    return Err(ConnectError::Protocol("memory comes without a file"));
                };
                known
                    .regions
                    .push(map_region(File::from(fd), first, length, offset)?);
                Ok(false)
            }
            kind::MEMORY_GOES => {
                let stays = |region: &Region| region.start_addr() != GuestAddress(first);
                known.regions.retain(stays);
                known.some_went = true;
                // Views that were given out still have it. They are of no use from the next
                // generation on.
                let next = self.memory.lock().generation + 1;
                self.valid_from.fetch_max(next, Ordering::Release);
                Ok(false)
            }
            kind::MEMORY => {
                self.memory_is(first, known)?;
                Ok(true)
            }
            _ => Err(ConnectError::Protocol("it says something unknown")),
        }
    }

    /// Memory consists of what is `known` in this generation.
    fn memory_is(&self, generation: u64, known: &mut Known) -> Result<(), ConnectError> {
        known.regions.sort_by_key(|region| region.start_addr());
        let regions = if known.regions.is_empty() {
            GuestMemoryMmap::new()
        } else {
            let all = GuestMemoryMmap::from_arc_regions(known.regions.clone());
            all.map_err(|e| ConnectError::Memory(e.to_string()))?
        };
        *self.memory.lock() = Memory {
            generation,
            regions,
        };
        if std::mem::take(&mut known.some_went) {
            self.wait_for_accesses();
        }
        let taken = Frame::new(kind::MEMORY_TAKEN, 0, [generation, 0, 0, 0]);
        Ok(say(&self.stream, &taken)?)
    }

    /// Waits for the accesses that may still use what has gone.
    fn wait_for_accesses(&self) {
        let words = self.epochs.as_slice();
        let mut grace = GracePeriod::begin(epoch_words(words));
        while !grace.is_over(|index| epoch_word(words, index)) {
            std::thread::sleep(NAP);
        }
    }

    /// Takes an epoch word that nobody in this process uses.
    #[inline]
    fn enter(&self) -> Option<Inside<'_>> {
        let hint = preferred_word();
        let (before, from) = self.tlbs.split_at(hint.min(self.tlbs.len()));
        let from = from.iter().enumerate().map(|(n, tlb)| (n + hint, tlb));
        for (index, tlb) in from.chain(before.iter().enumerate()) {
            if let Some(tlb) = tlb.try_lock() {
                let word = epoch_word(self.epochs.as_slice(), index)?;
                let value = enter(word);
                return Some(Inside { word, value, tlb });
            }
        }
        None
    }

    /// Where `iova` leads. To be called inside an access.
    #[inline]
    fn find(&self, iova: Iova, access: Access) -> Result<Translation, Refused> {
        if !self.connected.load(Ordering::Acquire) {
            return Err(Refused::Disconnected);
        }
        let found = match self.arena.view().endpoint(self.slot) {
            EndpointWord::Blocked => None,
            EndpointWord::Bypass => self.bypass(iova),
            EndpointWord::Domain { root, levels } => {
                reader::walk(self.arena.view(), root, levels, iova)
            }
        };
        found
            .filter(|found| found.access.allows(access))
            .ok_or(Refused::Fault {
                endpoint: self.endpoint,
                access,
                address: iova,
            })
    }

    fn bypass(&self, iova: Iova) -> Option<Translation> {
        let mut last = u64::MAX;
        for region in &self.reserved {
            if region.contains(iova) {
                return None;
            }
            if region.first() > iova {
                last = last.min(region.first().0 - 1);
            }
        }
        Some(Translation {
            gpa: Gpa(iova.0),
            contiguous_last: Iova(last),
            access: Access::READ_WRITE,
            mmio: false,
        })
    }

    /// Begins an access and puts the translation of a range where `vm-memory` finds it.
    fn fill(
        &self,
        iova: Iova,
        length: u64,
        access: Access,
        generation: u64,
    ) -> Result<TlbGuard<'_>, Refused> {
        let last = iova.0.checked_add(length.saturating_sub(1));
        let last = last.filter(|last| *last <= LAST_REACHED);
        let last = last.ok_or(Refused::Range {
            address: iova,
            length,
        })?;
        let mut inside = self.enter().ok_or(Refused::Busy)?;
        // After the access has begun: then who makes it outdated waits for this access, or is seen.
        if generation < self.valid_from.load(Ordering::Acquire) {
            return Err(Refused::Outdated);
        }
        if length == 0 {
            return Ok(TlbGuard(inside));
        }
        let tlb = &mut *inside.tlb;
        let mut at = iova.0;
        loop {
            let found = self.find(Iova(at), access)?;
            let until = found.contiguous_last.0;
            if at == iova.0 && last <= until {
                if tlb.has(at, last, found.gpa.0, found.access) {
                    return Ok(TlbGuard(inside));
                }
                tlb.clear();
                // From the start of the page: what comes next may lie before this.
                // Both addresses are at the same place in a page.
                let (start, gpa) = (at & !PAGE_MASK, found.gpa.0 & !PAGE_MASK);
                tlb.add(start, until.min(LAST_REACHED), gpa, found.access);
                return Ok(TlbGuard(inside));
            }
            if at == iova.0 {
                tlb.clear();
            }
            tlb.add(at, until.min(last), found.gpa.0, found.access);
            if until >= last {
                return Ok(TlbGuard(inside));
            }
            at = until + 1;
        }
    }

    /// Tells the daemon of a fault, if it listens; never waits.
    #[cold]
    fn report(&self, refused: &Refused) {
        let Refused::Fault {
            access, address, ..
        } = refused
        else {
            return;
        };
        let fault = Frame::new(kind::FAULT, access_bits(*access), [address.0, 0, 0, 0]);
        let sent = send(&self.stream, &fault.to_wire(), &[]);
        if !matches!(sent, Ok(FRAME_LEN)) {
            self.faults_unsaid.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The epoch word this thread tries first.
fn preferred_word() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static WORD: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    WORD.with(|word| {
        if word.get() == usize::MAX {
            word.set(NEXT.fetch_add(1, Ordering::Relaxed) % EPOCH_WORDS);
        }
        word.get()
    })
}

fn map_region(file: File, first: u64, length: u64, offset: u64) -> Result<Region, ConnectError> {
    let refuse = |why: String| {
        ConnectError::Memory(format!(
            "{length:#x} bytes at guest-physical {first:#x}: {why}"
        ))
    };
    let size = usize::try_from(length).map_err(|e| refuse(e.to_string()))?;
    let memory = MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|e| refuse(e.to_string()))?;
    GuestRegionMmap::new(memory, GuestAddress(first))
        .map(Arc::new)
        .ok_or_else(|| refuse("it passes the last address".into()))
}

/// Says a frame, however long the daemon takes to listen.
fn say(stream: &UnixStream, frame: &Frame) -> io::Result<()> {
    let bytes = frame.to_wire();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match send(stream, rest, &[]) {
            Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {
                wait_for_room(stream, Duration::from_secs(1))?;
            }
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

/// Waits for a frame and the descriptors that come with it.
fn hear(stream: &UnixStream) -> Result<(Frame, Vec<OwnedFd>), ConnectError> {
    let mut bytes = [0; FRAME_LEN];
    let mut filled = 0;
    let mut fds = Vec::new();
    while filled < FRAME_LEN {
        match receive(stream, bytes.get_mut(filled..).unwrap_or_default(), true) {
            Ok((0, _)) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok((got, came)) => {
                filled += got;
                fds.extend(came);
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok((Frame::from_wire(&bytes), fds))
}
