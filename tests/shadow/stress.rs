//! Readers at full speed while everything changes. Each access checks the value that it reads, so
//! an access through a removed mapping is detected.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::shadow::{AccessError, Limits, ShadowReader};
use vm_memory::{Bytes, GuestAddress};

use crate::bed::{A, B, Bed, D1, D2, PAGE, mapping, range};

/// Pages that are mapped and unmapped. Each has a table of its own, so that frames are allocated
/// and freed, too.
const PAGES: u64 = 8;
const STEP: u64 = 2 << 20;
/// The value in a page of memory that no mapping leads to.
const POISON: u64 = 0xdead_dead_dead_dead;
/// The offset in a page at which readers write.
const WRITE_OFFSET: u64 = 64;

/// The value in a page of memory to which `iova` leads in domain `domain`.
fn stamp(domain: u32, iova: u64) -> u64 {
    u64::from(domain) << 56 | iova | 1
}

fn is_stamp(value: u64, iova: u64) -> bool {
    value == stamp(D1.0, iova) || value == stamp(D2.0, iova)
}

/// Reads and writes until `over` is set. Returns the number of accesses that succeeded.
pub fn access_until(reader: &ShadowReader, over: &AtomicBool) -> u64 {
    let memory = reader.memory();
    let ram = memory.get_backend();
    let mut done = 0;
    let mut number = 0u64;
    while !over.load(Ordering::Relaxed) && reader.is_connected() {
        number = number.wrapping_add(1);
        let iova = number * 5 % PAGES * STEP;
        if number.is_multiple_of(3) {
            // Through `vm-memory`, like a device.
            if let Ok(found) = memory.read_obj::<u64>(GuestAddress(iova)) {
                assert!(is_stamp(found, iova), "{found:#x} at {iova:#x}");
                done += 1;
            }
            continue;
        }
        let inside = reader.enter().expect("a word");
        match inside.translate(Iova(iova), Access::READ_WRITE) {
            Ok(found) => {
                let at = GuestAddress(found.gpa.0);
                let first: u64 = ram.read_obj(at).expect("memory");
                assert!(is_stamp(first, iova), "{first:#x} at {iova:#x}");
                if number.is_multiple_of(16) {
                    std::thread::yield_now();
                }
                let there = GuestAddress(found.gpa.0 + WRITE_OFFSET);
                ram.write_obj(first, there).expect("memory");
                let still: u64 = ram.read_obj(at).expect("memory");
                assert_eq!(still, first, "at {iova:#x}, within one access");
                done += 1;
            }
            Err(AccessError::Fault { .. } | AccessError::Disconnected) => {}
            Err(other) => panic!("{other}"),
        }
    }
    done
}

/// Changes mappings, domains and memory for `time`. At any moment, the tables agree with the values
/// in memory.
fn change(bed: &mut Bed, time: Duration) -> u64 {
    let until = Instant::now() + time;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    // By domain and page: the page of memory to which it leads.
    let mut leads: [[Option<u64>; PAGES as usize]; 2] = Default::default();
    let mut free: Vec<u64> = (1..64).collect();
    for &page in &free {
        bed.poke(page * PAGE, POISON);
    }
    let mut changes = 0;
    // Both domains must exist all the time.
    bed.iommu.attach(B, D2, false).expect("attached");
    bed.iommu.attach(A, D1, false).expect("attached");
    let mut at = 0;
    while Instant::now() < until {
        let (which, page) = (next(2) as usize, next(PAGES));
        let domain = [D1, D2][which];
        let iova = page * STEP;
        match next(10) {
            0 => {
                // The domain that A leaves ends, with all its tables, unless B is attached to it.
                at = 1 - at;
                bed.iommu.attach(A, [D1, D2][at], false).expect("moved");
                if at == 1 {
                    retire(bed, &mut leads[0], &mut free);
                }
            }
            _ if bed.iommu.domains().all(|d| d.id != domain) => {}
            _ => match leads[which][page as usize].take() {
                Some(ram) => {
                    let gone = range(iova, iova + (PAGE - 1));
                    bed.iommu.unmap(domain, gone).expect("unmapped");
                    poison(bed, ram);
                    free.push(ram);
                }
                None => {
                    let ram = free.swap_remove(next(free.len() as u64) as usize);
                    check_poisoned(bed, ram);
                    bed.poke(ram * PAGE, stamp(domain.0, iova));
                    let page_of = mapping(iova, PAGE, ram * PAGE, Access::READ_WRITE);
                    bed.iommu.map(domain, &page_of).expect("mapped");
                    leads[which][page as usize] = Some(ram);
                }
            },
        }
        changes += 1;
    }
    for (domain, leads) in [D1, D2].into_iter().zip(&mut leads) {
        if bed.iommu.domains().any(|d| d.id == domain) {
            bed.iommu.unmap(domain, IovaRange::ALL).expect("unmapped");
        }
        retire(bed, leads, &mut free);
    }
    // Some time later, no reader has written to a page to which no mapping leads.
    std::thread::sleep(Duration::from_millis(20));
    for ram in free {
        check_poisoned(bed, ram);
    }
    changes
}

fn retire(bed: &Bed, leads: &mut [Option<u64>], free: &mut Vec<u64>) {
    for ram in leads.iter_mut().filter_map(Option::take) {
        poison(bed, ram);
        free.push(ram);
    }
}

fn poison(bed: &Bed, ram: u64) {
    bed.poke(ram * PAGE, POISON);
    bed.poke(ram * PAGE + WRITE_OFFSET, POISON);
}

fn check_poisoned(bed: &Bed, ram: u64) {
    assert_eq!(bed.peek(ram * PAGE), POISON);
    let written = bed.peek(ram * PAGE + WRITE_OFFSET);
    assert!(written == POISON || written == 0, "{written:#x}");
}

/// A bed with a long deadline: the test does not look for readers that were not scheduled in time.
fn bed_with_long_deadline() -> Bed {
    Bed::with(Limits {
        patience: Duration::from_secs(30),
        ..Limits::default()
    })
}

fn time() -> Duration {
    let seconds = std::env::var("SHADOW_STRESS_SECONDS").ok();
    let seconds = seconds.and_then(|s| s.parse().ok()).unwrap_or(2);
    Duration::from_secs(seconds)
}

#[test]
fn threads_reach_nothing_that_is_unmapped() {
    let mut bed = bed_with_long_deadline();
    let reader = bed.reader(A);
    let over = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (reader, over) = (reader.clone(), over.clone());
            std::thread::spawn(move || access_until(&reader, &over))
        })
        .collect();
    let changes = change(&mut bed, time());
    over.store(true, Ordering::Relaxed);
    let done: u64 = threads
        .into_iter()
        .map(|t| t.join().expect("all was right"))
        .sum();
    println!("{changes} changes, {done} accesses");
    assert!(
        changes > 100 && done > 1000,
        "{changes} changes, {done} accesses"
    );
}

#[test]
fn processes_reach_nothing_that_is_unmapped() {
    let mut bed = bed_with_long_deadline();
    let mut processes: Vec<_> = (0..2).map(|_| bed.process("access")).collect();
    for process in &mut processes {
        process.wait_for("begun");
    }
    let changes = change(&mut bed, time());
    for process in &mut processes {
        process.send_line("over");
        process.wait_for("accesses");
        assert!(process.ended_well());
    }
    assert!(changes > 100, "{changes} changes");
    assert_eq!(bed.registry.counters().killed.get(), 0);
}
