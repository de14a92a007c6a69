//! Received messages, assembled from the bytes of a stream.
//!
//! A receiver reads either up to the end of a message, or ahead. A read ahead may return descriptors of a later message
//! than the first one in it. Linux ends a read with the piece that has descriptors (`unix_stream_read_generic`), so one
//! read never returns descriptors of two pieces, and nothing that was sent after them. A sender that sends each message
//! with a call of its own therefore means the last message that begins in the bytes of that read.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use super::{Message, Received, SocketError};
use crate::vfio_user::kept::KeptInput;
use crate::vfio_user::message::{HEADER_BYTES, Header, Kind, MAX_DESCRIPTORS, Malformed};

/// The receiver makes room for this many bytes of a body at first, and then for as many as it has received: the peer
/// may declare a large body and never send it.
const STEP: usize = 64 << 10;
/// How far a receiver reads ahead. A message longer than this is read by itself.
pub(in crate::vfio_user) const AHEAD: usize = 32 << 10;
/// A larger buffer is freed as soon as its message was handled.
const KEPT: usize = 256 << 10;

/// Assembles messages from the bytes received.
#[derive(Debug, Default)]
pub struct Receiver {
    /// Whether it may read beyond the end of a message.
    reads_ahead: bool,
    /// Room for received bytes. Those of messages that were not returned yet are at `first..end`.
    buffer: Buffer,
    first: usize,
    end: usize,
    /// The header of the first message.
    header: Option<Header>,
    /// Descriptors of the last message that begins before `descriptors_end`.
    descriptors: Vec<OwnedFd>,
    descriptors_end: usize,
    /// The last read has found the socket empty, most likely: the next one is left to the caller's next event.
    is_drained: bool,
}

/// Where received bytes are.
#[derive(Debug)]
enum Buffer {
    /// In memory of this process.
    Own(Vec<u8>),
    /// In memory that outlives it.
    Kept(Box<KeptInput>),
}

impl Default for Buffer {
    fn default() -> Self {
        Self::Own(Vec::new())
    }
}

impl Buffer {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Kept(input) => input.memory(),
        }
    }

    /// The room for up to `room` bytes from `end` on.
    fn room(&mut self, end: usize, room: usize) -> &mut [u8] {
        match self {
            Self::Own(bytes) => {
                if bytes.len() < end + room {
                    bytes.reserve_exact(end + room - bytes.len());
                    bytes.resize(end + room, 0);
                }
                &mut bytes[end..end + room]
            }
            Self::Kept(input) => {
                let rest = input.memory_mut().get_mut(end..).unwrap_or_default();
                let room = room.min(rest.len());
                &mut rest[..room]
            }
        }
    }
}

impl Receiver {
    /// A receiver that reads ahead, for a peer that sends each message with a call of its own. It takes fewer system
    /// calls if the peer has several messages in flight. [`Self::has_message`] tells whether a message is left that no
    /// event reports. The caller must wait for an event when the receiver has returned nothing.
    pub fn reading_ahead() -> Self {
        Self {
            reads_ahead: true,
            ..Self::default()
        }
    }

    /// A receiver whose bytes outlive this process. It begins with those that an earlier process has left.
    /// [`Self::set_handled`] must follow each message, at the latest before the next one is received.
    pub(in crate::vfio_user) fn kept(input: KeptInput, reads_ahead: bool) -> Self {
        let (first, end) = input.unhandled();
        Self {
            reads_ahead,
            first,
            end,
            buffer: Buffer::Kept(Box::new(input)),
            ..Self::default()
        }
    }

    /// The stream position after the last message that was returned; 0 if the bytes end with this process.
    pub(in crate::vfio_user) fn position(&self) -> u64 {
        match &self.buffer {
            Buffer::Own(_) => 0,
            Buffer::Kept(input) => input.position(self.first),
        }
    }

