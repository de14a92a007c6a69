//! vhost-user messages as bytes, and the VMM's messages, which stay in its socket until they are done with.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use crate::process::peek::set_peek_offset;

/// Bytes of a message's header: request, flags, bytes of the body.
pub(super) const HEADER_LEN: usize = 12;
/// The most bytes of a message.
pub(super) const MAX_MESSAGE: usize = HEADER_LEN + MAX_MSG_SIZE;

/// The version in the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The flag of a reply.
const REPLY: u32 = 1 << 2;
/// The flag that asks for a reply to a message that has none by itself.
pub(super) const NEED_REPLY: u32 = 1 << 3;
const KNOWN_FLAGS: u32 = VERSION_MASK | REPLY | NEED_REPLY;

/// A message with its header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MessageBytes(pub(super) Vec<u8>);

impl MessageBytes {
    /// A message of this process.
    pub(super) fn new(request: FrontendReq, body: &[u8]) -> Self {
        let len = u32::try_from(body.len()).unwrap_or(0);
        let header = [u32::from(request), VERSION, len];
        let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
        bytes.extend(body);
        Self(bytes)
    }

    /// The request; `None` if there is none with this number.
    pub(super) fn request(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.word(0)?).ok()
    }

    /// The same message without the request for a reply.
    pub(super) fn without_need_reply(&self) -> Self {
        let mut bytes = self.0.clone();
        if let (Some(flags), Some(word)) = (self.word(1), bytes.get_mut(4..8)) {
            word.copy_from_slice(&(flags & !NEED_REPLY).to_ne_bytes());
        }
        Self(bytes)
    }

    /// Whether the sender must have attached descriptors.
    pub(super) fn has_files(&self) -> bool {
        /// The flag for a missing descriptor.
        const NO_DESCRIPTOR: u64 = 1 << 8;
        match self.request() {
            Some(
                FrontendReq::SET_VRING_KICK
                | FrontendReq::SET_VRING_CALL
                | FrontendReq::SET_VRING_ERR,
            ) => word64(self.body(), 0).is_none_or(|number| number & NO_DESCRIPTOR == 0),
            Some(
                FrontendReq::SET_MEM_TABLE
                | FrontendReq::ADD_MEM_REG
                | FrontendReq::SET_LOG_BASE
                | FrontendReq::SET_LOG_FD
                | FrontendReq::SET_BACKEND_REQ_FD
                | FrontendReq::SET_INFLIGHT_FD
                | FrontendReq::SET_DEVICE_STATE_FD
                | FrontendReq::GPU_SET_SOCKET,
            ) => true,
            _ => false,
        }
    }

    /// The bytes after the header.
    pub(super) fn body(&self) -> &[u8] {
        self.0.get(HEADER_LEN..).unwrap_or(&[])
    }

    /// The length that the header says, with the header; `None` if the header is not whole, or if the crate refuses it.
    pub(super) fn whole_len(&self) -> Option<usize> {
        let (request, flags, len) = (self.word(0)?, self.word(1)?, self.word(2)?);
        let len = usize::try_from(len).ok()?;
        let is_valid = FrontendReq::try_from(request).is_ok()
            && len <= MAX_MSG_SIZE
            && flags & VERSION_MASK == VERSION
            && flags & !KNOWN_FLAGS == 0;
        is_valid.then_some(HEADER_LEN + len)
    }

    fn word(&self, index: usize) -> Option<u32> {
        word32(&self.0, index * 4)
    }
}

/// The word of 32 bits at this byte.
pub(super) fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

/// The word of 64 bits at this byte.
pub(super) fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*word))
}

/// Sends all bytes, with descriptors. The socket takes a message of [`MAX_MESSAGE`] bytes at once or not at all, unless its
/// buffer is very small.
///
/// # Errors
/// `WouldBlock`: the peer has not read what was sent before. Others: the connection is gone.
pub(super) fn send(
    socket: &UnixStream,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// Reads what there is, up to the length of `bytes`, without waiting. `Ok(0)`: the connection has ended.
///
/// # Errors
/// `WouldBlock`: there is nothing yet. Others: the connection is gone.
pub(super) fn receive(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    read(socket, bytes, RecvFlags::empty())
}

fn read(socket: &UnixStream, bytes: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    loop {
        match rustix::net::recv(socket, &mut *bytes, flags | RecvFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            // The peer has closed its end, and has left bytes unread.
            Err(Errno::CONNRESET) => return Ok(0),
            got => return Ok(got?.0),
        }
    }
}

/// How much of the next message is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peeked {
    /// All of it.
    Whole,
    /// Not all of it yet.
    Partial,
    /// A header that the crate refuses.
    Invalid,
    /// A part, perhaps nothing, and the VMM has closed its end.
    Ended,
}

