//! Removal of many windows: what it costs the requester, and what it costs the server.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Gpa, Mapping};
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::ids::DomainId;

use crate::bed::{Bed, RAM, range};
use crate::connection::{DMA_MAP, DMA_UNMAP, RESET};
use crate::deadlines::map_many;

const PAGE: u64 = 0x1000;
/// The flag of DMA_UNMAP that removes all windows.
const UNMAP_ALL: u32 = 2;

/// How often this thread has waited.
fn waits() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("proc");
    let mut lines = status.lines();
    let waits = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    waits.expect("a count").trim().parse().expect("a number")
}

/// The requester waits for the answers together, and for room in the queue once for many of them.
#[test]
fn an_unmap_of_many_windows_is_not_woken_by_each_answer() {
    const COUNT: u64 = 8000;
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    map_many(&bed, COUNT);
    let (mut client, scripted) = bed.pair(|_, _| false);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let before = waits();
    bed.unmap(0, u64::MAX).expect("unmapped");
    let waited = waits() - before;
    assert_eq!(scripted.each(DMA_UNMAP, |_| ()).len() as u64, COUNT);
    println!("{waited} waits for {COUNT} answers");
    assert!(waited < COUNT / 20, "{waited} waits");
}

/// A server may need time for each window, also if one message removes them all. That is no late answer, and does not use up
/// the budget for those.
#[test]
fn the_removal_of_all_windows_may_take_longer_than_another_answer() {
    const COUNT: u64 = 300;
    const SECOND: Duration = Duration::from_secs(1);
    let bed = Bed::with_deadline(Isolation::ExactMessages, SECOND);
    bed.attach();
    let mut windows = HashSet::new();
    let (_client, scripted) = bed.pair(move |server, msg| {
        let is_known = match msg.cmd {
            DMA_MAP => windows.insert(msg.u64_at(16)),
            DMA_UNMAP if msg.u32_at(4) == UNMAP_ALL => {
                std::thread::sleep(SECOND * 2);
                windows.clear();
                true
            }
            DMA_UNMAP => windows.remove(&msg.u64_at(8)),
            _ => true,
        };
        if !is_known {
            server.refuse(msg, libc::ENOENT.unsigned_abs());
        }
        !is_known
    });
    for domain in [1, 2] {
        for n in 0..COUNT {
            let mapping = Mapping {
                range: range(0x4000_0000 + n * PAGE, PAGE),
                gpa: Gpa(RAM),
                access: Access::READ,
                mmio: false,
            };
            let mapped = bed.iommu().map(DomainId(domain), &mapping);
            mapped.expect("mapped");
        }
        let begun = Instant::now();
        let attached = bed
            .iommu()
            .attach(bed.endpoint(), DomainId(3 - domain), false);
        attached.expect("attached");
        assert!(begun.elapsed() >= SECOND * 2);
    }
    assert_eq!(scripted.each(DMA_UNMAP, |_| ()).len(), 5 + 1);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}
