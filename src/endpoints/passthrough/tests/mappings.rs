//! What devices reach.

use super::*;

#[test]
fn devices_reach_exactly_what_the_page_tables_map() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.check();
        for op in script() {
            let result = run(&mut bed, &op);
            if let Err(error) = &result {
                assert!(
                    matches!(op, Op::Map(_, m) if m.range.first() == Iova(0x30_0000)),
                    "{op:?}: {error}"
                );
            }
            bed.check();
            assert_eq!(bed.leaks(), 0, "{op:?}");
        }
    }
}

#[test]
fn endpoints_of_one_domain_share_one_host_mapping() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    for endpoint in [A, B] {
        bed.iommu.attach(endpoint, D1, false).expect("attached");
    }
    let before = bed.kernel.state().calls;
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    assert_eq!(bed.kernel.state().calls, before + 1);
    bed.check();
    bed.iommu
        .unmap(D1, range(0, 0xfff))
        .expect("unmapped with one call");
    assert_eq!(bed.kernel.state().calls, before + 2);
}

/// The specification lets a driver send any range, and demands OK unless the range splits a mapping.
#[test]
fn unmap_of_a_range_that_ends_within_pages_reaches_no_backend_as_it_is() {
    for interface in INTERFACES {
        for (first, last) in [
            (0x0fff, 0x2fff),
            (0x1000, 0x3000),
            (0x0001, 0x3ffe),
            (0x0800, u64::MAX - 1),
        ] {
            let mut bed = Bed::new(interface);
            bed.iommu.attach(A, D1, false).expect("attached");
            for at in [0x1000, 0x2000, 0x5000] {
                bed.iommu.map(D1, &mapping(at, 0x1000, at)).expect("mapped");
            }
            bed.iommu
                .unmap(D1, range(first, last))
                .expect("no mapping is split");
            let state = bed.iommu.endpoint(A).expect("an endpoint");
            assert!(!state.quarantined, "{interface:?} {first:#x}..={last:#x}");
            let left = usize::from(last < 0x5000);
            assert_eq!(bed.reached(1).len(), left, "{interface:?} {first:#x}");
            bed.check();
            let mut outcomes = std::collections::VecDeque::new();
            bed.iommu
                .map(D1, &mapping(0x1000, 0x1000, 0))
                .expect("mapped");
            bed.iommu
                .map(D1, &mapping(0x3000, 0x1000, 0))
                .expect("mapped");
            let parts = [range(0xffe, 0x2100), range(0x2101, 0x4001)];
            bed.iommu.unmap_all(D1, parts, &mut outcomes);
            assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
            bed.check();
        }
    }
}

#[test]
fn permissions_reach_the_host() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        let rights = [
            Access::READ,
            Access::WRITE,
            Access::READ_WRITE,
            Access::NONE,
        ];
        for (n, access) in rights.into_iter().enumerate() {
            let wanted = Mapping {
                access,
                ..mapping(n as u64 * 0x2000, 0x1000, 0x4000)
            };
            bed.iommu.map(D1, &wanted).expect("mapped");
        }
        let held: Vec<_> = bed.reached(1).iter().map(|a| a.access).collect();
        assert_eq!(held, rights[..3]);
        bed.check();
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
        assert!(bed.reached(1).is_empty());
        // A domain whose only mapping grants no rights must not fail either.
        let none = Mapping {
            access: Access::NONE,
            ..mapping(0, 0x1000, 0x4000)
        };
        bed.iommu.map(D1, &none).expect("mapped");
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    }
}

#[test]
fn an_unchanged_memory_table_causes_no_kernel_call() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        let file = memfd(0x4000);
        let again = file.try_clone().expect("a descriptor");
        bed.set_memory(vec![slot_of(file, 0, 0x4000, 0)]);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu.map(D1, &mapping(0, 0x4000, 0)).expect("mapped");
        let before = bed.kernel.state().calls;
        bed.set_memory(vec![slot_of(again, 0, 0x4000, 0)]);
        assert_eq!(bed.kernel.state().calls, before, "nothing has changed");
        bed.check();
    }
}

#[test]
fn kernels_without_mapping_by_file_take_addresses() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::Mapped));
    bed.kernel.state().old = true;
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu
        .map(D1, &mapping(0, 0x4000, 0xe000))
        .expect("mapped");
    bed.check();
}

