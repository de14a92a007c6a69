//! Removal of many windows: what it costs the requester, and what it costs the server.

use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::Bed;
use crate::connection::{DMA_UNMAP, RESET};
use crate::deadlines::map_many;

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
