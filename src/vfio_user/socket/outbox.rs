//! Messages to send to one peer.

use std::io;
use std::os::fd::AsFd;

use vm_memory::VolatileSlice;

use super::outgoing::OutgoingFd;
use super::queue::SendQueue;

/// Messages to send, in order.
#[derive(Debug)]
pub struct Outbox(Storage);

#[derive(Debug)]
enum Storage {
    Queue(SendQueue),
}

impl Default for Outbox {
    fn default() -> Self {
        Self(Storage::Queue(SendQueue::default()))
    }
}

impl Outbox {
    /// Queues a message, header and body, with at most [`MAX_DESCRIPTORS`](crate::vfio_user::message::MAX_DESCRIPTORS)
    /// descriptors.
    pub fn push(&mut self, bytes: Vec<u8>, descriptors: Vec<OutgoingFd>) {
        match &mut self.0 {
            Storage::Queue(queue) => queue.push(bytes, descriptors),
        }
    }

    /// Sends the first `len` bytes of `buffer`, whole replies without descriptors. If the socket does not accept all of
    /// them now, the outbox keeps the buffer with the rest, and `buffer` becomes one that was used before. So large
    /// messages are neither copied nor allocated anew.
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
        }
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        match &self.0 {
            Storage::Queue(queue) => queue.is_empty(),
        }
    }

    /// Unsent bytes.
    pub fn len_bytes(&self) -> usize {
        match &self.0 {
            Storage::Queue(queue) => queue.len_bytes(),
        }
    }

    /// Unsent bytes of replies that were queued with [`Self::send`].
    pub fn len_reply_bytes(&self) -> usize {
        match &self.0 {
            Storage::Queue(queue) => queue.len_reply_bytes(),
        }
    }

    /// Unsent descriptors, which stay open until they are sent.
    pub fn len_descriptors(&self) -> usize {
        match &self.0 {
            Storage::Queue(queue) => queue.len_descriptors(),
        }
    }

    /// Sends as much as the socket accepts.
    ///
    /// # Errors
    /// The peer is gone, or the kernel refuses to send.
    pub fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        match &mut self.0 {
            Storage::Queue(queue) => queue.flush(socket),
        }
    }
}
