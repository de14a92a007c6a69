//! The header that every message begins with.

use zerocopy::native_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::command::Command;
use super::limits::{HEADER_BYTES, MAX_MESSAGE};
use super::malformed::Malformed;

/// The bits of a header's flags for the type.
const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command.
    Command {
        /// The sender wants no reply.
        no_reply: bool,
    },
    /// A reply to a command that succeeded.
    Reply,
    /// A reply to a command that was refused, with an errno, which may be 0. Its body has no meaning:
    /// some servers send the reply that they had prepared, and the receiver drops it.
    Refusal(u32),
}

/// The first 16 bytes of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number that the sender gave the command, and that the reply repeats.
    pub id: u16,
    /// The number of the command, which may be unknown to [`Command`].
    pub command: u16,
    /// The type.
    pub kind: Kind,
    /// Bytes of the body: `0..=MAX_MESSAGE - 16`.
    pub body_len: usize,
}

impl Header {
    /// The header of a command.
    pub fn command(id: u16, command: Command, body_len: usize) -> Self {
        Self {
            id,
            command: command.number(),
            kind: Kind::Command { no_reply: false },
            body_len,
        }
    }

    /// The header of the reply to a command.
    pub fn reply_to(&self, body_len: usize) -> Self {
        Self {
            kind: Kind::Reply,
            body_len,
            ..*self
        }
    }

    /// The header of the refusal of a command, with the errno `error`.
    pub fn refusal_of(&self, error: i32) -> Self {
        Self {
            kind: Kind::Refusal(error.unsigned_abs()),
            body_len: 0,
            ..*self
        }
    }

    /// Whether it is a command whose sender wants no reply.
    pub fn wants_no_reply(&self) -> bool {
        self.kind == Kind::Command { no_reply: true }
    }

    /// Decodes a header. Flags without a meaning are ignored.
    ///
    /// # Errors
    /// The size or the type is invalid.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let wire = WireHeader::read_from_bytes(bytes).map_err(|_| Malformed::Size(0))?;
        let size = wire.size.get();
        let body_len = usize::try_from(size)
            .ok()
            .filter(|_| size <= MAX_MESSAGE)
            .and_then(|size| size.checked_sub(HEADER_BYTES))
            .ok_or(Malformed::Size(size))?;
        let flags = wire.flags.get();
        let kind = match flags & TYPE_MASK {
            0 => Kind::Command {
                no_reply: flags & FLAG_NO_REPLY != 0,
            },
            TYPE_REPLY if flags & FLAG_ERROR != 0 => Kind::Refusal(wire.error.get()),
            TYPE_REPLY => Kind::Reply,
            other => return Err(Malformed::Type(other)),
        };
        Ok(Self {
            id: wire.id.get(),
            command: wire.command.get(),
            kind,
            body_len,
        })
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (flags, error) = match self.kind {
            Kind::Command { no_reply: false } => (0, 0),
            Kind::Command { no_reply: true } => (FLAG_NO_REPLY, 0),
            Kind::Reply => (TYPE_REPLY, 0),
            Kind::Refusal(error) => (TYPE_REPLY | FLAG_ERROR, error),
        };
        let size = u32::try_from(self.body_len.saturating_add(HEADER_BYTES)).unwrap_or(u32::MAX);
        zerocopy::transmute!(WireHeader {
            id: self.id.into(),
            command: self.command.into(),
            size: size.into(),
            flags: flags.into(),
            error: error.into(),
        })
    }

    /// Encodes a whole message with `body`. The header's `body_len` is ignored; the length of `body`
    /// replaces it.
    pub fn with_body(&self, body: &[u8]) -> Vec<u8> {
        let header = Self {
            body_len: body.len(),
            ..*self
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(body);
        bytes
    }
}

/// A header on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHeader {
    /// See [`Header`].
    id: U16,
    /// See [`Header`].
    command: U16,
    /// Bytes of the message, including this header.
    size: U32,
    /// The type, and `FLAG_*`.
    flags: U32,
    /// The errno of a refusal.
    error: U32,
}

const _: () = assert!(size_of::<WireHeader>() == HEADER_BYTES);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(size: u32, flags: u32, error: u32) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(WireHeader {
            id: 7.into(),
            command: 9.into(),
            size: size.into(),
            flags: flags.into(),
            error: error.into(),
        })
    }

    #[test]
    fn headers_with_invalid_sizes_and_types_are_refused() {
        let decode = |size, flags| Header::decode(&raw(size, flags, 0));
        for size in [0, 1, 15, MAX_MESSAGE + 1, u32::MAX] {
            assert_eq!(decode(size, 0), Err(Malformed::Size(size)));
        }
        assert_eq!(decode(16, 0).map(|h| h.body_len), Ok(0));
        assert_eq!(
            decode(MAX_MESSAGE, 0).map(|h| h.body_len),
            Ok(MAX_MESSAGE as usize - 16)
        );
        assert_eq!(decode(16, 2), Err(Malformed::Type(2)));
        let refusal = Header::decode(&raw(16, 0x21, 22)).expect("a refusal");
        assert_eq!(refusal.kind, Kind::Refusal(22));
        let posted = Header::decode(&raw(16, 0x10, 0)).expect("a command");
        assert!(posted.wants_no_reply());
    }

    proptest! {
        #[test]
        fn a_decoded_header_equals_the_encoded_one(
            id: u16, command: u16, kind in 0..4u32, error: u32, len in 0..=MAX_MESSAGE as usize - 16
        ) {
            let kind = match kind {
                0 => Kind::Command { no_reply: false },
                1 => Kind::Command { no_reply: true },
                2 => Kind::Reply,
                _ => Kind::Refusal(error),
            };
            let header = Header { id, command, kind, body_len: len };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn any_bytes_are_decoded_without_panic(header: [u8; HEADER_BYTES]) {
            if let Ok(header) = Header::decode(&header) {
                prop_assert!(header.body_len + HEADER_BYTES <= MAX_MESSAGE as usize);
            }
        }
    }
}
