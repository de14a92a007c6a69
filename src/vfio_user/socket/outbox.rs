//! Messages to send to one peer: in memory of this process, or in memory that outlives it.

use std::io;
use std::os::fd::AsFd;

use vm_memory::VolatileSlice;

use super::outgoing::OutgoingFd;
use super::queue::SendQueue;
use crate::vfio_user::kept::SendRing;

/// Messages to send, in order.
#[derive(Debug)]
pub struct Outbox(Storage);

#[derive(Debug)]
enum Storage {
    Queue(SendQueue),
    Ring(Box<SendRing>),
}

impl Default for Outbox {
    fn default() -> Self {
        Self(Storage::Queue(SendQueue::default()))
    }
}

impl From<SendRing> for Outbox {
    fn from(ring: SendRing) -> Self {
        Self(Storage::Ring(Box::new(ring)))
    }
}

impl Outbox {
    /// The ring, if the messages outlive this process. It sends only what is committed.
    pub(in crate::vfio_user) fn ring(&mut self) -> Option<&mut SendRing> {
        match &mut self.0 {
            Storage::Queue(_) => None,
            Storage::Ring(ring) => Some(ring),
        }
    }

    /// Queues a message, header and body, with at most [`MAX_DESCRIPTORS`](crate::vfio_user::message::MAX_DESCRIPTORS)
    /// descriptors.
    pub fn push(&mut self, bytes: Vec<u8>, descriptors: Vec<OutgoingFd>) {
        match &mut self.0 {
            Storage::Queue(queue) => queue.push(bytes, descriptors),
            Storage::Ring(ring) => ring.push(&bytes, descriptors),
        }
    }

    /// Sends the first `len` bytes of `buffer`, whole replies without descriptors. If the socket does not accept all of
    /// them now, the outbox keeps the buffer with the rest, and `buffer` becomes one that was used before. So large
    /// messages are neither copied nor allocated anew.
    ///
    /// An outbox in memory that outlives this process sends nothing yet.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub fn send(&mut self, socket: impl AsFd, buffer: &mut Vec<u8>, len: usize) -> io::Result<()> {
        self.send_with(socket, buffer, len, &[])
    }

    /// The same with the bytes of `parts` after those of the buffer. The kernel takes them from the parts themselves. Only
    /// what the socket does not accept now is copied, so nothing refers to the parts afterwards.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub fn send_with(
        &mut self,
        socket: impl AsFd,
        buffer: &mut Vec<u8>,
        len: usize,
        parts: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        match &mut self.0 {
            Storage::Queue(queue) => queue.send_with(socket, buffer, len, parts),
            Storage::Ring(ring) => {
                ring.push_replies(buffer.get(..len).unwrap_or_default(), parts);
                Ok(())
            }
        }
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        match &self.0 {
            Storage::Queue(queue) => queue.is_empty(),
            Storage::Ring(ring) => ring.len_bytes() == 0,
        }
    }

    /// Unsent bytes.
    pub fn len_bytes(&self) -> usize {
        match &self.0 {
            Storage::Queue(queue) => queue.len_bytes(),
            Storage::Ring(ring) => ring.len_bytes(),
        }
    }

    /// Unsent bytes of replies that were queued with [`Self::send`].
    pub fn len_reply_bytes(&self) -> usize {
        match &self.0 {
            Storage::Queue(queue) => queue.len_reply_bytes(),
            Storage::Ring(ring) => ring.len_reply_bytes(),
        }
    }

    /// Unsent descriptors, which stay open until they are sent.
    pub fn len_descriptors(&self) -> usize {
        match &self.0 {
            Storage::Queue(queue) => queue.len_descriptors(),
            Storage::Ring(ring) => ring.len_descriptors(),
        }
    }

    /// Sends as much as the socket accepts.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        match &mut self.0 {
            Storage::Queue(queue) => queue.flush(socket),
            Storage::Ring(ring) => ring.flush(),
        }
    }
}
