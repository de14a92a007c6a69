//! Windows of large mappings, and in files with huge pages.

use std::sync::Arc;

use super::super::dma_window::windows_of;
use super::super::view::DeviceView;
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};
use crate::backends::MemorySlot;
use crate::backends::testing::slot;
use crate::page_table::{Arena, Levels, Table};

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
}

fn mapping(first: u64, len: u64, gpa: u64, access: Access) -> Mapping {
    Mapping {
        range: IovaRange::from_len(Iova(first), len).expect("not empty"),
        gpa: Gpa(gpa),
        access,
        mmio: false,
    }
}

fn ranges(view: &DeviceView) -> Vec<(u64, u64)> {
    let windows = view.windows_in(IovaRange::ALL);
    windows
        .map(|w| (w.range.first().0, w.range.last().0))
        .collect()
}

/// Servers with huge pages register windows of whole huge pages.
#[test]
fn a_large_mapping_is_one_window_however_the_table_holds_it() {
    const MIB2: u64 = 2 << 20;
    const GIB: u64 = 1 << 30;
    let slots = vec![Arc::new(slot(0, 3 * GIB, 0))];
    // In one leaf, in leaves of 2 MiB, and in leaves of 4 KiB: the guest-physical address decides.
    for (len, iova, gpa) in [
        (MIB2, 5 * MIB2, 7 * MIB2),
        (MIB2, 5 * MIB2, 7 * MIB2 + 0x1000),
        (GIB, GIB, GIB),
        (GIB, GIB, GIB + MIB2),
        (GIB, 3 * MIB2, 0x1000),
    ] {
        let mut arena = Arena::new(16 << 20).expect("an arena");
        let mut table = Table::new(&mut arena, Levels::Four).expect("a frame");
        let large = mapping(iova, len, gpa, Access::READ_WRITE);
        let plan = table.plan_map(&arena, &large).expect("free");
        table.commit_map(&mut arena, plan);
        let view = DeviceView::translated(table.reader(&arena), slots.clone(), [].into());
        let windows: Vec<_> = view.windows_in(IovaRange::ALL).collect();
        let found: Vec<_> = windows.iter().map(|w| (w.range, w.offset)).collect();
        assert_eq!(found, [(large.range, gpa)], "{len:#x} at {gpa:#x}");
    }
}

#[test]
fn a_window_that_begins_within_a_huge_page_is_two_if_it_goes_far() {
    const BLOCK: u64 = 2 << 20;
    let huge = MemorySlot {
        block_len: BLOCK,
        ..slot(BLOCK, 4 * BLOCK, BLOCK)
    };
    let slots = vec![Arc::new(huge)];
    let windows = |iova: u64, len: u64, gpa: u64| {
        let mapping = mapping(iova, len, gpa, Access::READ);
        let windows = windows_of(mapping, &slots);
        let windows = windows.map(|w| (w.range.first().0, w.range.len_bytes(), w.offset));
        windows.collect::<Vec<_>>()
    };
    let whole = [(0x1000, Some(BLOCK), BLOCK)];
    assert_eq!(windows(0x1000, BLOCK, 2 * BLOCK), whole);
    let page = [(0x1000, Some(0x1000), BLOCK - 0x1000)];
    assert_eq!(windows(0x1000, 0x1000, 2 * BLOCK - 0x1000), page);
    let two = [
        (0x1000, Some(0x1000), BLOCK - 0x1000),
        (0x2000, Some(BLOCK - 0x1000), BLOCK),
    ];
    assert_eq!(windows(0x1000, BLOCK, 2 * BLOCK - 0x1000), two);
    let bypass = DeviceView::bypass(slots.clone(), [range(0, BLOCK + 0xfff)].into());
    let all = range(BLOCK + 0x1000, 5 * BLOCK - 1);
    assert_eq!(ranges(&bypass), [(all.first().0, all.last().0)]);
    let bypass = DeviceView::bypass(
        slots.clone(),
        [range(0, BLOCK + 0xfff), range(5 * BLOCK - 0x1000, u64::MAX)].into(),
    );
    assert_eq!(ranges(&bypass), [(BLOCK + 0x1000, 5 * BLOCK - 0x1001)]);
    // From the last page of a huge page to the first one of the next.
    let (first, last) = (2 * BLOCK - 0x1000, 2 * BLOCK + 0xfff);
    let bypass = DeviceView::bypass(
        slots,
        [range(0, first - 1), range(last + 1, u64::MAX)].into(),
    );
    assert_eq!(ranges(&bypass), [(first, 2 * BLOCK - 1), (2 * BLOCK, last)]);
}
