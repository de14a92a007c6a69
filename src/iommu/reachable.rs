//! How much of a mapping leads into guest RAM.

use crate::address::{Access, Mapping};
use crate::backends::MemorySlot;

/// Whether backends have all of a mapping, which is what they have to have of nearly every one.
#[inline(always)]
pub(super) fn is_all_reachable(memory: &[MemorySlot], mapping: &Mapping) -> bool {
    // Slots are disjoint: if not all of it is in the first, it is in none.
    let first = memory.iter().find(|s| s.range.contains(mapping.gpa));
    let is_inside = |s: &MemorySlot| mapping.range.span() <= s.range.last().0 - mapping.gpa.0;
    mapping.access != Access::NONE && first.is_some_and(is_inside)
}

/// The bytes of a mapping that lead into `memory`, with rights: backends have these at least.
pub(super) fn reachable_bytes(memory: &[MemorySlot], mapping: &Mapping) -> u64 {
    if mapping.access == Access::NONE {
        return 0;
    }
    memory
        .iter()
        .filter_map(|slot| mapping.part_in(slot.range)?.range.len_bytes())
        .fold(0, u64::saturating_add)
}