#[test]
fn pin_mapped_keeps_a_bypass_address_space_only_while_it_is_used() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::Mapped));
    let spaces = |bed: &Bed| bed.kernel.state().spaces.len();
    let empty = spaces(&bed);
    bed.iommu.attach(A, D1, false).expect("attached");
    assert_eq!(spaces(&bed), empty + 1, "the domain's");
    bed.iommu.detach(A, D1).expect("detached");
    assert_eq!(spaces(&bed), empty + 1, "that of bypass mode");
    bed.check();
    bed.iommu.attach(A, D1, false).expect("attached");
    assert_eq!(spaces(&bed), empty + 1, "the domain's");
    bed.iommu.attach(B, D1, false).expect("attached");
    bed.iommu.attach(A, D2, true).expect("attached");
    assert_eq!(spaces(&bed), empty + 2, "both");
    bed.check();
}

#[test]
fn bypass_mode_that_lacks_memory_is_filled_or_refused() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.attach(B, D1, false).expect("attached");
    let mut memory = bed.memory.clone();
    memory.push(slot(0x100_0000, 0x1000, 0));
    bed.fail_in(1, libc::ENOMEM);
    bed.set_memory(memory);
    // The next endpoint that enters bypass mode reaches all memory.
    bed.iommu.detach(A, D1).expect("detached");
    bed.check();
    let mut memory = bed.memory.clone();
    memory.push(slot(0x200_0000, 0x1000, 0));
    bed.fail_in(1, libc::ENOMEM);
    bed.fail_in(2, libc::ENOMEM);
    bed.set_memory(memory);
    let refused = bed.iommu.detach(B, D1);
    assert!(
        matches!(refused, Err(RequestError::Quarantined { .. })),
        "{refused:?}"
    );
    assert!(bed.reached(2).is_empty());
}

#[test]
fn mappings_are_not_copied_from_bypass_mode_while_it_is_used() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    let files = |bed: &Bed| bed.kernel.state().mapped_by_file;
    bed.iommu.attach(A, D1, false).expect("attached");
    let before = files(&bed);
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    assert_eq!(files(&bed), before, "a copy");
    // Moves B from the VMM's address space into the daemon's bypass mode.
    bed.iommu.attach(B, D1, false).expect("attached");
    bed.iommu.detach(B, D1).expect("detached");
    let before = files(&bed);
    bed.iommu
        .map(D1, &mapping(0x1000, 0x1000, 0))
        .expect("mapped");
    assert_eq!(
        files(&bed),
        before + 1,
        "its pages may have been discarded since"
    );
    bed.check();
}

fn any_op() -> impl Strategy<Value = Op> {
    let endpoint = (0usize..4).prop_map(|n| ALL[n]);
    let domain = (1u32..4).prop_map(DomainId);
    let target = prop_oneof![
        4 => (0u64..32).prop_map(|n| n << 12),
        2 => (0x100u64..0x110).prop_map(|n| n << 12),
        1 => (0u64..6).prop_map(|n| BAR + (n << 12)),
    ];
    let access = prop_oneof![
        Just(Access::READ_WRITE),
        Just(Access::READ),
        Just(Access::WRITE),
        Just(Access::NONE)
    ];
    let any_mapping =
        (0u64..24, 1u64..6, target, access).prop_map(|(first, pages, gpa, access)| Mapping {
            access,
            ..mapping(first << 12, pages << 12, gpa)
        });
    prop_oneof![
        4 => (endpoint.clone(), domain.clone(), proptest::bool::weighted(0.1))
            .prop_map(|(e, d, b)| Op::Attach(e, d, b)),
        2 => (endpoint, domain.clone()).prop_map(|(e, d)| Op::Detach(e, d)),
        8 => (domain.clone(), any_mapping).prop_map(|(d, m)| Op::Map(d, m)),
        4 => (domain.clone(), 0u64..24, 0u64..12)
            .prop_map(|(d, first, more)| Op::Unmap(d, range(first << 12, ((first + more) << 12) | 0xfff))),
        4 => (domain, 0u64..0x1_8000, 0u64..0xc000)
            .prop_map(|(d, first, more)| Op::Unmap(d, range(first, first + more))),
        1 => any::<bool>().prop_map(Op::Bypass),
        1 => Just(Op::Reset),
        2 => (0usize..3).prop_map(Op::Memory),
        1 => Just(Op::Reconnect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_requests_leave_a_consistent_state(
        interface in (0usize..3).prop_map(|n| INTERFACES[n]),
        ops in proptest::collection::vec(any_op(), 1..60),
    ) {
        let mut bed = Bed::new(interface);
        for op in ops {
            let outcome = run(&mut bed, &op);
            // No call fails here, so no request of the guest may cost it an endpoint.
            let quarantined = matches!(outcome, Err(RequestError::Quarantined { .. }));
            prop_assert!(!quarantined, "{:?}: {:?}", op, outcome);
            bed.check();
            prop_assert_eq!(bed.leaks(), 0);
        }
    }
}
