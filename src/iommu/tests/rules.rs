//! The rules of the specification, each with 0, 1 and 2 backends.

use super::*;

/// MAP refuses a target at which the hardware that walks the tables finds them.
#[test]
fn no_mapping_leads_to_the_page_tables() {
    let base = 1 << 40;
    let settings = Settings {
        encoding: Encoding {
            format: Format::Vmsav8Stage1,
            base,
        },
        ..settings()
    };
    let mut iommu = Iommu::new(settings, topology()).expect("an arena");
    let recorder = Recorder::new();
    let added = iommu.add_backend(Box::new(recorder.clone()), &[A]);
    added.expect("the same addresses");
    iommu.attach(A, D1, false).expect("attached");
    for target in [base, base + settings.arena_limit - KIB4, base - KIB4] {
        let bad = mapping(0, 2 * KIB4 - 1, target);
        let refused = iommu.map(D1, &bad);
        assert!(
            matches!(refused, Err(RequestError::TargetsTables(_))),
            "{bad}: {refused:?}"
        );
    }
    let beyond = iommu.map(D1, &mapping(0, KIB4 - 1, 1 << 48));
    assert!(matches!(beyond, Err(RequestError::PhysOutOfRange(_))));
    assert_eq!(all_mappings(&iommu, D1), []);
    assert!(
        recorder.state().domains[&D1].is_empty(),
        "no backend has seen it"
    );
    let before = mapping(0, KIB4 - 1, base - KIB4);
    iommu.map(D1, &before).expect("the page before the tables");
}

#[test]
fn attach_3_an_endpoint_that_does_not_exist_is_noent() {
    with_each_backend_count(|mut iommu, _| {
        let absent = EndpointId(0x28);
        assert_eq!(
            iommu.attach(absent, D1, false),
            Err(RequestError::NoSuchEndpoint(absent))
        );
        assert_eq!(
            iommu.detach(absent, D1),
            Err(RequestError::NoSuchEndpoint(absent))
        );
        assert_eq!(
            iommu.probe(absent).err(),
            Some(RequestError::NoSuchEndpoint(absent))
        );
        assert_eq!(iommu.domains().count(), 0);
    });
}

#[test]
fn ops_6_domains_above_the_range_are_refused_everywhere() {
    with_each_backend_count(|mut iommu, _| {
        let id = DomainId(LAST_DOMAIN + 1);
        let refused = RequestError::DomainOutOfRange {
            id,
            last: LAST_DOMAIN,
        };
        assert_eq!(iommu.attach(A, id, false), Err(refused.clone()));
        assert_eq!(iommu.detach(A, id), Err(refused.clone()));
        assert_eq!(iommu.map(id, &page(1)), Err(refused.clone()));
        assert_eq!(iommu.unmap(id, range(0, 1)), Err(refused));
        assert_eq!(iommu.attach(A, DomainId(LAST_DOMAIN), false), Ok(()));
    });
}

