//! Accesses of readers that succeed, and accesses that are refused.

use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange};
use vhost_device_iommu::faults::{Fault, FaultReason};
use vhost_device_iommu::shadow::AccessError;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::bed::{A, B, Bed, D1, D2, LONG, MSI, PAGE, RAM, eventually, mapping, range, slot};

fn at(iova: u64) -> GuestAddress {
    GuestAddress(iova)
}

#[test]
fn memory_is_reached_through_mappings_only() {
    let mut bed = Bed::new();
    let reader = bed.reader(A);
    let memory = reader.memory();
    bed.iommu.attach(A, D1, false).expect("attached");
    let all = Access::READ_WRITE;
    // Two pages that are adjacent for the endpoint and apart in memory.
    bed.iommu
        .map(D1, &mapping(0x10_0000, PAGE, 0x5000, all))
        .expect("mapped");
    bed.iommu
        .map(D1, &mapping(0x10_1000, PAGE, 0x2000, all))
        .expect("mapped");
    memory
        .write_obj(0x1122_3344_5566_7788_u64, at(0x10_0ffc))
        .expect("mapped");
    assert_eq!(bed.peek(0x5ff8) >> 32, 0x5566_7788);
    assert_eq!(bed.peek(0x2000) & 0xffff_ffff, 0x1122_3344);
    // Alternates between the pages.
    for _ in 0..3 {
        bed.poke(0x5010, 5);
        bed.poke(0x2010, 2);
        assert_eq!(memory.read_obj::<u64>(at(0x10_0010)).expect("mapped"), 5);
        assert_eq!(memory.read_obj::<u64>(at(0x10_1010)).expect("mapped"), 2);
        let mut both = [0; 0x2000];
        memory.read_slice(&mut both, at(0x10_0000)).expect("mapped");
        assert_eq!((both[0x10], both[0x1010]), (5, 2));
    }
    // The page is unmapped and mapped to another address without an access in between.
    bed.iommu
        .unmap(D1, range(0x10_0000, 0x10_0fff))
        .expect("unmapped");
    bed.iommu
        .map(D1, &mapping(0x10_0000, PAGE, 0x7000, Access::READ))
        .expect("mapped");
    bed.poke(0x7010, 7);
    assert_eq!(memory.read_obj::<u64>(at(0x10_0010)).expect("mapped"), 7);
    memory
        .write_obj(0u64, at(0x10_0010))
        .expect_err("read-only");
    assert_eq!(bed.peek(0x7010), 7);
    // The same page with other rights, right after a read of it.
    let page = range(0x10_0000, 0x10_0fff);
    bed.iommu.unmap(D1, page).expect("unmapped");
    bed.iommu
        .map(D1, &mapping(0x10_0000, PAGE, 0x7000, all))
        .expect("mapped");
    memory.write_obj(8u64, at(0x10_0010)).expect("writable now");
    bed.iommu.unmap(D1, page).expect("unmapped");
    bed.iommu
        .map(D1, &mapping(0x10_0000, PAGE, 0x7000, Access::READ))
        .expect("mapped");
    memory
        .write_obj(9u64, at(0x10_0010))
        .expect_err("read-only");
    assert_eq!(bed.peek(0x7010), 8);
    assert!(!memory.check_range(at(0x10_0ff0), 0x20, Permissions::Write));
    assert!(memory.check_range(at(0x10_0ff0), 0x20, Permissions::Read));
    assert_eq!(memory.read(&mut [], at(0)).expect("nothing to do"), 0);
}

