//! Commands and completions as they lie in queues (NVM Express base specification 1.4, section 4).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a command.
pub const COMMAND_BYTES: usize = 64;
/// Bytes of a completion.
pub const COMPLETION_BYTES: usize = 16;

/// A command.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Command {
    /// What to do.
    pub opcode: u8,
    /// Fused commands, and how data is described; 0 is all that is served.
    pub flags: u8,
    /// The driver's name for it.
    pub id: U16,
    /// The namespace.
    pub nsid: U32,
    /// Not used.
    pub cdw2: U32,
    /// Not used.
    pub cdw3: U32,
    /// Where metadata is; there is none.
    pub metadata: U64,
    /// Where data begins.
    pub prp1: U64,
    /// The second page of data, or a list of all that follow.
    pub prp2: U64,
    /// Depends on the command.
    pub cdw10: U32,
    /// Depends on the command.
    pub cdw11: U32,
    /// Depends on the command.
    pub cdw12: U32,
    /// Depends on the command.
    pub cdw13: U32,
    /// Depends on the command.
    pub cdw14: U32,
    /// Depends on the command.
    pub cdw15: U32,
}
const _: () = assert!(size_of::<Command>() == COMMAND_BYTES);

/// A completion.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Completion {
    /// Depends on the command.
    pub result: U32,
    /// Not used.
    pub reserved: U32,
    /// How far the submission queue has been fetched.
    pub sq_head: U16,
    /// The submission queue.
    pub sq_id: U16,
    /// The command's name.
    pub id: U16,
    /// The phase in bit 0, then the status.
    pub status: U16,
}
const _: () = assert!(size_of::<Completion>() == COMPLETION_BYTES);

/// Why a command fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Failure {
    /// There is no such command.
    InvalidOpcode = 0x001,
    /// A field says what is not possible, or not served.
    InvalidField = 0x002,
    /// Guest memory could not be read or written.
    DataTransfer = 0x004,
    /// This program failed.
    Internal = 0x006,
    /// There is no such namespace.
    InvalidNamespace = 0x00b,
    /// An address of data is not aligned as it has to be.
    InvalidPrpOffset = 0x013,
    /// The disk ends before that.
    LbaOutOfRange = 0x080,
    /// There is no such completion queue.
    CompletionQueueInvalid = 0x100,
    /// A queue has this number already, or there is none, or none is possible.
    InvalidQueueIdentifier = 0x101,
    /// No queue can be that long.
    InvalidQueueSize = 0x102,
    /// Too many wait for events.
    TooManyEventRequests = 0x105,
    /// There is no such interrupt.
    InvalidInterruptVector = 0x108,
    /// There is no such log.
    InvalidLogPage = 0x109,
    /// A submission queue needs it.
    InvalidQueueDeletion = 0x10c,
    /// A feature stays as it is.
    FeatureNotChangeable = 0x10e,
    /// The disk's file could not be written.
    WriteFault = 0x280,
    /// The disk's file could not be read.
    UnrecoveredRead = 0x281,
}

/// The status field of a completion, without its phase.
pub fn status_of(outcome: Result<(), Failure>) -> u16 {
    // Bit 15: to repeat the command is of no use.
    match outcome {
        Ok(()) => 0,
        Err(failure) => (failure as u16) << 1 | 1 << 15,
    }
}
