//! MAP and UNMAP of single pages with an emulated device in the domain, beside the same without a device.

use std::time::Instant;

use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::iommu::{Iommu, Settings};
use vhost_device_iommu::topology::{EndpointSpec, PciAddress, PciRange, ReservedRegions, Topology};

use crate::bed::{Bed, DOMAIN, RAM, RAM_LEN};
use crate::median;

const PAGE: u64 = 4096;
/// Pages that one batch maps and unmaps.
const BATCH: u64 = 256;
const BATCHES: usize = 4000;

/// Nanoseconds of MAP and UNMAP, by name.
pub fn measure() -> Vec<(&'static str, f64)> {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    let pair = bed.pair(|_, _| false);
    let mut bare = without_device();
    let mut times: [Vec<f64>; 4] = Default::default();
    for batch in 0..BATCHES {
        let mut device = bed.iommu();
        for (iommu, at) in [(&mut bare, 0), (&mut *device, 2)] {
            let begin = Instant::now();
            for page in 0..BATCH {
                iommu.map(DOMAIN, &mapping(page)).expect("mapped");
            }
            let mapped = begin.elapsed();
            let begin = Instant::now();
            for page in 0..BATCH {
                let range = mapping(page).range;
                iommu.unmap(DOMAIN, range).expect("unmapped");
            }
            let unmapped = begin.elapsed();
            // The first batches bring tables and code into the processor's caches.
            if batch >= BATCHES / 10 {
                times[at].push(mapped.as_nanos() as f64 / BATCH as f64);
                times[at + 1].push(unmapped.as_nanos() as f64 / BATCH as f64);
            }
        }
    }
    drop(pair);
    let names = [
        "map_without_device",
        "unmap_without_device",
        "map_with_messages",
        "unmap_with_messages",
    ];
    let medians = times.iter_mut().filter_map(|t| median(t));
    names.into_iter().zip(medians).collect()
}

/// A core whose only endpoint has no backend.
fn without_device() -> Iommu {
    let address = PciAddress::new(0, 0, 6, 0).expect("an address");
    let spec = EndpointSpec {
        range: PciRange::new(address, address).expect("a range"),
        group: None,
        reserved: Vec::new(),
    };
    let own = PciAddress::new(0, 0, 5, 0).expect("an address");
    let topology = Topology::new(own, ReservedRegions::default(), &[spec]).expect("a topology");
    let settings = Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 255,
        bypass_at_boot: false,
        arena_limit: 64 << 20,
    };
    let mut iommu = Iommu::new(settings, topology).expect("a core");
    let endpoint = address.endpoint_id();
    iommu.attach(endpoint, DOMAIN, false).expect("attached");
    iommu
}

/// The mapping of a page.
pub fn mapping(page: u64) -> Mapping {
    Mapping {
        range: IovaRange::from_len(Iova(page * PAGE), PAGE).expect("a page"),
        gpa: Gpa(RAM + page * PAGE % RAM_LEN),
        access: Access::READ_WRITE,
        mmio: false,
    }
}
