//! A descriptor chain, checked and read once.

use std::ops::Range;

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::protocol::reply::TAIL_LEN;
use crate::protocol::request::MAX_REQUEST_LEN;

/// The longest device-writable part that is answered, in bytes; a driver needs `probe_size` + 4.
pub const MAX_WRITABLE: usize = 64 * 1024;

/// A piece of guest memory the device writes to.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    at: GuestAddress,
    len: usize,
}

/// A chain that is to be returned, with the request it carries.
#[derive(Debug)]
pub struct Chain {
    /// Index of its first descriptor.
    pub head: u16,
    /// What it carries; `None` where it has to go back unwritten.
    pub request: Option<ChainRequest>,
}

/// The two parts of a well-formed chain.
#[derive(Debug)]
pub struct ChainRequest {
    /// The first bytes of the device-readable part, up to the longest request there is; `None`
    /// where they are not in guest memory.
    pub bytes: Option<ReadBytes>,
    /// The device-writable part: indices into the batch's spans.
    pub spans: Range<usize>,
    /// Its length in bytes, from 4 to [`MAX_WRITABLE`].
    pub writable_len: usize,
}

/// Up to [`MAX_REQUEST_LEN`] bytes.
#[derive(Clone, Copy, Debug)]
pub struct ReadBytes {
    bytes: [u8; MAX_REQUEST_LEN],
    len: usize,
}

impl ReadBytes {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

impl Chain {
    /// Reads a chain; its device-writable pieces are appended to `spans`.
    ///
    /// It goes back unwritten where it loops, breaks off, is longer than the queue, has a readable
    /// descriptor after a writable one, or has no room for a tail in guest memory.
    pub fn read(
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
        queue_size: u16,
        spans: &mut Vec<Span>,
    ) -> Self {
        let head = chain.head_index();
        let first_span = spans.len();
        let request = read_parts(memory, chain, queue_size, spans);
        if request.is_none() {
            spans.truncate(first_span);
        }
        Self { head, request }
    }
}

fn read_parts(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    queue_size: u16,
    spans: &mut Vec<Span>,
) -> Option<ChainRequest> {
    let first_span = spans.len();
    let mut bytes = [0; MAX_REQUEST_LEN];
    let mut len = 0;
    let mut readable = true;
    let mut writable_seen = false;
    let mut writable_len = 0usize;
    let mut descriptors = 0;
    let mut last: Option<Descriptor> = None;
    for descriptor in chain {
        last = Some(descriptor);
        descriptors += 1;
        if descriptors > queue_size {
            return None;
        }
        let (at, size) = (descriptor.addr(), descriptor.len() as usize);
        if descriptor.is_write_only() {
            writable_seen = true;
            writable_len = writable_len.checked_add(size)?;
            if writable_len > MAX_WRITABLE || !memory.check_range(at, size, Permissions::Write) {
                return None;
            }
            if size > 0 {
                spans.push(Span { at, len: size });
            }
        } else {
            if writable_seen {
                return None;
            }
            let room = bytes.get_mut(len..)?;
            let wanted = size.min(room.len());
            if readable && wanted > 0 {
                readable = memory.read_slice(&mut room[..wanted], at).is_ok();
                len += wanted;
            }
        }
    }
    // A chain the iterator gave up on still promises another descriptor.
    if last?.has_next() || writable_len < TAIL_LEN {
        return None;
    }
    Some(ChainRequest {
        bytes: readable.then_some(ReadBytes { bytes, len }),
        spans: first_span..spans.len(),
        writable_len,
    })
}

/// Writes `bytes` over the pieces. Returns whether all of them are still guest memory.
pub fn scatter(memory: &GuestMemoryMmap, spans: &[Span], mut bytes: &[u8]) -> bool {
    for span in spans {
        let (now, rest) = bytes.split_at(span.len.min(bytes.len()));
        if memory.write_slice(now, span.at).is_err() {
            return false;
        }
        bytes = rest;
    }
    true
}
