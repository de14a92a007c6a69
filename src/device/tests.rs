//! The device over a plain ring: no transport, no socket, no other thread.

use super::chain::{Chain, ChainRequest, ReadBytes};
use super::execute::{Context, Executor};
use super::testing::{Bed, ENDPOINT, MAX_BATCH, RING_SIZE, attach, map, unmap};
use super::view::GuestView;
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use crate::backends::Target;
use crate::faults::{Fault, FaultReason};
use crate::ids::DomainId;
use crate::metrics::Metrics;
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::reply::{Status, TAIL_LEN};
use crate::protocol::request::RequestKind;
use crate::protocol::wire::VIRTIO_IOMMU_F_MAP_UNMAP;
use crate::store::crash;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const OK: u8 = Status::Ok as u8;
const NOENT: u8 = Status::NoEnt as u8;
const DOMAIN: u32 = 1;

/// Whether the backend has mappings of the domain.
fn has_domain(bed: &Bed) -> bool {
    bed.recorder.state().domains.contains_key(&DomainId(DOMAIN))
}

fn fault(address: u64) -> Fault {
    Fault {
        endpoint: ENDPOINT,
        reason: FaultReason::Mapping,
        access: Access::WRITE,
        address: Iova(address),
    }
}

#[test]
fn requests_are_answered_and_the_driver_is_notified() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&map(DOMAIN, 0x1000)), NOENT);
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    assert_eq!(bed.request(&map(DOMAIN, 0x1000)), OK);
    assert_eq!(bed.recorder.state().domains[&DomainId(DOMAIN)].len(), 1);
    assert_eq!(bed.request(&unmap(DOMAIN, 0x1000)), OK);
    assert!(bed.recorder.state().domains[&DomainId(DOMAIN)].is_empty());
    assert_eq!(bed.requests.ring.take_interrupts(), 4);
    bed.requests.suppress_interrupts();
    assert_eq!(bed.request(&map(DOMAIN, 0x1000)), OK);
    assert_eq!(bed.requests.ring.take_interrupts(), 0);
}

#[test]
fn one_kick_serves_all_batches() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    let count = u16::try_from(MAX_BATCH).expect("small") + 3;
    let heads: Vec<_> = (0..count)
        .map(|n| bed.requests.put(&map(DOMAIN, u64::from(n) << 12), TAIL_LEN))
        .collect();
    bed.kick();
    for head in heads {
        assert_eq!(bed.requests.take_used(), Some((head, 4)));
        assert_eq!(bed.requests.written(head)[0], OK);
    }
    assert_eq!(bed.requests.take_used(), None);
    let metrics = bed.device.metrics();
    // A pass that takes a millisecond ends within its batch, and the next one may be full again.
    let full = metrics.batch_full.get();
    assert!((1..=2).contains(&full), "{full} full batches");
    assert_eq!(metrics.wakeups.get(), 2);
}

#[test]
fn a_request_of_an_unknown_type_is_returned_unwritten() {
    let mut bed = Bed::new();
    let head = bed.requests.put(&[0x7f; 8], TAIL_LEN);
    bed.kick();
    assert_eq!(bed.requests.take_used(), Some((head, 0)));
    assert_eq!(bed.requests.written(head)[..TAIL_LEN], [0xff; TAIL_LEN]);
    assert_eq!(bed.device.metrics().chains_refused.get(), 1);
}

#[test]
fn a_stopped_ring_is_left_alone_and_a_resumed_driver_keeps_its_domains() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    bed.stop();
    let head = bed.requests.put(&map(DOMAIN, 0), TAIL_LEN);
    bed.kick();
    assert_eq!(bed.requests.take_used(), None);
    bed.start();
    bed.kick();
    assert_eq!(bed.requests.take_used(), Some((head, 4)));
    assert_eq!(bed.requests.written(head)[0], OK);
    assert_eq!(bed.device.metrics().resets.get(), 0);
}

#[test]
fn a_new_driver_finds_no_domain() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    bed.stop();
    bed.start_new_driver();
    assert_eq!(bed.request(&map(DOMAIN, 0)), NOENT);
    assert_eq!(bed.device.metrics().resets.get(), 1);
    assert!(!has_domain(&bed));
}

#[test]
fn a_reset_of_the_vm_has_an_effect_only_while_the_ring_is_stopped() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    assert!(!bed.device.reset_vm(), "the ring is running");
    assert!(has_domain(&bed));
    bed.stop();
    assert!(bed.device.reset_vm());
    assert!(!has_domain(&bed));
    assert!(!bed.device.reset_vm(), "no domain is left");
}

#[test]
fn a_ring_with_more_requests_than_entries_is_left_alone_until_it_starts_anew() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    bed.requests.claim(RING_SIZE + 2);
    bed.kick();
    bed.requests.claim(1);
    let head = bed.requests.put(&map(DOMAIN, 0), TAIL_LEN);
    bed.kick();
    assert_eq!(bed.requests.take_used(), None, "{head} is not served");
    bed.stop();
    bed.start_new_driver();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
}

#[test]
fn faults_go_into_the_buffers_of_the_event_ring() {
    let mut bed = Bed::new();
    bed.device.report_fault(&fault(0x1000));
    assert_eq!(bed.device.metrics().faults_dropped.get(), 1, "no ring");
    bed.kick();
    bed.device.report_fault(&fault(0x2000));
    assert_eq!(bed.device.metrics().faults_dropped.get(), 2, "no buffer");
    let small = bed.events.put(&[], 8);
    let fitting = bed.events.put(&[], 24);
    bed.device.report_fault(&fault(0x3000));
    assert_eq!(bed.device.metrics().faults_delivered.get(), 1);
    assert_eq!(bed.events.take_used(), Some((small, 0)));
    assert_eq!(bed.events.take_used(), Some((fitting, 24)));
    let record = bed.events.written(fitting);
    assert_eq!(record[16..24], 0x3000u64.to_le_bytes());
    assert_eq!(bed.events.ring.take_interrupts(), 1);
}

