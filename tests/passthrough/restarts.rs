//! The daemon is killed while a device of the host works: the device reaches exactly what the guest has mapped, before, while
//! nobody serves the guest, and under the next daemon.

use crate::bed::{BACKENDS, Backend, Bed, endpoint};
use crate::common::guest::{HIGH_RAM, LOW_RAM, Layout};
use crate::common::kept::Keeper;
use crate::common::wire::{self, OK, READ, RW, TAIL};
use crate::devices::Edu;
use crate::words;

const PAGE: u64 = 4096;
/// Guest pages: one with a pattern, and two that the device writes.
const SOURCE: u64 = HIGH_RAM + 0x10_0000;
const TARGET: u64 = HIGH_RAM + 0x30_0000;
const OTHER: u64 = LOW_RAM + 0xe0_0000;
/// Where the device finds the first two.
const FROM: u64 = 0x10_0000;
const TO: u64 = 0x700_0000_0000;
/// Where a page comes and goes.
const MOVING: u64 = 0x20_0000;

/// Kills for each backend; the environment can ask for more.
fn kills() -> u64 {
    let more = std::env::var("VIOMMU_KILLS").ok();
    more.map_or(4, |text| text.parse().expect("VIOMMU_KILLS is a number"))
}

struct KilledBed {
    vm: Bed,
    keeper: Keeper,
    edu: Edu,
}

impl KilledBed {
    /// Has the device copy a page. Returns whether it arrived; nothing else in memory may change.
    fn copies(&self, to: u64, target: u64) -> bool {
        let memory = &self.vm.guest.memory;
        let zeros = vec![0; PAGE as usize];
        memory.write(target, &zeros);
        let before = self.vm.memory();
        self.edu.read(FROM);
        self.edu.write(to);
        let arrived = memory.read(target, PAGE as usize);
        memory.write(target, &zeros);
        assert!(
            self.vm.memory() == before,
            "memory outside the mapping has changed"
        );
        let source = memory.read(SOURCE, PAGE as usize);
        assert!(arrived == source || arrived == zeros, "a part has arrived");
        arrived == source
    }

    /// The daemon is killed with this request in the ring. What the device reaches must not change meanwhile.
    fn die_with(&mut self, request: &[u8], reaches_moving: bool) {
        self.vm
            .guest
            .submit(request, &Layout::plain(request.len(), TAIL));
        self.vm.guest.kick();
        self.vm.daemon.kill();
        assert!(
            self.copies(TO, TARGET),
            "its DMA goes on while there is no daemon"
        );
        // The request may have been executed before the kill, or not: both are right. Nothing else may change.
        self.copies(MOVING, OTHER);
        self.vm.daemon.start_again(&mut self.keeper);
        assert_eq!(self.vm.guest.complete().1.status(), OK);
        assert!(self.copies(TO, TARGET), "and under the next one");
        assert_eq!(self.copies(MOVING, OTHER), reaches_moving);
    }
}

fn scenario(backend: Backend) {
    eprintln!("{backend:?}");
    let name = words("VIOMMU_EDU")[0].clone();
    let keeper = Keeper::empty();
    let mut vm = Bed::kept(backend, &[&name], &keeper);
    let ep = endpoint(0);
    let pattern: Vec<u8> = (0..PAGE).map(|n| (n as u8).wrapping_mul(31) | 1).collect();
    vm.guest.memory.write(SOURCE, &pattern);
    assert_eq!(vm.guest.attach(1, ep), OK);
    assert_eq!(vm.guest.map(1, FROM, FROM + PAGE - 1, SOURCE, READ), OK);
    assert_eq!(vm.guest.map(1, TO, TO + PAGE - 1, TARGET, RW), OK);
    let edu = Edu::new(&name);
    let mut bed = KilledBed { vm, keeper, edu };
    assert!(bed.copies(TO, TARGET));
    let last = MOVING + PAGE - 1;
    for kill in 0..kills() / 2 {
        eprintln!("kills {} and {}", 2 * kill + 1, 2 * kill + 2);
        bed.die_with(&wire::map(1, MOVING, last, OTHER, RW), true);
        bed.die_with(&wire::unmap(1, MOVING, last), false);
    }
    let status = bed.vm.daemon.status();
    assert_eq!(status["life"]["state"], "taken-over", "{}", status["life"]);
    assert_eq!(status["endpoints_quarantined"], 0);
    // Another domain, and none.
    assert_eq!(bed.vm.guest.attach(2, ep), OK);
    bed.vm.daemon.die(&mut bed.keeper);
    assert!(!bed.copies(TO, TARGET));
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn devices_go_on_over_kills_of_the_daemon() {
    for backend in BACKENDS {
        scenario(backend);
    }
}