#[test]
fn each_refusal_is_reported_with_endpoint_rights_and_address() {
    let mut bed = Bed::new();
    let (a, b) = (bed.reader(A), bed.reader(B));
    let refused = |endpoint, access, address| Fault {
        endpoint,
        reason: FaultReason::Mapping,
        access,
        address: Iova(address),
    };
    // The endpoint is attached to no domain and not in bypass mode.
    a.memory().read_obj::<u8>(at(0x1234)).expect_err("blocked");
    assert_eq!(bed.fault(), refused(A, Access::READ, 0x1234));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu
        .map(D1, &mapping(0, PAGE, 0, Access::WRITE))
        .expect("mapped");
    bed.iommu
        .map(D1, &mapping(PAGE, PAGE, 0, Access::NONE))
        .expect("mapped");
    // An address without a mapping, and an access whose second half has none.
    b.memory().write_obj(0u8, at(0x9000)).expect_err("blocked");
    assert_eq!(bed.fault(), refused(B, Access::WRITE, 0x9000));
    a.memory()
        .write_obj(0u64, at(0xffc))
        .expect_err("the second half");
    assert_eq!(bed.fault(), refused(A, Access::WRITE, 0x1000));
    a.memory()
        .read_obj::<u64>(at(0x10))
        .expect_err("write-only");
    assert_eq!(bed.fault(), refused(A, Access::READ, 0x10));
    let inside = a.enter().expect("a word");
    let refusal = inside.translate(Iova(0x5000), Access::READ_WRITE);
    assert!(matches!(refusal, Err(AccessError::Fault { .. })));
    drop(inside);
    assert_eq!(bed.fault(), refused(A, Access::READ_WRITE, 0x5000));
    // Addresses that overflow.
    for (first, bytes) in [(u64::MAX, 1), (u64::MAX - 3, 8), (u64::MAX - 1, 1)] {
        let buffer = &mut vec![0; bytes];
        a.memory()
            .read(buffer, at(first))
            .expect_err("past the end");
    }
    assert!(bed.faults.try_recv().is_err(), "no other faults");
}

#[test]
fn an_endpoint_is_switched_over_at_once() {
    let mut bed = Bed::new();
    let reader = bed.reader(A);
    let memory = reader.memory();
    bed.poke(0, 0x1000_0000);
    bed.poke(PAGE, 0x2000_0000);
    bed.poke(2 * PAGE, 0x3000_0000);
    let read = || memory.read_obj::<u64>(at(PAGE)).ok();
    assert_eq!(read(), None);
    bed.iommu.set_bypass(true);
    assert_eq!(read(), Some(0x2000_0000));
    memory.write_obj(0u32, at(MSI)).expect_err("reserved");
    assert_eq!(bed.fault().address, Iova(PAGE));
    assert_eq!(bed.fault().address, Iova(MSI));
    let inside = reader.enter().expect("a word");
    let below = inside
        .translate(Iova(MSI - 1), Access::READ)
        .expect("bypass");
    assert_eq!(
        (below.gpa, below.contiguous_last),
        (Gpa(MSI - 1), Iova(MSI - 1))
    );
    drop(inside);
    bed.iommu.attach(A, D1, false).expect("attached");
    assert_eq!(read(), None);
    bed.iommu
        .map(D1, &mapping(PAGE, PAGE, 0, Access::READ))
        .expect("mapped");
    assert_eq!(read(), Some(0x1000_0000));
    bed.iommu.attach(B, D2, false).expect("attached");
    let third = mapping(PAGE, PAGE, 2 * PAGE, Access::READ);
    bed.iommu.map(D2, &third).expect("mapped");
    bed.iommu.attach(A, D2, false).expect("moved");
    assert_eq!(read(), Some(0x3000_0000));
    bed.iommu.detach(A, D2).expect("detached");
    assert_eq!(read(), Some(0x2000_0000));
    bed.iommu.set_bypass(false);
    assert_eq!(read(), None);
    bed.iommu.attach(A, D2, false).expect("moved");
    assert_eq!(read(), Some(0x3000_0000));
    bed.iommu.disconnect();
    assert_eq!(read(), None);
}

