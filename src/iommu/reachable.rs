//! The part of a mapping that backends have: the part in guest RAM.

use crate::address::{Access, Mapping};
use crate::backends::MemorySlot;

/// Whether backends have the whole mapping. Nearly every mapping is of this kind.
#[inline(always)]
pub(super) fn is_all_reachable(memory: &[MemorySlot], mapping: &Mapping) -> bool {
    // Slots are disjoint: a mapping that does not fit into the slot of its first byte fits into none.
    let first = memory.iter().find(|s| s.range.contains(mapping.gpa));
    let is_inside = |s: &MemorySlot| mapping.range.span() <= s.range.last().0 - mapping.gpa.0;
    mapping.access != Access::NONE && first.is_some_and(is_inside)
}

/// The number of bytes of a mapping that lie in `memory`; 0 for a mapping without access rights.
/// Backends have mapped at least this many.
pub(super) fn reachable_bytes(memory: &[MemorySlot], mapping: &Mapping) -> u64 {
    if mapping.access == Access::NONE {
        return 0;
    }
    memory
        .iter()
        .filter_map(|slot| mapping.part_in(slot.range)?.range.len_bytes())
        .fold(0, u64::saturating_add)
}
