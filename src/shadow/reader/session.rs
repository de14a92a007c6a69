//! A reader's connection to the daemon: the welcome, and guest memory that comes and goes.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use log::{debug, error};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestMemoryRegion};

use super::error::{AccessError, ConnectError};
use super::memory::{Known, Memory, Region, map_region};
use super::tlb::Tlb;
use crate::address::{Iova, IovaRange};
use crate::ids::EndpointId;
use crate::locks::{Mutex, Rank};
use crate::page_table::ReadOnlyArena;
use crate::page_table::epoch::GracePeriod;
use crate::page_table::words::{MappedWords, sealed_size};
use crate::shadow::frames::{receive_frame, send_frame};
use crate::shadow::sys::send;
use crate::shadow::wire::{
    EPOCH_BYTES, EPOCH_WORDS, FRAME_LEN, Frame, MAGIC, Refusal, VERSION, access_bits, epoch_word,
    epoch_words, kind,
};

/// How long the daemon may take for its welcome.
const WELCOME_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether this process's own accesses have ended.
const NAP: Duration = Duration::from_micros(50);

/// The socket's owner: the last one to go hangs up.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) shared: Arc<Session>,
    thread: Option<JoinHandle<()>>,
}

impl Registration {
    pub(super) fn connect(path: &Path, endpoint: EndpointId) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(path).map_err(|source| ConnectError::Connect {
            path: path.display().to_string(),
            source,
        })?;
        stream.set_read_timeout(Some(WELCOME_PATIENCE))?;
        let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, endpoint.0.into(), 0, 0]);
        send_frame(&stream, &hello, &[], None)?;
        let (shared, mut known) = Session::welcomed(stream, endpoint)?;
        shared.stream.set_read_timeout(None)?;
        let shared = Arc::new(shared);
        let heard = shared.clone();
        let thread = std::thread::Builder::new()
            .name("shadow".into())
            .spawn(move || heard.listen(&mut known))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Registration {
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

/// What the threads of this process work with.
#[derive(Debug)]
pub(super) struct Session {
    stream: UnixStream,
    pub(super) endpoint: EndpointId,
    pub(super) arena: ReadOnlyArena,
    /// The word of the arena that says where the endpoint's DMA goes.
    pub(super) slot: usize,
    pub(super) epochs: MappedWords,
    /// One for each epoch word: who holds it has the word. Only ever tried, never waited for.
    pub(super) tlbs: Vec<Mutex<Tlb>>,
    /// What bypass mode does not reach.
    pub(super) reserved: Vec<IovaRange>,
    pub(super) connected: AtomicBool,
    pub(super) memory: Mutex<Memory>,
    /// Views of memory of an older generation than this have some that has gone.
    pub(super) valid_from: AtomicU64,
    pub(super) faults_unsaid: AtomicU64,
}

impl Session {
    /// Reads what the daemon says first.
    fn welcomed(stream: UnixStream, endpoint: EndpointId) -> Result<(Self, Known), ConnectError> {
        let (welcome, mut fds) = receive_frame(&stream)?;
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
            let (frame, _) = receive_frame(&shared.stream)?;
            let [first, last, ..] = frame.numbers;
            let range = IovaRange::new(Iova(first), Iova(last));
            let range = range.filter(|_| frame.kind == kind::RESERVED);
            let missing = ConnectError::Protocol("it does not tell the reserved regions");
            shared.reserved.push(range.ok_or(missing)?);
        }
        let mut known = Known::default();
        loop {
            let (frame, fds) = receive_frame(&shared.stream)?;
            if shared.heed(&frame, fds, &mut known)? {
                return Ok((shared, known));
            }
        }
    }

    /// What the thread does: hears of memory that comes and goes, until the daemon hangs up.
    fn listen(&self, known: &mut Known) {
        loop {
            let frame = receive_frame(&self.stream).map_err(ConnectError::from);
            match frame.and_then(|(frame, fds)| self.heed(&frame, fds, known)) {
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
        Ok(send_frame(&self.stream, &taken, &[], None)?)
    }

    /// Waits for the accesses that may still use what has gone.
    fn wait_for_accesses(&self) {
        let words = self.epochs.as_slice();
        let mut grace = GracePeriod::begin(epoch_words(words));
        while !grace.is_over(|index| epoch_word(words, index)) {
            std::thread::sleep(NAP);
        }
    }

    /// Tells the daemon of a fault, if it listens; never waits.
    #[cold]
    pub(super) fn report(&self, refused: &AccessError) {
        let AccessError::Fault {
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