#[test]
fn unmap_waits_for_accesses_begun_before_and_for_no_other() {
    let mut bed = Bed::patient();
    let (a, b) = (bed.reader(A), bed.reader(B));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.attach(B, D2, false).expect("attached");
    let page = mapping(0, PAGE, 0, Access::READ);
    bed.iommu.map(D1, &page).expect("mapped");
    // A reader of another domain, in this thread: UNMAP ends although it stays inside its access.
    let other = b.enter().expect("a word");
    let begun = Instant::now();
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    assert!(begun.elapsed() < LONG / 2);
    drop(other);
    bed.iommu.map(D1, &page).expect("mapped");
    std::thread::scope(|scope| {
        let inside = a.enter().expect("a word");
        inside.translate(Iova(0), Access::READ).expect("mapped");
        let iommu = &mut bed.iommu;
        let unmapping = scope.spawn(move || iommu.unmap(D1, IovaRange::ALL));
        eventually("the entry is gone", || {
            let next = a.enter().expect("a word");
            next.translate(Iova(0), Access::READ).is_err()
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!unmapping.is_finished(), "an access is in progress");
        // From now on one access is in progress at any moment, each begun before the last one ends. UNMAP waits for
        // those alone that are in progress when it looks.
        let mut open = a.enter().expect("a word");
        drop(inside);
        eventually("UNMAP does not wait for later accesses", || {
            open = a.enter().expect("a word");
            unmapping.is_finished()
        });
        drop(open);
        unmapping.join().expect("no panic").expect("unmapped");
    });
}

/// The slices of an access stay usable until the guard is dropped.
#[test]
fn a_guard_keeps_slices_usable() {
    let mut bed = Bed::new();
    let reader = bed.reader(A);
    let memory = reader.memory();
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu
        .map(D1, &mapping(0, PAGE, 0, Access::READ_WRITE))
        .expect("mapped");
    let guard = reader.enter().expect("a word");
    let slices = memory
        .get_slices(at(0), 64, Permissions::Write)
        .expect("mapped");
    let slices: Vec<_> = slices.collect::<Result<_, _>>().expect("memory");
    std::thread::scope(|scope| {
        let iommu = &mut bed.iommu;
        let unmapping = scope.spawn(move || iommu.unmap(D1, IovaRange::ALL));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!unmapping.is_finished());
        slices[0].write_obj(7u64, 0).expect("room");
        drop(slices);
        drop(guard);
        unmapping.join().expect("no panic").expect("unmapped");
    });
    assert_eq!(bed.peek(0), 7);
}

#[test]
fn accesses_may_use_all_words_at_once() {
    let bed = Bed::new();
    let reader = bed.reader(A);
    let mut inside: Vec<_> = (0..64).map(|_| reader.enter().expect("a word")).collect();
    assert_eq!(reader.enter().err(), Some(AccessError::Busy));
    reader.memory().read_obj::<u8>(at(0)).expect_err("busy");
    inside.pop();
    drop(reader.enter().expect("a word"));
}

#[test]
fn memory_can_be_added_and_removed() {
    let mut bed = Bed::new();
    let reader = bed.reader(A);
    bed.iommu.attach(A, D1, false).expect("attached");
    let before = reader.memory();
    let far = mapping(0, PAGE, RAM, Access::READ_WRITE);
    bed.iommu.map(D1, &far).expect("mapped");
    before.read_obj::<u8>(at(0)).expect_err("no memory there");
    assert!(
        bed.faults.try_recv().is_err(),
        "the IOMMU must not report a fault"
    );
    let more = slot(RAM, 16 * PAGE);
    let both = vec![bed.ram[0].clone(), more.clone()];
    bed.iommu.set_memory(both);
    // An answer to the VMM means that readers have the new memory.
    assert!(reader.has_changed(&before));
    let with = reader.memory();
    with.write_obj(9u64, at(0)).expect("memory there");
    // Only the removal of memory invalidates older views.
    bed.iommu
        .map(D1, &mapping(PAGE, PAGE, 0, Access::READ))
        .expect("mapped");
    before.read_obj::<u8>(at(PAGE)).expect("as before");

    bed.iommu.set_memory(vec![bed.ram[0].clone()]);
    for old in [&before, &with] {
        let refused = old.read_obj::<u8>(at(PAGE)).expect_err("outdated");
        assert!(refused.to_string().contains("changed"), "{refused}");
    }
    assert!(reader.has_changed(&with));
    let without = reader.memory();
    without.read_obj::<u8>(at(0)).expect_err("no memory there");
    without.read_obj::<u8>(at(PAGE)).expect("as before");
    assert_eq!(bed.registry.counters().killed.get(), 0);
}