    /// The record says that all messages up to this stream position were handled.
    pub(in crate::vfio_user) fn set_handled(&mut self, position: u64) {
        if let Buffer::Kept(input) = &mut self.buffer {
            input.set_handled(position);
        }
    }

    /// Receives the bytes available, up to the end of one message.
    ///
    /// # Errors
    /// Nothing more can be received after an error.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Received, SocketError> {
        Ok(match self.receive_in_place(socket)? {
            Received::Message(message) => Received::Message(Message {
                header: message.header,
                body: message.body.to_vec(),
                descriptors: message.descriptors,
                lost_descriptors: message.lost_descriptors,
                end: message.end,
            }),
            Received::Nothing => Received::Nothing,
            Received::End => Received::End,
        })
    }

    /// The same without a copy of the body.
    ///
    /// # Errors
    /// Nothing more can be received after an error.
    pub fn receive_in_place(&mut self, socket: impl AsFd) -> Result<Received<&[u8]>, SocketError> {
        loop {
            let missing = self.missing()?;
            if missing == 0 {
                return Ok(self.take_message());
            }
            self.make_room();
            if std::mem::take(&mut self.is_drained) {
                return Ok(Received::Nothing);
            }
            match self.receive_some(socket.as_fd(), missing)? {
                None => return Ok(Received::Nothing),
                Some(0) if self.first == self.end => return Ok(Received::End),
                Some(0) => return Err(SocketError::Truncated),
                Some(_) => {}
            }
        }
    }

    /// Whether the next message, or an error, is in the bytes that were read ahead.
    pub fn has_message(&self) -> bool {
        match (self.header, self.peek_header()) {
            (Some(header), _) | (None, Some(Ok(header))) => {
                self.end - self.first >= HEADER_BYTES + header.body_len
            }
            (None, Some(Err(_))) => true,
            (None, None) => false,
        }
    }

    /// The header of the first message, if all of it was received.
    fn peek_header(&self) -> Option<Result<Header, Malformed>> {
        let received = self.buffer.as_slice().get(self.first..self.end)?;
        Some(Header::decode(received.first_chunk()?))
    }

    /// The number of bytes to receive before the first message goes on: up to the end of its header or its body.
    fn missing(&mut self) -> Result<usize, SocketError> {
        let received = self.end - self.first;
        if self.header.is_none() {
            self.header = self.peek_header().transpose()?;
        }
        let wanted = match self.header {
            Some(header) => HEADER_BYTES + header.body_len,
            None => HEADER_BYTES,
        };
        Ok(wanted.saturating_sub(received))
    }

    /// Takes the first message, which is complete.
    fn take_message(&mut self) -> Received<&[u8]> {
        let Some(mut header) = self.header.take() else {
            return Received::Nothing;
        };
        let body = self.first + HEADER_BYTES..self.first + HEADER_BYTES + header.body_len;
        let lost_descriptors = match &self.buffer {
            Buffer::Own(_) => false,
            Buffer::Kept(input) => input.is_before_death(self.first),
        };
        self.first = body.end;
        let end = self.position();
        // It is the last message that begins before the end of the read.
        let descriptors = if self.first >= self.descriptors_end {
            std::mem::take(&mut self.descriptors)
        } else {
            Vec::new()
        };
        let mut body = self.buffer.as_slice().get(body).unwrap_or_default();
        if matches!(header.kind, Kind::Refusal(_)) {
            // The errno in the header says all.
            body = &[];
            header.body_len = 0;
        }
        Received::Message(Message {
            header,
            body,
            descriptors,
            lost_descriptors,
            end,
        })
    }

    /// Receives bytes: `missing` of them, or more if the receiver may read ahead. Returns their number, 0 at the end of
    /// the stream, or `None` if there are none yet.
    fn receive_some(
        &mut self,
        socket: BorrowedFd<'_>,
        missing: usize,
    ) -> Result<Option<usize>, SocketError> {
        let received = self.end - self.first;
        let step = missing.min(STEP.max(received));
        // The first message may get more descriptors: those of a later message must not join them.
        let room = if self.reads_ahead && self.descriptors.is_empty() {
            step.max(AHEAD)
        } else {
            step
        };
        let into = self.buffer.room(self.end, room);
        let room = into.len();
        if room == 0 {
            return Err(SocketError::System(io::Error::other(
                "its message has no room",
            )));
        }
        let before = self.descriptors.len();
        let Some(count) = receive_bytes(socket, into, &mut self.descriptors)? else {
            return Ok(None);
        };
        if let Buffer::Kept(input) = &mut self.buffer {
            input.count_in(socket, count)?;
        }
        self.end += count;
        if self.descriptors.len() > before {
            self.descriptors_end = self.end;
        }
        // A peer with one message in flight sends the next one when it has its reply. If several messages have come,
        // more of them are under way.
        let is_short = count < room && self.descriptors.len() == before;
        self.is_drained = self.reads_ahead && is_short && count > 0 && self.missing()? == 0 && {
            let first = self.header.map_or(0, |h| HEADER_BYTES + h.body_len);
            self.end - self.first == first
        };
        Ok(Some(count))
    }

    /// Moves the received bytes to the front of the buffer, and frees a large one that has none.
    fn make_room(&mut self) {
        let moved = match &mut self.buffer {
            Buffer::Own(bytes) => {
                if self.first > 0 {
                    bytes.copy_within(self.first..self.end, 0);
                }
                if self.first == self.end && bytes.len() > KEPT {
                    *bytes = Vec::new();
                }
                self.first
            }
            Buffer::Kept(input) => input.make_room(),
        };
        self.descriptors_end = self.descriptors_end.saturating_sub(moved);
        self.end -= moved;
        self.first -= moved;
    }
}

