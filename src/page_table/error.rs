//! Errors of the arena, and the refusals of MAP and UNMAP.

use std::io;

use thiserror::Error;

use crate::address::IovaRange;

/// The arena could not be made or opened.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// The limit exceeds 2^32 frames or the address space of this process.
    #[error("an arena of {limit_bytes} bytes is too large; lower the arena limit")]
    TooLarge {
        /// The requested limit.
        limit_bytes: u64,
    },
    /// A system call on the memfd failed.
    #[error("cannot {action} for the page tables")]
    System {
        /// What the call was for.
        action: &'static str,
        /// The error of the call.
        #[source]
        source: io::Error,
    },
    /// The lists of free frames could not be allocated.
    #[error("no memory to keep track of {frames} frames of page tables; lower the arena limit")]
    Lists {
        /// The number of frames.
        frames: u32,
    },
    /// The descriptor that a reader received is not an arena of this version.
    #[error("the descriptor holds no arena of page tables: {0}")]
    NotAnArena(&'static str),
}

/// The arena has too few free frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{needed} page table frames needed, {free} free; raise the arena limit")]
pub struct OutOfFrames {
    /// Frames the request needs.
    pub needed: u64,
    /// Frames available now, without retired ones.
    pub free: u64,
}

/// A MAP is refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapRefusal {
    /// The range or the guest-physical address does not consist of whole 4 KiB pages.
    #[error("the range or the guest-physical address is not a multiple of 4 KiB")]
    Misaligned,
    /// The range passes the last address of the table, or the guest-physical range passes
    /// 2^52 - 1.
    #[error("the range passes the end of the table, or the guest-physical range passes 2^52 - 1")]
    OutOfRange,
    /// Part of the range is mapped already. Carries the first leaf mapped there.
    #[error("{0} is mapped already")]
    Overlap(IovaRange),
    /// The arena has too few free frames.
    #[error(transparent)]
    OutOfFrames(OutOfFrames),
}

/// An UNMAP is refused, because it would split the mapping that this leaf belongs to; nothing has
/// changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it would split the mapping at {0}")]
pub struct WouldSplit(pub IovaRange);
