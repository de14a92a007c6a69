//! Drivers and clients that do what they must not. The daemon goes on, answers every access, and serves the next VMM.

use std::fs::File;
use std::os::fd::AsFd;

use crate::bed::{CONFIG, Client, EVENTS, MSIX, NOTIFY_REQUESTS, RAM, RW, SPACE, Vm};
use crate::common::daemon::{Daemon, EP};
use crate::common::memory::memfd;
use crate::common::rng::Rng;
use crate::common::wire::{self, OK};
use crate::connection::{NO_REPLY, REGION_WRITE, dma_map, irqs, region};

/// The next VMM gets a device that works.
fn next_vmm_works(daemon: &Daemon) {
    let mut vm = Vm::started(daemon);
    assert_eq!(vm.call(daemon, &wire::attach(1, EP, 0)), OK);
    let map = wire::map(1, 0, 0xfff, 0x3000, wire::RW);
    assert_eq!(vm.call(daemon, &map), OK);
    assert_eq!(daemon.gpa_of(EP, 0), Some(0x3000));
}

#[test]
fn every_register_survives_every_width_and_value() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    for value in [
        0u64,
        1,
        0xff,
        0xffff,
        0x8000_0000,
        u64::MAX,
        0x4000_0000_0000_0001,
    ] {
        for at in (0..0x40)
            .chain(0x1000..0x1004)
            .chain(0x2000..0x2030)
            .chain(0x3000..0x300c)
        {
            for width in [1, 2, 3, 4, 5, 8] {
                vm.client.write(0, at, &value.to_le_bytes()[..width]);
                vm.client.read_bytes(0, at, width as u32);
            }
        }
        for at in 0..256 {
            for width in [1, 2, 3, 4] {
                vm.client.write(SPACE, at, &value.to_le_bytes()[..width]);
                vm.client.read_bytes(SPACE, at, width as u32);
            }
        }
    }
    drop(vm);
    next_vmm_works(&daemon);
}

#[test]
fn accesses_outside_of_the_regions_are_answered() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut client = Client::connect(&daemon);
    for (index, at, len) in [
        (0, 0x8000, 4),
        (0, 0x7fff, 2),
        (0, u64::MAX, 8),
        (1, 0, 4),
        (2, 0x1000, 4),
        (6, 0, 1),
        (SPACE, 256, 4),
        (SPACE, 4095, 1),
        (8, 0, 4),
        (9, 0, 4),
        (u32::MAX, 0, 4),
        (0, 0x8000, 1 << 20),
    ] {
        let bytes = client.read_bytes(index, at, len);
        assert!(bytes.iter().all(|byte| *byte == 0xff), "{index} {at:#x}");
        client.write(index, at, &bytes);
    }
    assert_eq!(client.read_bytes(0, 0, 0), Vec::<u8>::new());
    // All of the registers at once.
    assert_eq!(client.read_bytes(0, 0, 0x8000).len(), 0x8000);
    client.write(0, 0, &[0xff; 0x8000]);
    drop(client);
    next_vmm_works(&daemon);
}

#[test]
fn queues_are_enabled_in_every_state() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut rng = Rng::new(7);
    for _ in 0..100 {
        let mut vm = Vm::new(&daemon);
        for _ in 0..30 {
            let address = [
                0,
                1,
                0x1_0000,
                0x1_0008,
                RAM - 16,
                RAM,
                u64::MAX - 15,
                1 << 40,
            ];
            let mut pick = |n: u64| rng.below(n);
            match pick(7) {
                0 => vm.write(20, &[[0, 1, 3, 7, 11, 15, 0x8f, 0xff][pick(8) as usize]]),
                1 => vm.write(
                    22,
                    &[[0u16, 1, 2, 0xffff][pick(4) as usize].to_le_bytes()].concat(),
                ),
                2 => vm.write(
                    24,
                    &[[0u16, 1, 3, 64, 1024, 0xffff][pick(6) as usize].to_le_bytes()].concat(),
                ),
                3 => {
                    let at = 32 + 8 * pick(3);
                    vm.write(at, &address[pick(8) as usize].to_le_bytes());
                }
                4 => vm.write(28, &[1, 0]),
                5 => vm.client.write(0, 0x3000 + 4 * pick(3), &[0, 0]),
                _ => vm
                    .client
                    .write(SPACE, 4, &[[0, 2, 4, 6][pick(4) as usize], 0]),
            }
        }
    }
    daemon.assert_alive();
    next_vmm_works(&daemon);
}

