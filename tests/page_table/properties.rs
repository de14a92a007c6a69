//! Short runs of requests that proptest shrinks, and the counterexamples that it has found.

use proptest::prelude::*;
use vhost_device_iommu::address::{Access, Gpa, IovaRange};
use vhost_device_iommu::page_table::{Encoding, Levels, Mapping};

use crate::audit::audit;
use crate::pair::{Op, Pair};
use crate::{GIB, MIB2, PAGE, encodings, range};

fn any_mapping(levels: Levels) -> impl Strategy<Value = Mapping> {
    let end = levels.last_address().0;
    let anchor = prop_oneof![
        Just(0u64),
        Just(GIB),
        Just(512 * GIB),
        Just(end - GIB + 1),
        Just(end - 4 * MIB2 + 1),
    ];
    let steps = prop_oneof![
        (0..16u64, 1..16u64).prop_map(|(at, len)| (at * PAGE, len * PAGE)),
        (0..4u64, 1..4u64).prop_map(|(at, len)| (at * MIB2, len * MIB2)),
        (508..516u64, 1..1030u64).prop_map(|(at, len)| (at * PAGE, len * PAGE)),
        (0..3u64, 1..3u64).prop_map(|(at, len)| (at * GIB, len * GIB)),
        (0..8 * PAGE, 1..3 * PAGE),
    ];
    let skew = prop_oneof![
        3 => Just(0u64),
        1 => Just(GIB),
        1 => Just(MIB2),
        1 => Just(PAGE),
        1 => Just(1u64 << 51),
    ];
    (anchor, steps, skew, any::<(bool, bool, bool)>()).prop_map(
        move |(anchor, (at, bytes), skew, (read, write, mmio))| {
            let first = (anchor + at).min(end);
            let bytes = if skew == PAGE {
                bytes.min(8 * MIB2)
            } else {
                bytes
            };
            Mapping {
                range: range(first, first + (bytes - 1)),
                gpa: Gpa(first % (1 << 50) + skew),
                access: Access { read, write },
                mmio,
            }
        },
    )
}

fn any_op(levels: Levels) -> impl Strategy<Value = Op> {
    let end = levels.last_address().0;
    let anchor = || prop_oneof![Just(0u64), 0..GIB, Just(512 * GIB), (end - GIB)..end];
    let shift = || {
        prop_oneof![
            4 => Just(0i64),
            1 => Just(1),
            1 => Just(-1),
            1 => Just(PAGE as i64),
            1 => Just(-(MIB2 as i64)),
        ]
    };
    prop_oneof![
        6 => any_mapping(levels).prop_map(Op::Map),
        1 => any_mapping(levels).prop_map(|mapping| Op::Unmap(mapping.range)),
        1 => anchor().prop_map(|first| Op::Unmap(range(first, u64::MAX))),
        3 => (anchor(), anchor(), shift(), shift()).prop_map(|(from, to, move_first, move_last)| {
            Op::UnmapLive { from, to, move_first, move_last }
        }),
        1 => Just(Op::Reclaim),
    ]
}

fn any_run() -> impl Strategy<Value = (Levels, u64, Encoding, Vec<Op>)> {
    let levels = prop_oneof![Just(Levels::Four), Just(Levels::Five)];
    let frames = prop_oneof![2..16u64, Just(200)];
    (levels, frames).prop_flat_map(|(levels, frames)| {
        let encoding = prop::sample::select(encodings(levels, GIB + MIB2));
        let ops = prop::collection::vec(any_op(levels), 1..40);
        (Just(levels), Just(frames), encoding, ops)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_table_agrees_with_the_model((levels, frames, encoding, ops) in any_run()) {
        compare_in(encoding, levels, frames, &ops);
    }
}

/// [`compare_in`] every encoding.
fn compare_with_the_model(levels: Levels, frames: u64, ops: &[Op]) {
    for encoding in encodings(levels, 512 * GIB) {
        compare_in(encoding, levels, frames, ops);
    }
}

/// Applies `ops` to a table and to the model, and compares the two after each.
fn compare_in(encoding: Encoding, levels: Levels, frames: u64, ops: &[Op]) {
    let mut pair = Pair::new(frames, levels, encoding);
    for op in ops {
        let before = pair.contents();
        if pair.apply(op) {
            assert_eq!(pair.contents(), before);
        }
        pair.check_listing(IovaRange::ALL);
        audit(&pair.arena, &pair.table, &pair.model);
    }
    pair.finish(ops.len().is_multiple_of(2));
}

/// A mapping without rights, as in the counterexamples below.
fn without_rights(range: IovaRange, gpa: u64) -> Op {
    Op::Map(Mapping {
        range,
        gpa: Gpa(gpa),
        access: Access {
            read: false,
            write: false,
        },
        mmio: false,
    })
}

// Counterexamples that proptest found. They stand here by their values. A regression file holds
// seeds, and a seed gives another value as soon as `any_run` changes.

#[test]
fn regression_unmap_inside_a_mapping_of_one_gib() {
    let ops = [
        without_rights(range(0, GIB - 1), 0),
        Op::UnmapLive {
            from: 0,
            to: 0,
            move_first: 1,
            move_last: 1,
        },
    ];
    compare_with_the_model(Levels::Four, 3, &ops);
}

#[test]
fn regression_unmaps_beside_and_over_a_lone_page() {
    let page = 0xffff_ff80_0000;
    let ops = [
        without_rights(range(page, page + PAGE - 1), page),
        Op::Unmap(range(page + PAGE, page + 2 * PAGE - 1)),
        Op::Unmap(IovaRange::ALL),
        Op::Unmap(range(0xffff_ff80_4646, 0xffff_ff80_7121)),
    ];
    compare_with_the_model(Levels::Four, 5, &ops);
}
