//! The header: frame 0 of the arena.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Encoding, FRAME_BYTES, Format};
use crate::page_table::error::ArenaError;

/// First word of the arena.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iova\0tbl");
/// The version of an arena of [`Format::X86FirstStage`] with base 0. Readers that know no other arena refuse every other
/// version.
pub const ABI_VERSION: u64 = 1;
/// The version of an arena of another format, or with another base.
pub const ENCODED_VERSION: u64 = 2;

/// Index of the header word that holds [`MAGIC`].
pub const HEADER_MAGIC: usize = 0;
/// Index of the header word that holds [`ABI_VERSION`] or [`ENCODED_VERSION`].
pub const HEADER_VERSION: usize = 1;
/// Index of the header word that holds the levels of the deepest table made so far; 0 before the
/// first table.
pub const HEADER_LEVELS: usize = 2;
/// Index of the header word that holds the number of frames, including the header.
pub const HEADER_FRAMES: usize = 3;
/// Index of the header word that holds the number of the [`Format`].
pub const HEADER_FORMAT: usize = 4;
/// Index of the header word that holds the base, see [`Encoding::base`].
pub const HEADER_BASE: usize = 5;

/// The words of the header of a new arena that differ from zero, without the magic, which must be stored last.
pub(in crate::page_table) fn first_words(encoding: Encoding, frames: u32) -> [(usize, u64); 4] {
    let version = if encoding == Encoding::default() {
        ABI_VERSION
    } else {
        ENCODED_VERSION
    };
    [
        (HEADER_VERSION, version),
        (HEADER_FRAMES, u64::from(frames)),
        (HEADER_FORMAT, encoding.format.number()),
        (HEADER_BASE, encoding.base),
    ]
}

/// Checks the header of an arena of `bytes` that begins with `words`, and returns the encoding of its tables. Reads each
/// word once.
pub(in crate::page_table) fn read(
    words: &[AtomicU64],
    bytes: usize,
) -> Result<Encoding, ArenaError> {
    let refused = |why| Err(ArenaError::NotAnArena(why));
    let word = |index: usize| words.get(index).map_or(0, |w| w.load(Ordering::Acquire));
    if word(HEADER_MAGIC) != MAGIC {
        return refused("the magic number is missing");
    }
    let version = word(HEADER_VERSION);
    if version != ABI_VERSION && version != ENCODED_VERSION {
        return refused("it has another version");
    }
    let bytes = bytes as u64;
    if word(HEADER_FRAMES).checked_mul(FRAME_BYTES) != Some(bytes) {
        return refused("its size differs from that in its header");
    }
    let Some(format) = Format::from_number(word(HEADER_FORMAT)) else {
        return refused("its entries have an unknown format");
    };
    let base = word(HEADER_BASE);
    let encoding = Encoding { format, base };
    if version == ABI_VERSION && encoding != Encoding::default() {
        return refused("its version has neither another format nor a base");
    }
    if encoding.check(bytes).is_err() {
        return refused("it cannot lie at its base");
    }
    Ok(encoding)
}