/// Receives bytes into `buffer`, which is not empty. Returns their number, 0 at the end of the stream,
/// or `None` if there are none yet.
fn receive_bytes(
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::super::{Outbox, OutgoingFd};
    use super::*;
    use crate::vfio_user::message::Command;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().expect("sockets")
    }

    fn capacity(receiver: &Receiver) -> usize {
        match &receiver.buffer {
            Buffer::Own(bytes) => bytes.capacity(),
            Buffer::Kept(_) => panic!("it was not asked for"),
        }
    }

    #[test]
    fn a_declared_body_is_not_allocated_before_it_is_received() {
        let (mut here, there) = pair();
        let header = Header::command(1, Command::RegionWrite, 1 << 20);
        here.write_all(&header.encode()).expect("sent");
        let mut receiver = Receiver::default();
        assert!(matches!(receiver.receive(&there), Ok(Received::Nothing)));
        assert!(capacity(&receiver) <= HEADER_BYTES + STEP);
    }

    fn message(id: u16, body: &[u8]) -> Vec<u8> {
        Header::command(id, Command::RegionWrite, 0).with_body(body)
    }

    fn null() -> OutgoingFd {
        OutgoingFd::Owned(File::open("/dev/null").expect("open").into())
    }

    /// The id of each message that was sent, and the number of its descriptors.
    fn receive_all(receiver: &mut Receiver, socket: &UnixStream) -> Vec<(u16, usize)> {
        let mut all = Vec::new();
        let mut nothings = 0;
        // The first time, the receiver may only have left the socket to the next event.
        while nothings < 2 {
            match receiver.receive(socket).expect("received") {
                Received::Message(message) => {
                    all.push((message.header.id, message.descriptors.len()));
                }
                Received::Nothing => nothings += 1,
                Received::End => break,
            }
        }
        all
    }

    #[test]
    fn messages_that_were_read_ahead_keep_their_descriptors() {
        let (here, there) = pair();
        let mut outbox = Outbox::default();
        let sent = [0, 0, 2, 0, 1, 1, 0, 0, 3];
        for (id, count) in (1..).zip(sent) {
            let descriptors = (0..count).map(|_| null()).collect();
            outbox.push(message(id, b"body"), descriptors);
        }
        outbox.flush(&here).expect("sent");
        let mut receiver = Receiver::reading_ahead();
        let received = receive_all(&mut receiver, &there);
        let expected: Vec<_> = (1..).zip(sent).collect();
        assert_eq!(received, expected);
    }

    /// The first bytes of a message, which have its descriptors, come with the message before.
    #[test]
    fn descriptors_of_an_incomplete_message_wait_for_its_end() {
        let (mut here, there) = pair();
        let mut receiver = Receiver::reading_ahead();
        let second = message(2, b"second");
        for cut in [1, 15, 16, 17] {
            let mut outbox = Outbox::default();
            outbox.push(message(1, b"first"), Vec::new());
            outbox.push(second[..cut].to_vec(), vec![null()]);
            outbox.flush(&here).expect("sent");
            assert_eq!(receive_all(&mut receiver, &there), [(1, 0)]);
            here.write_all(&second[cut..]).expect("sent");
            outbox.push(message(3, b"third"), vec![null(), null()]);
            outbox.flush(&here).expect("sent");
            assert_eq!(receive_all(&mut receiver, &there), [(2, 1), (3, 2)]);
        }
    }

    #[test]
    fn a_message_that_was_read_ahead_needs_no_event() {
        let (mut here, there) = pair();
        let mut receiver = Receiver::reading_ahead();
        assert!(!receiver.has_message());
        here.write_all(&[message(1, b"a"), message(2, b"b"), message(3, b"c")].concat()[..40])
            .expect("sent");
        assert!(matches!(receiver.receive(&there), Ok(Received::Message(m)) if m.header.id == 1));
        assert!(receiver.has_message());
        assert!(matches!(receiver.receive(&there), Ok(Received::Message(m)) if m.header.id == 2));
        assert!(!receiver.has_message());
    }

    #[test]
    fn a_malformed_header_that_was_read_ahead_needs_no_event() {
        let (mut here, there) = pair();
        let mut receiver = Receiver::reading_ahead();
        let bytes = [&message(1, b"a")[..], &[0xff; HEADER_BYTES]].concat();
        here.write_all(&bytes).expect("sent");
        assert!(matches!(receiver.receive(&there), Ok(Received::Message(m)) if m.header.id == 1));
        assert!(receiver.has_message());
        assert!(matches!(
            receiver.receive(&there),
            Err(SocketError::Malformed(_))
        ));
    }

    #[test]
    fn the_buffer_of_a_large_message_is_freed() {
        let (here, there) = pair();
        let mut outbox = Outbox::default();
        let mut receiver = Receiver::reading_ahead();
        outbox.push(message(1, &vec![7; 1 << 20]), Vec::new());
        let mut received = 0;
        while received == 0 {
            outbox.flush(&here).expect("sent");
            received += receive_all(&mut receiver, &there).len();
        }
        assert!(capacity(&receiver) <= KEPT);
    }

    proptest! {
        #[test]
        fn messages_read_ahead_arrive_whole_however_they_are_cut(
            sent in proptest::collection::vec((0..3000usize, 0..3usize), 1..20),
            rests in proptest::collection::vec(any::<bool>(), 20),
        ) {
            let (here, there) = pair();
            let mut receiver = Receiver::reading_ahead();
            let mut outbox = Outbox::default();
            let mut received = Vec::new();
            for ((id, (len, count)), rests) in (1..).zip(&sent).zip(rests) {
                let descriptors = (0..*count).map(|_| null()).collect();
                outbox.push(message(id, &vec![7; *len]), descriptors);
                outbox.flush(&here).expect("sent");
                if rests {
                    received.extend(receive_all(&mut receiver, &there));
                }
            }
            received.extend(receive_all(&mut receiver, &there));
            let expected: Vec<_> = (1..).zip(&sent).map(|(id, (_, count))| (id, *count)).collect();
            prop_assert_eq!(received, expected);
        }
    }
}