#[test]
fn attach_5_the_bypass_flag_agrees_with_the_domain() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, true).expect("a bypass domain");
        iommu.attach(B, D2, false).expect("a domain");
        assert_eq!(
            iommu.attach(RESERVED, D1, false),
            Err(RequestError::BypassMismatch {
                domain: D1,
                is_bypass: true
            })
        );
        assert_eq!(
            iommu.attach(RESERVED, D2, true),
            Err(RequestError::BypassMismatch {
                domain: D2,
                is_bypass: false
            })
        );
        assert_eq!(dma(&iommu, A), Dma::Bypass);
        assert_eq!(translated(&iommu, A, 0x1234), Ok(0x1234));
        iommu.set_bypass(false);
        assert_eq!(dma(&iommu, A), Dma::Bypass, "the domain says so");
        assert_eq!(dma(&iommu, RESERVED), Dma::Blocked);
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn attach_4_and_6_endpoints_share_a_domain_and_move_between_domains() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        iommu.map(D1, &page(1)).expect("mapped");
        iommu.attach(B, D1, false).expect("a second endpoint");
        assert_eq!(translated(&iommu, B, 0x1000), Ok(0x4000_1000));
        check_agreement(&iommu, recorders);

        iommu.attach(A, D2, false).expect("moved");
        assert_eq!(translated(&iommu, A, 0x1000), Err(FaultReason::Mapping));
        assert_eq!(translated(&iommu, B, 0x1000), Ok(0x4000_1000));
        check_agreement(&iommu, recorders);

        // D1 ends with its last endpoint, and its ID then names a new, empty domain.
        iommu.attach(B, D2, false).expect("moved");
        assert_eq!(iommu.map(D1, &page(1)), Err(RequestError::NoSuchDomain(D1)));
        iommu.attach(B, D1, false).expect("moved back");
        assert_eq!(all_mappings(&iommu, D1), []);
        assert_eq!(translated(&iommu, B, 0x1000), Err(FaultReason::Mapping));
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn attaching_again_to_the_same_domain_keeps_its_mappings() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        iommu.map(D1, &page(1)).expect("mapped");
        iommu.attach(A, D1, false).expect("attached already");
        assert_eq!(all_mappings(&iommu, D1), [page(1)]);
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn attach_7_regions_that_clash_with_mappings_keep_an_endpoint_out() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        let clash = mapping(OWN_RESERVED.0 - KIB4, OWN_RESERVED.0 + KIB4 - 1, 0);
        iommu.map(D1, &clash).expect("not reserved for A");
        let refused = iommu.attach(RESERVED, D1, false);
        assert!(
            matches!(
                refused,
                Err(RequestError::RegionClash { endpoint: RESERVED, mapping, .. })
                    if mapping == clash
            ),
            "{refused:?}"
        );
        assert_eq!(dma(&iommu, RESERVED), Dma::Bypass);
        iommu.unmap(D1, clash.range).expect("unmapped");
        iommu.attach(RESERVED, D1, false).expect("nothing clashes");
        // RESV-4: from now on the region applies to the whole domain, until its owner leaves.
        assert!(matches!(
            iommu.map(D1, &clash),
            Err(RequestError::Reserved { .. })
        ));
        iommu.detach(RESERVED, D1).expect("detached");
        iommu.map(D1, &clash).expect("its owner has left");
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn detach_3_a_domain_that_the_endpoint_is_not_attached_to_is_refused() {
    with_each_backend_count(|mut iommu, recorders| {
        let refused = |domain| {
            Err(RequestError::NotAttached {
                endpoint: A,
                domain,
            })
        };
        assert_eq!(iommu.detach(A, D1), refused(D1));
        iommu.attach(A, D1, false).expect("attached");
        iommu.attach(B, D2, false).expect("attached");
        assert_eq!(iommu.detach(A, D2), refused(D2));
        assert_eq!(dma(&iommu, A), Dma::Translated);
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn detach_4_a_detached_endpoint_reaches_no_mapping() {
    for bypass in [false, true] {
        with_each_backend_count(|mut iommu, recorders| {
            iommu.set_bypass(bypass);
            iommu.attach(A, D1, false).expect("attached");
            iommu.map(D1, &page(1)).expect("mapped");
            iommu.detach(A, D1).expect("detached");
            let expected = if bypass {
                Ok(0x1000)
            } else {
                Err(FaultReason::Domain)
            };
            assert_eq!(translated(&iommu, A, 0x1000), expected);
            assert_eq!(iommu.domains().count(), 0, "the domain ceased to exist");
            check_agreement(&iommu, recorders);
        });
    }
}

#[test]
fn map_1_and_ops_4_misaligned_and_out_of_range_mappings_are_refused() {
    with_each_backend_count(|mut iommu, _| {
        iommu.attach(A, D1, false).expect("attached");
        let top = (1u64 << 48) - 1;
        for bad in [
            mapping(1, KIB4, 0),
            mapping(0, KIB4 - 2, 0),
            mapping(0, KIB4, 0),
            mapping(0, KIB4 - 1, 1),
            mapping(0x800, 0x17ff, 0),
        ] {
            let refused = iommu.map(D1, &bad);
            assert!(
                matches!(refused, Err(RequestError::Misaligned { .. })),
                "{bad}: {refused:?}"
            );
        }
        for bad in [
            mapping(top + 1, top + KIB4, 0),
            mapping(top + 1 - KIB4, top + KIB4, 0),
            mapping(0, u64::MAX, 0),
            mapping(u64::MAX - KIB4 + 1, u64::MAX, 0),
        ] {
            let refused = iommu.map(D1, &bad);
            assert!(
                matches!(refused, Err(RequestError::OutsideInputRange { .. })),
                "{bad}: {refused:?}"
            );
        }
        for bad in [
            mapping(0, 0x1fff, u64::MAX - KIB4 + 1),
            mapping(0, 0x1fff, (1 << 52) - KIB4),
            mapping(0, 0xfff, 1 << 52),
        ] {
            let refused = iommu.map(D1, &bad);
            assert!(
                matches!(refused, Err(RequestError::PhysOutOfRange(_))),
                "{bad}: {refused:?}"
            );
        }
        assert_eq!(all_mappings(&iommu, D1), []);
        iommu
            .map(D1, &mapping(top + 1 - KIB4, top, (1 << 52) - KIB4))
            .expect("the last page of both spaces");
        assert_eq!(translated(&iommu, A, top), Ok((1 << 52) - 1));
    });
}

#[test]
fn map_2_overlaps_are_refused_and_change_nothing() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        let there = mapping(0x4000, 0x7fff, 0);
        iommu.map(D1, &there).expect("mapped");
        for bad in [
            there,
            mapping(0x3000, 0x4fff, 0),
            mapping(0x7000, 0x8fff, 0),
            mapping(0x5000, 0x5fff, 0),
            mapping(0, 0x3fff_ffff, 0),
        ] {
            let refused = iommu.map(D1, &bad);
            assert!(
                matches!(refused, Err(RequestError::Overlap { existing, .. })
                    if there.range.covers(existing) && bad.range.overlaps(existing)),
                "{bad}: {refused:?}"
            );
        }
        assert_eq!(all_mappings(&iommu, D1), [there]);
        iommu.map(D1, &mapping(0x3000, 0x3fff, 0)).expect("before");
        iommu.map(D1, &mapping(0x8000, 0x8fff, 0)).expect("after");
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn map_4_and_5_unmap_2_and_3_unknown_and_bypass_domains_are_refused() {
    with_each_backend_count(|mut iommu, _| {
        assert_eq!(iommu.map(D1, &page(1)), Err(RequestError::NoSuchDomain(D1)));
        assert_eq!(
            iommu.unmap(D1, range(0, 1)),
            Err(RequestError::NoSuchDomain(D1))
        );
        iommu.attach(A, D1, true).expect("a bypass domain");
        assert_eq!(iommu.map(D1, &page(1)), Err(RequestError::BypassDomain(D1)));
        assert_eq!(
            iommu.unmap(D1, range(0, 1)),
            Err(RequestError::BypassDomain(D1))
        );
    });
}

#[test]
fn map_6_accesses_need_the_rights_of_the_mapping() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        let rights = [
            Access::NONE,
            Access::READ,
            Access::WRITE,
            Access::READ_WRITE,
        ];
        for (number, access) in (0u64..).zip(rights) {
            let mapping = Mapping {
                access,
                mmio: number % 2 == 1,
                ..page(number)
            };
            iommu.map(D1, &mapping).expect("mapped");
            for wanted in rights {
                let got = iommu.translate(A, Iova(number * KIB4 + 5), wanted);
                assert_eq!(got.is_ok(), access.allows(wanted), "{access} {wanted}");
                if let Ok(t) = got {
                    assert_eq!((t.gpa.0, t.mmio), (mapping.gpa.0 + 5, mapping.mmio));
                }
            }
        }
        // Every backend received the same rights.
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn resv_4_and_5_reserved_regions_are_neither_mapped_nor_reached() {
    with_each_backend_count(|mut iommu, _| {
        assert_eq!(translated(&iommu, A, MSI.0), Err(FaultReason::Mapping));
        assert_eq!(translated(&iommu, A, MSI.0 - 1), Ok(MSI.0 - 1));
        assert_eq!(translated(&iommu, A, MSI.1 + 1), Ok(MSI.1 + 1));
        assert_eq!(
            translated(&iommu, RESERVED, OWN_RESERVED.1),
            Err(FaultReason::Mapping)
        );
        let before = iommu
            .translate(A, Iova(0), Access::READ)
            .expect("in bypass mode");
        assert_eq!(before.contiguous_last, Iova(MSI.0 - 1));

        iommu.attach(A, D1, false).expect("attached");
        for bad in [
            mapping(MSI.0, MSI.0 + KIB4 - 1, 0),
            mapping(MSI.0 - KIB4, MSI.0 + KIB4 - 1, 0),
            mapping(MSI.1 - KIB4 + 1, MSI.1 + KIB4, 0),
            mapping(0, (1 << 32) - 1, 0),
        ] {
            let refused = iommu.map(D1, &bad);
            assert!(
                matches!(refused, Err(RequestError::Reserved { region, .. })
                    if region.range == range(MSI.0, MSI.1)),
                "{bad}: {refused:?}"
            );
        }
        iommu
            .map(D1, &mapping(MSI.0 - KIB4, MSI.0 - 1, 0))
            .expect("just below");
        iommu
            .map(D1, &mapping(MSI.1 + 1, MSI.1 + KIB4, 0))
            .expect("just above");
    });
}

/// The examples of the specification's UNMAP section, with one page for each of its units.
#[test]
fn unmap_4_and_5_the_examples_of_the_specification_hold() {
    type Case = (
        &'static str,
        &'static [(u64, u64)],
        (u64, u64),
        Option<usize>,
    );
    let cases: [Case; 7] = [
        ("(1) nothing there", &[], (0, 4), Some(0)),
        ("(2) one mapping", &[(0, 9)], (0, 9), Some(1)),
        ("(3) two mappings", &[(0, 4), (5, 9)], (0, 9), Some(2)),
        ("(4) partial cover", &[(0, 9)], (0, 4), None),
        ("(5) the first of two", &[(0, 4), (5, 9)], (0, 4), Some(1)),
        ("(6) more than is there", &[(0, 4)], (0, 9), Some(1)),
        ("(7) over a hole", &[(0, 4), (10, 14)], (0, 14), Some(2)),
    ];
    let units = |(first, last): (u64, u64)| (first * KIB4, last * KIB4 + KIB4 - 1);
    for (name, maps, unmap, expected) in cases {
        with_each_backend_count(|mut iommu, recorders| {
            iommu.attach(A, D1, false).expect("attached");
            for &at in maps {
                let (first, last) = units(at);
                iommu.map(D1, &mapping(first, last, 0)).expect("mapped");
            }
            let (first, last) = units(unmap);
            let result = iommu.unmap(D1, range(first, last));
            match expected {
                Some(count) => {
                    assert_eq!(result.expect(name).mappings, count as u64, "{name}");
                    assert_eq!(all_mappings(&iommu, D1).len(), maps.len() - count, "{name}");
                }
                None => {
                    assert!(
                        matches!(result, Err(RequestError::WouldSplit { .. })),
                        "{name}"
                    );
                    assert_eq!(all_mappings(&iommu, D1).len(), maps.len(), "{name}");
                }
            }
            check_agreement(&iommu, recorders);
        });
    }
}

#[test]
fn unmap_reaches_over_everything_and_to_the_last_address() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        iommu.map(D1, &page(0)).expect("mapped");
        let top = (1u64 << 48) - 1;
        iommu
            .map(D1, &mapping(top + 1 - KIB4, top, 0))
            .expect("mapped");
        assert!(matches!(
            iommu.unmap(D1, range(1, u64::MAX)),
            Err(RequestError::WouldSplit { .. })
        ));
        assert!(matches!(
            iommu.unmap(D1, range(0, top - 1)),
            Err(RequestError::WouldSplit { .. })
        ));
        assert_eq!(
            iommu
                .unmap(D1, range(top + 1, u64::MAX))
                .map(|u| u.mappings),
            Ok(0)
        );
        assert_eq!(iommu.unmap(D1, IovaRange::ALL).map(|u| u.mappings), Ok(2));
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn unattached_endpoints_follow_bypass() {
    with_each_backend_count(|mut iommu, recorders| {
        assert_eq!(translated(&iommu, A, 0x5000), Ok(0x5000));
        iommu.set_bypass(false);
        assert_eq!(translated(&iommu, A, 0x5000), Err(FaultReason::Domain));
        assert_eq!(
            translated(&iommu, EndpointId(1), 0x5000),
            Err(FaultReason::Unknown)
        );
        check_agreement(&iommu, recorders);
        iommu.reset();
        assert!(!iommu.bypass(), "a device reset keeps it");
        iommu.disconnect();
        iommu.connect();
        assert!(iommu.bypass(), "a new VM has it as configured");
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn init_1_a_reset_detaches_everything_and_frees_every_frame() {
    with_each_backend_count(|mut iommu, recorders| {
        let idle = iommu.arena().frames_used();
        for (number, &endpoint) in (1u32..).zip(&ALL[..3]) {
            iommu
                .attach(endpoint, DomainId(number), number == 3)
                .expect("attached");
        }
        for number in 0..600 {
            iommu.map(D1, &page(number * 700 + 300)).expect("mapped");
        }
        iommu.reset();
        assert_eq!(iommu.domains().count(), 0);
        assert_eq!(iommu.arena().frames_used(), idle);
        for endpoint in ALL {
            assert_eq!(dma(&iommu, endpoint), Dma::Bypass);
        }
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn one_domain_cannot_exhaust_the_arena_for_the_others() {
    let mut iommu = Iommu::new(
        Settings {
            arena_limit: 1 << 20,
            ..settings()
        },
        topology(),
    )
    .expect("an arena");
    iommu.attach(A, D1, false).expect("attached");
    iommu.attach(B, D2, false).expect("attached");
    iommu.map(D2, &page(1)).expect("mapped");
    let mut mapped = 0;
    let refused = (0..).find_map(|number: u64| {
        // Each page needs a page table of its own.
        let at = number << 21;
        match iommu.map(D1, &mapping(at, at + KIB4 - 1, 0)) {
            Ok(()) => {
                mapped += 1;
                None
            }
            Err(cause) => Some(cause),
        }
    });
    assert!(
        matches!(refused, Some(RequestError::OutOfFrames { .. })),
        "{refused:?}"
    );
    assert!(mapped > 100, "{mapped}");
    // The other domain can still grow, up to the limit of a small domain.
    for number in 1..4u64 {
        let at = number << 30;
        iommu
            .map(D2, &mapping(at, at + KIB4 - 1, 0))
            .expect("a small domain");
    }
    assert_eq!(translated(&iommu, B, 0x1000), Ok(0x4000_1000));
    iommu.attach(G1, DomainId(3), false).expect("a new domain");
    // The domain that exhausted the arena can still unmap, and then map again.
    iommu.unmap(D1, range(0, (1 << 30) - 1)).expect("unmapped");
    iommu.map(D1, &page(0)).expect("mapped again");
}

#[test]
fn the_guest_is_offered_only_what_all_backends_support() {
    let mut iommu = Iommu::new(settings(), topology()).expect("an arena");
    let narrow = Recorder::with(BackendCapabilities {
        page_sizes: PageMask::new(1 << 16 | 1 << 21).expect("not empty"),
        aperture: range(0x1_0000, (1 << 39) - 1),
    });
    iommu
        .add_backend(Box::new(narrow), &[A])
        .expect("common addresses");
    assert_eq!(iommu.input_range(), range(0x1_0000, (1 << 39) - 1));
    assert_eq!(iommu.page_sizes().bits(), 1 << 16 | 1 << 21);
    let far = Recorder::with(BackendCapabilities {
        page_sizes: PageMask::TABLE,
        aperture: range(1 << 40, (1 << 41) - 1),
    });
    let refused = iommu
        .add_backend(Box::new(far), &[B])
        .expect_err("disjoint");
    assert!(refused.contains("narrow the address width"), "{refused}");
    iommu.attach(A, D1, false).expect("attached");
    assert!(matches!(
        iommu.map(D1, &mapping(0, 0xffff, 0)),
        Err(RequestError::OutsideInputRange { .. })
    ));
    assert!(matches!(
        iommu.map(D1, &mapping(0x1_0000, 0x1_0fff, 0)),
        Err(RequestError::Misaligned {
            granule: 0x1_0000,
            ..
        })
    ));
    iommu
        .map(D1, &mapping(0x1_0000, 0x1_ffff, 0))
        .expect("mapped");
}

#[test]
fn neighbours_are_unmapped_by_one_call() {
    let (mut iommu, recorders) = with_backends(2);
    iommu.attach(A, D1, false).expect("attached");
    iommu.attach(B, D1, false).expect("attached");
    for n in 0..8 {
        iommu.map(D1, &page(n)).expect("mapped");
    }
    let calls = || recorders.iter().map(|r| r.state().calls).sum::<u64>();
    let before = calls();
    // Ascending, descending and separate ranges; one range is empty.
    let ranges: Vec<_> = [0, 1, 2, 5, 4, 7, 30].map(|n| page(n).range).into();
    let mut outcomes = VecDeque::new();
    iommu.unmap_all(D1, ranges.iter().copied(), &mut outcomes);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(outcomes.len(), ranges.len());
    assert_eq!(calls() - before, 3 * 2);
    assert_eq!(all_mappings(&iommu, D1), [page(3), page(6)]);
    check_agreement(&iommu, &recorders);
}
