//! A client's messages, which stay in its socket until they were executed.
//!
//! The server looks at bytes with `MSG_PEEK`. The socket's peek offset is the number of bytes that were looked at and are
//! still in the socket; a read without `MSG_PEEK` lowers it. Executed messages are taken out many at a time: for each one, a
//! call would cost more than the kernel's way past those that are still there.
//!
//! Descriptors come with the bytes that were sent with them. Linux ends a read behind such bytes, so they belong to the last
//! message that begins before the end of the read. A sender that sends each message with a call of its own therefore means
//! that one. A read that is full goes on without room, and returns descriptors of bytes that it has not read
//! (`unix_stream_read_generic`): so each read has room for more than the message.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg,
};

use super::super::respond::ClientError;
use crate::process::peek::set_peek_offset;
use crate::vfio_user::message::{HEADER_BYTES, Header, Kind, MAX_DESCRIPTORS};
use crate::vfio_user::socket::{Message, SocketError};

/// Room of a read beyond the message.
const AHEAD: usize = 4 << 10;
/// The most bytes of a body that are read at once: the client may declare a large body and never send it.
const STEP: usize = 64 << 10;
/// The server takes executed messages out of the socket once there are more bytes of them.
#[cfg(not(test))]
pub(super) const MAX_UNTAKEN: usize = 2 << 10;
/// In tests, after every few messages.
#[cfg(test)]
pub(super) const MAX_UNTAKEN: usize = 100;
/// Bytes that are taken out of the socket at once.
const TAKE: usize = 16 << 10;
/// A larger buffer is freed once its message was taken.
const KEPT: usize = 256 << 10;

/// The most bytes of data in one transfer with a client whose connection is kept. A whole message must fit into the socket,
/// where it stays until it was executed, and the client's kernel gives the socket about 200 KiB (`net.core.wmem_default`).
pub(super) const MAX_KEPT_DATA: u32 = 64 << 10;
/// The most bytes of a body: the data, and room for the structures before it.
const MAX_BODY: usize = MAX_KEPT_DATA as usize + 4096;

/// What the socket has.
#[derive(Debug)]
pub(super) enum Looked {
    /// A message of this many bytes.
    Message(Message, usize),
    /// No whole message yet.
    Nothing,
    /// The client hung up between two messages.
    End,
}

/// The messages of one client.
#[derive(Debug, Default)]
pub(super) struct Lookahead {
    /// Bytes of executed messages that are still in the socket, before the others.
    untaken: usize,
    /// The bytes that were looked at, from the first message on.
    bytes: Vec<u8>,
    /// Descriptors, each with the end of the read that has returned them.
    descriptors: Vec<(usize, Vec<OwnedFd>)>,
    /// The last read has found the socket empty behind what it returned: the next one is left to the caller's next event.
    is_drained: bool,
}

impl Lookahead {
    /// The messages in a socket of which nothing counts as looked at.
    ///
    /// # Errors
    /// The kernel has no peek offsets.
    pub(super) fn new(socket: &UnixStream) -> std::io::Result<Self> {
        set_peek_offset(socket.as_fd(), 0)?;
        Ok(Self::default())
    }

    /// Bytes that were looked at, and are in the socket.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of executed messages that are still in the socket.
    pub(super) fn untaken(&self) -> usize {
        self.untaken
    }

    /// Looks at the next message. The caller must wait for an edge of the socket after [`Looked::Nothing`], and
    /// [finish](Self::finish) a message before it asks for the next one.
    ///
    /// # Errors
    /// The client has to be cut off.
    pub(super) fn next(&mut self, socket: &UnixStream) -> Result<Looked, ClientError> {
        loop {
            let header = self.bytes.first_chunk().map(Header::decode).transpose();
            let header = header.map_err(SocketError::Malformed)?;
            let wanted = HEADER_BYTES + header.map_or(0, |header| header.body_len);
            if wanted > HEADER_BYTES + MAX_BODY {
                return Err(ClientError::Protocol(
                    "the client sent a longer message than was negotiated",
                ));
            }
            // Before more is read: a message may come in many pieces, each with descriptors.
            if self.own_descriptors(wanted) > MAX_DESCRIPTORS {
                return Err(SocketError::LostDescriptors.into());
            }
            if let Some(header) = header
                && self.bytes.len() >= wanted
            {
                return Ok(Looked::Message(self.message(header, wanted), wanted));
            }
            if std::mem::take(&mut self.is_drained) {
                return Ok(Looked::Nothing);
            }
            match self.look(socket, wanted - self.bytes.len())? {
                None => return Ok(Looked::Nothing),
                Some(0) if self.bytes.is_empty() => return Ok(Looked::End),
                Some(0) => return Err(SocketError::Truncated.into()),
                Some(_) => {}
            }
        }
    }