/// The VMM's messages. One at a time is looked at; it stays in the socket until it is [consumed](Self::consume), so that
/// a later process finds it there if this one dies.
///
/// The socket's peek offset is the number of bytes of that message that were looked at. If all were, and some are gone
/// from the offset later, as many bytes were consumed.
#[derive(Debug)]
pub(super) struct Inbox {
    socket: UnixStream,
    message: MessageBytes,
    files: Vec<OwnedFd>,
}

impl Inbox {
    /// The messages in `socket`, none of which was looked at.
    ///
    /// # Errors
    /// The kernel has no peek offsets.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        set_peek_offset(socket.as_fd(), 0)?;
        Ok(Self::looked_at(socket))
    }

    /// The messages in `socket`, of which the first was looked at. The caller must [consume](Self::consume_expected) what is
    /// left of it. Until then the peek offset stays: if this process dies, too, the next one needs it.
    pub(super) fn looked_at(socket: UnixStream) -> Self {
        Self {
            socket,
            message: MessageBytes::default(),
            files: Vec::new(),
        }
    }

    /// The VMM's socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The bytes that were looked at.
    pub(super) fn message(&self) -> &MessageBytes {
        &self.message
    }

    /// The descriptors of a whole message: no more than the crate takes.
    pub(super) fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    /// Looks at the next message, as far as it has come.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn peek(&mut self) -> io::Result<Peeked> {
        loop {
            let seen = self.message.0.len();
            let wanted = match self.message.whole_len() {
                Some(len) => len,
                None if seen < HEADER_LEN => HEADER_LEN,
                None => return Ok(Peeked::Invalid),
            };
            if seen >= HEADER_LEN && seen == wanted {
                // If the bytes that were looked at have no descriptors, the kernel gives those of the next bytes that have
                // some: another message's.
                if !self.message.has_files() {
                    self.files.clear();
                }
                return Ok(Peeked::Whole);
            }
            let mut bytes = [0; MAX_MESSAGE];
            let room = bytes.get_mut(..wanted - seen).unwrap_or(&mut []);
            let got = if seen == 0 {
                self.peek_first(room)
            } else {
                read(&self.socket, room, RecvFlags::PEEK)
            };
            match got {
                Ok(0) => return Ok(Peeked::Ended),
                Ok(count) => {
                    let new = room.get(..count).unwrap_or(&[]);
                    self.message.0.extend(new);
                }
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Peeked::Partial);
                }
                Err(cause) => return Err(cause),
            }
        }
    }

    /// Looks at the first bytes, and gets copies of their descriptors, if they have some.
    fn peek_first(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = loop {
            let mut slices = [IoSliceMut::new(bytes)];
            match rustix::net::recvmsg(&self.socket, &mut slices, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(0),
                got => break got?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        Ok(got.bytes)
    }

    /// Takes the last `count` bytes of `message` out of the socket. Returns whether they were there.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn consume_expected(
        &mut self,
        message: &MessageBytes,
        count: usize,
    ) -> io::Result<bool> {
        let at = message.0.len().saturating_sub(count);
        let mut expected = message.0.get(at..).unwrap_or(&[]);
        let mut bytes = [0; MAX_MESSAGE];
        while !expected.is_empty() {
            let room = bytes.get_mut(..expected.len()).unwrap_or(&mut []);
            let count = match receive(&self.socket, room) {
                Ok(count) if count > 0 => count,
                Err(cause) if cause.kind() != io::ErrorKind::WouldBlock => return Err(cause),
                _ => return Ok(false),
            };
            let (now, later) = expected.split_at_checked(count).unwrap_or((expected, &[]));
            if room.get(..count) != Some(now) {
                return Ok(false);
            }
            expected = later;
        }
        Ok(true)
    }

    /// Takes the next `len` bytes, which were looked at, out of the socket, and forgets the message.
    ///
    /// # Errors
    /// They are not there.
    pub(super) fn consume(&mut self, len: usize) -> io::Result<()> {
        let mut left = len;
        let mut bytes = [0; MAX_MESSAGE];
        while left > 0 {
            let room = bytes.get_mut(..left.min(MAX_MESSAGE)).unwrap_or(&mut []);
            match receive(&self.socket, room)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => left = left.saturating_sub(count),
            }
        }
        self.message.0.clear();
        self.files.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;

    use super::*;
    use crate::process::inherited::is_same_file;
    use crate::process::peek::peek_offset;

    fn inbox() -> (UnixStream, Inbox) {
        let (vmm, ours) = UnixStream::pair().expect("sockets");
        (vmm, Inbox::new(ours).expect("peek offsets"))
    }

    fn offset(inbox: &Inbox) -> Option<u32> {
        peek_offset(inbox.socket().as_fd()).expect("an offset")
    }

    #[test]
    fn a_message_stays_until_it_is_consumed() {
        let (mut vmm, mut inbox) = inbox();
        assert_eq!(inbox.peek().expect("peeked"), Peeked::Partial);
        let first = MessageBytes::new(FrontendReq::SET_VRING_NUM, &[7; 8]);
        let second = MessageBytes::new(FrontendReq::SET_OWNER, &[]);
        vmm.write_all(&[first.0.clone(), second.0.clone()].concat())
            .expect("sent");
        for message in [&first, &second] {
            assert_eq!(inbox.peek().expect("peeked"), Peeked::Whole);
            assert_eq!(inbox.message(), message);
            assert_eq!(offset(&inbox), u32::try_from(message.0.len()).ok());
            // Another process would find the same.
            let copy = inbox.socket().try_clone().expect("a copy");
            inbox = Inbox::new(copy).expect("peek offsets");
            assert_eq!(inbox.peek().expect("peeked"), Peeked::Whole);
            assert_eq!(inbox.message(), message);
            inbox.consume(message.0.len()).expect("consumed");
            assert_eq!(offset(&inbox), Some(0));
        }
        drop(vmm);
        assert_eq!(inbox.peek().expect("peeked"), Peeked::Ended);
    }

    #[test]
    fn a_message_may_come_byte_by_byte_with_descriptors() {
        let (mut vmm, mut inbox) = inbox();
        let message = MessageBytes::new(FrontendReq::SET_VRING_CALL, &[0; 8]);
        let (first, rest) = message.0.split_at(1);
        let (one, other) = io::pipe().expect("a pipe");
        let files = [one.as_fd(), other.as_fd()];
        assert_eq!(send(&vmm, first, &files).expect("sent"), 1);
        for byte in rest {
            assert_eq!(inbox.peek().expect("peeked"), Peeked::Partial);
            vmm.write_all(&[*byte]).expect("sent");
        }
        assert_eq!(inbox.peek().expect("peeked"), Peeked::Whole);
        assert_eq!(inbox.message(), &message);
        assert_eq!(inbox.files().len(), 2);
        inbox.consume(message.0.len()).expect("consumed");
        assert_eq!(offset(&inbox), Some(0));
    }

    #[test]
    fn descriptors_belong_to_the_message_with_which_they_came() {
        let (vmm, mut inbox) = inbox();
        let (one, other) = io::pipe().expect("a pipe");
        let plain = MessageBytes::new(FrontendReq::SET_OWNER, &[]);
        let none = MessageBytes::new(FrontendReq::SET_VRING_KICK, &0x100u64.to_ne_bytes());
        let kick = MessageBytes::new(FrontendReq::SET_VRING_KICK, &[0; 8]);
        let sent = [
            (&plain, vec![]),
            (&none, vec![]),
            (&kick, vec![one.as_fd()]),
            (&plain, vec![]),
            (&kick, vec![other.as_fd()]),
        ];
        for (message, files) in &sent {
            send(&vmm, &message.0, files).expect("sent");
        }
        for (message, files) in &sent {
            assert_eq!(inbox.peek().expect("peeked"), Peeked::Whole);
            assert_eq!(inbox.message(), *message);
            assert_eq!(inbox.files().len(), files.len());
            let pairs = inbox.files().iter().zip(files);
            for (got, sent) in pairs {
                assert_ne!(is_same_file(got.as_fd(), *sent), Some(false));
            }
            inbox.consume(message.0.len()).expect("consumed");
        }
    }

    #[test]
    fn what_is_left_when_the_vmm_ends_is_seen() {
        let (mut vmm, mut inbox) = inbox();
        let message = MessageBytes::new(FrontendReq::SET_VRING_NUM, &[7; 8]);
        vmm.write_all(&message.0[..15]).expect("sent");
        vmm.shutdown(Shutdown::Write).expect("ended");
        assert_eq!(inbox.peek().expect("peeked"), Peeked::Ended);
        assert_eq!(inbox.message().0, message.0[..15]);
    }

    #[test]
    fn headers_that_the_crate_refuses_are_invalid() {
        for words in [[0, 1, 0], [45, 1, 0], [3, 0, 0], [3, 0x11, 0], [3, 1, 4097]] {
            let (mut vmm, mut inbox) = inbox();
            let bytes = words.map(u32::to_ne_bytes).concat();
            vmm.write_all(&bytes).expect("sent");
            assert_eq!(inbox.peek().expect("peeked"), Peeked::Invalid, "{words:?}");
            assert_eq!(inbox.message().0, bytes);
        }
    }

    #[test]
    fn the_request_for_a_reply_can_be_taken_away() {
        let mut message = MessageBytes::new(FrontendReq::SET_OWNER, &[]);
        let plain = message.clone();
        message.0[4] |= 8;
        assert_ne!(message, plain);
        assert_eq!(message.whole_len(), Some(HEADER_LEN));
        assert_eq!(message.without_need_reply(), plain);
    }
}