#[test]
fn interrupts_of_garbage_are_refused() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    let null = File::open("/dev/null").expect("opened");
    let (_other, pipe) = std::io::pipe().expect("a pipe");
    for fd in [null.as_fd(), pipe.as_fd()] {
        assert_ne!(vm.client.set_irqs(&irqs(EVENTS, MSIX, 0, 1), &[fd]), 0);
    }
    for (flags, index, start, count) in [
        (EVENTS, MSIX, 3, 1),
        (EVENTS, MSIX, 0, 4),
        (EVENTS, MSIX, u32::MAX, 2),
        (EVENTS, 0, 0, 1),
        (EVENTS, 7, 0, 1),
        (1 | 0x20, 1, 0, 1),
        (EVENTS | 0x40, MSIX, 0, 1),
        (0, MSIX, 0, 1),
        (1, MSIX, 0, 0),
    ] {
        let body = irqs(flags, index, start, count);
        assert_ne!(
            vm.client.set_irqs(&body, &[]),
            0,
            "{flags:#x} {index} {start} {count}"
        );
    }
    // The VMM emulates the table, so what a driver writes there has no effect.
    vm.client.write(0, 0x4000, &[0xff; 0x30]);
    vm.client.write(0, 0x5000, &[0xff; 8]);
    assert_eq!(vm.client.read(0, 0x5000, 8), 0);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    // Disabling interrupts of a kind that the device lacks is no error: VMMs do so.
    for index in 0..5 {
        assert_eq!(
            vm.client.set_irqs(&irqs(1 | 0x20, index, 0, 0), &[]),
            0,
            "{index}"
        );
    }
}

#[test]
fn windows_that_lie_cost_nothing() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    let small = memfd(0x1000);
    for (offset, address, size) in [
        (0, 1u64 << 32, 0x2000u64),
        (0x1000, 1 << 32, 0x1000),
        (0x800, 1 << 32, 0x800),
        (u64::MAX, 1 << 32, 0x1000),
        (0, 1 << 32, 1 << 62),
        (0, u64::MAX, 0x1000),
        (0, 0x1000, 0x1000),
        (0, 1 << 32, 0),
    ] {
        let body = dma_map(RW, offset, address, size);
        assert_ne!(
            vm.client.map(&body, &[small.as_fd()]),
            0,
            "{offset:#x} {size:#x}"
        );
    }
    // A refusal is as long as the answer that a client waits for.
    let refusal = vm.client.unmap(1 << 33, 0x1000);
    assert_eq!((refusal.errno(), refusal.body.len()), (libc::ENOENT, 24));
    // Not RAM: accepted, and nobody reaches it.
    let null = File::open("/dev/null").expect("opened");
    assert_eq!(
        vm.client
            .map(&dma_map(RW, 0, 1 << 40, 0x1000), &[null.as_fd()]),
        0
    );
    assert_eq!(
        vm.client
            .map(&dma_map(1, 0, 1 << 41, 0x1000), &[small.as_fd()]),
        0
    );
    assert_eq!(vm.client.map(&dma_map(RW, 0, 1 << 42, 0x1000), &[]), 0);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    for at in [1u64 << 40, 1 << 41, 1 << 42] {
        let map = wire::map(1, at, at + 0xfff, at, wire::RW);
        assert_eq!(vm.call(&daemon, &map), OK);
        assert_eq!(daemon.translate(EP, at)["backed"], false);
    }
    drop(vm);
    next_vmm_works(&daemon);
}

/// Nothing can be served without the memory. The message names the cure.
#[test]
fn memory_that_shrinks_ends_the_daemon_with_a_message() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    vm.memory.shrink();
    let kick = region(NOTIFY_REQUESTS, 0, 2, &[0, 0]);
    vm.client
        .connection
        .send(1, REGION_WRITE, NO_REPLY, &kick, &[]);
    assert_eq!(daemon.wait_for_end().code(), Some(1));
    let log = daemon.log();
    assert!(log.contains("a file of guest memory shorter"), "{log}");
}

/// A driver that makes its ring unusable learns that the device needs a reset, and gets a configuration interrupt.
#[test]
fn a_broken_ring_is_reported_and_a_reset_mends_it() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    vm.memory.store_u16(vm.requests.avail + 2, 1000);
    vm.kick(0);
    daemon.wait_for("NEEDS_RESET", || vm.status() == 15 | 64);
    // The interrupt follows the status (virtio 1.3, 2.1.2).
    daemon.wait_for("an interrupt", || vm.take_interrupts()[0] == 1);
    vm.start(64);
    assert_eq!(daemon.domains(), Vec::<u64>::new());
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
}
