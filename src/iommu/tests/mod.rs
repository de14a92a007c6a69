//! The rules, driven by plain function calls, with 0, 1 and 2 backends behind the endpoints.

mod hotplug;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::address::{Access, Gpa, Iova, Mapping};
use crate::backends::recorder::Recorder;
use crate::backends::{BackendCapabilities, Target};
use crate::faults::FaultReason;
use crate::topology::{
    EndpointSpec, GroupName, PciAddress, PciRange, ReservedKind, ReservedRegion, ReservedRegions,
};

const A: EndpointId = EndpointId(0x30);
const B: EndpointId = EndpointId(0x38);
/// Has a reserved region of its own.
const RESERVED: EndpointId = EndpointId(0x40);
/// Three members of one host group.
const G1: EndpointId = EndpointId(0x48);
const G2: EndpointId = EndpointId(0x49);
const G3: EndpointId = EndpointId(0x4a);
const ALL: [EndpointId; 6] = [A, B, RESERVED, G1, G2, G3];

const D1: DomainId = DomainId(1);
const D2: DomainId = DomainId(2);
const LAST_DOMAIN: u32 = 15;

const KIB4: u64 = 0x1000;
const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
const OWN_RESERVED: (u64, u64) = (0x10_0000, 0x10_ffff);

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
}

