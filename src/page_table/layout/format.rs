//! The formats of the entries, and the place of the tables in the address space of the hardware that walks them.

use thiserror::Error;

use super::{FRAME_BYTES, Levels, vmsav8, x86};

/// The format of a table's entries, which decides whose hardware can walk it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// First-stage translation of x86-64, as in VT-d: 4 or 5 levels, 52 bits of guest-physical address.
    #[default]
    X86FirstStage,
    /// VMSAv8-64 stage 1 with a granule of 4 KiB, as in SMMUv3: 4 levels, 48 bits of guest-physical address.
    Vmsav8Stage1,
}

impl Format {
    /// The number in the arena's header.
    pub fn number(self) -> u64 {
        match self {
            Self::X86FirstStage => 0,
            Self::Vmsav8Stage1 => 1,
        }
    }

    /// The format with this number in an arena's header.
    pub fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::X86FirstStage),
            1 => Some(Self::Vmsav8Stage1),
            _ => None,
        }
    }

    /// Guest-physical addresses lie below this limit: a leaf cannot hold higher ones.
    #[inline(always)]
    pub fn gpa_limit(self) -> u64 {
        match self {
            Self::X86FirstStage => 1 << 52,
            Self::Vmsav8Stage1 => 1 << 48,
        }
    }

    /// The depth of the deepest tables.
    pub fn most_levels(self) -> Levels {
        match self {
            Self::X86FirstStage => Levels::Five,
            Self::Vmsav8Stage1 => Levels::Four,
        }
    }

    /// Whether tables can be this deep.
    pub fn has_levels(self, levels: Levels) -> bool {
        levels.count() <= self.most_levels().count()
    }

    /// The bit that marks the first leaf of a mapping.
    #[inline(always)]
    pub(in crate::page_table) fn first(self) -> u64 {
        match self {
            Self::X86FirstStage => x86::FIRST,
            Self::Vmsav8Stage1 => vmsav8::FIRST,
        }
    }

    /// The bit that marks the last leaf of a mapping.
    #[inline(always)]
    pub(in crate::page_table) fn last(self) -> u64 {
        match self {
            Self::X86FirstStage => x86::LAST,
            Self::Vmsav8Stage1 => vmsav8::LAST,
        }
    }
}

/// How the tables of an arena are encoded: the format of their entries, and the address that pointers count from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// The format of the entries.
    pub format: Format,
    /// The guest-physical address at which the hardware that walks the tables finds the arena; a multiple of
    /// [`FRAME_BYTES`]. 0: only software walks them, and a pointer is an offset.
    pub base: u64,
}

impl Encoding {
    /// Checks that an arena of `bytes` can lie at the base.
    ///
    /// # Errors
    /// The base is no page's address, or the arena would end beyond the addresses of the format.
    pub fn check(self, bytes: u64) -> Result<(), WrongBase> {
        let (base, limit) = (self.base, self.format.gpa_limit());
        if !base.is_multiple_of(FRAME_BYTES) {
            return Err(WrongBase::Misaligned { base });
        }
        match base.checked_add(bytes) {
            Some(end) if end <= limit => Ok(()),
            _ => Err(WrongBase::TooHigh { base, bytes, limit }),
        }
    }
}

/// An arena cannot lie at its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WrongBase {
    /// The base is no page's address.
    #[error("the page tables cannot lie at {base:#x}; give a multiple of 4 KiB")]
    Misaligned {
        /// The base.
        base: u64,
    },
    /// The arena would end beyond the addresses of its format.
    #[error(
        "page tables of {bytes} bytes at {base:#x} would pass {limit:#x}, the end of the addresses of their format; give a \
         lower address, or lower the arena limit"
    )]
    TooHigh {
        /// The base.
        base: u64,
        /// The size of the arena.
        bytes: u64,
        /// The first address that the format cannot express.
        limit: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_lies_where_pointers_reach_all_of_it() {
        for (format, limit) in [
            (Format::X86FirstStage, 1 << 52),
            (Format::Vmsav8Stage1, 1 << 48),
        ] {
            assert_eq!(Format::from_number(format.number()), Some(format));
            let check = |base, bytes| Encoding { format, base }.check(bytes);
            assert_eq!(check(0, 1 << 20), Ok(()));
            assert_eq!(check(limit - (1 << 20), 1 << 20), Ok(()));
            for (base, bytes) in [
                (limit - (1 << 20) + FRAME_BYTES, 1 << 20),
                (limit, FRAME_BYTES),
                (u64::MAX - (FRAME_BYTES - 1), 1 << 20),
            ] {
                let refused = check(base, bytes);
                assert_eq!(refused, Err(WrongBase::TooHigh { base, bytes, limit }));
            }
            let base = FRAME_BYTES + 8;
            assert_eq!(check(base, 1), Err(WrongBase::Misaligned { base }));
        }
        assert_eq!(Format::from_number(2), None);
        assert!(!Format::Vmsav8Stage1.has_levels(Levels::Five));
    }
}
