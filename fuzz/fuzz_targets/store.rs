//! Any contents of a store and of an arena that an earlier process may have left: no panic, and no endpoint in bypass mode
//! after a refusal.
#![no_main]

use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Dma, Iommu, Predecessor, Settings};
use vhost_device_iommu::topology::{EndpointSpec, PciRange, ReservedRegions, Topology};

const A: EndpointId = EndpointId(0x30);

fn topology() -> Topology {
    let at = "00:06.0".parse().expect("an address");
    let spec = EndpointSpec {
        range: PciRange::new(at, at).expect("a range"),
        group: None,
        reserved: Vec::new(),
    };
    let reserved = ReservedRegions::new(Vec::new()).expect("none");
    Topology::new("00:05.0".parse().expect("an address"), reserved, &[spec]).expect("a topology")
}

fn settings() -> Settings {
    Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 7,
        bypass_at_boot: true,
        arena_limit: 256 << 10,
    }
}

fn copy(words: &[AtomicU64]) -> Vec<AtomicU64> {
    let values = words.iter().map(|word| word.load(Ordering::Relaxed));
    values.map(AtomicU64::new).collect()
}

// Changes of the store and of the arena: the index of a word, and its new value.
fuzz_target!(|input: (Vec<(u16, u64)>, Vec<(u16, u64)>)| {
    let mut old = Iommu::new(settings(), topology()).expect("memory");
    old.keep_journal();
    old.attach(A, DomainId(1), false).expect("attached");
    for page in 1..4 {
        let range = IovaRange::from_len(Iova(page << 12), 1 << 12).expect("in range");
        let mapping = Mapping {
            range,
            gpa: Gpa(page << 20),
            access: Access::READ_WRITE,
            mmio: false,
        };
        old.map(DomainId(1), &mapping).expect("mapped");
    }
    let arena = copy(old.arena().memory().words());
    // The head of the store, with the first records.
    let store = copy(old.store().memory().words());
    for (words, changes) in [(&store, input.0), (&arena, input.1)] {
        for (index, value) in changes {
            if let Some(word) = words.get(usize::from(index)) {
                word.store(value, Ordering::Relaxed);
            }
        }
    }
    let mut iommu = Iommu::successor(settings(), topology()).expect("memory");
    iommu.connect();
    let restored = iommu.restore(Predecessor {
        arena: &arena,
        store: &store,
    });
    if restored.is_err() {
        assert_eq!(iommu.endpoint(A).expect("an endpoint").dma, Dma::Blocked);
    }
    iommu.reset();
    assert_eq!(iommu.arena().frames_retired(), 0);
});
