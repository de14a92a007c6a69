//! The messages of vfio-user: structures in the host's byte order, and what a well-formed one is.
//!
//! Nothing here acts. Sizes and counts are checked against the bytes that are there before anything
//! is subtracted or taken apart; what a command asks for is for others to judge.

mod body;
mod check;
mod command;
mod header;

use thiserror::Error;

pub use self::body::*;
pub use self::check::{check_command, check_reply};
pub use self::command::Command;
pub use self::header::{HEADER_BYTES, Header, Kind};

/// The most bytes of data in one transfer (`max_data_xfer_size`); also what a peer that names no
/// size means.
pub const MAX_DATA: u32 = 1 << 20;
/// The longest message accepted, header included: the largest transfer and room for what surrounds
/// it.
pub const MAX_MESSAGE: u32 = MAX_DATA + 4096;
/// The most descriptors that come with one message: what the system carries at once.
pub const MAX_DESCRIPTORS: usize = 253;

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
