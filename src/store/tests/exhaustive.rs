//! Every kind of request, with a death after each of its stores, and deaths of the process that goes on.

use super::bed::{A, B, Bed, D1, D2, D3, G1, G2, G3, OK, Req, Snapshot, Step};
use super::model::Model;
use crate::ids::DomainId;
use crate::page_table::crash;

/// No death.
const NEVER: u64 = u64::MAX;

/// What happens before, and the step in which the process dies.
pub(super) struct Case {
    pub name: &'static str,
    pub before: Vec<Step>,
    pub step: Step,
}

fn map(domain: DomainId, first: u64, pages: u64) -> Req {
    Req::Map(domain, first, pages, first + 0x4_0000)
}

fn case(name: &'static str, before: &[Req], step: &[Req]) -> Case {
    Case {
        name,
        before: before.iter().map(|r| Step::Batch(vec![*r])).collect(),
        step: Step::Batch(step.to_vec()),
    }
}

fn in_d1() -> Vec<Req> {
    vec![
        Req::Attach(A, D1, false),
        Req::Attach(B, D1, false),
        map(D1, 1, 1),
        map(D1, 4, 3),
    ]
}

fn with(mut before: Vec<Req>, more: &[Req]) -> Vec<Req> {
    before.extend(more);
    before
}