#[test]
fn a_view_in_use_delays_the_removal_of_memory() {
    let mut bed = Bed::new();
    let reader = bed.reader(A);
    let guard = reader.enter().expect("a word");
    std::thread::scope(|scope| {
        let iommu = &mut bed.iommu;
        let going = scope.spawn(move || iommu.set_memory(Vec::new()));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!going.is_finished());
        drop(guard);
        going.join().expect("no panic");
    });
    assert_eq!(bed.registry.reader_count(), 1);
}

#[test]
fn added_memory_is_available_without_waiting_for_accesses() {
    let mut bed = Bed::patient();
    let reader = bed.reader(A);
    bed.iommu.set_bypass(true);
    let _guard = reader.enter().expect("a word");
    let mut memory = vec![bed.ram[0].clone()];
    let begun = Instant::now();
    for number in 0..20 {
        let gpa = RAM + number * PAGE;
        memory.push(slot(gpa, PAGE));
        bed.iommu.set_memory(memory.clone());
        reader.memory().write_obj(number, at(gpa)).expect("there");
    }
    assert!(begun.elapsed() < LONG / 2, "{begun:?}");
    assert_eq!(bed.registry.counters().killed.get(), 0);
}

#[test]
fn nothing_is_reached_once_the_daemon_is_gone() {
    let mut bed = Bed::new();
    let reader = bed.reader(A);
    let memory = reader.memory();
    bed.iommu.set_bypass(true);
    memory.read_obj::<u8>(at(0)).expect("bypass");
    let path = bed.path();
    drop(bed);
    eventually("noticed", || !reader.is_connected());
    reader.set_patience(Duration::ZERO);
    memory.read_obj::<u8>(at(0)).expect_err("gone");
    assert!(!path.exists());
}

#[test]
fn an_access_makes_no_system_call() {
    let mut bed = Bed::new();
    bed.iommu.attach(A, D1, false).expect("attached");
    for page in 0..16 {
        let apart = mapping(page * PAGE, PAGE, page * 3 * PAGE, Access::READ_WRITE);
        bed.iommu.map(D1, &apart).expect("mapped");
    }
    bed.process("strict-seccomp").wait_for("no system call");
}

#[test]
fn faults_are_limited_and_counted() {
    let bed = Bed::new();
    let reader = bed.reader(A);
    let memory = reader.memory();
    for _ in 0..1000 {
        memory.read_obj::<u8>(at(0)).expect_err("blocked");
    }
    let counters = bed.registry.counters();
    eventually("all are counted", || {
        counters.faults.get() + counters.faults_suppressed.get() + reader.faults_unreported()
            == 1000
    });
    assert!(counters.faults.get() >= 64);
    assert!(counters.faults_suppressed.get() + reader.faults_unreported() > 100);
}

#[test]
fn a_reconnection_does_not_renew_the_fault_budget() {
    let bed = Bed::new();
    let begun = Instant::now();
    let counters = bed.registry.counters();
    let mut reported = 0;
    for _ in 0..30 {
        let reader = bed.reader(A);
        let memory = reader.memory();
        for _ in 0..64 {
            memory.read_obj::<u8>(at(0)).expect_err("blocked");
        }
        reported += 64 - reader.faults_unreported();
        drop((memory, reader));
        eventually("all are counted", || {
            counters.faults.get() + counters.faults_suppressed.get() == reported
        });
    }
    // One fault in ten milliseconds, besides the initial budget.
    let earned = u64::try_from(begun.elapsed().as_millis() / 10).expect("not long");
    let passed = counters.faults.get();
    assert!(
        passed <= 64 + earned + 1,
        "{passed} in {:?}",
        begun.elapsed()
    );
    // Another endpoint has a budget of its own.
    let before = counters.faults.get();
    let reader = bed.reader(B);
    for _ in 0..10 {
        reader.memory().read_obj::<u8>(at(0)).expect_err("blocked");
    }
    eventually("they are passed on", || {
        counters.faults.get() >= before + 10
    });
}
