//! Messages over Unix stream sockets, with their descriptors. Nothing here waits.
//!
//! A descriptor belongs to the message that it was sent with.

mod gather;
mod outbox;
mod outgoing;
mod queue;
mod receiver;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;

pub use self::outbox::Outbox;
pub use self::outgoing::OutgoingFd;
pub(super) use self::queue::send_with_descriptors;
pub(super) use self::receiver::AHEAD;
pub use self::receiver::Receiver;
use super::message::{Header, MAX_DESCRIPTORS, Malformed};

/// A message. Its body is a copy, or a part of the receiver's buffer.
#[derive(Debug)]
pub struct Message<Body = Vec<u8>> {
    /// The header.
    pub header: Header,
    /// The `header.body_len` bytes after the header; none of a refusal, whatever the peer sent.
    pub body: Body,
    /// The descriptors received with it; they are closed on exec.
    pub descriptors: Vec<OwnedFd>,
    /// An earlier process has received a part of it. If that had descriptors, they are gone.
    pub lost_descriptors: bool,
    /// The stream position after it; 0 if the receiver's bytes end with this process.
    pub end: u64,
}

/// The outcome of [`Receiver::receive`].
#[derive(Debug)]
pub enum Received<Body = Vec<u8>> {
    /// A message.
    Message(Message<Body>),
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

/// Whether a descriptor that a peer has sent is a Unix stream socket. To wait for another file could take as long as its
/// file system likes.
pub(super) fn is_stream_socket(fd: impl AsFd) -> bool {
    let fd = fd.as_fd();
    rustix::net::sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && rustix::net::sockopt::socket_type(fd) == Ok(SocketType::STREAM)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

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
