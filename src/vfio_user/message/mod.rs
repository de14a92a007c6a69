//! The messages of vfio-user: structures in the host's byte order, and what a well-formed one is.
//!
//! Nothing here acts. Sizes and counts are checked against the bytes that are there before anything
//! is subtracted or taken apart; what a command asks for is for others to judge.

mod body;
mod check;
mod command;
mod header;
mod limits;
mod malformed;

pub use self::body::*;
pub use self::check::{check_command, check_reply};
pub use self::command::Command;
pub use self::header::{Header, Kind};
pub use self::limits::{HEADER_BYTES, MAX_DATA, MAX_DESCRIPTORS, MAX_MESSAGE};
pub use self::malformed::Malformed;
