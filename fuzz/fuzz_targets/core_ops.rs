//! Any sequence of requests: the core must stay consistent, and a reset must free everything.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, Settings};
use vhost_device_iommu::topology::{EndpointSpec, GroupName, PciRange, ReservedRegions, Topology};

#[derive(Arbitrary, Debug)]
enum Op {
    Attach(u8, u8, bool),
    Detach(u8, u8),
    Map(u8, u64, u64, u64, bool, bool),
    MapPages(u8, u16, u8, u16),
    Unmap(u8, u64, u64),
    UnmapPages(u8, u16, u8),
    Translate(u8, u64),
    Bypass(bool),
    Reset,
}

fn iommu() -> Iommu {
    let first = "00:06.0".parse().expect("an address");
    let last = "00:06.7".parse().expect("an address");
    let alone = "00:07.0".parse().expect("an address");
    let spec = |first, last, group: Option<&str>| EndpointSpec {
        range: PciRange::new(first, last).expect("a range"),
        group: group.map(|name| GroupName::new(name).expect("a name")),
        reserved: Vec::new(),
    };
    let topology = Topology::new(
        "00:05.0".parse().expect("an address"),
        ReservedRegions::new(Vec::new()).expect("none"),
        &[spec(first, last, Some("g")), spec(alone, alone, None)],
    )
    .expect("a topology");
    let settings = Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 7,
        bypass_at_boot: true,
        arena_limit: 256 << 10,
    };
    Iommu::new(settings, topology).expect("an arena")
}

fn pages(first: u16, count: u8) -> IovaRange {
    let first = u64::from(first) << 12;
    IovaRange::from_len(Iova(first), (u64::from(count) + 1) << 12).expect("in range")
}

fuzz_target!(|ops: Vec<Op>| {
    let mut iommu = iommu();
    let idle = iommu.arena().frames_used();
    let endpoint = |n: u8| EndpointId(0x30 + u32::from(n % 10));
    let domain = |n: u8| DomainId(u32::from(n % 9));
    for op in ops {
        match op {
            Op::Attach(e, d, bypass) => drop(iommu.attach(endpoint(e), domain(d), bypass)),
            Op::Detach(e, d) => drop(iommu.detach(endpoint(e), domain(d))),
            Op::Map(d, first, last, gpa, read, write) => {
                if let Some(range) = IovaRange::new(Iova(first), Iova(last)) {
                    let access = Access { read, write };
                    let mapping = Mapping {
                        range,
                        gpa: Gpa(gpa),
                        access,
                        mmio: read,
                    };
                    drop(iommu.map(domain(d), &mapping));
                }
            }
            Op::MapPages(d, first, count, gpa) => {
                let mapping = Mapping {
                    range: pages(first, count),
                    gpa: Gpa(u64::from(gpa) << 12),
                    access: Access::READ_WRITE,
                    mmio: false,
                };
                if iommu.map(domain(d), &mapping).is_ok() {
                    let found = iommu.mappings(domain(d), mapping.range.first()).next();
                    assert_eq!(found, Some(mapping));
                }
            }
            Op::Unmap(d, first, last) => {
                if let Some(range) = IovaRange::new(Iova(first), Iova(last)) {
                    drop(iommu.unmap(domain(d), range));
                }
            }
            Op::UnmapPages(d, first, count) => {
                let range = pages(first, count);
                if iommu.unmap(domain(d), range).is_ok() {
                    let next = iommu.mappings(domain(d), range.first()).next();
                    assert!(next.is_none_or(|m| !m.range.overlaps(range)));
                }
            }
            Op::Translate(e, iova) => {
                let _ = iommu.translate(endpoint(e), Iova(iova), Access::READ);
            }
            Op::Bypass(bypass) => iommu.set_bypass(bypass),
            Op::Reset => iommu.reset(),
        }
        for state in iommu.domains() {
            assert!(!state.endpoints.is_empty());
            let listed = iommu.mappings(state.id, Iova(0)).count() as u64;
            assert_eq!(listed, state.mappings);
        }
    }
    iommu.reset();
    assert_eq!(iommu.arena().frames_used(), idle);
});
