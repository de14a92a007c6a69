//! Messages to send, in a ring that outlives the process.
//!
//! sendfile(2) moves bytes from a memfd into a socket, and moves the file position of the open memfd in the same step. The
//! keeper has that open file, too, so the next process knows how many bytes were sent. Only committed bytes are sent: those
//! that the record says the peer must get.
//!
//! The socket refers to the pages of the memfd and does not copy them, so bytes must stay until the peer has read them. The
//! size of the socket's send buffer limits the unread bytes, and the ring has room for so many besides the unsent ones. When
//! everything is sent and read, the ring begins at its front again, so that it touches few pages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek, sendfile};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::sockopt::socket_send_buffer_size;
use vm_memory::VolatileSlice;

use super::crash;
use super::layout::{LEG_REWINDING, LEG_SHIFT, Leg};
use super::memory::{MappedBytes, Words};
use crate::process::unread::unread_bytes;
use crate::vfio_user::socket::{OutgoingFd, send_with_descriptors};

/// The ring may begin anew after so many bytes.
const LAP: u64 = 64 << 10;
/// And after so many more if the peer had not read everything.
const RETRY: u64 = 16 << 10;
/// Memory behind this is given back when the ring begins anew: all that a server's ring can have stays. To take a page again
/// costs more than its copy, and a server with long accesses takes a megabyte in a millisecond.
const TOUCHED: u64 = 16 << 20;
/// The socket takes at most its send buffer and this many bytes before the peer reads.
const BEYOND_BUFFER: u64 = 128 << 10;

/// The messages to one peer.
pub(in crate::vfio_user) struct SendRing {
    memory: MappedBytes,
    /// Its position is that of the first unsent byte, if the ring is not being rewound.
    file: Arc<OwnedFd>,
    socket: OwnedFd,
    words: Arc<Words>,
    leg: Leg,
    /// The most bytes that can be sent and not read.
    unread: u64,
    /// The stream position of the ring's front.
    shift: u64,
    /// The stream positions up to which bytes are sent, are committed, and are in the ring.
    sent: u64,
    committed: u64,
    tail: u64,
    /// The last position at which the peer had unread bytes.
    tried: u64,
    /// Messages with descriptors that were not sent yet.
    attached: VecDeque<Attached>,
    /// The end of the last message with descriptors.
    attached_end: u64,
    /// Where unsent replies to the peer's commands are.
    replies: VecDeque<(u64, u64)>,
    /// Too much was queued.
    is_overrun: bool,
}

struct Attached {
    begin: u64,
    end: u64,
    descriptors: Vec<OutgoingFd>,
}

