//! Accesses to memory that a device's server asks for: each is checked and performed here, or
//! refused.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use zerocopy::IntoBytes;

use super::message::{Command, DmaAccessBody, HEADER_BYTES, Header, MAX_DATA, Malformed, take};
use super::socket::Outbox;
use crate::address::{Access, Iova, IovaRange};

/// Memory that a device may reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// The device's addresses.
    pub range: IovaRange,
    /// The rights of the device there, at least one.
    pub access: Access,
    /// The file that the server can map, and the offset of the window in it. Without a file the server
    /// has to send DMA_READ and DMA_WRITE.
    pub file: Option<(Arc<File>, u64)>,
}

/// The device has no right to an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessDenied;

/// Memory as a device sees it.
///
/// The interposer's thread calls this trait. An implementation must not wait for a thread that uses a
/// [`Link`](super::Link), or for a lock that such a thread holds while it waits for a reply, above all
/// the lock of the core.
pub trait DmaTarget: Send + Sync {
    /// Reads all of `range`, which is as long as `into`.
    ///
    /// # Errors
    /// The device may not read all of the range. The content of `into` is then unspecified.
    fn read(&self, range: IovaRange, into: &mut [u8]) -> Result<(), AccessDenied>;

    /// Calls `act` with the memory behind `range`, in ascending order, unless the device may not read all of it. The guest
    /// may change the memory meanwhile. An UNMAP of a part of `range` is answered after `act` has returned, so `act` must
    /// not wait, and must leave nothing behind that refers to the memory.
    ///
    /// # Errors
    /// The device may not read all of the range. `act` is then not called.
    fn read_in_place(
        &self,
        range: IovaRange,
        act: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> Result<(), AccessDenied>;

    /// Writes all of `range`, which is as long as `from`.
    ///
    /// # Errors
    /// The device may not write all of the range. Nothing is then written.
    fn write(&self, range: IovaRange, from: &[u8]) -> Result<(), AccessDenied>;

    /// The first `limit` windows, in ascending order, of those whose first address is not below `first`. The caller holds
    /// the lock of the [`Link`](super::Link).
    fn windows_from(&self, first: Iova, limit: usize) -> Vec<Window>;
}

/// This many bytes of replies are sent before further commands are executed: the server can work on them meanwhile.
const ENOUGH: usize = 32 << 10;
/// A larger buffer for replies is freed as soon as they are sent.
const KEPT: usize = 256 << 10;

/// A DMA_READ with so much data that its reply is sent before others join it. The data is sent from guest memory itself.
#[derive(Debug)]
pub(super) struct LargeRead {
    header: Header,
    access: DmaAccessBody,
    range: IovaRange,
    len: usize,
}

/// Replies to commands of the server, in order.
#[derive(Debug, Default)]
pub(super) struct Replies {
    /// Room for replies. They are the first `len` bytes. The rest stays allocated, and is not cleared before it is used.
    buffer: Vec<u8>,
    len: usize,
}

impl Replies {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sends the replies, and queues what the socket does not accept yet. None is left here.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub(super) fn send(&mut self, outbox: &mut Outbox, socket: impl AsFd) -> io::Result<()> {
        let sent = outbox.send(socket, &mut self.buffer, self.len);
        self.clear();
        sent
    }

    /// Sends the replies and then the one to `read`, and queues what the socket does not accept yet. None is left here but
    /// the refusal of `read`.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub(super) fn send_read(
        &mut self,
        read: &LargeRead,
        target: &dyn DmaTarget,
        outbox: &mut Outbox,
        socket: impl AsFd,
    ) -> io::Result<()> {
        let at = self.len;
        let head = read.access.as_bytes();
        let header = read.header.reply_to(head.len() + read.len).encode();
        let into = self.add(HEADER_BYTES + head.len());
        into[..HEADER_BYTES].copy_from_slice(&header);
        into[HEADER_BYTES..].copy_from_slice(head);
        let mut sent = Ok(());
        let outcome = target.read_in_place(read.range, &mut |parts| {
            sent = outbox.send_with(&socket, &mut self.buffer, self.len, parts);
        });
        match outcome {
            Ok(()) => self.clear(),
            Err(AccessDenied) => {
                self.len = at;
                self.refuse(&read.header, libc::EFAULT);
            }
        }
        sent
    }

    /// Whether they should be sent before others join them.
    pub(super) fn is_enough(&self) -> bool {
        self.len >= ENOUGH
    }

    /// Removes all replies.
    pub(super) fn clear(&mut self) {
        self.len = 0;
        if self.buffer.len() > KEPT {
            self.buffer = Vec::new();
        }
    }

    /// Adds the refusal of a command with the errno `error`, if its sender wants a reply.
    pub(super) fn refuse(&mut self, header: &Header, error: i32) {
        if !header.wants_no_reply() {
            let refusal = header.refusal_of(error).encode();
            self.add(refusal.len()).copy_from_slice(&refusal);
        }
    }

    /// Adds `len` bytes, which have any value.
    fn add(&mut self, len: usize) -> &mut [u8] {
        let at = self.len;
        self.len += len;
        if self.buffer.len() < self.len {
            self.buffer.resize(self.len, 0);
        }
        &mut self.buffer[at..self.len]
    }
}

/// Executes a DMA_READ or DMA_WRITE. Adds the reply to `replies`, if the sender wants one. A long DMA_READ is not executed
/// but returned, for [`Replies::send_read`].
///
/// # Errors
/// The body is malformed, although [`check_command`](super::message::check_command) accepted it.
pub(super) fn serve(
    target: &dyn DmaTarget,
    header: &Header,
    command: Command,
    body: &[u8],
    replies: &mut Replies,
) -> Result<Option<LargeRead>, Malformed> {
    let (access, data) = take::<DmaAccessBody>(command, body)?;
    let count = access.count.get();
    let (Ok(len), true) = (usize::try_from(count), count <= MAX_DATA.into()) else {
        replies.refuse(header, libc::E2BIG);
        return Ok(None);
    };
    let range = IovaRange::from_len(Iova(access.address.get()), count);
    if range.is_none() && count > 0 {
        replies.refuse(header, libc::EINVAL);
        return Ok(None);
    }
    let head = access.as_bytes();
    let at = replies.len;
    let reads = command == Command::DmaRead;
    if let Some(range) = range.filter(|_| reads && len >= ENOUGH && !header.wants_no_reply()) {
        return Ok(Some(LargeRead {
            header: *header,
            access,
            range,
            len,
        }));
    }
    let body_len = head.len() + if reads { len } else { 0 };
    let reply = replies.add(HEADER_BYTES + body_len);
    let outcome = match range {
        None => Ok(()),
        Some(range) if reads => target.read(range, &mut reply[HEADER_BYTES + head.len()..]),
        Some(range) => target.write(range, data.get(..len).unwrap_or(data)),
    };
    if outcome.is_ok() && !header.wants_no_reply() {
        reply[..HEADER_BYTES].copy_from_slice(&header.reply_to(body_len).encode());
        reply[HEADER_BYTES..HEADER_BYTES + head.len()].copy_from_slice(head);
        return Ok(None);
    }
    // Nothing of a refused access is sent.
    replies.len = at;
    if outcome.is_err() {
        replies.refuse(header, libc::EFAULT);
    }
    Ok(None)
}
