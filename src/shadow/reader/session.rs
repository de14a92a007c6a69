//! A reader's connection to the daemon: the handshake, and guest memory that the VMM adds and removes.

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
use super::memory::{AnnouncedMemory, Memory, RamRegion, map_region};
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

/// The longest silence of the daemon during the handshake.
const WELCOME_PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two checks whether this process's accesses have ended.
const NAP: Duration = Duration::from_micros(50);

/// A session and its thread. Dropping it closes the connection and joins the thread.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) session: Arc<Session>,
    thread: Option<JoinHandle<()>>,
    /// The process that is registered.
    process: u32,
}

impl Registration {
    /// Connects to the daemon that listens at `path`, and registers for `endpoint`.
    pub(super) fn connect(path: &Path, endpoint: EndpointId) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(path).map_err(|source| ConnectError::Connect {
            path: path.display().to_string(),
            source,
        })?;
        stream.set_read_timeout(Some(WELCOME_PATIENCE))?;
        let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, endpoint.0.into(), 0, 0]);
        send_frame(&stream, &hello, &[], None)?;
        let (session, mut announced) = Session::handshake(stream, endpoint)?;
        session.stream.set_read_timeout(None)?;
        let session = Arc::new(session);
        let listener = session.clone();
        let thread = std::thread::Builder::new()
            .name("shadow".into())
            .spawn(move || listener.listen(&mut announced))?;
        Ok(Self {
            session,
            thread: Some(thread),
            process: std::process::id(),
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // A child of the registered process. The connection and the thread are the parent's, and the mappings are
            // not in this process: other memory may have their addresses, and must not be unmapped.
            std::mem::forget(self.thread.take());
            std::mem::forget(self.session.clone());
            return;
        }
        // Fails if the connection is closed already.
        let _ = self.session.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the shadow thread has panicked");
        }
    }
}

/// The state that the session's thread and the accesses share.
#[derive(Debug)]
pub(super) struct Session {
    stream: UnixStream,
    pub(super) endpoint: EndpointId,
    pub(super) arena: ReadOnlyArena,
    /// The index of the arena's word that is the endpoint's slot.
    pub(super) slot: usize,
    pub(super) epochs: MappedWords,
    /// One for each epoch word. Its lock reserves the word; threads only try it and never wait for it.
    pub(super) tlbs: Vec<Mutex<Tlb>>,
    /// Addresses that bypass mode does not reach.
    pub(super) reserved: Vec<IovaRange>,
    pub(super) connected: AtomicBool,
    pub(super) memory: Mutex<Memory>,
    /// Views of an older generation than this hold memory that the VMM has removed.
    pub(super) valid_from: AtomicU64,
    pub(super) faults_unreported: AtomicU64,
}

