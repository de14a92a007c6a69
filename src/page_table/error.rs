//! Errors of the arena, and the refusals of MAP and UNMAP.

use std::io;

use thiserror::Error;

use super::layout::{Levels, WrongBase};
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
    /// It cannot lie at its base.
    #[error(transparent)]
    Base(#[from] WrongBase),
    /// The format has no tables that translate so many bits of address.
    #[error(
        "page tables of their format translate {most} bits of address; lower the address width from {bits}"
    )]
    TooWide {
        /// The wanted width in bits.
        bits: u32,
        /// The most that the format has.
        most: u32,
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

/// A table cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TableRefusal {
    /// The arena has too few free frames.
    #[error(transparent)]
    OutOfFrames(#[from] OutOfFrames),
    /// The format of the arena has no tables of this depth.
    #[error("the format of the page tables has no {} levels", .0.count())]
    TooDeep(Levels),
}

/// A MAP is refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapRefusal {
    /// The range or the guest-physical address does not consist of whole 4 KiB pages.
    #[error("the range or the guest-physical address is not a multiple of 4 KiB")]
    Misaligned,
    /// The range passes the last address of the table, or the guest-physical range passes the end of
    /// the addresses of the table's format.
    #[error(
        "the range passes the end of the table, or the guest-physical range passes the last address of its format"
    )]
    OutOfRange,
    /// The guest-physical range shares an address with the arena: an endpoint whose hardware walks the
    /// tables would reach them.
    #[error("the guest-physical range leads to the page tables")]
    TargetsTables,
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
