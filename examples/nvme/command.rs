//! The entries of queues: commands and completions (NVM Express base specification 1.4, section 4).

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
    /// The number of the command.
    pub opcode: u8,
    /// Fused operation, and PRPs or SGLs; only 0 is supported.
    pub flags: u8,
    /// The identifier that the driver gave the command.
    pub id: U16,
    /// The namespace.
    pub nsid: U32,
    /// Not used.
    pub cdw2: U32,
    /// Not used.
    pub cdw3: U32,
    /// The address of metadata; not used.
    pub metadata: U64,
    /// The first page of the data.
    pub prp1: U64,
    /// The second page of the data, or a list of all further pages.
    pub prp2: U64,
    /// A parameter of the command.
    pub cdw10: U32,
    /// A parameter of the command.
    pub cdw11: U32,
    /// A parameter of the command.
    pub cdw12: U32,
    /// A parameter of the command.
    pub cdw13: U32,
    /// A parameter of the command.
    pub cdw14: U32,
    /// A parameter of the command.
    pub cdw15: U32,
}
const _: () = assert!(size_of::<Command>() == COMMAND_BYTES);

/// A completion.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Completion {
    /// The result of the command.
    pub result: U32,
    /// Not used.
    pub reserved: U32,
    /// The head of the submission queue.
    pub sq_head: U16,
    /// The submission queue.
    pub sq_id: U16,
    /// The command's identifier.
    pub id: U16,
    /// The phase tag in bit 0, then the status.
    pub status: U16,
}
const _: () = assert!(size_of::<Completion>() == COMPLETION_BYTES);

/// Why a command fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Failure {
    /// There is no such command.
    InvalidOpcode = 0x001,
    /// A field has an invalid or unsupported value.
    InvalidField = 0x002,
    /// Guest memory could not be read or written.
    DataTransfer = 0x004,
    /// An internal error.
    Internal = 0x006,
    /// There is no such namespace.
    InvalidNamespace = 0x00b,
    /// An address of data is misaligned.
    InvalidPrpOffset = 0x013,
    /// The blocks exceed the disk.
    LbaOutOfRange = 0x080,
    /// There is no such completion queue.
    CompletionQueueInvalid = 0x100,
    /// The queue exists already, does not exist, or has an invalid number.
    InvalidQueueIdentifier = 0x101,
    /// The size of the queue is invalid.
    InvalidQueueSize = 0x102,
    /// Too many requests for events are pending.
    TooManyEventRequests = 0x105,
    /// There is no such interrupt.
    InvalidInterruptVector = 0x108,
    /// There is no such log.
    InvalidLogPage = 0x109,
    /// A submission queue uses the completion queue.
    InvalidQueueDeletion = 0x10c,
    /// The feature cannot be changed.
    FeatureNotChangeable = 0x10e,
    /// The disk's file could not be written.
    WriteFault = 0x280,
    /// The disk's file could not be read.
    UnrecoveredRead = 0x281,
}

/// The status field of a completion, without its phase.
pub fn status_of(outcome: Result<(), Failure>) -> u16 {
    // Bit 15: do not retry.
    match outcome {
        Ok(()) => 0,
        Err(failure) => (failure as u16) << 1 | 1 << 15,
    }
}