impl SendRing {
    /// An empty ring for a new connection. Makes the socket nonblocking. The record must not say yet that there is one.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn new(
        leg: Leg,
        words: Arc<Words>,
        file: Arc<OwnedFd>,
        socket: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        words.set(leg.word(LEG_REWINDING), 0);
        words.set(leg.word(LEG_SHIFT), 0);
        seek(&file, SeekFrom::Start(0))?;
        let mut ring = Self::with(leg, words, file, socket)?;
        // Pages that an earlier peer has not read yet stay as they are, with that peer's socket.
        let len = ring.memory.len();
        ring.memory.discard(0, len);
        Ok(ring)
    }

    /// The ring that an earlier process has left, with `committed` bytes.
    ///
    /// # Errors
    /// It does not add up, or the system refuses.
    pub(super) fn adopt(
        leg: Leg,
        words: Arc<Words>,
        file: Arc<OwnedFd>,
        socket: BorrowedFd<'_>,
        committed: u64,
    ) -> io::Result<Self> {
        let mut ring = Self::with(leg, words, file, socket)?;
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its send ring is damaged");
        ring.tail = committed;
        ring.committed = committed;
        ring.sent = committed;
        if ring.words.get(leg.word(LEG_REWINDING)) != 0 {
            ring.rewind()?;
            return Ok(ring);
        }
        ring.shift = ring.words.get(leg.word(LEG_SHIFT));
        let at = seek(&ring.file, SeekFrom::Current(0))?;
        let lap = committed.checked_sub(ring.shift).ok_or_else(damaged)?;
        if at > ring.bytes() {
            return Err(damaged());
        }
        // The front is the position after the end, too.
        let unsent = (lap + ring.bytes() - at) % ring.bytes();
        if unsent > lap || unsent + ring.unread > ring.bytes() {
            return Err(damaged());
        }
        ring.sent = committed - unsent;
        if at == ring.bytes() {
            seek(&ring.file, SeekFrom::Start(0))?;
        }
        Ok(ring)
    }

    fn with(
        leg: Leg,
        words: Arc<Words>,
        file: Arc<OwnedFd>,
        socket: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let bytes = usize::try_from(leg.ring_bytes()).map_err(io::Error::other)?;
        // sendfile has no flag for it.
        ioctl_fionbio(socket, true)?;
        let buffer = socket_send_buffer_size(socket)? as u64;
        if buffer + BEYOND_BUFFER > leg.ring_bytes() / 4 {
            return Err(io::Error::other(
                "the send buffer of its socket is too large",
            ));
        }
        Ok(Self {
            memory: MappedBytes::map(file.as_fd(), 0, bytes)?,
            file,
            socket: socket.try_clone_to_owned()?,
            words,
            leg,
            unread: buffer + BEYOND_BUFFER,
            shift: 0,
            sent: 0,
            committed: 0,
            tail: 0,
            tried: 0,
            attached: VecDeque::new(),
            attached_end: 0,
            replies: VecDeque::new(),
            is_overrun: false,
        })
    }

    fn bytes(&self) -> u64 {
        self.leg.ring_bytes()
    }

    /// Where the byte of a stream position is in the memory.
    fn place(&self, position: u64) -> u64 {
        (position - self.shift) % self.bytes()
    }

    /// The stream position after the last byte.
    pub(in crate::vfio_user) fn tail(&self) -> u64 {
        self.tail
    }

    /// The stream position after the last message with descriptors.
    pub(in crate::vfio_user) fn descriptors_end(&self) -> u64 {
        self.attached_end
    }

    /// The stream position after the last byte that was sent.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether there is more than [`Self::commit`] has named.
    pub(in crate::vfio_user) fn has_uncommitted(&self) -> bool {
        self.tail > self.committed
    }

    /// The record says that the peer must get everything up to here.
    pub(in crate::vfio_user) fn commit(&mut self, tail: u64) {
        self.committed = tail;
    }

    pub(in crate::vfio_user) fn len_bytes(&self) -> usize {
        usize::try_from(self.tail - self.sent).unwrap_or(usize::MAX)
    }

    pub(in crate::vfio_user) fn len_reply_bytes(&self) -> usize {
        let replies = self.replies.iter();
        let unsent = replies.map(|(begin, end)| end - (*begin).max(self.sent).min(*end));
        usize::try_from(unsent.sum::<u64>()).unwrap_or(usize::MAX)
    }

    pub(in crate::vfio_user) fn len_descriptors(&self) -> usize {
        let attached = self.attached.iter();
        attached.map(|attached| attached.descriptors.len()).sum()
    }

    /// Adds a message with its descriptors.
    pub(in crate::vfio_user) fn push(&mut self, bytes: &[u8], descriptors: Vec<OutgoingFd>) {
        let begin = self.tail;
        if self.make_room(bytes.len()) {
            self.append(bytes);
        }
        if !descriptors.is_empty() {
            self.attached_end = self.tail;
            self.attached.push_back(Attached {
                begin,
                end: self.tail,
                descriptors,
            });
        }
    }

    /// Adds replies to the peer's commands: `head` and then `parts`.
    pub(in crate::vfio_user) fn push_replies(&mut self, head: &[u8], parts: &[VolatileSlice<'_>]) {
        let len = head.len() + parts.iter().map(VolatileSlice::len).sum::<usize>();
        if !self.make_room(len) {
            return;
        }
        let begin = self.tail;
        self.append(head);
        for part in parts {
            self.append_part(part);
        }
        match self.replies.back_mut() {
            Some((_, end)) if *end == begin => *end = self.tail,
            Some(_) | None => self.replies.push_back((begin, self.tail)),
        }
    }

    /// Whether `len` more bytes fit.
    fn make_room(&mut self, len: usize) -> bool {
        if self.sent == self.tail {
            self.begin_anew();
        }
        let unsent = self.tail - self.sent;
        let fits = unsent + len as u64 + self.unread <= self.bytes();
        self.is_overrun |= !fits;
        fits && !self.is_overrun
    }

    fn append(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let into = self.next_room(rest.len());
            let (now, later) = rest.split_at(into.len());
            into.copy_from_slice(now);
            self.tail += now.len() as u64;
            rest = later;
        }
    }

    fn append_part(&mut self, part: &VolatileSlice<'_>) {
        let mut done = 0;
        while let Ok(rest) = part.offset(done)
            && !rest.is_empty()
        {
            let into = self.next_room(rest.len());
            let len = into.len();
            rest.copy_to(into);
            self.tail += len as u64;
            done += len;
        }
    }

    /// The memory of the next bytes, up to `len` of them and to the end of the ring.
    fn next_room(&mut self, len: usize) -> &mut [u8] {
        let memory_len = self.memory.len();
        let at = usize::try_from(self.place(self.tail)).unwrap_or(usize::MAX);
        let end = at.saturating_add(len).min(memory_len);
        &mut self.memory.as_mut_slice()[at..end]
    }

    /// Begins at the front of the ring again, if the peer has read everything.
    fn begin_anew(&mut self) {
        if self.tail - self.shift < LAP || self.tail < self.tried + RETRY {
            return;
        }
        self.tried = self.tail;
        if unread_bytes(self.socket.as_fd()).is_ok_and(|unread| unread == 0) {
            // On error, the file position is what it was, and the record says so.
            let _ = self.rewind();
        }
    }

    fn rewind(&mut self) -> io::Result<()> {
        let lap = self.tail.saturating_sub(self.shift).min(self.bytes());
        self.words.set(self.leg.word(LEG_REWINDING), 1);
        crash::call()?;
        seek(&self.file, SeekFrom::Start(0))?;
        self.words.set(self.leg.word(LEG_SHIFT), self.tail);
        self.words.set(self.leg.word(LEG_REWINDING), 0);
        self.shift = self.tail;
        if lap > TOUCHED {
            let at = |n| usize::try_from(n).unwrap_or(usize::MAX);
            self.memory.discard(at(TOUCHED), at(lap));
        }
        Ok(())
    }

    /// Sends as much of the committed bytes as the socket accepts.
    ///
    /// # Errors
    /// The peer is gone, the kernel refuses to send, or too much was queued.
    pub(in crate::vfio_user) fn flush(&mut self) -> io::Result<()> {
        if self.is_overrun {
            return Err(io::Error::other("too many bytes wait for it"));
        }
        while self.sent < self.committed {
            let at = self.place(self.sent);
            let next = self.attached.front().map(|attached| attached.begin);
            let end = self.committed.min(next.unwrap_or(u64::MAX));
            let len = (end.max(self.sent) - self.sent).min(self.bytes() - at);
            let outcome = match len {
                0 => self.send_attached(at),
                _ => self.send_plain(len),
            };
            match outcome {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(cause) => return Err(cause.into()),
            }
            if self.place(self.sent) == 0 {
                crash::call()?;
                seek(&self.file, SeekFrom::Start(0))?;
            }
        }
        let sent = self.sent;
        while self.replies.front().is_some_and(|(_, end)| *end <= sent) {
            self.replies.pop_front();
        }
        Ok(())
    }

    fn send_plain(&self, len: u64) -> Result<u64, Errno> {
        if !crash::step() {
            return Err(Errno::IO);
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        match sendfile(&self.socket, &self.file, None, len)? {
            // The file position is not where it should be.
            0 => Err(Errno::IO),
            count => Ok(count as u64),
        }
    }

    /// Sends bytes of the next message, which has descriptors. The file position follows by a call of its own: a process that
    /// dies in between leaves a message of which nobody knows whether it was sent ([`Self::descriptors_end`]).
    fn send_attached(&mut self, at: u64) -> Result<u64, Errno> {
        let Some(next) = self.attached.front() else {
            return Err(Errno::IO);
        };
        let from = usize::try_from(at).unwrap_or(usize::MAX);
        let len = usize::try_from(next.end - next.begin).unwrap_or(usize::MAX);
        let bytes = self.memory.as_slice().get(from..).unwrap_or_default();
        let bytes = bytes.get(..len).unwrap_or(bytes);
        if !crash::step() {
            return Err(Errno::IO);
        }
        let count = send_with_descriptors(self.socket.as_fd(), bytes, &next.descriptors)
            .map_err(|cause| Errno::from_io_error(&cause).unwrap_or(Errno::IO))?;
        let count = count.ok_or(Errno::AGAIN)? as u64;
        if !crash::step() {
            return Err(Errno::IO);
        }
        seek(&self.file, SeekFrom::Start(at + count))?;
        self.attached.pop_front();
        Ok(count)
    }
}

impl std::fmt::Debug for SendRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut ring = f.debug_struct("SendRing");
        ring.field("leg", &self.leg).finish_non_exhaustive()
    }
}
