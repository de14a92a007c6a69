//! When the rings run, when they stop, and what breaks them.

use super::*;

#[test]
fn a_reset_ends_the_domains_and_clears_the_registers() {
    let mut bed = Bed::new();
    bed.start_and_attach();
    assert_eq!(bed.request(&map(1, 0x1000)), 0);
    assert!(!bed.recorder.state().domains.is_empty());
    bed.write(16, &0u16.to_le_bytes());
    bed.write(20, &[0]);
    assert_eq!(bed.status(), 0);
    for queue in 0..2u16 {
        bed.write(22, &queue.to_le_bytes());
        assert_eq!(bed.read(24, 2), 1024);
        assert_eq!(bed.read(26, 2), u64::from(NO_VECTOR));
        assert_eq!((bed.read(28, 2), bed.read(32, 8)), (0, 0));
    }
    assert_eq!(bed.read(16, 2), u64::from(NO_VECTOR));
    // Nothing of the last driver is served, and the next one has no domains.
    bed.make(&map(1, 0x2000));
    bed.kick();
    bed.clear_ring();
    bed.start();
    assert_eq!(bed.request(&map(1, 0x3000)), NO_ENT);
    assert_eq!(bed.request(&attach(1)), 0);
    assert_eq!(bed.device.metrics().resets.get(), 1);
}

/// The worker may wait for the locks that the reset holds, and must find the rings stopped when it gets them: else it
/// would serve requests of the last driver after the domains have ended.
#[test]
fn rings_have_stopped_when_a_reset_ends_the_domains() {
    type Reset = fn(&mut Bed);
    let resets: [(&str, Reset); 3] = [
        ("the driver's", |bed| bed.write(20, &[0])),
        ("the VMM's", |bed| bed.pci.reset().expect("reset")),
        ("the end of the connection", |bed| bed.pci.release()),
    ];
    for (name, reset) in resets {
        let mut bed = Bed::new();
        bed.start_and_attach();
        let rings = bed.pci.rings();
        assert!(rings.iter().all(|ring| ring.lock().is_running()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = seen.clone();
        bed.recorder.state().at_attach = Some(Hook(Arc::new(move || {
            let mut all = all.lock().expect("no panic");
            all.extend(rings.iter().map(|ring| ring.lock().is_running()));
        })));
        reset(&mut bed);
        bed.recorder.state().at_attach = None;
        let seen = seen.lock().expect("no panic");
        assert!(
            !seen.is_empty() && !seen.contains(&true),
            "{name}: {seen:?}"
        );
    }
}

#[test]
fn no_request_is_served_before_driver_ok() {
    let mut bed = Bed::new();
    bed.negotiate(VERSION_1 | MAP_UNMAP);
    bed.enable(0, 16, RINGS[0]);
    bed.assert_waits_for(|bed| bed.write(20, &[15]));
}

#[test]
fn a_device_that_is_no_bus_master_leaves_memory_alone() {
    let mut bed = Bed::new();
    bed.start();
    bed.set_bus_master(false);
    bed.assert_waits_for(|bed| bed.set_bus_master(true));
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let mut bed = Bed::new();
    bed.enable_msix();
    let event = bed.give_event(0);
    bed.start();
    bed.break_ring();
    assert_eq!(bed.status(), 15 | 64);
    assert_eq!(count(&event), 0, "configuration changes have no vector");
    assert_eq!(bed.read(ISR, 1), 2, "the bit comes before the notification");
    bed.write(20, &[0]);
    assert_eq!(bed.status(), 0);
    bed.clear_ring();
    bed.start();
    bed.write(16, &[0, 0]);
    assert_eq!(bed.request(&attach(1)), 0);
    bed.break_ring();
    assert_eq!(bed.status(), 15 | 64);
    assert_eq!(count(&event), 1);
    assert_eq!(bed.device.metrics().needs_reset.get(), 2);
    // It stays so until the reset.
    bed.put(RINGS[0] + AVAILABLE + 2, &1u16.to_le_bytes());
    bed.kick();
    assert_eq!(bed.status(), 15 | 64);
}

#[test]
fn a_ring_outside_memory_asks_for_a_reset() {
    for (queue, at) in [(0, RAM_BYTES - 0x4000), (1, 1 << 40), (0, 0x1_0008)] {
        let mut bed = Bed::new();
        bed.negotiate(VERSION_1 | MAP_UNMAP);
        bed.enable(queue, 16, at);
        bed.write(20, &[15]);
        assert_eq!(bed.status(), 15 | 64, "{at:#x}");
    }
    // Memory that goes away under a ring.
    let mut bed = Bed::new();
    bed.start();
    bed.unmap(0, 0, RAM_BYTES).expect("unmapped");
    assert_eq!(bed.status(), 15);
    bed.write(NOTIFY, &[0, 0]);
    assert_eq!(bed.status(), 15 | 64);
}

#[test]
fn a_client_that_goes_leaves_nothing() {
    let mut bed = Bed::new();
    let bypass = bed.flip_bypass();
    bed.start_and_attach();
    let event = bed.give_event(1);
    bed.pci.release();
    assert!(!bed.recorder.state().connected && bed.device.memory().is_none());
    assert!(bed.recorder.state().memory.is_empty());
    assert_eq!(count(&event), 0);
    bed.connect();
    assert_eq!(bed.status(), 0);
    assert_eq!(bed.bypass(), bypass);
    bed.start();
    bed.map_vector(0, 1);
    assert_eq!(bed.request(&map(1, 0x1000)), NO_ENT);
    assert_eq!(count(&event), 0, "the eventfd was the last client's");
}

#[test]
fn a_reset_by_the_vmm_restores_the_space_and_bypass() {
    let mut bed = Bed::new();
    let bypass = bed.flip_bypass();
    bed.start_and_attach();
    bed.pci.reset().expect("reset");
    assert_eq!((bed.status(), bed.read_space(4, 2)), (0, 0));
    assert_eq!(bed.bypass(), bypass);
    // Guest memory stays.
    assert!(bed.device.memory().is_some());
    bed.clear_ring();
    // The device is no bus master any more.
    bed.start();
    bed.assert_waits_for(|bed| bed.set_bus_master(true));
}

#[test]
fn a_fault_reaches_the_event_queue() {
    let mut bed = Bed::new();
    let event = bed.give_event(2);
    let fault = Fault {
        endpoint: ENDPOINT,
        access: Access::WRITE,
        address: Iova(0x5000),
        reason: FaultReason::Mapping,
    };
    bed.start();
    bed.map_vector(1, 2);
    bed.work();
    bed.device.report_fault(&fault);
    assert_eq!(count(&event), 0, "no buffer");
    let ring = RINGS[1];
    let mut descriptor = (ring + BUFFERS).to_le_bytes().to_vec();
    descriptor.extend([24, 0, 0, 0, 2, 0, 0, 0]);
    bed.put(ring, &descriptor);
    bed.put(ring + AVAILABLE, &[0, 0, 1, 0, 0, 0]);
    bed.device.report_fault(&fault);
    assert_eq!(count(&event), 1);
    let mut record = [0; 24];
    let at = GuestAddress(ring + BUFFERS);
    bed.memory().read_slice(&mut record, at).expect("in memory");
    assert_eq!(record[8..12], ENDPOINT.0.to_le_bytes());
    assert_eq!(record[16..], 0x5000u64.to_le_bytes());
}
