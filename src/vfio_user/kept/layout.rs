//! The layout of a record, in words of 64 bits.
//!
//! ```text
//! | header | slot 0 | slot 1 | legs | commands | regions | terms 0 | terms 1 | received bytes of each leg |
//! ```

use crate::vfio_user::message::MAX_MESSAGE;
use crate::vfio_user::socket::AHEAD;

/// `iovavfu`.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"iovavfu\0");
/// The version of the layout and of everything in it.
pub const VERSION: u64 = 1;

/// Where the words of the header are.
pub(super) const AT_MAGIC: usize = 0;
pub(super) const AT_VERSION: usize = 1;
/// The number of the last commit. Its lowest bit says which slot counts.
pub(super) const AT_COMMIT: usize = 2;

/// The slots of the positions.
pub(super) const SLOTS: usize = 32;
pub(super) const SLOT_WORDS: usize = 32;

/// The words of each leg.
pub(super) const LEGS: usize = 96;
pub(super) const LEG_WORDS: usize = 8;
/// The stream position of the first byte in the buffer of received bytes.
pub(super) const LEG_BASE: usize = 0;
/// The stream position at which the peek offset was [`PEEK_START`](super::input).
pub(super) const LEG_SINCE: usize = 1;
/// The next value of [`LEG_SINCE`] plus one, while the peek offset is being set.
pub(super) const LEG_REBASE: usize = 2;
/// The stream position whose byte is the first one of the send ring.
pub(super) const LEG_SHIFT: usize = 3;
/// Not 0 while the send ring is being rewound. Everything is sent then.
pub(super) const LEG_REWINDING: usize = 4;

/// The client's commands without a reply.
pub(super) const COMMANDS: usize = 128;
pub(super) const COMMAND_WORDS: usize = 12;
pub(super) const MAX_KEPT_COMMANDS: usize = 128;

/// The regions that the server is told.
pub(super) const REGIONS: usize = COMMANDS + COMMAND_WORDS * MAX_KEPT_COMMANDS;
pub(super) const REGION_WORDS: usize = 4;
pub(super) const MAX_REGIONS: usize = 64;

/// What client and server have agreed on: length, check, JSON. There are two.
pub(super) const TERMS: usize = 2048;
pub(super) const TERMS_WORDS: usize = 512;

/// Bytes of all words.
pub(super) const WORDS_BYTES: usize = 32 << 10;
/// Bytes of the buffer of each leg. While more than half of it is in use, the rest of a message may be moved to its
/// front without overlap.
pub(super) const INPUT_BYTES: usize = 2 * (MAX_MESSAGE as usize + AHEAD);
pub(super) const RECORD_BYTES: u64 = (WORDS_BYTES + 3 * INPUT_BYTES) as u64;

const _: () = assert!(SLOTS + 2 * SLOT_WORDS <= LEGS && LEGS + 3 * LEG_WORDS <= COMMANDS);
const _: () = assert!(REGIONS + REGION_WORDS * MAX_REGIONS <= TERMS);
const _: () = assert!((TERMS + 2 * TERMS_WORDS) * 8 <= WORDS_BYTES);
const _: () = assert!(INPUT_BYTES.is_multiple_of(4096));

/// One of the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vfio_user) enum Leg {
    /// The client's.
    Client,
    /// The server's.
    Server,
    /// The server's for its commands.
    Twin,
}

impl Leg {
    pub(super) const ALL: [Self; 3] = [Self::Client, Self::Server, Self::Twin];

    pub(super) fn index(self) -> usize {
        match self {
            Self::Client => 0,
            Self::Server => 1,
            Self::Twin => 2,
        }
    }

    /// Where one of the leg's words is.
    pub(super) fn word(self, word: usize) -> usize {
        LEGS + self.index() * LEG_WORDS + word
    }

    /// Where the leg's buffer begins in the record.
    pub(super) fn input_at(self) -> u64 {
        (WORDS_BYTES + self.index() * INPUT_BYTES) as u64
    }

    /// Bytes of the leg's send ring, which take memory only where they are in use. 64 replies of 1 MiB can wait for a client
    /// that reads nothing, besides 4 MiB. A server gets no more while 4 MiB of each kind wait.
    pub(super) fn ring_bytes(self) -> u64 {
        match self {
            Self::Client => 128 << 20,
            Self::Server | Self::Twin => 16 << 20,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Twin => "twin",
        }
    }
}