fn mapping(first: u64, last: u64, gpa: u64) -> Mapping {
    Mapping {
        range: range(first, last),
        gpa: Gpa(gpa),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

fn page(number: u64) -> Mapping {
    mapping(
        number * KIB4,
        number * KIB4 + KIB4 - 1,
        0x4000_0000 + number * KIB4,
    )
}

fn topology() -> Topology {
    let spec = |id: EndpointId, group: Option<&str>, reserved: &[(u64, u64)]| {
        let at = PciAddress::from_endpoint_id(id);
        EndpointSpec {
            range: PciRange::new(at, at).expect("one function"),
            group: group.map(|name| GroupName::new(name).expect("a name")),
            reserved: reserved
                .iter()
                .map(|&(first, last)| ReservedRegion {
                    range: range(first, last),
                    kind: ReservedKind::Reserved,
                })
                .collect(),
        }
    };
    let msi = ReservedRegion {
        range: range(MSI.0, MSI.1),
        kind: ReservedKind::Msi,
    };
    Topology::new(
        "00:05.0".parse().expect("an address"),
        ReservedRegions::new(vec![msi]).expect("one region"),
        &[
            spec(A, None, &[]),
            spec(B, None, &[]),
            spec(RESERVED, None, &[OWN_RESERVED]),
            spec(G1, Some("g"), &[]),
            spec(G2, Some("g"), &[]),
            spec(G3, Some("g"), &[]),
        ],
    )
    .expect("a topology")
}

fn settings() -> Settings {
    Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: LAST_DOMAIN,
        bypass_at_boot: true,
        arena_limit: 4 << 20,
    }
}

/// An IOMMU whose endpoints are behind this many recorders, in turn.
fn with_backends(count: usize) -> (Iommu, Vec<Recorder>) {
    let mut iommu = Iommu::new(settings(), topology()).expect("an arena");
    let recorders: Vec<_> = (0..count).map(|_| Recorder::new()).collect();
    for (index, recorder) in recorders.iter().enumerate() {
        let mine: Vec<_> = ALL.iter().copied().skip(index).step_by(count).collect();
        iommu
            .add_backend(Box::new(recorder.clone()), &mine)
            .expect("common addresses");
    }
    (iommu, recorders)
}

fn each(test: impl Fn(Iommu, &[Recorder])) {
    for count in 0..=2 {
        let (iommu, recorders) = with_backends(count);
        test(iommu, &recorders);
    }
}

fn all_mappings(iommu: &Iommu, domain: DomainId) -> Vec<Mapping> {
    iommu.mappings(domain, Iova(0)).collect()
}

fn dma(iommu: &Iommu, endpoint: EndpointId) -> Dma {
    iommu.endpoint(endpoint).expect("an endpoint").dma
}

fn translated(iommu: &Iommu, endpoint: EndpointId, iova: u64) -> Result<u64, FaultReason> {
    iommu
        .translate(endpoint, Iova(iova), Access::READ)
        .map(|t| t.gpa.0)
        .map_err(|f| f.reason)
}

/// What the table says, what the recorders hold, and what endpoints meet agree.
fn check_agreement(iommu: &Iommu, recorders: &[Recorder]) {
    for domain in iommu.domains() {
        let table = all_mappings(iommu, domain.id);
        assert_eq!(table.len() as u64, domain.mappings);
        assert!(!domain.endpoints.is_empty(), "a domain without endpoints");
        for (index, recorder) in recorders.iter().enumerate() {
            let behind: Vec<_> = domain
                .endpoints
                .iter()
                .filter(|e| iommu.backend_of.get(e) == Some(&index))
                .collect();
            let quarantined = behind
                .iter()
                .all(|e| iommu.endpoint(**e).expect("a member").quarantined);
            let state = recorder.state();
            match state.domains.get(&domain.id) {
                Some(held) => {
                    assert_eq!(held.values().copied().collect::<Vec<_>>(), table);
                }
                None => assert!(domain.bypass || quarantined),
            }
        }
    }
    for (index, recorder) in recorders.iter().enumerate() {
        let state = recorder.state();
        for domain in state.domains.keys() {
            assert!(iommu.domains().any(|d| d.id == *domain), "stale {domain}");
        }
        for (&endpoint, &target) in &state.targets {
            assert_eq!(iommu.backend_of.get(&endpoint), Some(&index));
            let seen = iommu.endpoint(endpoint).expect("an endpoint");
            let expected = match (seen.dma, seen.domain) {
                (Dma::Blocked, _) => Target::Blocked,
                (Dma::Bypass, _) => Target::Bypass,
                (Dma::Translated, Some(domain)) => Target::Domain(domain),
                (Dma::Translated, None) => panic!("translated without a domain"),
            };
            assert_eq!(target, expected, "endpoint {endpoint}");
        }
    }
}

#[test]
fn attach_3_an_endpoint_that_does_not_exist_is_noent() {
    each(|mut iommu, _| {
        let nobody = EndpointId(0x28);
        assert_eq!(
            iommu.attach(nobody, D1, false),
            Err(RequestError::NoSuchEndpoint(nobody))
        );
        assert_eq!(
            iommu.detach(nobody, D1),
            Err(RequestError::NoSuchEndpoint(nobody))
        );
        assert_eq!(
            iommu.probe(nobody).err(),
            Some(RequestError::NoSuchEndpoint(nobody))
        );
        assert_eq!(iommu.domains().count(), 0);
    });
}

#[test]
fn ops_6_domains_above_the_range_are_refused_everywhere() {
    each(|mut iommu, _| {
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
    each(|mut iommu, recorders| {
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
    each(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        iommu.map(D1, &page(1)).expect("mapped");
        iommu.attach(B, D1, false).expect("a second endpoint");
        assert_eq!(translated(&iommu, B, 0x1000), Ok(0x4000_1000));
        check_agreement(&iommu, recorders);

        iommu.attach(A, D2, false).expect("moved");
        assert_eq!(translated(&iommu, A, 0x1000), Err(FaultReason::Mapping));
        assert_eq!(translated(&iommu, B, 0x1000), Ok(0x4000_1000));
        check_agreement(&iommu, recorders);

        // With its last endpoint D1 goes, and its ID names a new, empty domain.
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
    each(|mut iommu, recorders| {
        iommu.attach(A, D1, false).expect("attached");
        iommu.map(D1, &page(1)).expect("mapped");
        iommu.attach(A, D1, false).expect("attached already");
        assert_eq!(all_mappings(&iommu, D1), [page(1)]);
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn attach_7_regions_that_clash_with_mappings_keep_an_endpoint_out() {
    each(|mut iommu, recorders| {
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
        // RESV-4: now the region holds for the whole domain, until its owner leaves.
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
fn detach_3_only_the_domain_an_endpoint_is_attached_to() {
    each(|mut iommu, recorders| {
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
        each(|mut iommu, recorders| {
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
fn map_1_and_ops_4_misaligned_and_out_of_range_mappings() {
    each(|mut iommu, _| {
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
    each(|mut iommu, recorders| {
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
fn map_4_and_5_unmap_2_and_3_unknown_and_bypass_domains() {
    each(|mut iommu, _| {
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
    each(|mut iommu, recorders| {
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
        // Every backend was told the same rights.
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn resv_4_and_5_reserved_regions_are_neither_mapped_nor_reached() {
    each(|mut iommu, _| {
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

/// The examples of the specification's UNMAP section, a page for each of its units.
#[test]
fn unmap_4_and_5_the_examples_of_the_specification() {
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
        each(|mut iommu, recorders| {
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
    each(|mut iommu, recorders| {
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
    each(|mut iommu, recorders| {
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
    each(|mut iommu, recorders| {
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
fn a_group_stays_in_one_domain() {
    each(|mut iommu, recorders| {
        iommu.attach(G1, D1, false).expect("attached");
        let elsewhere = Err(RequestError::GroupElsewhere {
            endpoint: G2,
            other: G1,
            other_domain: D1,
        });
        assert_eq!(iommu.attach(G2, D2, false), elsewhere);
        assert_eq!(iommu.attach(G2, D2, true), elsewhere);
        assert_eq!(iommu.domains().count(), 1, "D2 was not made");
        iommu.attach(G2, D1, false).expect("to its group");
        iommu.attach(A, D2, false).expect("A is in no group");
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn members_attached_to_nothing_are_blocked_while_another_is_active() {
    each(|mut iommu, recorders| {
        assert!(iommu.bypass());
        iommu.attach(G1, D1, false).expect("attached");
        for endpoint in [G2, G3] {
            assert_eq!(dma(&iommu, endpoint), Dma::Blocked);
            assert_eq!(
                translated(&iommu, endpoint, 0x1000),
                Err(FaultReason::Domain)
            );
        }
        assert_eq!(dma(&iommu, A), Dma::Bypass, "in no group");
        check_agreement(&iommu, recorders);

        iommu.attach(G2, D1, false).expect("to its group");
        iommu.detach(G2, D1).expect("detached");
        assert_eq!(dma(&iommu, G2), Dma::Blocked, "G1 is still active");
        check_agreement(&iommu, recorders);
        iommu.set_bypass(false);
        iommu.set_bypass(true);
        check_agreement(&iommu, recorders);

        iommu.detach(G1, D1).expect("detached");
        for endpoint in [G1, G2, G3] {
            assert_eq!(dma(&iommu, endpoint), Dma::Bypass);
        }
        check_agreement(&iommu, recorders);

        iommu.attach(G1, D1, false).expect("attached");
        iommu.reset();
        assert_eq!(dma(&iommu, G2), Dma::Bypass);
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn a_group_moves_one_endpoint_at_a_time_and_nobody_is_left_behind_open() {
    each(|mut iommu, recorders| {
        for endpoint in [G1, G2, G3] {
            iommu.attach(endpoint, D1, false).expect("attached");
        }
        iommu.map(D1, &page(1)).expect("mapped");

        iommu.attach(G1, D2, false).expect("the first to move");
        for endpoint in [G2, G3] {
            assert_eq!(dma(&iommu, endpoint), Dma::Blocked);
            assert_eq!(
                translated(&iommu, endpoint, 0x1000),
                Err(FaultReason::Unknown)
            );
            // What they were attached to is still theirs to be detached from.
            assert_eq!(
                iommu.endpoint(endpoint).expect("an endpoint").domain,
                Some(D1)
            );
        }
        check_agreement(&iommu, recorders);
        assert!(matches!(
            iommu.attach(G2, DomainId(3), false),
            Err(RequestError::GroupElsewhere { .. })
        ));
        iommu.attach(G2, D2, false).expect("follows");
        assert_eq!(dma(&iommu, G2), Dma::Translated);
        check_agreement(&iommu, recorders);

        // The driver changes its mind: the group is whole again in D1.
        iommu.attach(G1, D1, false).expect("back");
        assert_eq!(dma(&iommu, G3), Dma::Translated);
        assert_eq!(dma(&iommu, G2), Dma::Blocked);
        assert_eq!(translated(&iommu, G3, 0x1000), Ok(0x4000_1000));
        check_agreement(&iommu, recorders);

        iommu.detach(G1, D1).expect("detached");
        iommu.detach(G3, D1).expect("detached");
        assert_eq!(dma(&iommu, G2), Dma::Translated, "alone in D2");
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn one_domain_cannot_use_up_what_the_others_need() {
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
        // A page table for each page.
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
    // The other domain goes on, within reason.
    for number in 1..4u64 {
        let at = number << 30;
        iommu
            .map(D2, &mapping(at, at + KIB4 - 1, 0))
            .expect("a small domain");
    }
    assert_eq!(translated(&iommu, B, 0x1000), Ok(0x4000_1000));
    iommu.attach(G1, DomainId(3), false).expect("a new domain");
    // The greedy one still unmaps, and then maps again.
    iommu.unmap(D1, range(0, (1 << 30) - 1)).expect("unmapped");
    iommu.map(D1, &page(0)).expect("mapped again");
}

#[test]
fn the_guest_is_offered_what_all_backends_can_do() {
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

#[derive(Clone, Copy, Debug)]
enum Op {
    Attach(EndpointId, DomainId, bool),
    Detach(EndpointId, DomainId),
    Map(DomainId, Mapping),
    Unmap(DomainId, IovaRange),
    Bypass(bool),
    Reset,
}

fn run(iommu: &mut Iommu, op: Op) -> Result<(), RequestError> {
    match op {
        Op::Attach(endpoint, domain, bypass) => iommu.attach(endpoint, domain, bypass),
        Op::Detach(endpoint, domain) => iommu.detach(endpoint, domain),
        Op::Map(domain, mapping) => iommu.map(domain, &mapping),
        Op::Unmap(domain, range) => iommu.unmap(domain, range).map(|_| ()),
        Op::Bypass(bypass) => {
            iommu.set_bypass(bypass);
            Ok(())
        }
        Op::Reset => {
            iommu.reset();
            Ok(())
        }
    }
}

/// Everything a guest could tell apart.
fn snapshot(iommu: &Iommu) -> (Vec<EndpointState>, Vec<DomainState>, Vec<Vec<Mapping>>) {
    let domains: Vec<_> = iommu.domains().collect();
    let mappings = domains.iter().map(|d| all_mappings(iommu, d.id)).collect();
    (iommu.endpoints(usize::MAX, 10).collect(), domains, mappings)
}

/// Fails every backend call in turn: the core, the table and the backends agree afterwards, and a
/// request that was refused without quarantine changed nothing.
#[test]
fn every_failure_of_a_backend_leaves_agreement() {
    let script = [
        Op::Attach(A, D1, false),
        Op::Map(D1, page(1)),
        Op::Map(D1, page(2)),
        Op::Attach(B, D1, false),
        Op::Map(D1, page(3)),
        Op::Unmap(D1, range(0x1000, 0x1fff)),
        Op::Attach(A, D2, false),
        Op::Map(D2, page(1)),
        Op::Attach(G1, D2, false),
        Op::Attach(G2, D2, false),
        Op::Attach(G1, D1, false),
        Op::Attach(G2, D1, false),
        Op::Attach(RESERVED, DomainId(3), true),
        Op::Bypass(false),
        Op::Detach(B, D1),
        Op::Unmap(D2, IovaRange::ALL),
        Op::Detach(A, D2),
        Op::Reset,
    ];
    for count in 1..=2 {
        for victim in 0..count {
            let mut failed_calls = 0;
            for n in 1.. {
                let (mut iommu, recorders) = with_backends(count);
                let before = recorders[victim].state().calls;
                recorders[victim].state().fail_call = Some(before + n);
                let mut hit = false;
                for op in script {
                    let snap = snapshot(&iommu);
                    let result = run(&mut iommu, op);
                    if let Err(error) = &result
                        && !matches!(error, RequestError::Quarantined { .. })
                    {
                        assert_eq!(snapshot(&iommu), snap, "{op:?} failed with {error}");
                    }
                    hit |= recorders[victim].state().calls >= before + n;
                    check_agreement(&iommu, &recorders);
                }
                if !hit {
                    break;
                }
                failed_calls += 1;
                iommu.disconnect();
                iommu.connect();
                check_agreement(&iommu, &recorders);
                assert!(
                    iommu
                        .endpoints(usize::MAX, 10)
                        .all(|e| e.dma == Dma::Bypass),
                    "a new VM finds every endpoint usable"
                );
            }
            assert!(failed_calls >= 10, "{failed_calls} calls were failed");
        }
    }
}

#[test]
fn an_unmap_that_fails_quarantines_and_attach_cures() {
    let (mut iommu, recorders) = with_backends(1);
    iommu.attach(A, D1, false).expect("attached");
    iommu.attach(B, D1, false).expect("attached");
    iommu.map(D1, &page(1)).expect("mapped");
    let calls = recorders[0].state().calls;
    recorders[0].state().fail_call = Some(calls + 1);
    assert!(matches!(
        iommu.unmap(D1, page(1).range),
        Err(RequestError::Quarantined { count: 2, .. })
    ));
    assert_eq!(recorders[0].state().quarantined, [A, B]);
    for endpoint in [A, B] {
        assert_eq!(dma(&iommu, endpoint), Dma::Blocked);
        assert_eq!(
            translated(&iommu, endpoint, 0x1000),
            Err(FaultReason::Unknown)
        );
    }
    iommu.attach(A, D2, false).expect("a fresh domain");
    assert_eq!(dma(&iommu, A), Dma::Translated);
    assert_eq!(dma(&iommu, B), Dma::Blocked);
    check_agreement(&iommu, &recorders);
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
    // Upwards, downwards, apart; one range holds nothing.
    let ranges: Vec<_> = [0, 1, 2, 5, 4, 7, 30].map(|n| page(n).range).into();
    let mut outcomes = VecDeque::new();
    iommu.unmap_all(D1, &ranges, &mut outcomes);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(outcomes.len(), ranges.len());
    assert_eq!(calls() - before, 3 * 2);
    assert_eq!(all_mappings(&iommu, D1), [page(3), page(6)]);
    check_agreement(&iommu, &recorders);
}

#[test]
fn where_one_of_several_unmaps_fails_nobody_reaches_any_of_them() {
    for fail in 1..=3 {
        let (mut iommu, recorders) = with_backends(2);
        iommu.attach(A, D1, false).expect("attached");
        iommu.attach(B, D1, false).expect("attached");
        for n in 0..6 {
            iommu.map(D1, &page(n)).expect("mapped");
        }
        let calls = recorders[0].state().calls;
        recorders[0].state().fail_call = Some(calls + fail);
        let ranges = [page(0).range, page(2).range, page(4).range];
        let mut outcomes = VecDeque::new();
        iommu.unmap_all(D1, &ranges, &mut outcomes);
        for outcome in &outcomes {
            let refused = matches!(outcome, Err(RequestError::Quarantined { count: 1, .. }));
            assert!(refused, "{outcome:?}");
        }
        assert_eq!(dma(&iommu, A), Dma::Blocked);
        assert_eq!(dma(&iommu, B), Dma::Translated, "its backend did not fail");
        // With all that it was not asked for because of the failure.
        assert!(!recorders[0].state().domains.contains_key(&D1));
        assert_eq!(recorders[1].state().domains[&D1].len(), 3);
        iommu.detach(A, D1).expect("detached");
        iommu.attach(A, D1, false).expect("attached");
        check_agreement(&iommu, &recorders);
    }
}

/// The rules once more, as plainly as they can be written.
#[derive(Default)]
struct Model {
    bypass: bool,
    attached: BTreeMap<EndpointId, DomainId>,
    domains: BTreeMap<DomainId, (bool, BTreeMap<u64, Mapping>)>,
}

impl Model {
    fn members(&self, domain: DomainId) -> BTreeSet<EndpointId> {
        self.attached
            .iter()
            .filter(|(_, d)| **d == domain)
            .map(|(e, _)| *e)
            .collect()
    }

    fn leave(&mut self, endpoint: EndpointId) {
        if let Some(domain) = self.attached.remove(&endpoint)
            && self.members(domain).is_empty()
        {
            self.domains.remove(&domain);
        }
    }

    fn reserved(&self, domain: DomainId, wanted: IovaRange) -> bool {
        wanted.overlaps(range(MSI.0, MSI.1))
            || (self.attached.get(&RESERVED) == Some(&domain)
                && wanted.overlaps(range(OWN_RESERVED.0, OWN_RESERVED.1)))
    }

    /// Whether the request succeeds, and its effect. Groups are left out.
    fn apply(&mut self, op: Op) -> bool {
        match op {
            Op::Attach(endpoint, domain, bypass) => {
                if self.attached.get(&endpoint) == Some(&domain) {
                    return self.domains[&domain].0 == bypass;
                }
                if let Some((is_bypass, mappings)) = self.domains.get(&domain) {
                    let own = range(OWN_RESERVED.0, OWN_RESERVED.1);
                    if *is_bypass != bypass
                        || (endpoint == RESERVED
                            && mappings.values().any(|m| m.range.overlaps(own)))
                    {
                        return false;
                    }
                }
                self.domains.entry(domain).or_default().0 = bypass;
                self.leave(endpoint);
                self.attached.insert(endpoint, domain);
                true
            }
            Op::Detach(endpoint, domain) => {
                let attached = self.attached.get(&endpoint) == Some(&domain);
                if attached {
                    self.leave(endpoint);
                }
                attached
            }
            Op::Map(domain, mapping) => {
                let reserved = self.reserved(domain, mapping.range);
                match self.domains.get_mut(&domain) {
                    Some((false, mappings))
                        if !reserved
                            && !mappings.values().any(|m| m.range.overlaps(mapping.range)) =>
                    {
                        mappings.insert(mapping.range.first().0, mapping);
                        true
                    }
                    _ => false,
                }
            }
            Op::Unmap(domain, wanted) => match self.domains.get_mut(&domain) {
                Some((false, mappings))
                    if mappings
                        .values()
                        .all(|m| wanted.covers(m.range) || !wanted.overlaps(m.range)) =>
                {
                    mappings.retain(|_, m| !wanted.covers(m.range));
                    true
                }
                _ => false,
            },
            Op::Bypass(bypass) => {
                self.bypass = bypass;
                true
            }
            Op::Reset => {
                self.attached.clear();
                self.domains.clear();
                true
            }
        }
    }

    fn check(&self, iommu: &Iommu) {
        for endpoint in [A, B, RESERVED] {
            let seen = iommu.endpoint(endpoint).expect("an endpoint");
            assert_eq!(seen.domain, self.attached.get(&endpoint).copied());
            let expected = match seen.domain.map(|d| self.domains[&d].0) {
                Some(true) => Dma::Bypass,
                Some(false) => Dma::Translated,
                None if self.bypass => Dma::Bypass,
                None => Dma::Blocked,
            };
            assert_eq!(seen.dma, expected);
        }
        assert_eq!(iommu.domains().count(), self.domains.len());
        for (&id, (_, mappings)) in &self.domains {
            assert_eq!(
                all_mappings(iommu, id),
                mappings.values().copied().collect::<Vec<_>>()
            );
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let endpoint = prop::sample::select(vec![A, B, RESERVED]);
    let domain = (0u32..3).prop_map(DomainId);
    // Around the reserved region, so that it is met.
    let pages = (0xf8u64..0x118, 1u64..6);
    prop_oneof![
        3 => (endpoint.clone(), domain.clone(), prop::bool::weighted(0.2))
            .prop_map(|(e, d, b)| Op::Attach(e, d, b)),
        1 => (endpoint, domain.clone()).prop_map(|(e, d)| Op::Detach(e, d)),
        6 => (domain.clone(), pages.clone(), 0u64..64).prop_map(|(d, (at, len), gpa)| {
            Op::Map(d, mapping(at * KIB4, (at + len) * KIB4 - 1, gpa * KIB4))
        }),
        4 => (domain, pages).prop_map(|(d, (at, len))| {
            Op::Unmap(d, range(at * KIB4, (at + len) * KIB4 - 1))
        }),
        1 => any::<bool>().prop_map(Op::Bypass),
        1 => Just(Op::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_sequence_of_requests_follows_the_rules(
        backends in 0usize..3,
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let (mut iommu, recorders) = with_backends(backends);
        let mut model = Model { bypass: true, ..Model::default() };
        for op in ops {
            let before = snapshot(&iommu);
            let result = run(&mut iommu, op);
            let expected = model.apply(op);
            prop_assert_eq!(result.is_ok(), expected, "{:?}: {:?}", op, result);
            if !expected {
                prop_assert_eq!(snapshot(&iommu), before);
            }
            model.check(&iommu);
            check_agreement(&iommu, &recorders);
        }
    }

    #[test]
    fn unmaps_together_come_to_the_same_as_one_by_one(
        backends in 0usize..3,
        maps in prop::collection::vec((0u64..40, 1u64..4), 0..20),
        unmaps in prop::collection::vec((0u64..40, 1u64..6), 1..12),
    ) {
        let (mut together, recorders) = with_backends(backends);
        let (mut one_by_one, _) = with_backends(backends);
        for iommu in [&mut together, &mut one_by_one] {
            for endpoint in [A, B] {
                iommu.attach(endpoint, D1, false).expect("attached");
            }
            for &(at, len) in &maps {
                let _ = iommu.map(D1, &mapping(at * KIB4, (at + len) * KIB4 - 1, at * KIB4));
            }
        }
        let ranges: Vec<_> = unmaps
            .iter()
            .map(|&(at, len)| range(at * KIB4, (at + len) * KIB4 - 1))
            .collect();
        let mut outcomes = VecDeque::new();
        together.unmap_all(D1, &ranges, &mut outcomes);
        let expected: Vec<_> = ranges
            .iter()
            .map(|range| one_by_one.unmap(D1, *range).map(drop))
            .collect();
        prop_assert_eq!(outcomes, expected);
        prop_assert_eq!(all_mappings(&together, D1), all_mappings(&one_by_one, D1));
        check_agreement(&together, &recorders);
    }
}
