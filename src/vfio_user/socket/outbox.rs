//! Messages to send, in order.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::vfio_user::message::MAX_DESCRIPTORS;

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
