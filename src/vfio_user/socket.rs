//! Messages over Unix stream sockets, with their descriptors. Nothing here waits.
//!
//! A descriptor belongs to the message that it was sent with. The receiver therefore reads up to the
//! end of a header, then up to the end of the message, and never further: a longer read could return
//! descriptors of the next message.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType,
};
use thiserror::Error;

use super::message::{HEADER_BYTES, Header, Kind, MAX_DESCRIPTORS, Malformed};

/// The receiver allocates this many bytes of a body at a time: the peer may declare a large body and
/// never send it.
const STEP: usize = 64 << 10;

/// A message.
#[derive(Debug)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// The `header.body_len` bytes after the header; none of a refusal, whatever the peer sent.
    pub body: Vec<u8>,
    /// The descriptors received with it; they are closed on exec.
    pub descriptors: Vec<OwnedFd>,
}

/// The outcome of [`Receiver::receive`].
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// No complete message yet.
    Nothing,
    /// The peer hung up between two messages.
    End,
}

/// Why nothing more can be received from a peer.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The peer sent an invalid header.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The peer hung up within a message.
    #[error("the peer hung up within a message")]
    Truncated,
    /// The kernel dropped descriptors of a message.
    #[error(
        "the kernel dropped descriptors of a message: it has more than {MAX_DESCRIPTORS}, or this \
         process has too many files open; raise RLIMIT_NOFILE"
    )]
    LostDescriptors,
    /// The socket failed.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// Assembles messages from the bytes received.
#[derive(Debug, Default)]
pub struct Receiver {
    head: [u8; HEADER_BYTES],
    head_len: usize,
    header: Option<Header>,
    body: Vec<u8>,
    body_len: usize,
    descriptors: Vec<OwnedFd>,
}

impl Receiver {
    /// Receives the bytes available, up to the end of one message.
    ///
    /// # Errors
    /// Nothing more can be received after an error.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Received, SocketError> {
        loop {
            let Some(header) = self.header else {
                let head = &mut self.head[self.head_len..];
                match receive_some(socket.as_fd(), head, &mut self.descriptors)? {
                    None => return Ok(Received::Nothing),
                    Some(0) if self.head_len == 0 => return Ok(Received::End),
                    Some(0) => return Err(SocketError::Truncated),
                    Some(n) => self.head_len += n,
                }
                if self.head_len == HEADER_BYTES {
                    self.header = Some(Header::decode(&self.head)?);
                }
                continue;
            };
            if self.body_len == header.body_len {
                self.head_len = 0;
                self.header = None;
                self.body_len = 0;
                let mut body = std::mem::take(&mut self.body);
                let mut header = header;
                if matches!(header.kind, Kind::Refusal(_)) {
                    // The errno in the header says all.
                    body = Vec::new();
                    header.body_len = 0;
                }
                return Ok(Received::Message(Message {
                    header,
                    body,
                    descriptors: std::mem::take(&mut self.descriptors),
                }));
            }
            if self.body.len() == self.body_len {
                let room = (header.body_len - self.body_len).min(STEP);
                self.body.resize(self.body_len + room, 0);
            }
            let body = &mut self.body[self.body_len..];
            match receive_some(socket.as_fd(), body, &mut self.descriptors)? {
                None => return Ok(Received::Nothing),
                Some(0) => return Err(SocketError::Truncated),
                Some(n) => self.body_len += n,
            }
        }
    }
}

/// A descriptor to send with a message.
#[derive(Debug)]
pub enum OutgoingFd {
    /// It is closed when it is sent.
    Owned(OwnedFd),
    /// It has other users.
    Shared(Arc<File>),
}

impl AsFd for OutgoingFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Owned(fd) => fd.as_fd(),
            Self::Shared(file) => file.as_fd(),
        }
    }
}

/// Messages to send, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Outgoing>,
    /// Unsent bytes in the queue.
    bytes: usize,
    /// Descriptors in the queue.
    descriptors: usize,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Sent with the first byte, then empty.
    descriptors: Vec<OutgoingFd>,
}

impl Outbox {
    /// Queues a message, header and body, with at most [`MAX_DESCRIPTORS`] descriptors.
    pub fn push(&mut self, bytes: Vec<u8>, descriptors: Vec<OutgoingFd>) {
        self.bytes += bytes.len();
        self.descriptors += descriptors.len();
        self.queue.push_back(Outgoing {
            bytes,
            sent: 0,
            descriptors,
        });
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Unsent bytes.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// Unsent descriptors, which stay open until they are sent.
    pub fn len_descriptors(&self) -> usize {
        self.descriptors
    }

    /// Sends as much as the socket accepts.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        while let Some(first) = self.queue.front_mut() {
            let rest = &first.bytes[first.sent..];
            let Some(sent) = send_some(socket.as_fd(), rest, &first.descriptors)? else {
                return Ok(());
            };
            self.descriptors = self.descriptors.saturating_sub(first.descriptors.len());
            first.descriptors.clear();
            first.sent += sent;
            self.bytes = self.bytes.saturating_sub(sent);
            if first.sent == first.bytes.len() {
                self.queue.pop_front();
            }
        }
        Ok(())
    }
}

/// Whether a descriptor that a peer has sent is a Unix stream socket. To wait for another file could take as long as its
/// file system likes.
pub(super) fn is_stream_socket(fd: impl AsFd) -> bool {
    let fd = fd.as_fd();
    rustix::net::sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && rustix::net::sockopt::socket_type(fd) == Ok(SocketType::STREAM)
}