pub(super) fn cases() -> Vec<Case> {
    let in_d1 = in_d1();
    // Beyond the tables of the other mappings.
    let far = 1 << 27;
    let big = with(in_d1.clone(), &[map(D1, far, 2), map(D1, 512, 600)]);
    let groups = [
        Req::Attach(G1, D1, false),
        Req::Attach(G2, D1, false),
        map(D1, 1, 1),
    ];
    let mut all = vec![
        case("map a leaf", &in_d1, &[map(D1, 2, 1)]),
        case("map leaves", &in_d1, &[map(D1, 8, 9)]),
        case("map in new tables", &in_d1, &[map(D1, far, 1)]),
        case("map over two tables", &in_d1, &[map(D1, 510, 4)]),
        case("map 2 MiB", &in_d1, &[map(D1, 1024, 512)]),
        case("map 2 MiB and pages", &in_d1, &[map(D1, 1020, 520)]),
        case(
            "map what is mapped",
            &in_d1,
            &[map(D1, 1, 1), map(D1, 2, 1)],
        ),
        case("unmap one", &in_d1, &[Req::Unmap(D1, 1, 1)]),
        case("unmap leaves", &in_d1, &[Req::Unmap(D1, 4, 3)]),
        case("unmap several", &in_d1, &[Req::Unmap(D1, 0, 64)]),
        case("unmap nothing", &in_d1, &[Req::Unmap(D1, 2, 1)]),
        case("unmap a part", &in_d1, &[Req::Unmap(D1, 4, 1)]),
        case("unmap with tables", &big, &[Req::Unmap(D1, far, 1 << 18)]),
        case(
            "unmap leaves of two sizes",
            &big,
            &[Req::Unmap(D1, 512, 600)],
        ),
        case("unmap all", &big, &[Req::Unmap(D1, 0, 1 << 36)]),
        case("attach to a new domain", &[], &[Req::Attach(A, D1, false)]),
        case(
            "attach to a domain",
            &in_d1[..1],
            &[Req::Attach(B, D1, false)],
        ),
        case(
            "attach to a domain with mappings",
            &with(in_d1[..1].to_vec(), &in_d1[2..]),
            &[Req::Attach(B, D1, false)],
        ),
        case("move to a new domain", &in_d1, &[Req::Attach(A, D2, false)]),
        case(
            "move the last member",
            &with(in_d1[..1].to_vec(), &in_d1[2..]),
            &[Req::Attach(A, D2, false)],
        ),
        case(
            "move to another domain",
            &with(in_d1.clone(), &[Req::Attach(G1, D2, false), map(D2, 9, 2)]),
            &[Req::Attach(A, D2, false)],
        ),
        case(
            "attach to a bypass domain",
            &in_d1,
            &[Req::Attach(A, D3, true)],
        ),
        case("attach again", &in_d1, &[Req::Attach(A, D1, false)]),
        case("attach otherwise", &in_d1, &[Req::Attach(A, D1, true)]),
        case(
            "move a member of a group",
            &groups,
            &[Req::Attach(G1, D2, false)],
        ),
        case(
            "move the last member of a group",
            &with(groups.to_vec(), &[Req::Attach(G3, D1, false)]),
            &[Req::Attach(G3, D2, false)],
        ),
        case(
            "the group follows",
            &with(groups.to_vec(), &[Req::Attach(G1, D2, false)]),
            &[Req::Attach(G2, D2, false)],
        ),
        case(
            "the group returns",
            &with(groups.to_vec(), &[Req::Attach(G1, D2, false)]),
            &[Req::Attach(G1, D1, false)],
        ),
        case("the first of a group", &[], &[Req::Attach(G3, D1, false)]),
        case("detach a member", &in_d1, &[Req::Detach(A, D1)]),
        case("detach the last", &in_d1[..1], &[Req::Detach(A, D1)]),
        case("detach of a group", &groups, &[Req::Detach(G1, D1)]),
        case(
            "detach, and others come back",
            &with(groups.to_vec(), &[Req::Attach(G1, D2, false)]),
            &[Req::Detach(G1, D2)],
        ),
        case("detach nobody", &in_d1, &[Req::Detach(A, D2)]),
        case("probe", &in_d1, &[Req::Probe(A), Req::Junk, Req::Probe(B)]),
        case(
            "a run of maps",
            &in_d1,
            &[
                map(D1, 20, 1),
                map(D1, 21, 2),
                map(D1, 20, 2),
                map(D1, 513, 1),
            ],
        ),
        case(
            "a run of unmaps",
            &in_d1,
            &[
                Req::Unmap(D1, 1, 1),
                Req::Unmap(D1, 4, 3),
                Req::Unmap(D1, 0, 9),
            ],
        ),
        case(
            "a run of unmaps with a refusal that a later one would change",
            &in_d1,
            &[
                Req::Unmap(D1, 1, 1),
                Req::Unmap(D1, 4, 2),
                Req::Unmap(D1, 4, 3),
            ],
        ),
        case(
            "a batch of everything",
            &in_d1,
            &[
                Req::Unmap(D1, 1, 1),
                map(D1, 1, 1),
                map(D1, 1, 1),
                Req::Junk,
                Req::Attach(G1, D2, false),
                map(D2, 3, 1),
                Req::Detach(A, D1),
                Req::Attach(A, D2, false),
            ],
        ),
    ];
    let steps = [
        ("bypass off", Step::Bypass(false)),
        ("reset", Step::Reset),
        ("reset of the VM", Step::ResetVm),
    ];
    for (name, step) in steps {
        let mut before: Vec<_> = in_d1.iter().map(|r| Step::Batch(vec![*r])).collect();
        if name == "reset of the VM" {
            before.push(Step::Bypass(false));
        }
        all.push(Case { name, before, step });
    }
    let before = vec![Step::Bypass(false)];
    all.push(Case {
        name: "bypass on",
        before,
        step: Step::Bypass(true),
    });
    all
}

/// The bed after `case.before`.
fn prepared(case: &Case, count: usize, batchers: u8) -> (Bed, Model) {
    let mut bed = Bed::new(count, batchers);
    let mut model = Model::default();
    for step in &case.before {
        assert!(bed.step(step, NEVER).0);
        for (request, status) in &bed.answers {
            assert_eq!(*status, Some(OK), "{}: {request:?}", case.name);
        }
        bed.check(&mut model);
    }
    (bed, model)
}

/// What happens to a bed without a death: the points passed, the answers, and the state.
fn undisturbed(case: &Case, count: usize, batchers: u8) -> (u64, Vec<(Req, Option<u8>)>, Snapshot) {
    let (mut bed, mut model) = prepared(case, count, batchers);
    let (_, points) = bed.step(&case.step, NEVER);
    let answers = bed.answers.clone();
    finish(case, &mut bed, &mut model);
    (points, answers, bed.snapshot())
}

