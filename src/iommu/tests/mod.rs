//! Tests of the core by plain function calls. This file holds what they share: a topology, an IOMMU
//! whose endpoints are behind recorders, and a check that core, tables and backends agree.

mod failures;
mod groups;
mod hotplug;
mod model;
mod rules;
mod runs;
mod withheld;

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::address::{Access, Gpa, Iova, Mapping};
use crate::backends::recorder::Recorder;
use crate::backends::{BackendCapabilities, Target};
use crate::faults::FaultReason;
use crate::page_table::{Encoding, Format};
use crate::topology::{
    EndpointSpec, GroupName, PciAddress, PciRange, ReservedKind, ReservedRegion, ReservedRegions,
};

const A: EndpointId = EndpointId(0x30);
const B: EndpointId = EndpointId(0x38);
/// An endpoint with a reserved region of its own.
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
        encoding: Encoding::default(),
    }
}

/// An IOMMU whose endpoints are distributed over `count` recorders in turn.
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

fn with_each_backend_count(test: impl Fn(Iommu, &[Recorder])) {
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

/// Checks that the tables, the recorders' mappings and the endpoints' targets agree.
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
            assert!(state.begun.is_empty(), "a MAP has not come");
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

/// The whole state that a guest can observe.
fn snapshot(iommu: &Iommu) -> (Vec<EndpointState>, Vec<DomainState>, Vec<Vec<Mapping>>) {
    let domains: Vec<_> = iommu.domains().collect();
    let mappings = domains.iter().map(|d| all_mappings(iommu, d.id)).collect();
    (iommu.endpoints(usize::MAX, 10).collect(), domains, mappings)
}
