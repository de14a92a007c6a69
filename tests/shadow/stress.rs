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
    while !over.load(Ordering::Relaxed) {
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

/// A guest that maps and unmaps at random. At any moment, the tables agree with the values in memory.
pub struct Model {
    random: u64,
    /// By domain and page: the page of memory to which it leads.
    leads: [[Option<u64>; PAGES as usize]; 2],
    /// The pages of memory to which no mapping leads.
    free: Vec<u64>,
    /// The index of the domain that A is in. B is in the second one all the time.
    at: usize,
}

impl Model {
    pub fn new(bed: &mut Bed) -> Self {
        let free: Vec<u64> = (1..64).collect();
        for &page in &free {
            poison(bed, page);
        }
        let model = Self {
            random: 0x9e37_79b9_7f4a_7c15,
            leads: Default::default(),
            free,
            at: 0,
        };
        model.replay(bed);
        model
    }

    /// Gives a new daemon the state of the guest.
    pub fn replay(&self, bed: &mut Bed) {
        bed.iommu.attach(B, D2, false).expect("attached");
        bed.iommu
            .attach(A, [D1, D2][self.at], false)
            .expect("attached");
        for (domain, leads) in [D1, D2].into_iter().zip(&self.leads) {
            for (page, ram) in (0..).zip(leads) {
                let Some(ram) = ram else { continue };
                let page = mapping(page * STEP, PAGE, ram * PAGE, Access::READ_WRITE);
                bed.iommu.map(domain, &page).expect("mapped");
            }
        }
    }

    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Changes mappings and domains for `time`. Returns the number of changes.
    pub fn change(&mut self, bed: &mut Bed, time: Duration) -> u64 {
        let until = Instant::now() + time;
        let mut changes = 0;
        while Instant::now() < until {
            let (which, page) = (self.next(2) as usize, self.next(PAGES));
            let domain = [D1, D2][which];
            let iova = page * STEP;
            match self.next(10) {
                0 => {
                    // The domain that A leaves ends, with all its tables, unless B is attached to it.
                    self.at = 1 - self.at;
                    let to = [D1, D2][self.at];
                    bed.iommu.attach(A, to, false).expect("moved");
                    if self.at == 1 {
                        self.retire(bed, 0);
                    }
                }
                _ if bed.iommu.domains().all(|d| d.id != domain) => {}
                _ => match self.leads[which][page as usize].take() {
                    Some(ram) => {
                        let gone = range(iova, iova + (PAGE - 1));
                        bed.iommu.unmap(domain, gone).expect("unmapped");
                        poison(bed, ram);
                        self.free.push(ram);
                    }
                    None => {
                        let some = self.next(self.free.len() as u64) as usize;
                        let ram = self.free.swap_remove(some);
                        check_poisoned(bed, ram);
                        bed.poke(ram * PAGE, stamp(domain.0, iova));
                        let page_of = mapping(iova, PAGE, ram * PAGE, Access::READ_WRITE);
                        bed.iommu.map(domain, &page_of).expect("mapped");
                        self.leads[which][page as usize] = Some(ram);
                    }
                },
            }
            changes += 1;
        }
        changes
    }

    /// Unmaps everything.
    pub fn finish(mut self, bed: &mut Bed) {
        for (which, domain) in [D1, D2].into_iter().enumerate() {
            if bed.iommu.domains().any(|d| d.id == domain) {
                bed.iommu.unmap(domain, IovaRange::ALL).expect("unmapped");
            }
            self.retire(bed, which);
        }
        // Some time later, no reader has written to a page to which no mapping leads.
        std::thread::sleep(Duration::from_millis(20));
        for ram in self.free {
            check_poisoned(bed, ram);
        }
    }

    fn retire(&mut self, bed: &Bed, which: usize) {
        for ram in self.leads[which].iter_mut().filter_map(Option::take) {
            poison(bed, ram);
            self.free.push(ram);
        }
    }
}

/// Lets a guest change everything for `time`.
fn change(bed: &mut Bed, time: Duration) -> u64 {
    let mut model = Model::new(bed);
    let changes = model.change(bed, time);
    model.finish(bed);
    changes
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
