//! The messages of vfio-user: structures in the host's byte order, and checks that a message is well
//! formed.
//!
//! Nothing here executes a command. Sizes and counts are checked against the bytes received before
//! anything is subtracted or decoded. The receiver decides whether a command
//! is permitted.

mod body;
mod check;
mod command;
mod header;
mod limits;
mod malformed;

pub use self::body::*;
pub use self::check::{accesses_nothing, check_command, check_empty_reply, check_reply};
pub use self::command::Command;
pub use self::header::{Header, Kind};
pub use self::limits::{HEADER_BYTES, MAX_DATA, MAX_DESCRIPTORS, MAX_MESSAGE};
pub use self::malformed::Malformed;
