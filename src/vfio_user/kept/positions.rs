//! The contents of a record, and their words.

use serde::{Deserialize, Serialize};

use crate::vfio_user::message::{Header, Kind};
use crate::vfio_user::version::{Terms, Version};

/// How far one socket is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vfio_user) struct Progress {
    /// The socket.
    pub peer: Peer,
    /// The stream position up to which its messages were handled.
    pub handled: u64,
    /// The stream position up to which it must get messages.
    pub committed: u64,
    /// The stream position after the last of these with descriptors.
    pub descriptors_end: u64,
}

/// The state of one socket. Its number is the kernel's cookie of the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vfio_user) enum Peer {
    /// There is none. A client or a server may be connecting.
    #[default]
    None,
    /// It is connected; a server has negotiated.
    Connected(u64),
    /// The connection is half closed. The server may have memory until it hangs up.
    Closing(u64),
    /// The connection has ended.
    Ended(u64),
}

/// Where the windows of a server come from, for a later process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vfio_user) struct WindowsOf(pub u64);

/// Everything that one commit changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vfio_user) struct Positions {
    pub client: Progress,
    pub server: Progress,
    pub twin: Progress,
    /// The number of the link's next command.
    pub next_id: u16,
    /// The client has descriptors of the server.
    pub client_holds_descriptors: bool,
    /// The client has set interrupts.
    pub client_has_interrupts: bool,
    /// The server has, or had, descriptors of memory.
    pub shares_memory: bool,
    /// The server was sent all windows.
    pub is_announced: bool,
    /// It has answered all updates, too, and has all windows.
    pub is_settled: bool,
    /// Which of the two terms counts, if the client has negotiated.
    pub terms: Option<bool>,
    /// See [`WindowsOf`].
    pub windows_of: WindowsOf,
}

/// A command of the client without a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::vfio_user) struct KeptCommand {
    /// The number that the server knows.
    pub id: u16,
    pub header: Header,
    pub accesses_nothing: bool,
    /// The first bytes of the body, up to [`BODY_BYTES`].
    pub body: Vec<u8>,
}

/// The bytes of a command's body from which a refusal can be made.
pub(in crate::vfio_user) const BODY_BYTES: usize = 32;

/// What client and server have agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::vfio_user) struct KeptTerms {
    /// The client's proposal.
    pub version: Version,
    /// The answer to it.
    pub answer: Version,
    /// The terms with the last server.
    pub terms: Terms,
}

impl Peer {
    const SHIFT: u32 = 62;

    fn encode(self) -> u64 {
        let (state, cookie) = match self {
            Self::None => (0, 0),
            Self::Connected(cookie) => (1, cookie),
            Self::Closing(cookie) => (2, cookie),
            Self::Ended(cookie) => (3, cookie),
        };
        state << Self::SHIFT | (cookie & ((1 << Self::SHIFT) - 1))
    }

    fn decode(word: u64) -> Self {
        let cookie = word & ((1 << Self::SHIFT) - 1);
        match word >> Self::SHIFT {
            0 => Self::None,
            1 => Self::Connected(cookie),
            2 => Self::Closing(cookie),
            _ => Self::Ended(cookie),
        }
    }

    /// The socket's number, if it is connected.
    pub(in crate::vfio_user) fn connected(self) -> Option<u64> {
        match self {
            Self::Connected(cookie) => Some(cookie),
            Self::None | Self::Closing(_) | Self::Ended(_) => None,
        }
    }

    /// The connection has ended.
    pub(in crate::vfio_user) fn ended(self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Connected(cookie) | Self::Closing(cookie) | Self::Ended(cookie) => {
                Self::Ended(cookie)
            }
        }
    }
}

impl Positions {
    pub(super) const WORDS: usize = 14;

    #[inline]
    pub(super) fn encode(&self) -> [u64; Self::WORDS] {
        let flag = |is_set: bool, bit: u32| u64::from(is_set) << bit;
        let flags = u64::from(self.next_id)
            | flag(self.client_holds_descriptors, 16)
            | flag(self.client_has_interrupts, 17)
            | flag(self.shares_memory, 18)
            | flag(self.is_settled, 19)
            | flag(self.terms.is_some(), 20)
            | flag(self.terms == Some(true), 21)
            | flag(self.is_announced, 22);
        let [a, b, c] = [self.client, self.server, self.twin].map(|leg| {
            [
                leg.peer.encode(),
                leg.handled,
                leg.committed,
                leg.descriptors_end,
            ]
        });
        let mut words = [0; Self::WORDS];
        words[..4].copy_from_slice(&a);
        words[4..8].copy_from_slice(&b);
        words[8..12].copy_from_slice(&c);
        words[12] = flags;
        words[13] = self.windows_of.0;
        words
    }

    pub(super) fn decode(words: &[u64; Self::WORDS]) -> Option<Self> {
        let leg = |at: usize| Progress {
            peer: Peer::decode(words[at]),
            handled: words[at + 1],
            committed: words[at + 2],
            descriptors_end: words[at + 3],
        };
        let flags = words[12];
        let has = |bit: u32| flags & (1 << bit) != 0;
        let positions = Self {
            client: leg(0),
            server: leg(4),
            twin: leg(8),
            next_id: (flags & 0xffff) as u16,
            client_holds_descriptors: has(16),
            client_has_interrupts: has(17),
            shares_memory: has(18),
            is_settled: has(19),
            terms: has(20).then(|| has(21)),
            is_announced: has(22),
            windows_of: WindowsOf(words[13]),
        };
        (positions.encode() == *words).then_some(positions)
    }
}

impl KeptCommand {
    pub(super) const WORDS: usize = 6;

    pub(super) fn encode(&self) -> [u64; Self::WORDS] {
        let mut body = [0; BODY_BYTES];
        let len = self.body.len().min(BODY_BYTES);
        body[..len].copy_from_slice(&self.body[..len]);
        let mut words = [0; Self::WORDS];
        words[0] = u64::from(self.id)
            | u64::from(self.header.id) << 16
            | u64::from(self.header.command) << 32
            | u64::from(self.accesses_nothing) << 48;
        words[1] = self.header.body_len as u64 | (len as u64) << 32;
        let (chunks, _) = body.as_chunks::<8>();
        for (word, bytes) in words[2..].iter_mut().zip(chunks) {
            *word = u64::from_ne_bytes(*bytes);
        }
        words
    }

    pub(super) fn decode(words: &[u64; Self::WORDS]) -> Option<Self> {
        let body: Vec<u8> = words[2..].iter().flat_map(|w| w.to_ne_bytes()).collect();
        let part = |at: u32| (words[0] >> at & 0xffff) as u16;
        let len = usize::try_from(words[1] >> 32).ok()?;
        Some(Self {
            id: part(0),
            header: Header {
                id: part(16),
                command: part(32),
                kind: Kind::Command { no_reply: false },
                body_len: usize::try_from(words[1] & u64::from(u32::MAX)).ok()?,
            },
            accesses_nothing: words[0] >> 48 & 1 != 0,
            body: body.get(..len)?.to_vec(),
        })
    }
}