#[test]
fn nothing_of_a_vm_is_left_for_the_next_one() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    assert!(bed.recorder.state().connected);
    bed.disconnect();
    assert!(!bed.device.is_connected() && bed.device.memory().is_none());
    assert!(!bed.recorder.state().connected && !has_domain(&bed));
    bed.events.put(&[], 24);
    bed.device.report_fault(&fault(0x1000));
    assert_eq!(bed.device.metrics().faults_dropped.get(), 1);
    bed.connect();
    bed.start_new_driver();
    assert_eq!(bed.request(&map(DOMAIN, 0)), NOENT);
}

/// A refusal ends a run of UNMAPs. The rest of the batch must not be decoded again for each of them.
#[test]
fn a_batch_of_refused_unmaps_is_decoded_ahead_twice_at_most() {
    const COUNT: u64 = 300;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
    let view = GuestView::new(&memory);
    let config = ConfigSpace {
        page_sizes: PageMask::TABLE,
        input_range: IovaRange::ALL,
        last_domain: 15,
        probe_size: 512,
    };
    // One in so many is refused: it would split a mapping of two pages.
    for refused_in in [1, 2, 3, 10, COUNT] {
        let mut bed = Bed::new();
        assert_eq!(bed.request(&attach(DOMAIN)), OK);
        let metrics = Metrics::default();
        let mut iommu = bed.device.iommu.lock();
        let mut chains = Vec::new();
        for n in 0..COUNT {
            let first = n * 0x2000;
            let len = if n % refused_in == 0 { 0x2000 } else { 0x1000 };
            let mapping = Mapping {
                range: IovaRange::from_len(Iova(first), len).expect("a range"),
                gpa: Gpa(first),
                access: Access::READ,
                mmio: false,
            };
            iommu.map(DomainId(DOMAIN), &mapping).expect("mapped");
            let request = ChainRequest {
                bytes: Some(ReadBytes::from_slice(&unmap(DOMAIN, first))),
                at: 0,
                spans: 0..0,
                writable_len: TAIL_LEN,
            };
            chains.push(Chain {
                head: 0,
                request: Some(request),
            });
        }
        let mut context = Context {
            iommu: &mut iommu,
            memory: &memory,
            features: 1 << VIRTIO_IOMMU_F_MAP_UNMAP,
            config: &config,
            metrics: &metrics,
            max_batch: chains.len(),
        };
        let mut executor = Executor::default();
        let mut taken = 0;
        for (at, chain) in chains.iter().enumerate() {
            if !executor.has_outcomes() {
                let rest = chains.iter().skip(at).inspect(|_| taken += 1);
                executor.run_ahead(rest, &mut context);
            }
            let request = chain.request.as_ref().expect("a request");
            executor.answer(&view, request, &[], &mut context);
        }
        assert!(
            taken <= 2 * COUNT,
            "{taken} for one refused in {refused_in}"
        );
        let unmaps = &metrics.requests[RequestKind::Unmap.index()];
        let refused = unmaps[Status::Range.index()].get();
        assert_eq!(refused, COUNT.div_ceil(refused_in));
        assert_eq!(unmaps[Status::Ok.index()].get(), COUNT - refused);
    }
}

/// The backends, too, must not let an endpoint reach memory whose driver is not known yet.
#[test]
fn backends_block_endpoints_until_the_first_ring_runs() {
    let bed = Bed::new();
    let target = || bed.recorder.state().targets[&ENDPOINT];
    assert_eq!(target(), Target::Blocked, "memory, and no ring");
    bed.kick();
    assert_eq!(target(), Target::Bypass, "a new driver");
    // Between drivers of one connection there is no doubt: the VMM may share memory anew.
    bed.stop();
    bed.device.await_driver();
    assert_eq!(target(), Target::Bypass, "a stopped ring");
    bed.disconnect();
    bed.connect();
    assert_eq!(target(), Target::Blocked, "another connection");
}

#[test]
fn a_restored_device_goes_on_with_the_ring() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    bed.restart(None);
    assert_eq!(bed.request(&map(DOMAIN, 0x1000)), OK);
    assert!(has_domain(&bed));
}

#[test]
fn a_restored_ring_waits_for_its_memory() {
    let mut deaths = 0;
    for at in 0.. {
        let mut bed = Bed::new();
        let head = bed.requests.put(&attach(DOMAIN), TAIL_LEN);
        if crash::run(at, || bed.kick()).0.is_some() {
            break;
        }
        let part = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        bed.restart(Some(Arc::new(part)));
        bed.kick();
        bed.share_memory();
        bed.kick();
        assert_eq!(bed.requests.take_used(), Some((head, 4)), "died at {at}");
        assert_eq!(bed.requests.written(head)[0], OK, "died at {at}");
        deaths += 1;
    }
    assert!(deaths > 10, "{deaths}");
}

#[test]
fn a_reset_before_the_restored_ring_runs_ends_its_domains() {
    let mut bed = Bed::new();
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
    bed.restart(None);
    bed.pause_unseen();
    assert!(bed.device.reset_vm());
    assert!(!has_domain(&bed));
    bed.start_new_driver();
    assert_eq!(bed.request(&map(DOMAIN, 0x1000)), NOENT);
    assert_eq!(bed.request(&attach(DOMAIN)), OK);
}
