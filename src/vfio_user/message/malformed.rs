//! What is wrong with a message.

use thiserror::Error;

use super::command::Command;
use super::limits::{HEADER_BYTES, MAX_MESSAGE};

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The declared size is no message's.
    #[error("a message declares {0} bytes; {HEADER_BYTES} to {MAX_MESSAGE} are possible")]
    Size(u32),
    /// It neither asks nor answers.
    #[error("a message has the type {0}; 0 and 1 are defined")]
    Type(u32),
    /// A refusal has nothing to say besides its errno.
    #[error("a refusal comes with {0} bytes of data")]
    RefusalWithData(usize),
    /// There is less than the command needs.
    #[error("{command:?} has {have} bytes of data and needs {need}")]
    Short {
        /// The command, or that of the reply.
        command: Command,
        /// Bytes it needs at least.
        need: usize,
        /// Bytes it has.
        have: usize,
    },
    /// It counts what is not there.
    #[error("{command:?} counts {count} and has room for {room}")]
    Count {
        /// The command, or that of the reply.
        command: Command,
        /// What it says.
        count: u64,
        /// What its bytes could hold.
        room: u64,
    },
    /// Descriptors came where none belong.
    #[error("{command:?} comes with {have} descriptors and may have {may}")]
    Descriptors {
        /// The command, or that of the reply.
        command: Command,
        /// Those that came.
        have: usize,
        /// The most it can have.
        may: usize,
    },
}
