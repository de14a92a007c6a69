//! Tests of devices behind several instances of the host's IOMMU, on a fake kernel.

use std::sync::Arc;

use super::capabilities;
use crate::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::backends::testing::slot;
use crate::host::sysfs::{HostRegion, HostRegionKind, gaps, merge};
use crate::ids::{DomainId, EndpointId};
use crate::iommu::{Iommu, RequestError, Settings};
use crate::topology::{EndpointSpec, ReservedKind, ReservedRegion, ReservedRegions, Topology};
use crate::vfio::fake::{FakeKernel, FakeMemory};

const WIDE: EndpointId = EndpointId(0x18);
const NARROW: EndpointId = EndpointId(0x20);
const D1: DomainId = DomainId(1);
/// RAM of QEMU's `virt`.
const RAM: u64 = 0x4000_0000;
/// The last address of an SMMU with stage-2 tables only, whose input is as wide as its output.
const NARROW_LAST: u64 = (1 << 44) - 1;
const WIDE_LAST: u64 = (1 << 48) - 1;

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
}

/// The window in which Linux maps the host's doorbell, and the addresses that the kernel then allows.
fn window() -> IovaRange {
    range(0x800_0000, 0x80f_ffff)
}

fn allowed(last: u64) -> Vec<IovaRange> {
    vec![range(0, 0x7ff_ffff), range(0x810_0000, last)]
}

/// Two devices behind two SMMUs, one of 48 and one of 44 bits, and the regions that PROBE reports for the first one.
fn two_smmus() -> (Iommu, ReservedRegions) {
    let kernel = FakeKernel::default();
    let doorbell = ReservedRegion {
        range: range(0x809_0000, 0x809_ffff),
        kind: ReservedKind::Msi,
    };
    let common = ReservedRegions::new(vec![doorbell]).expect("one region");
    let of_host = HostRegion {
        range: window(),
        kind: HostRegionKind::Msi,
    };
    let input = IovaRange::of_width(48);
    let reported = |last| merge(&common, &[of_host], Some(&allowed(last)), input);
    let mut specs = Vec::new();
    let mut devices = Vec::new();
    for (endpoint, group, last) in [(WIDE, 1, WIDE_LAST), (NARROW, 2, NARROW_LAST)] {
        let all = gaps(&allowed(last), IovaRange::ALL);
        kernel.state().reserved.insert(group, all);
        let regions = reported(last);
        let own = regions.iter().copied();
        specs.push(EndpointSpec {
            range: format!("00:{:02x}.0", endpoint.0 >> 3)
                .parse()
                .expect("an address"),
            group: None,
            reserved: own.filter(|it| it.kind == ReservedKind::Reserved).collect(),
        });
        kernel.vmm_device(endpoint.0, group);
        let bar = GpaRange::from_len(Gpa(0x1000_0000), 0x1000).expect("not empty");
        devices.push(PassthroughDevice {
            endpoint,
            name: format!("device {endpoint}"),
            group,
            shared: true,
            attach: Box::new(kernel.device(endpoint.0, group)),
            memory: Arc::new(FakeMemory::at(0, bar)),
        });
    }
    let settings = Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 15,
        bypass_at_boot: true,
        arena_limit: 4 << 20,
        encoding: Default::default(),
    };
    let topology = Topology::new(
        "00:01.0".parse().expect("an address"),
        common.clone(),
        &specs,
    );
    let mut iommu = Iommu::new(settings, topology.expect("a topology")).expect("an arena");
    let ranges = [allowed(WIDE_LAST), allowed(NARROW_LAST)];
    let both = capabilities(&ranges, 4096).expect("common addresses");
    let backend = Iommufd::new(Arc::new(kernel), both, Pinning::All, devices);
    iommu
        .add_backend(Box::new(backend), &[WIDE, NARROW])
        .expect("added");
    iommu.connect();
    iommu.set_memory(vec![slot(RAM, 0x10_0000, 0)]);
    (iommu, reported(WIDE_LAST))
}

fn page(iova: u64) -> Mapping {
    Mapping {
        range: range(iova, iova + 0xfff),
        gpa: Gpa(RAM),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

/// Otherwise the second device could not enter a domain of the first one: the kernel refuses (EADDRINUSE) if the address
/// space has a mapping that the device's IOMMU does not reach.
#[test]
fn the_guest_gets_the_addresses_that_all_instances_translate() {
    let (mut iommu, _) = two_smmus();
    assert_eq!(iommu.input_range(), range(0, NARROW_LAST));
    iommu.attach(WIDE, D1, false).expect("attached");
    let refused = iommu.map(D1, &page(1 << 44));
    assert!(matches!(
        refused,
        Err(RequestError::OutsideInputRange { .. })
    ));
    iommu.map(D1, &page(NARROW_LAST - 0xfff)).expect("mapped");
    iommu.attach(NARROW, D1, false).expect("both in one domain");
    iommu.map(D1, &page(0x1000)).expect("mapped for both");
    iommu
        .unmap(D1, range(0, NARROW_LAST))
        .expect("unmapped for both");
    iommu.detach(WIDE, D1).expect("detached");
}

/// The guest's driver learns the window from PROBE. A request that ignores it changes nothing.
#[test]
fn the_window_for_the_hosts_doorbell_cannot_be_mapped() {
    let (mut iommu, reported) = two_smmus();
    let shown: Vec<_> = reported.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "0x8000000..=0x808ffff:reserved",
            "0x8090000..=0x809ffff:msi",
            "0x80a0000..=0x80fffff:reserved"
        ]
    );
    iommu.attach(WIDE, D1, false).expect("attached");
    for iova in [0x800_0000, 0x809_0000, 0x80f_f000] {
        let refused = iommu.map(D1, &page(iova)).expect_err("reserved");
        assert!(
            matches!(refused, RequestError::Reserved { .. }),
            "{refused:?}"
        );
    }
    iommu.map(D1, &page(0x7ff_f000)).expect("below the window");
    iommu.map(D1, &page(0x810_0000)).expect("above it");
}