    /// The descriptors of the first message, if it ends at `end`.
    fn own_descriptors(&self, end: usize) -> usize {
        let own = self.descriptors.iter().filter(|(at, _)| *at <= end);
        own.map(|(_, files)| files.len()).sum()
    }

    /// A copy of the first message, with its descriptors.
    fn message(&mut self, mut header: Header, len: usize) -> Message {
        let mut body = self.bytes.get(HEADER_BYTES..len).unwrap_or_default();
        if matches!(header.kind, Kind::Refusal(_)) {
            // The errno in the header says all.
            body = &[];
            header.body_len = 0;
        }
        let body = body.to_vec();
        let own = |(end, _): &mut (usize, Vec<OwnedFd>)| *end <= len;
        let descriptors = self.descriptors.extract_if(.., own);
        Message {
            header,
            body,
            descriptors: descriptors.flat_map(|(_, files)| files).collect(),
            lost_descriptors: false,
            end: 0,
        }
    }

    /// Looks at more bytes, of which `missing` belong to the first message. Returns their number, 0 at the end of the
    /// stream, or `None` if there are none yet.
    fn look(&mut self, socket: &UnixStream, missing: usize) -> Result<Option<usize>, ClientError> {
        let seen = self.bytes.len();
        let room = missing.min(STEP.max(seen)) + AHEAD;
        self.bytes.resize(seen + room, 0);
        let mut files = Vec::new();
        let into = self.bytes.get_mut(seen..).unwrap_or_default();
        let looked = peek(socket, into, &mut files);
        let count = looked.as_ref().map_or(0, |count| count.unwrap_or(0));
        self.bytes.truncate(seen + count);
        let Some(mut count) = looked? else {
            return Ok(None);
        };
        let is_full = count == room;
        if is_full && !files.is_empty() {
            // The descriptors may be those of bytes behind the room. The next read returns them with their last byte.
            count -= 1;
            files.clear();
            self.bytes.truncate(seen + count);
            let offset = self.untaken + self.bytes.len();
            let offset = u32::try_from(offset).unwrap_or(u32::MAX);
            set_peek_offset(socket.as_fd(), offset)?;
        }
        self.is_drained = count > 0 && !is_full && files.is_empty();
        if !files.is_empty() {
            self.descriptors.push((seen + count, files));
        }
        Ok(Some(count))
    }

    /// The first message, of `len` bytes, is executed. It stays in the socket until [`Self::take`].
    pub(super) fn finish(&mut self, len: usize) {
        self.bytes.drain(..len.min(self.bytes.len()));
        self.untaken += len;
        for (end, _) in &mut self.descriptors {
            *end = end.saturating_sub(len);
        }
        if self.bytes.capacity() > KEPT {
            self.bytes.shrink_to(AHEAD);
        }
    }

    /// Takes the executed messages out of the socket.
    ///
    /// # Errors
    /// They are not there.
    pub(super) fn take(&mut self, socket: &UnixStream) -> std::io::Result<()> {
        take(socket, std::mem::take(&mut self.untaken))
    }
}

/// Takes the next `len` bytes out of a socket.
///
/// # Errors
/// They are not there.
pub(super) fn take(socket: &UnixStream, len: usize) -> std::io::Result<()> {
    let mut left = len;
    let mut bytes = [MaybeUninit::uninit(); TAKE];
    while left > 0 {
        let room = bytes.get_mut(..left.min(TAKE)).unwrap_or_default();
        match recv(socket, room, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok((_, count)) => left = left.saturating_sub(count),
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok(())
}

/// Looks at bytes behind the peek offset, and adds copies of their descriptors to `files`. `None`: there are none yet.
fn peek(
    socket: &UnixStream,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, ClientError> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let looked = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Ok(looked) => break looked,
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            // The client has closed its end, and has left replies unread.
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(cause) => return Err(ClientError::System(cause.into())),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    if looked.flags.contains(ReturnFlags::CTRUNC) || files.len() > MAX_DESCRIPTORS {
        return Err(SocketError::LostDescriptors.into());
    }
    Ok(Some(looked.bytes))
}
