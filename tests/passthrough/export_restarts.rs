//! The daemon is killed, and restarted, while a client drives an exported device: the device and its client go on.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::bed::{Backend, Bed, endpoint};
use crate::common::guest::HIGH_RAM;
use crate::common::kept::Keeper;
use crate::common::wire::{OK, READ, RW};
use crate::connection::{REGION_READ, SET_IRQS, irqs, region};
use crate::edu_driver::{BAR, Driver, EDU_BUFFER, MASTER, PAGE};
use crate::export::{command_of, is_raised};
use crate::words;

/// Kills; the environment can ask for more.
fn kills() -> u64 {
    let more = std::env::var("VIOMMU_KILLS").ok();
    more.map_or(4, |text| text.parse().expect("VIOMMU_KILLS is a number"))
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn an_exported_device_goes_on_over_kills_of_the_daemon() {
    let name = words("VIOMMU_EDU")[0].clone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("edu");
    let keys = format!("[[endpoint]]\naddress = '00:06.0'\nvfio = '{name}'\nexport = {path:?}\n");
    let mut keeper = Keeper::empty();
    let mut bed = Bed::kept_with(Backend::Owned, &[], &keys, &keeper);
    let (source, target) = (HIGH_RAM + 0x10_0000, HIGH_RAM + 0x20_0000);
    let bytes = [0x5a; PAGE as usize];
    bed.guest.memory.write(source, &bytes);
    assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
    assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, source, READ), OK);
    assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
    let mut driver = Driver::connect(&path);
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    let body = irqs(0x24, 1, 0, 1);
    let set = driver.0.call(SET_IRQS, &body, &[event.as_fd()]);
    assert_eq!(set.errno(), 0);
    for round in 0..kills() {
        eprintln!("round {round}");
        bed.guest.memory.write(target, &[0; PAGE as usize]);
        driver.write(BAR, 4, &(round as u32).to_ne_bytes());
        driver.dma_read(0x1000);
        // It takes 100 ms, and ends with an interrupt.
        driver.start(EDU_BUFFER, 0x2000, 2 | 4);
        if round % 2 == 0 {
            bed.daemon.kill();
        } else {
            bed.daemon.terminate();
            assert!(bed.daemon.wait_for_end().success());
        }
        assert!(is_raised(&event, Duration::from_secs(20)));
        let arrived = bed.guest.memory.read(target, PAGE as usize);
        assert_eq!(arrived, bytes, "its DMA goes on while there is no daemon");
        assert_ne!(command_of(&name) & MASTER, 0);
        // The client asks, and nobody answers yet.
        let asked = driver.0.ask(REGION_READ, &region(4, BAR, 4, &[]), &[]);
        bed.daemon.start_again(&mut keeper);
        let reply = driver.0.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno()), (asked, 0));
        assert_eq!(
            reply.u32_at(16),
            !(round as u32),
            "the device was not reset"
        );
        assert_ne!(command_of(&name) & MASTER, 0);
        let pending = driver.load(0x24);
        driver.write(BAR, 0x64, &pending.to_ne_bytes());
        // The guest's mappings are those of the device, as before.
        bed.guest.memory.write(target, &[0; PAGE as usize]);
        assert_eq!(bed.guest.unmap(1, 0x2000, 0x2fff), OK);
        driver.dma_write(0x2000);
        let arrived = bed.guest.memory.read(target, PAGE as usize);
        assert_eq!(arrived, [0; PAGE as usize], "it is unmapped");
        assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
        let life = &bed.daemon.status()["life"];
        assert_eq!(life["state"], "taken-over", "{life}");
        assert_eq!(life["lost"].as_array().map(Vec::len), Some(0), "{life}");
    }
    // Without its client, the device does no DMA, and no later daemon takes it over.
    drop(driver);
    bed.daemon
        .wait_for("the client's end", || command_of(&name) & MASTER == 0);
    bed.daemon.die(&mut keeper);
    let mut driver = Driver::connect(&path);
    driver.dma_read(0x1000);
    driver.dma_write(0x2000);
    assert_eq!(bed.guest.memory.read(target, PAGE as usize), bytes);
}
