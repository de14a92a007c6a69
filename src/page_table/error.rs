//! Why an arena, a mapping or its removal is refused.

use std::io;

use thiserror::Error;

use crate::address::IovaRange;

/// Why an arena could not be made or opened.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// Frame numbers have 32 bits, and the address space of this process has an end.
    #[error("an arena of {limit_bytes} bytes is too large; lower the arena limit")]
    TooLarge {
        /// The limit that was asked for.
        limit_bytes: u64,
    },
    /// A system call on the memfd failed.
    #[error("cannot {action} for the page tables")]
    System {
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The lists of free frames found no memory.
    #[error("no memory to keep track of {frames} frames of page tables; lower the arena limit")]
    Lists {
        /// The number of frames.
        frames: u32,
    },
    /// The descriptor a reader was given is no arena of this version.
    #[error("the descriptor holds no arena of page tables: {0}")]
    NotAnArena(&'static str),
}

/// The arena has not enough frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{needed} page table frames needed, {free} free; raise the arena limit")]
pub struct OutOfFrames {
    /// Frames the request takes.
    pub needed: u64,
    /// Frames that can be had now; retired ones are not among them.
    pub free: u64,
}

/// Why a MAP is refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapRefusal {
    /// The range or the guest-physical address is not made of whole 4 KiB pages.
    #[error("the range or the guest-physical address is not a multiple of 4 KiB")]
    Misaligned,
    /// The range passes the last address of the table, or the guest-physical range 2^52.
    #[error("the range passes the end of the table, or the guest-physical one 2^52")]
    OutOfRange,
    /// Part of the range is mapped already: by the mapping this leaf belongs to, the first in the
    /// range.
    #[error("{0} is mapped already")]
    Overlap(IovaRange),
    /// The arena is full.
    #[error(transparent)]
    OutOfFrames(OutOfFrames),
}

/// An UNMAP is refused: it would cut a mapping at this leaf of it. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it would split the mapping at {0}")]
pub struct WouldSplit(pub IovaRange);
