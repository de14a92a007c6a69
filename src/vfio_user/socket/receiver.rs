//! Received messages, assembled from the bytes of a stream.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use super::{Message, Received, SocketError};
use crate::vfio_user::message::{HEADER_BYTES, Header, Kind, MAX_DESCRIPTORS};

/// The receiver allocates this many bytes of a body at a time: the peer may declare a large body and
/// never send it.
const STEP: usize = 64 << 10;

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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::vfio_user::message::Command;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().expect("sockets")
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
}
