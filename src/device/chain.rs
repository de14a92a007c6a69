//! A descriptor chain: the device reads and checks it once.

use std::ops::Range;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::view::GuestView;
use crate::protocol::reply::TAIL_LEN;
use crate::protocol::request::MAX_REQUEST_LEN;
use crate::store::{KEPT_WORDS, MALFORMED, UNREADABLE};

/// The longest device-writable part that the device accepts, in bytes. A driver needs `probe_size` + 4.
pub const MAX_WRITABLE: usize = 64 * 1024;

/// A piece of guest memory that the device writes to.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    at: u64,
    len: usize,
}

/// A chain that the device must return, with the request it carries.
#[derive(Debug)]
pub struct Chain {
    /// Index of its first descriptor.
    pub head: u16,
    /// The request; `None` if the chain is malformed and must be returned unwritten.
    pub request: Option<ChainRequest>,
}

/// The two parts of a well-formed chain.
#[derive(Debug)]
pub struct ChainRequest {
    /// The first bytes of the device-readable part, up to the length of the longest request; `None` if they are not
    /// in guest memory.
    pub bytes: Option<ReadBytes>,
    /// Guest-physical address of the device-readable part; 0 if it is empty.
    pub at: u64,
    /// The device-writable part, as indices into the spans of the batch.
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
    /// The first [`MAX_REQUEST_LEN`] of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut all = [0; MAX_REQUEST_LEN];
        let len = bytes.len().min(MAX_REQUEST_LEN);
        if let (Some(to), Some(from)) = (all.get_mut(..len), bytes.get(..len)) {
            to.copy_from_slice(from);
        }
        Self { bytes: all, len }
    }

    /// The number of all bytes, and the words that the journal keeps.
    #[inline(always)]
    fn journal_words(&self) -> (u8, [u64; KEPT_WORDS]) {
        let mut words = [0; KEPT_WORDS];
        let (chunks, _) = self.bytes.as_chunks::<8>();
        for (word, chunk) in words.iter_mut().zip(chunks) {
            *word = u64::from_le_bytes(*chunk);
        }
        (u8::try_from(self.len).unwrap_or(0), words)
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

impl Chain {
    /// What the journal keeps: the head, the length of the request as in [`EntryState`](crate::store::EntryState), and the
    /// words of the request.
    #[inline(always)]
    pub fn journal_words(&self) -> (u16, u8, [u64; KEPT_WORDS]) {
        let (len, words) = match self.request.as_ref().map(|request| &request.bytes) {
            Some(Some(bytes)) => bytes.journal_words(),
            Some(None) => (UNREADABLE, [0; KEPT_WORDS]),
            None => (MALFORMED, [0; KEPT_WORDS]),
        };
        (self.head, len, words)
    }

    /// Reads the chain at `head` of a ring of `size` entries with its descriptor table at `table`, and appends the
    /// device-writable pieces to `spans`.
    ///
    /// The chain is malformed if:
    ///
    /// - it loops, or has more descriptors than the ring has entries;
    /// - it leads out of its table or out of guest memory, or has an indirect table in an indirect table;
    /// - its buffers have 2^32 bytes or more in all;
    /// - a readable descriptor follows a writable one;
    /// - the device-writable part is shorter than a tail, longer than [`MAX_WRITABLE`], or not all in guest memory.
    pub fn read(
        view: &GuestView<'_>,
        head: u16,
        table: u64,
        size: u16,
        spans: &mut Vec<Span>,
    ) -> Self {
        let first_span = spans.len();
        let walk = Walk {
            view,
            table,
            size,
            next: Some(head),
            indirect: false,
        };
        let request = read_parts(walk, size, spans);
        if request.is_none() {
            spans.truncate(first_span);
        }
        Self { head, request }
    }
}

/// Virtio specification, "The Virtqueue Descriptor Table".
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor {
    addr: U64,
    len: U32,
    flags: U16,
    next: U16,
}

/// Size of a descriptor in bytes.
pub const DESCRIPTOR_LEN: u64 = 16;
const _: () = assert!(size_of::<Descriptor>() as u64 == DESCRIPTOR_LEN);

impl Descriptor {
    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags.get()) & flag != 0
    }
}