/// Checks a bed after the step.
fn finish(case: &Case, bed: &mut Bed, model: &mut Model) {
    if !matches!(case.step, Step::Batch(_) | Step::Bypass(_)) {
        model.reset();
    }
    bed.check(model);
}

/// The restored core goes on: it serves everything else, and a reset frees all memory.
fn go_on(bed: &mut Bed, model: &mut Model) {
    let more = [
        Req::Attach(A, D1, false),
        Req::Unmap(D1, 0, 1 << 36),
        map(D1, 1, 2),
        map(D1, 600, 1),
        Req::Unmap(D1, 600, 1),
    ];
    for request in more {
        assert!(bed.step(&Step::Batch(vec![request]), NEVER).0);
    }
    bed.check(model);
    bed.step(&Step::Reset, NEVER);
    model.reset();
    bed.check(model);
    let arena = bed.iommu().arena();
    assert_eq!((arena.frames_used(), arena.frames_retired()), (1, 0));
}

fn set_ups() -> impl Iterator<Item = (usize, u8)> {
    [(0, 0), (1, 0), (1, 1), (2, 0b10)].into_iter()
}

#[test]
fn a_death_after_any_store_is_not_noticed() {
    let mut deaths = 0;
    for case in &cases() {
        for (count, batchers) in set_ups() {
            let (points, answers, state) = undisturbed(case, count, batchers);
            for at in 0..points {
                let (mut bed, mut model) = prepared(case, count, batchers);
                let name = format!("{}, {count} kernels, died after {at} points", case.name);
                // A slow machine publishes a batch in several parts, which have points of their own.
                if !bed.step(&case.step, at).0 {
                    assert!(bed.restore(NEVER).0);
                }
                let mut found = bed.answers.clone();
                found.retain(|answer| !matches!(answer.0, Req::Probe(_)));
                let mut expected = answers.clone();
                expected.retain(|answer| !matches!(answer.0, Req::Probe(_)));
                assert_eq!(found, expected, "{name}");
                finish(case, &mut bed, &mut model);
                assert_eq!(bed.snapshot(), state, "{name}");
                go_on(&mut bed, &mut model);
                deaths += bed.deaths;
            }
        }
    }
    assert!(deaths > 2000, "only {deaths} deaths");
}

#[test]
fn a_death_of_the_process_that_goes_on_is_not_noticed() {
    let mut deaths = 0;
    for (number, case) in cases().iter().enumerate() {
        let (count, batchers) = [(1, 0), (2, 0b01)][number % 2];
        let (points, answers, state) = undisturbed(case, count, batchers);
        // Every few points, at another offset for each case.
        for at in (0..points).skip(1 + number % 7).step_by(7) {
            for second in (number as u64 % 5..).step_by(5) {
                let (mut bed, mut model) = prepared(case, count, batchers);
                let name = format!("{}, {count} kernels, died at {at} and {second}", case.name);
                if bed.step(&case.step, at).0 || bed.restore(second).0 {
                    break;
                }
                assert!(bed.restore(NEVER).0, "{name}");
                // The same request may have ended two processes.
                let is_refused = bed.answers.len() == answers.len()
                    && bed.answers.iter().any(|a| a.1 == Some(super::bed::DEVERR));
                if !is_refused {
                    let mut found = bed.answers.clone();
                    found.retain(|answer| !matches!(answer.0, Req::Probe(_)));
                    let mut expected = answers.clone();
                    expected.retain(|answer| !matches!(answer.0, Req::Probe(_)));
                    assert_eq!(found, expected, "{name}");
                }
                finish(case, &mut bed, &mut model);
                if !is_refused {
                    assert_eq!(bed.snapshot(), state, "{name}");
                }
                go_on(&mut bed, &mut model);
                deaths += bed.deaths;
            }
        }
    }
    assert!(deaths > 2000, "only {deaths} deaths");
}

