//! Deaths at any call, which devices must not notice.

use super::*;

#[test]
fn a_death_at_any_call_is_not_noticed() {
    let mut deaths = 0;
    for (number, interface) in INTERFACES.into_iter().enumerate() {
        // More points for one of them.
        let step_by = if number == 0 { 2 } else { 8 };
        for case in &cases() {
            let (mut bed, mut model) = prepared(case, interface);
            let (_, points) = bed.step(&case.step, NEVER);
            let expected = answers(&bed);
            finish(case, &mut bed, &mut model);
            let state = bed.snapshot();
            for at in (0..points).skip(number).step_by(step_by) {
                let (mut bed, mut model) = prepared(case, interface);
                let name = format!("{}, {interface:?}, died after {at} points", case.name);
                if !bed.step(&case.step, at).0 {
                    assert!(bed.restore(NEVER).0);
                }
                assert_eq!(answers(&bed), expected, "{name}");
                finish(case, &mut bed, &mut model);
                assert_eq!(bed.snapshot(), state, "{name}");
                go_on(&mut bed, &mut model);
                deaths += bed.deaths;
            }
        }
    }
    assert!(deaths > 1000, "only {deaths} deaths");
}

#[test]
fn a_death_while_objects_are_taken_over_is_not_noticed() {
    let mut deaths = 0;
    for (number, case) in cases().iter().enumerate() {
        let interface = INTERFACES[number % INTERFACES.len()];
        let (mut bed, _) = prepared(case, interface);
        let (_, points) = bed.step(&case.step, NEVER);
        for at in (0..points).skip(1 + number % 7).step_by(14) {
            for second in (number as u64 % 5..).step_by(11) {
                let (mut bed, mut model) = prepared(case, interface);
                if bed.step(&case.step, at).0 || bed.restore(second).0 {
                    break;
                }
                assert!(bed.restore(NEVER).0, "{}, {at}, {second}", case.name);
                finish(case, &mut bed, &mut model);
                go_on(&mut bed, &mut model);
                deaths += bed.deaths;
            }
        }
    }
    assert!(deaths > 500, "only {deaths} deaths");
}

/// A device whose domain is not concerned reaches its memory at any time.
#[test]
fn other_devices_lose_no_mapping_for_a_moment() {
    let map = |first, pages| Req::Map(D1, first, pages, first + 0x4_0000);
    let before = [
        Req::Attach(A, D1, false),
        Req::Attach(B, D1, false),
        map(1, 1),
        map(4, 3),
    ];
    let steps: [&[Req]; 6] = [
        &[map(2, 1)],
        &[Req::Unmap(D1, 4, 3)],
        &[Req::Attach(B, D2, false), Req::Map(D2, 9, 1, 9)],
        &[Req::Detach(B, D1)],
        &[Req::Attach(G1, D1, false), Req::Attach(G2, D1, false)],
        &[Req::Attach(B, D2, true)],
    ];
    let mut deaths = 0;
    for interface in &INTERFACES[..4] {
        for step in steps {
            let case = Case {
                name: "others",
                before: before.iter().map(|r| Step::Batch(vec![*r])).collect(),
                step: Step::Batch(step.to_vec()),
            };
            for (at, second) in (0..).flat_map(|at| [(at, NEVER), (at, 7 + at % 40)]) {
                let (mut bed, mut model) = prepared(&case, *interface);
                let watched = {
                    let host = bed.host.as_ref().expect("a host");
                    let area = host.areas(&Mapping {
                        range: IovaRange::from_len(Iova(PAGE), PAGE).expect("a page"),
                        gpa: Gpa(0x4_0001 * PAGE),
                        access: Access::READ_WRITE,
                        mmio: false,
                    });
                    host.watched
                        .lock()
                        .expect("not poisoned")
                        .push((1, area[0]));
                    host.watched.clone()
                };
                let lived = bed.step(&case.step, at).0;
                if !lived && !bed.restore(second).0 {
                    assert!(bed.restore(NEVER).0);
                }
                finish(&case, &mut bed, &mut model);
                watched.lock().expect("not poisoned").clear();
                go_on(&mut bed, &mut model);
                deaths += bed.deaths;
                if lived {
                    break;
                }
            }
        }
    }
    assert!(deaths > 1000, "only {deaths} deaths");
}

/// The guest's group has a member in each of three groups of the host, which the host switches one by one.
#[test]
fn the_members_of_a_group_never_reach_two_targets() {
    let before = [
        Req::Attach(A, D2, false),
        Req::Map(D2, 20, 2, 30),
        Req::Attach(G1, D1, false),
        Req::Attach(G2, D1, false),
        Req::Attach(G3, D1, false),
        Req::Map(D1, 1, 2, 7),
    ];
    let all = |act: fn(EndpointId) -> Req| [G1, G2, G3].map(act).to_vec();
    let steps = [
        Step::Batch(all(|member| Req::Attach(member, D2, false))),
        Step::Batch(all(|member| Req::Attach(member, D3, true))),
        Step::Batch(all(|member| Req::Detach(member, D1))),
        Step::Reset,
        Step::ResetVm,
    ];
    let mut deaths = 0;
    let interfaces = [INTERFACES[0], INTERFACES[3], Interface::Type1];
    for (interface, step) in interfaces
        .into_iter()
        .flat_map(|i| steps.iter().map(move |s| (i, s)))
    {
        let case = Case {
            name: "members",
            before: before.iter().map(|r| Step::Batch(vec![*r])).collect(),
            step: step.clone(),
        };
        for (at, second) in (0..).flat_map(|at| [(at, NEVER), (at, 5 + at % 60)]) {
            let (mut bed, _) = prepared_on(&case, Host::new(interface, true));
            let lived = bed.step(&case.step, at).0;
            if !lived && !bed.restore(second).0 {
                assert!(bed.restore(NEVER).0);
            }
            assert!(bed.step(&Step::Reset, NEVER).0);
            deaths += bed.deaths;
            if lived {
                break;
            }
        }
    }
    assert!(deaths > 500, "only {deaths} deaths");
}
