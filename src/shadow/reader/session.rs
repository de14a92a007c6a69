//! One registration with a daemon: the handshake, and guest memory that the VMM adds and removes.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::error::ConnectError;
use super::memory::{AnnouncedMemory, Views};
use crate::address::{Access, Iova, IovaRange};
use crate::ids::EndpointId;
use crate::page_table::ReadOnlyArena;
use crate::page_table::epoch::{GracePeriod, is_idle};
use crate::page_table::words::{MappedWords, sealed_size};
use crate::shadow::frames::{receive_frame, send_frame};
use crate::shadow::sys::send;
use crate::shadow::wire::{
    EPOCH_BYTES, EPOCH_WORDS, FRAME_LEN, Frame, MAGIC, REVOCABLE, Refusal, VERSION, access_bits,
    epoch_word, epoch_words, kind, revocation_word, revoke,
};

/// The longest silence of the daemon during the handshake.
const WELCOME_PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two checks whether this process's accesses have ended.
pub(super) const NAP: Duration = Duration::from_micros(50);

/// The state that the registration's thread and the accesses share.
#[derive(Debug)]
pub(super) struct Session {
    stream: Arc<UnixStream>,
    /// The number of this registration of the handle, from 1 on.
    pub(super) serial: u64,
    pub(super) endpoint: EndpointId,
    pub(super) arena: ReadOnlyArena,
    /// The index of the arena's word that is the endpoint's slot.
    pub(super) slot: usize,
    pub(super) epochs: MappedWords,
    /// Addresses that bypass mode does not reach.
    pub(super) reserved: Vec<IovaRange>,
}

impl Session {
    /// Registers for `endpoint` with the daemon at the other end of `stream`. Returns when guest memory is complete for
    /// the first time.
    pub(super) fn register(
        stream: Arc<UnixStream>,
        endpoint: EndpointId,
        serial: u64,
        announced: &mut AnnouncedMemory,
        views: &Views,
    ) -> Result<Self, ConnectError> {
        stream.set_read_timeout(Some(WELCOME_PATIENCE))?;
        let numbers = [MAGIC, endpoint.0.into(), REVOCABLE, 0];
        let hello = Frame::new(kind::HELLO, VERSION, numbers);
        send_frame(&stream, &hello, &[], None)?;
        let session = Self::handshake(stream, endpoint, serial, announced, views)?;
        session.stream.set_read_timeout(None)?;
        Ok(session)
    }

    /// Reads the daemon's answer to the greeting, up to the first complete guest memory.
    fn handshake(
        stream: Arc<UnixStream>,
        endpoint: EndpointId,
        serial: u64,
        announced: &mut AnnouncedMemory,
        views: &Views,
    ) -> Result<Self, ConnectError> {
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
            serial,
            endpoint,
            arena,
            slot: usize::try_from(slot).unwrap_or(usize::MAX),
            epochs,
            reserved: Vec::new(),
        };
        for _ in 0..reserved_count {
            let (frame, _) = receive_frame(&session.stream)?;
            let [first, last, ..] = frame.numbers;
            let range = IovaRange::new(Iova(first), Iova(last));
            let range = range.filter(|_| frame.kind == kind::RESERVED);
            let missing = ConnectError::Protocol("it does not send the reserved regions");
            session.reserved.push(range.ok_or(missing)?);
        }
        loop {
            let (frame, fds) = receive_frame(&session.stream)?;
            if session.handle_frame(&frame, fds, announced, views)? {
                return Ok(session);
            }
        }
    }

    /// Follows guest memory until the daemon closes the connection. Returns why it has ended.
    pub(super) fn listen(&self, announced: &mut AnnouncedMemory, views: &Views) -> ConnectError {
        loop {
            let frame = receive_frame(&self.stream).map_err(ConnectError::from);
            let handled =
                frame.and_then(|(frame, fds)| self.handle_frame(&frame, fds, announced, views));
            if let Err(cause) = handled {
                return cause;
            }
        }
    }

    /// Whether no access with epoch word `index` may begin any more: the daemon has revoked it, or [`Self::revoke`] has.
    /// The caller must be inside an access.
    #[inline]
    pub(super) fn is_revoked(&self, index: usize) -> bool {
        let word = revocation_word(self.epochs.as_slice(), index);
        word.is_none_or(|word| word.load(Ordering::Acquire) != 0)
    }

    /// Makes every access wait that begins from now on.
    pub(super) fn revoke(&self) {
        revoke(self.epochs.as_slice());
    }

    /// Waits until no access is in progress, after [`Self::revoke`].
    pub(super) fn wait_until_idle(&self) {
        while !is_idle(epoch_words(self.epochs.as_slice())) {
            std::thread::sleep(NAP);
        }
    }

    /// Closes the connection. The daemon takes that as the promise that no access is in progress, and none begins.
    pub(super) fn hang_up(&self) {
        // Fails if the daemon has closed the connection.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Handles a frame about guest memory. Returns whether guest memory is complete.
    fn handle_frame(
        &self,
        frame: &Frame,
        mut fds: Vec<OwnedFd>,
        announced: &mut AnnouncedMemory,
        views: &Views,
    ) -> Result<bool, ConnectError> {
        let [first, length, offset, _] = frame.numbers;
        match frame.kind {
            kind::MEMORY_ADDED => {
                let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
                    return Err(ConnectError::Protocol("it adds memory without a file"));
                };
                announced.add(views, File::from(fd), [first, length, offset])?;
                Ok(false)
            }
            kind::MEMORY_REMOVED => {
                announced.remove(first);
                // Views taken before still hold the region.
                views.outdate();
                Ok(false)
            }
            kind::MEMORY_COMPLETE => {
                if announced.publish(views)? {
                    self.wait_for_accesses();
                }
                // No access uses a removed region any more.
                let ack = Frame::new(kind::MEMORY_ACK, 0, [first, 0, 0, 0]);
                send_frame(&self.stream, &ack, &[], None)?;
                Ok(true)
            }
            _ => Err(ConnectError::Protocol(
                "it sends a frame of an unknown kind",
            )),
        }
    }

    /// Waits until every access that was in progress has ended.
    fn wait_for_accesses(&self) {
        let words = self.epochs.as_slice();
        let mut grace = GracePeriod::begin(epoch_words(words));
        while !grace.is_over(|index| epoch_word(words, index)) {
            std::thread::sleep(NAP);
        }
    }

    /// Reports a refused access to the daemon. Never waits. Returns whether the report was sent: not if the socket is
    /// full, or the daemon is gone.
    #[cold]
    pub(super) fn report(&self, access: Access, address: Iova) -> bool {
        let fault = Frame::new(kind::FAULT, access_bits(access), [address.0, 0, 0, 0]);
        let sent = send(&self.stream, &fault.to_wire(), &[]);
        matches!(sent, Ok(FRAME_LEN))
    }
}