/// Receives bytes into `buffer`, which is not empty. Returns their number, 0 at the end of the stream,
/// or `None` if there are none yet.
fn receive_some(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, SocketError> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        let mut into = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut into, &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            // The peer hung up with unread bytes, which is an ordinary end.
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(cause) => return Err(SocketError::System(cause.into())),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS {
        return Err(SocketError::LostDescriptors);
    }
    Ok(Some(received.bytes))
}

/// Sends some of `bytes`, with all of `descriptors`. Returns the number of bytes, or `None` if the
/// socket accepts none yet.
fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[OutgoingFd],
) -> io::Result<Option<usize>> {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message with {} descriptors", borrowed.len()),
        ));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(sent) => return Ok(Some(sent)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(cause) => return Err(cause.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;
    use crate::vfio_user::message::Command;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().expect("sockets")
    }

    fn message(id: u16, body: &[u8]) -> Vec<u8> {
        Header::command(id, Command::RegionWrite, 0).with_body(body)
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").expect("open").into()
    }

    fn next(receiver: &mut Receiver, socket: &UnixStream) -> Message {
        match receiver.receive(socket) {
            Ok(Received::Message(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn descriptors_stay_with_their_message_and_are_closed_on_exec() {
        let (here, there) = pair();
        let mut outbox = Outbox::default();
        outbox.push(message(1, b"first"), vec![OutgoingFd::Owned(null())]);
        outbox.push(message(2, b"second"), Vec::new());
        let shared = Arc::new(File::open("/dev/null").expect("open"));
        let three = (0..3).map(|_| OutgoingFd::Shared(shared.clone())).collect();
        outbox.push(message(3, b""), three);
        outbox.flush(&here).expect("sent");
        assert!(outbox.is_empty());
        let mut receiver = Receiver::default();
        for (id, body, descriptors) in [(1, "first", 1), (2, "second", 0), (3, "", 3)] {
            let message = next(&mut receiver, &there);
            assert_eq!(message.header.id, id);
            assert_eq!(message.body, body.as_bytes());
            assert_eq!(message.descriptors.len(), descriptors);
            for fd in &message.descriptors {
                let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
                let text = std::fs::read_to_string(info).expect("open");
                let flags = text.lines().find_map(|l| l.strip_prefix("flags:"));
                let flags = flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok());
                assert_ne!(flags.expect("flags") & libc::O_CLOEXEC, 0);
            }
        }
        assert!(matches!(receiver.receive(&there), Ok(Received::Nothing)));
        drop(here);
        assert!(matches!(receiver.receive(&there), Ok(Received::End)));
    }

    #[test]
    fn a_stream_that_ends_within_a_message_is_an_error() {
        for bytes in [&message(1, b"body")[..7], &message(1, b"body")[..18]] {
            let (mut here, there) = pair();
            here.write_all(bytes).expect("sent");
            let mut receiver = Receiver::default();
            assert!(matches!(receiver.receive(&there), Ok(Received::Nothing)));
            drop(here);
            assert!(matches!(
                receiver.receive(&there),
                Err(SocketError::Truncated)
            ));
        }
    }

    #[test]
    fn a_declared_body_is_not_allocated_before_it_is_received() {
        let (mut here, there) = pair();
        let header = Header::command(1, Command::RegionWrite, 1 << 20);
        here.write_all(&header.encode()).expect("sent");
        let mut receiver = Receiver::default();
        assert!(matches!(receiver.receive(&there), Ok(Received::Nothing)));
        assert!(receiver.body.capacity() <= STEP);
    }

    #[test]
    fn a_full_socket_accepts_the_rest_later_and_the_descriptors_once() {
        let (here, mut there) = pair();
        let mut outbox = Outbox::default();
        let body = vec![7; 1 << 20];
        outbox.push(message(1, &body), vec![OutgoingFd::Owned(null())]);
        outbox.flush(&here).expect("sent");
        assert!(!outbox.is_empty());
        let mut receiver = Receiver::default();
        let message = loop {
            match receiver.receive(&there).expect("received") {
                Received::Message(message) => break message,
                Received::Nothing => outbox.flush(&here).expect("sent"),
                Received::End => panic!("hung up"),
            }
        };
        assert_eq!((message.body, message.descriptors.len()), (body, 1));
        assert_eq!((outbox.len_bytes(), outbox.len_descriptors()), (0, 0));
        there.set_nonblocking(true).expect("set");
        assert!(there.read(&mut [0]).is_err(), "nothing is left");
    }

    #[test]
    fn sending_to_a_closed_peer_is_an_error_and_raises_no_signal() {
        let (here, there) = pair();
        drop(there);
        let mut outbox = Outbox::default();
        outbox.push(message(1, b""), Vec::new());
        assert!(outbox.flush(&here).is_err());
    }

    proptest! {
        #[test]
        fn messages_arrive_whole_however_they_are_cut(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 1..8),
            cuts in proptest::collection::vec(1..50usize, 1..20),
        ) {
            let (mut here, there) = pair();
            let all: Vec<u8> = bodies.iter().zip(1..).flat_map(|(b, id)| message(id, b)).collect();
            let mut receiver = Receiver::default();
            let mut received = Vec::new();
            let mut rest = &all[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at(rest.len().min(*cut));
                here.write_all(now).expect("sent");
                rest = later;
                while let Received::Message(m) = receiver.receive(&there).expect("received") {
                    received.push(m.body);
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(received, bodies);
        }
    }
}