impl Session {
    /// Reads the daemon's answer to the greeting, up to the first complete guest memory.
    fn handshake(
        stream: UnixStream,
        endpoint: EndpointId,
    ) -> Result<(Self, AnnouncedMemory), ConnectError> {
        let (welcome, mut fds) = receive_frame(&stream)?;
        let [slot, words, reserved_count, _] = welcome.numbers;
        match welcome.kind {
            kind::WELCOME if welcome.value == VERSION => {}
            kind::WELCOME => {
                return Err(ConnectError::Protocol("it welcomes with another version"));
            }
            kind::REFUSED => {
                return Err(match Refusal::of(welcome.value) {
                    Some(refusal) => ConnectError::Refused {
                        refusal,
                        number: slot,
                    },
                    None => ConnectError::Protocol("it refuses with an unknown reason"),
                });
            }
            _ => {
                return Err(ConnectError::Protocol(
                    "its answer to the greeting is no welcome",
                ));
            }
        }
        let (Some(epochs), Some(arena), None) = (fds.pop(), fds.pop(), fds.pop()) else {
            return Err(ConnectError::Protocol(
                "its welcome does not carry two descriptors",
            ));
        };
        if words != EPOCH_WORDS as u64 || sealed_size(epochs.as_fd())? != EPOCH_BYTES {
            return Err(ConnectError::Protocol("its epoch memory has another size"));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let arena = ReadOnlyArena::map(arena.as_fd())?;
        let epochs = MappedWords::map(epochs.as_fd(), EPOCH_BYTES, protection)?;
        // The daemon knows this process only. A child that inherits the mappings would outlive the registration.
        arena.keep_from_children()?;
        epochs.keep_from_children()?;
        let mut session = Self {
            stream,
            endpoint,
            arena,
            slot: usize::try_from(slot).unwrap_or(usize::MAX),
            epochs,
            tlbs: (0..EPOCH_WORDS)
                .map(|_| Mutex::new(Rank::ReaderCache, Tlb::new()))
                .collect(),
            reserved: Vec::new(),
            connected: AtomicBool::new(true),
            memory: Mutex::new(Rank::ReaderMemory, Memory::default()),
            valid_from: AtomicU64::new(0),
            faults_unreported: AtomicU64::new(0),
        };
        for _ in 0..reserved_count {
            let (frame, _) = receive_frame(&session.stream)?;
            let [first, last, ..] = frame.numbers;
            let range = IovaRange::new(Iova(first), Iova(last));
            let range = range.filter(|_| frame.kind == kind::RESERVED);
            let missing = ConnectError::Protocol("it does not send the reserved regions");
            session.reserved.push(range.ok_or(missing)?);
        }
        let mut announced = AnnouncedMemory::default();
        loop {
            let (frame, fds) = receive_frame(&session.stream)?;
            if session.handle_frame(&frame, fds, &mut announced)? {
                return Ok((session, announced));
            }
        }
    }

    /// The thread's loop: follows guest memory until the daemon closes the connection.
    fn listen(&self, announced: &mut AnnouncedMemory) {
        loop {
            let frame = receive_frame(&self.stream).map_err(ConnectError::from);
            match frame.and_then(|(frame, fds)| self.handle_frame(&frame, fds, announced)) {
                Ok(_) => {}
                Err(cause) => {
                    debug!(
                        "the connection for endpoint {} has ended: {cause}",
                        self.endpoint
                    );
                    break;
                }
            }
        }
        self.connected.store(false, Ordering::Release);
        // Fails if the connection is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Handles a frame about guest memory. Returns whether guest memory is complete.
    fn handle_frame(
        &self,
        frame: &Frame,
        mut fds: Vec<OwnedFd>,
        announced: &mut AnnouncedMemory,
    ) -> Result<bool, ConnectError> {
        let [first, length, offset, _] = frame.numbers;
        match frame.kind {
            kind::MEMORY_ADDED => {
                let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
                    return Err(ConnectError::Protocol("it adds memory without a file"));
                };
                announced
                    .regions
                    .push(map_region(File::from(fd), first, length, offset)?);
                Ok(false)
            }
            kind::MEMORY_REMOVED => {
                let stays = |region: &RamRegion| region.start_addr() != GuestAddress(first);
                announced.regions.retain(stays);
                announced.has_removed = true;
                // Views taken before still hold the region. Accesses through them fail from the next
                // generation on.
                let next = self.memory.lock().generation + 1;
                self.valid_from.fetch_max(next, Ordering::Release);
                Ok(false)
            }
            kind::MEMORY_COMPLETE => {
                self.publish_memory(first, announced)?;
                Ok(true)
            }
            _ => Err(ConnectError::Protocol(
                "it sends a frame of an unknown kind",
            )),
        }
    }

    /// Makes the announced regions the guest memory of this generation, and acknowledges it once no access
    /// uses a removed region.
    fn publish_memory(
        &self,
        generation: u64,
        announced: &mut AnnouncedMemory,
    ) -> Result<(), ConnectError> {
        announced.regions.sort_by_key(|region| region.start_addr());
        let regions = if announced.regions.is_empty() {
            GuestMemoryMmap::new()
        } else {
            let all = GuestMemoryMmap::from_arc_regions(announced.regions.clone());
            all.map_err(|e| ConnectError::Memory(e.to_string()))?
        };
        *self.memory.lock() = Memory {
            generation,
            regions,
        };
        if std::mem::take(&mut announced.has_removed) {
            self.wait_for_accesses();
        }
        let ack = Frame::new(kind::MEMORY_ACK, 0, [generation, 0, 0, 0]);
        Ok(send_frame(&self.stream, &ack, &[], None)?)
    }

    /// Waits until every access that was in progress has ended.
    fn wait_for_accesses(&self) {
        let words = self.epochs.as_slice();
        let mut grace = GracePeriod::begin(epoch_words(words));
        while !grace.is_over(|index| epoch_word(words, index)) {
            std::thread::sleep(NAP);
        }
    }

    /// Reports a refused access to the daemon. Never waits: if the socket is full, the report is not sent, but
    /// counted.
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
            self.faults_unreported.fetch_add(1, Ordering::Relaxed);
        }
    }
}
