//! A process that has connected to a readers' socket, and what it sends.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::registry::Reader;
use super::sys::receive;
use super::wire::{FRAME_LEN, Frame};

/// A connected process.
pub(super) struct Peer {
    pub(super) state: PeerState,
    /// The frame being received, of which `filled` bytes have arrived.
    pub(super) frame: [u8; FRAME_LEN],
    pub(super) filled: usize,
}

pub(super) enum PeerState {
    /// It has not greeted yet.
    Connected {
        stream: UnixStream,
        /// The index of the socket that it connected to.
        listener: usize,
        /// The server refuses the peer if it has not greeted by this time.
        deadline: Instant,
    },
    Registered(Arc<Reader>),
    /// A disconnected reader that may still be inside an access: the thread waits for the end of its process.
    Leaving(Arc<Reader>),
}

/// The input from a peer.
pub(super) enum Input {
    Frame(Frame),
    /// No whole frame yet.
    Incomplete,
    /// The peer has closed the connection.
    Closed,
    /// A breach of the protocol, as the rest of a sentence about the peer.
    Breach(&'static str),
}

impl Peer {
    fn stream(&self) -> Option<&UnixStream> {
        match &self.state {
            PeerState::Connected { stream, .. } => Some(stream),
            PeerState::Registered(reader) => Some(reader.stream()),
            PeerState::Leaving(_) => None,
        }
    }

    /// Receives as much of the next frame as has arrived.
    pub(super) fn receive(&mut self) -> Input {
        let mut frame = self.frame;
        let filled = self.filled;
        let Some(stream) = self.stream() else {
            return Input::Incomplete;
        };
        let received = receive(stream, frame.get_mut(filled..).unwrap_or_default(), false);
        self.frame = frame;
        match received {
            Ok((_, fds)) if !fds.is_empty() => Input::Breach("sends descriptors"),
            Ok((0, _)) if filled > 0 => Input::Breach("hangs up within a frame"),
            Ok((0, _)) => Input::Closed,
            Ok((got, _)) => {
                self.filled += got;
                if self.filled < FRAME_LEN {
                    return Input::Incomplete;
                }
                self.filled = 0;
                Input::Frame(Frame::from_wire(&self.frame))
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => Input::Incomplete,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => Input::Incomplete,
            Err(_) => Input::Closed,
        }
    }
}
