//! The windows of a mapping, and their pieces in files with huge pages.

use std::sync::Arc;

use super::MemorySlot;
use crate::address::{Access, GpaRange, Iova, IovaRange, Mapping};

/// A window: a mapping, or the part of one that leads into one memory slot, or one of the two [`pieces`] of that part.
#[derive(Clone, Debug)]
pub(super) struct DmaWindow {
    pub(super) range: IovaRange,
    pub(super) access: Access,
    pub(super) slot: Arc<MemorySlot>,
    /// The window's first byte in the slot.
    pub(super) offset: u64,
}

/// The windows of a mapping: the parts of it that lead into guest RAM. `slots` must be in ascending order and disjoint.
/// A mapping without rights has no windows.
pub(super) fn windows_of(
    mapping: Mapping,
    slots: &[Arc<MemorySlot>],
) -> impl Iterator<Item = DmaWindow> + Send + '_ {
    let target = mapping.target().filter(|_| mapping.access != Access::NONE);
    let from = slots.partition_point(|s| s.range.last() < mapping.gpa);
    let touched = slots
        .iter()
        .skip(from)
        .take_while(move |s| target.is_some_and(|t| reaches(t, s.range)));
    let windows = touched.filter_map(move |slot| {
        let part = mapping.part_in(slot.range)?;
        Some(DmaWindow {
            range: part.range,
            access: part.access,
            slot: slot.clone(),
            offset: part.gpa.0 - slot.range.first().0,
        })
    });
    windows.flat_map(pieces)
}

/// The window in one piece, or in the two that [`first_piece`] wants.
pub(super) fn pieces(window: DmaWindow) -> impl Iterator<Item = DmaWindow> + Send {
    let cut = cut(&window);
    let (head, tail) = match cut {
        None => (window, None),
        Some((head, tail, offset)) => {
            let rest = DmaWindow {
                range: tail,
                offset,
                ..window.clone()
            };
            let begin = DmaWindow {
                range: head,
                ..window
            };
            (begin, Some(rest))
        }
    };
    std::iter::once(head).chain(tail)
}

/// The ranges of two pieces, and the offset of the second one in the slot; `None` if one piece is enough.
fn cut(window: &DmaWindow) -> Option<(IovaRange, IovaRange, u64)> {
    let first = window.range.first();
    let at = window.slot.offset.checked_add(window.offset)?;
    let len = first_piece(window.slot.block_len, at, window.range.len_bytes()?)?;
    let next = Iova(first.0.checked_add(len)?);
    let head = IovaRange::new(first, Iova(next.0.checked_sub(1)?))?;
    let tail = IovaRange::new(next, window.range.last())?;
    Some((head, tail, window.offset.checked_add(len)?))
}

fn reaches(target: GpaRange, slot: GpaRange) -> bool {
    target.intersection(slot).is_some()
}

/// The length of the first of the two pieces in which a window of `len` bytes, from byte `offset` of its file on, is
/// announced; `None` if one piece is enough. The file has blocks of `block` bytes: huge pages, for example.
///
/// libvfio-user maps whole blocks of the file, from the window's first block on, and as many as the *length* of the window
/// needs. A window that begins within a block, and is longer than the rest of these blocks, ends outside of them. The
/// server would then access other memory of its own. So such a window is cut where its second block begins. A window of
/// one page never is, and neither is one of whole blocks.
fn first_piece(block: u64, offset: u64, len: u64) -> Option<u64> {
    let at = offset.checked_rem(block)?;
    let mapped = len.checked_next_multiple_of(block)?;
    (at.checked_add(len)? > mapped).then(|| block - at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 0x1000;
    const HUGE: u64 = 2 << 20;

    /// The bytes of a window that libvfio-user maps.
    fn is_mapped(block: u64, offset: u64, len: u64) -> bool {
        let begin = offset / block * block;
        offset + len <= begin + len.next_multiple_of(block)
    }

    #[test]
    fn only_windows_that_reach_out_of_their_blocks_are_cut() {
        for (offset, len, first) in [
            (0, HUGE, None),
            (HUGE, 512 * HUGE, None),
            (HUGE - PAGE, PAGE, None),
            (3 * PAGE, HUGE - 3 * PAGE, None),
            (3 * PAGE, HUGE - 2 * PAGE, Some(HUGE - 3 * PAGE)),
            (HUGE - PAGE, 2 * PAGE, Some(PAGE)),
            (PAGE, HUGE, Some(HUGE - PAGE)),
        ] {
            assert_eq!(
                first_piece(HUGE, offset, len),
                first,
                "{len:#x} at {offset:#x}"
            );
            assert_eq!(first_piece(PAGE, offset, len), None);
        }
        assert_eq!(first_piece(0, PAGE, PAGE), None);
        assert_eq!(first_piece(HUGE, u64::MAX, u64::MAX), None);
    }

    proptest! {
        #[test]
        fn each_piece_is_mapped_whole(at in 0..2048u64, pages in 1..4096u64, small: bool) {
            let block = if small { 16 * PAGE } else { HUGE };
            let (offset, len) = (at * PAGE, pages * PAGE);
            match first_piece(block, offset, len) {
                None => prop_assert!(is_mapped(block, offset, len)),
                Some(first) => {
                    prop_assert!(!is_mapped(block, offset, len));
                    prop_assert!((1..len).contains(&first));
                    prop_assert!(is_mapped(block, offset, first));
                    prop_assert!(is_mapped(block, offset + first, len - first));
                }
            }
        }
    }
}