/// Walks the descriptors of a chain. The caller must bound the number of steps: a chain may loop.
struct Walk<'a, 'm> {
    view: &'a GuestView<'m>,
    table: u64,
    /// Entries in the table.
    size: u16,
    next: Option<u16>,
    indirect: bool,
}

/// The chain leads out of its table or out of guest memory, or has an indirect table in an indirect table.
struct BadChain;

impl Walk<'_, '_> {
    /// The next descriptor that is not an indirect table; `None` after the last.
    fn step(&mut self) -> Result<Option<Descriptor>, BadChain> {
        let Some(index) = self.next else {
            return Ok(None);
        };
        let mut descriptor = self.entry(index)?;
        if descriptor.has(VRING_DESC_F_INDIRECT) {
            let len = u64::from(descriptor.len.get());
            if self.indirect || !len.is_multiple_of(DESCRIPTOR_LEN) {
                return Err(BadChain);
            }
            self.indirect = true;
            self.table = descriptor.addr.get();
            // A longer table counts as one of 65535 entries: an index has 16 bits.
            self.size = u16::try_from(len / DESCRIPTOR_LEN).unwrap_or(u16::MAX);
            descriptor = self.entry(0)?;
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                return Err(BadChain);
            }
        }
        self.next = descriptor
            .has(VRING_DESC_F_NEXT)
            .then_some(descriptor.next.get());
        Ok(Some(descriptor))
    }

    fn entry(&self, index: u16) -> Result<Descriptor, BadChain> {
        if index >= self.size {
            return Err(BadChain);
        }
        let offset = u64::from(index) * DESCRIPTOR_LEN;
        let at = self.table.checked_add(offset).ok_or(BadChain)?;
        let mut descriptor = Descriptor::new_zeroed();
        if self.view.read(at, descriptor.as_mut_bytes()) {
            Ok(descriptor)
        } else {
            Err(BadChain)
        }
    }
}

fn read_parts(
    mut walk: Walk<'_, '_>,
    queue_size: u16,
    spans: &mut Vec<Span>,
) -> Option<ChainRequest> {
    let view = walk.view;
    let first_span = spans.len();
    let mut bytes = [0; MAX_REQUEST_LEN];
    let mut len = 0;
    let mut begin = 0;
    let mut readable = true;
    let mut writable_seen = false;
    let mut writable_len = 0usize;
    let mut total = 0u32;
    let mut descriptors = 0;
    while let Some(descriptor) = walk.step().ok()? {
        descriptors += 1;
        // A chain must not be longer than the queue, nor have 2^32 bytes or more.
        total = total.checked_add(descriptor.len.get())?;
        if descriptors > queue_size {
            return None;
        }
        let (at, size) = (descriptor.addr.get(), descriptor.len.get() as usize);
        if descriptor.has(VRING_DESC_F_WRITE) {
            writable_seen = true;
            writable_len = writable_len.checked_add(size)?;
            if writable_len > MAX_WRITABLE || !view.is_backed(at, size) {
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
            if len == 0 {
                begin = at;
            }
            if readable && wanted > 0 {
                readable = view.read(at, &mut room[..wanted]);
                len += wanted;
            }
        }
    }
    if descriptors == 0 || writable_len < TAIL_LEN {
        return None;
    }
    Some(ChainRequest {
        bytes: readable.then_some(ReadBytes { bytes, len }),
        at: begin,
        spans: first_span..spans.len(),
        writable_len,
    })
}

/// Writes `bytes` to the pieces in turn. Returns whether all of them are still in guest memory.
pub fn scatter(view: &GuestView<'_>, spans: &[Span], mut bytes: &[u8]) -> bool {
    for span in spans {
        let (now, rest) = bytes.split_at(span.len.min(bytes.len()));
        if !view.write(span.at, now) {
            return false;
        }
        bytes = rest;
    }
    true
}
