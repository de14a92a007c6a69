//! Why a message is malformed.

use thiserror::Error;

use super::command::Command;
use super::limits::{HEADER_BYTES, MAX_MESSAGE};

/// Why a message is malformed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The header declares a size that no message has.
    #[error("a message declares {0} bytes; {HEADER_BYTES} to {MAX_MESSAGE} are valid")]
    Size(u32),
    /// The header's type is neither command nor reply.
    #[error("a message has type {0}; only 0 and 1 are defined")]
    Type(u32),
    /// The body is shorter than the structure of the command.
    #[error("{command:?} has {have} bytes of data and needs {need}")]
    Short {
        /// The command, or the command that is replied to.
        command: Command,
        /// Bytes of the structure.
        need: usize,
        /// Bytes of the body.
        have: usize,
    },
    /// The body counts more elements than it has.
    #[error("{command:?} counts {count} elements and has {room}")]
    Count {
        /// The command, or the command that is replied to.
        command: Command,
        /// The number in the body.
        count: u64,
        /// The number of elements that the rest of the body holds.
        room: u64,
    },
    /// The message has more descriptors than its command allows.
    #[error("{command:?} has {have} descriptors; at most {may} are allowed")]
    Descriptors {
        /// The command, or the command that is replied to.
        command: Command,
        /// Descriptors received.
        have: usize,
        /// Descriptors allowed.
        may: usize,
    },
}
