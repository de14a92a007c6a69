//! Messages to send, in memory of this process.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vm_memory::VolatileSlice;

use super::gather;
use super::outgoing::OutgoingFd;
use crate::vfio_user::message::MAX_DESCRIPTORS;

/// A larger buffer is freed as soon as it was sent.
const KEPT: usize = 256 << 10;

/// Messages to send, in order.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    queue: VecDeque<Outgoing>,
    /// Unsent bytes in the queue.
    bytes: usize,
    /// Those of them that [`Self::send_with`] has queued.
    reply_bytes: usize,
    /// Descriptors in the queue.
    descriptors: usize,
    /// The buffer of a message that was sent, for [`Self::send_with`].
    spare: Vec<u8>,
}

#[derive(Debug)]
struct Outgoing {
    /// The unsent bytes are at `sent..end`.
    bytes: Vec<u8>,
    sent: usize,
    end: usize,
    is_reply: bool,
    /// Sent with the first byte, then empty.
    descriptors: Vec<OutgoingFd>,
}

impl SendQueue {
    /// Queues a message, header and body, with at most [`MAX_DESCRIPTORS`] descriptors.
    pub fn push(&mut self, bytes: Vec<u8>, descriptors: Vec<OutgoingFd>) {
        self.bytes += bytes.len();
        self.descriptors += descriptors.len();
        self.queue.push_back(Outgoing {
            end: bytes.len(),
            bytes,
            sent: 0,
            is_reply: false,
            descriptors,
        });
    }

    /// See [`Outbox::send_with`](super::Outbox::send_with).
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
        if !self.queue.is_empty() {
            self.flush(&socket)?;
        }
        let head = buffer.get(..len).unwrap_or_default();
        let len = head.len();
        let end = len + parts.iter().map(VolatileSlice::len).sum::<usize>();
        let mut sent = 0;
        while self.queue.is_empty() && sent < end {
            match gather::send_some(socket.as_fd(), head, parts, sent) {
                Ok(Some(count)) => sent += count,
                Ok(None) => break,
                // A file has become shorter, and its memory is gone: the copy below ends the process, as
                // every access of the daemon to such memory does.
                Err(cause) if cause.raw_os_error() == Some(libc::EFAULT) => break,
                Err(cause) => return Err(cause),
            }
        }
        if sent == end {
            return Ok(());
        }
        if buffer.len() < end {
            buffer.resize(end, 0);
        }
        let mut at = len;
        for part in parts {
            let skipped = sent.saturating_sub(at).min(part.len());
            if let (Ok(rest), Some(into)) = (part.offset(skipped), buffer.get_mut(at + skipped..)) {
                rest.copy_to(into);
            }
            at += part.len();
        }
        self.bytes += end - sent;
        self.reply_bytes += end - sent;
        self.queue.push_back(Outgoing {
            bytes: std::mem::replace(buffer, std::mem::take(&mut self.spare)),
            sent,
            end,
            is_reply: true,
            descriptors: Vec::new(),
        });
        Ok(())
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Unsent bytes.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// Unsent bytes of replies that were queued with [`Self::send_with`].
    pub fn len_reply_bytes(&self) -> usize {
        self.reply_bytes
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
            let rest = &first.bytes[first.sent..first.end];
            let Some(sent) = send_with_descriptors(socket.as_fd(), rest, &first.descriptors)?
            else {
                return Ok(());
            };
            self.descriptors = self.descriptors.saturating_sub(first.descriptors.len());
            first.descriptors.clear();
            first.sent += sent;
            self.bytes = self.bytes.saturating_sub(sent);
            if first.is_reply {
                self.reply_bytes = self.reply_bytes.saturating_sub(sent);
            }
            if first.sent == first.end
                && let Some(sent) = self.queue.pop_front()
                && (self.spare.len()..=KEPT).contains(&sent.bytes.len())
            {
                self.spare = sent.bytes;
            }
        }
        Ok(())
    }
}

