//! Runs of MAPs that the core executes in one call: the outcomes are those of single calls, whichever is refused.

use super::*;

/// An IOMMU with `count` recorders, and [`A`] and [`B`] in [`D1`]. Bit n of `batchers` says whether recorder n gains from
/// runs. `frames` is the size of the arena.
fn attached(count: usize, batchers: u8, frames: u64) -> (Iommu, Vec<Recorder>) {
    let settings = Settings {
        arena_limit: frames * KIB4,
        ..settings()
    };
    let mut iommu = Iommu::new(settings, topology()).expect("an arena");
    let recorders: Vec<_> = (0..count).map(|_| Recorder::new()).collect();
    for (index, recorder) in recorders.iter().enumerate() {
        recorder.state().batches_maps = batchers >> index & 1 != 0;
        let mine: Vec<_> = ALL.iter().copied().skip(index).step_by(count).collect();
        iommu
            .add_backend(Box::new(recorder.clone()), &mine)
            .expect("common addresses");
    }
    for endpoint in [A, B] {
        iommu.attach(endpoint, D1, false).expect("attached");
    }
    (iommu, recorders)
}

fn map_all(iommu: &mut Iommu, run: &[Mapping]) -> Vec<Result<(), RequestError>> {
    let mut outcomes = VecDeque::new();
    iommu.map_all(D1, run, &mut outcomes);
    outcomes.into()
}

/// Page `at`, or 1 GiB further for each page, so that every mapping needs frames of its own.
fn at(page: u64, is_spread: bool) -> u64 {
    (page * KIB4) << if is_spread { 18 } else { 0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn batched_maps_have_the_outcomes_of_single_ones(
        backends in 0usize..3,
        batchers in 0u8..4,
        is_spread in any::<bool>(),
        frames in 24u64..64,
        before in prop::collection::vec((0u64..40, 1u64..4), 0..6),
        run in prop::collection::vec((0u64..40, 1u64..6, prop::bool::weighted(0.05)), 1..24),
        refused in prop::collection::vec((0usize..2, 0u64..40), 0..4),
    ) {
        let (mut together, recorders) = attached(backends, batchers, frames);
        let (mut one_by_one, others) = attached(backends, 0, frames);
        let mapping_of = |page: u64, pages: u64| {
            let first = at(page, is_spread);
            mapping(first, first + pages * KIB4 - 1, page * KIB4)
        };
        for (iommu, recorders) in [(&mut together, &recorders), (&mut one_by_one, &others)] {
            for &(page, pages) in &before {
                let _ = iommu.map(D1, &mapping_of(page, pages));
            }
            for &(victim, page) in &refused {
                if let Some(recorder) = recorders.get(victim) {
                    recorder.state().refused_maps.insert(at(page, is_spread));
                }
            }
        }
        let run: Vec<_> = run
            .iter()
            .map(|&(page, pages, is_misaligned)| {
                let mapping = mapping_of(page, pages);
                let gpa = Gpa(mapping.gpa.0 + u64::from(is_misaligned));
                Mapping { gpa, ..mapping }
            })
            .collect();
        let outcomes = map_all(&mut together, &run);
        let expected: Vec<_> = run.iter().map(|mapping| one_by_one.map(D1, mapping)).collect();
        prop_assert_eq!(outcomes, expected);
        prop_assert_eq!(snapshot(&together), snapshot(&one_by_one));
        check_agreement(&together, &recorders);
    }
}

#[test]
fn only_mappings_that_depend_on_no_other_are_announced_together() {
    let (mut iommu, recorders) = attached(2, 0b10, 64);
    iommu.map(D1, &page(9)).expect("mapped");
    let wide = mapping(2 * KIB4, 5 * KIB4 - 1, 0);
    // Pages 2 to 4 are one mapping. The next one overlaps it, and the one after that overlaps both.
    let run = [
        page(1),
        wide,
        mapping(4 * KIB4, 6 * KIB4 - 1, 0),
        page(5),
        page(9),
        page(6),
    ];
    let outcomes = map_all(&mut iommu, &run);
    let done: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(done, [true, true, false, true, false, true]);
    assert_eq!(recorders[1].state().longest_run, 3);
    assert_eq!(recorders[0].state().longest_run, 0);
    check_agreement(&iommu, &recorders);
}

/// Fails every backend call of a run in turn.
#[test]
fn core_and_backends_agree_after_any_failed_call_of_a_run() {
    // The last one needs more frames than there are.
    let far = |n: u64| mapping(n << 39, (n << 39) + KIB4 - 1, 0);
    let run = [page(1), page(2), page(2), far(1), far(2), far(3), page(3)];
    for batchers in 0..4 {
        for victim in 0..2 {
            for n in 1.. {
                let (mut iommu, recorders) = attached(2, batchers, 12);
                let before = recorders[victim].state().calls;
                recorders[victim].state().fail_call = Some(before + n);
                let outcomes = map_all(&mut iommu, &run);
                assert_eq!(outcomes.len(), run.len());
                for (mapping, outcome) in run.iter().zip(&outcomes) {
                    let others = run.iter().zip(&outcomes);
                    let mapped = others
                        .filter(|(other, outcome)| *other == mapping && outcome.is_ok())
                        .count();
                    let there = translated(&iommu, A, mapping.range.first().0)
                        .or_else(|_| translated(&iommu, B, mapping.range.first().0));
                    assert_eq!(there.is_ok(), mapped == 1, "{mapping}: {outcome:?}");
                }
                check_agreement(&iommu, &recorders);
                if recorders[victim].state().calls < before + n {
                    assert!(n > 4, "only {n} calls");
                    break;
                }
            }
        }
    }
}