/// With a backend that fails, states and answers may differ from those without a death. They must agree nevertheless.
#[test]
fn a_death_with_a_failing_backend_leaves_an_agreement() {
    let mut deaths = 0;
    for case in &cases() {
        for (count, batchers) in [(1, 0), (2, 0b01)] {
            for fail in 1..4 {
                for at in (fail..).step_by(3) {
                    let (mut bed, mut model) = prepared(case, count, batchers);
                    let calls = bed.kernels[0].lock().calls;
                    bed.kernels[0].lock().fail_call = Some(calls + fail);
                    let (lived, _) = bed.step(&case.step, at);
                    if !lived {
                        assert!(bed.restore(NEVER).0);
                    }
                    finish(case, &mut bed, &mut model);
                    bed.kernels[0].lock().fail_call = None;
                    go_on(&mut bed, &mut model);
                    deaths += bed.deaths;
                    if lived {
                        break;
                    }
                }
            }
        }
    }
    assert!(deaths > 2000, "only {deaths} deaths");
}

#[test]
fn a_request_ends_two_processes_at_most() {
    let before = in_d1();
    for deadly in [
        map(D1, 8, 3),
        Req::Unmap(D1, 4, 3),
        Req::Attach(A, D2, false),
        Req::Detach(A, D1),
    ] {
        let case = case("deadly", &before, &[Req::Probe(B), deadly, map(D1, 40, 1)]);
        // Among the first effects of the request: each further entry of the batch takes seven stores, and the
        // publication of the other batch four.
        let at = {
            let (mut other, _) = prepared(&case, 1, 0);
            let (_, probe) = other.step(&Step::Batch(vec![Req::Probe(B)]), NEVER);
            probe + 2 * 7 - 2
        };
        let mut refused = 0;
        for second in 0.. {
            let (mut bed, mut model) = prepared(&case, 1, 0);
            assert!(!bed.step(&case.step, at).0);
            if bed.restore(second).0 {
                break;
            }
            // If the second process has died in the same request, the third must not execute it.
            assert!(bed.restore(NEVER).0);
            let found = bed.answers.iter().find(|(request, _)| *request == deadly);
            let status = found.expect("an answer").1;
            bed.check(&mut model);
            let quarantined = bed.iommu().endpoint(A).expect("an endpoint").quarantined;
            let is_refused = status == Some(super::bed::DEVERR);
            assert!(is_refused || status == Some(OK), "{deadly:?}: {status:?}");
            assert_eq!(quarantined, is_refused, "{deadly:?}");
            refused += u64::from(is_refused);
            go_on(&mut bed, &mut model);
        }
        assert!(refused > 0, "{deadly:?}");
    }
    assert!(!crash::is_dead());
}

/// Kills at random hit restores more often than executions: it takes more of them to refuse the request.
#[test]
fn deaths_of_restores_are_counted_apart() {
    let deadly = map(D1, 8, 3);
    let case = case("deadly", &in_d1(), &[Req::Probe(B), deadly]);
    for (deaths, expected) in [(1, OK), (7, OK), (8, super::bed::DEVERR)] {
        let (mut bed, _) = prepared(&case, 1, 0);
        let (_, points) = bed.step(&case.step, NEVER);
        let mut refused = 0;
        // The restore counts the death after it has made a core of its own, and dies before that is complete.
        let places = (0..points).flat_map(|at| (0..60).step_by(6).map(move |again| (at, again)));
        for (at, again) in places {
            let (mut bed, mut model) = prepared(&case, 1, 0);
            assert!(!bed.step(&case.step, at).0);
            let died = (0..deaths).take_while(|_| !bed.restore(again).0).count();
            if died < deaths {
                continue;
            }
            assert!(bed.restore(NEVER).0);
            let found = bed.answers.iter().find(|(request, _)| *request == deadly);
            let status = found.expect("an answer").1;
            bed.check(&mut model);
            assert!(
                status == Some(OK) || status == Some(expected),
                "{deaths} at {at}, {again}: {status:?}"
            );
            refused += u64::from(status != Some(OK));
        }
        assert_eq!(refused > 0, expected != OK, "{deaths}");
    }
    assert!(!crash::is_dead());
}