/// Sends some of `bytes`, with all of `descriptors`. Returns the number of bytes, or `None` if the
/// socket accepts none yet.
///
/// # Errors
/// The peer is gone, or the kernel refuses to send.
pub(in crate::vfio_user) fn send_with_descriptors(
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
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, MmapRegion, VolatileMemory};

    use super::*;

    /// The socket takes a part of a buffer at once. The rest comes later, in order, and the buffer's memory is used again.
    #[test]
    fn what_a_full_socket_leaves_is_sent_later_from_the_same_buffer() {
        const LEN: usize = 200 << 10;
        const COUNT: u8 = 5;
        let (here, mut there) = UnixStream::pair().expect("sockets");
        let mut outbox = SendQueue::default();
        let mut kept = Vec::new();
        for n in 0..COUNT {
            // The end of the buffer is no part of the message.
            let mut buffer = vec![n; LEN + 16];
            buffer[LEN..].fill(0xff);
            let memory = buffer.as_ptr();
            outbox
                .send_with(&here, &mut buffer, LEN, &[])
                .expect("sent");
            if buffer.as_ptr() != memory {
                kept.push(memory);
                assert_eq!(buffer, [0; 0]);
            }
        }
        assert!(kept.len() > 2, "the socket took almost everything");
        let mut received = vec![0; LEN * (usize::from(COUNT) + 1)];
        let mut rest = &mut received[..];
        assert_eq!(outbox.len_reply_bytes(), outbox.len_bytes());
        outbox.push(vec![COUNT; LEN], Vec::new());
        let mut unsent = outbox.len_bytes();
        assert_eq!(outbox.len_reply_bytes() + LEN, unsent);
        while !rest.is_empty() {
            let len = rest.len().min(4096);
            there.read_exact(&mut rest[..len]).expect("bytes");
            rest = &mut rest[len..];
            outbox.flush(&here).expect("sent");
            assert!(outbox.len_bytes() <= unsent);
            unsent = outbox.len_bytes();
        }
        assert_eq!((unsent, outbox.len_reply_bytes()), (0, 0));
        let right = (0..=COUNT).all(|n| {
            let at = LEN * usize::from(n);
            received[at..at + LEN].iter().all(|byte| *byte == n)
        });
        assert!(right);
        let mut buffer = vec![9; 8];
        while outbox.is_empty() {
            outbox.send_with(&here, &mut buffer, 8, &[]).expect("sent");
        }
        assert!(kept.contains(&buffer.as_ptr()));
    }

    /// Whichever part of a message a full socket leaves, its bytes are those at the time of the call, and in order.
    #[test]
    fn bytes_from_memory_follow_the_buffer_and_are_copied_if_the_socket_is_full() {
        const LEN: usize = 100_000;
        let memory = MmapRegion::<()>::new(LEN).expect("memory");
        let memory = memory.as_volatile_slice();
        let part = |at: usize, len: usize| memory.subslice(at, len).expect("inside");
        // Backwards, and with an empty part.
        let parts = [part(70_000, 30_000), part(0, 0), part(10_001, 59_999)];
        let (here, mut there) = UnixStream::pair().expect("sockets");
        let mut outbox = SendQueue::default();
        let mut expected = Vec::new();
        let mut is_cut = false;
        for n in 0..8u8 {
            let data: Vec<u8> = (0..LEN).map(|at| (at / 7).to_le_bytes()[0] ^ n).collect();
            memory.write_slice(&data, 0).expect("written");
            // The end of the buffer is no part of the message.
            let mut buffer = [[n; 48], [0xff; 48]].concat();
            let unsent = outbox.len_bytes();
            let sent = outbox.send_with(&here, &mut buffer, 48, &parts);
            sent.expect("sent");
            memory.write_slice(&[0xee; LEN], 0).expect("written");
            expected.extend([n; 48]);
            expected.extend(&data[70_000..]);
            expected.extend(&data[10_001..70_000]);
            let left = outbox.len_bytes() - unsent;
            is_cut |= left > 0 && left < 48 + 89_999;
        }
        assert!(is_cut, "the socket has taken a part of a message");
        assert_eq!(outbox.len_reply_bytes(), outbox.len_bytes());
        let mut received = vec![0; expected.len()];
        for piece in received.chunks_mut(4096) {
            there.read_exact(piece).expect("bytes");
            outbox.flush(&here).expect("sent");
        }
        assert!(received == expected);
        assert_eq!((outbox.len_bytes(), outbox.len_reply_bytes()), (0, 0));
    }
}
