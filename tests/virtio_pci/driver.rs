//! A driver that keeps to the specification.

use std::os::fd::AsFd;

use crate::bed::{CONFIG, RAM, RW, SPACE, Vm};
use crate::common::daemon::{Daemon, EP, EP2};
use crate::common::memory::memfd;
use crate::common::stopped_thread::StoppedThread;
use crate::common::wire::{self, Config, OK, parse_properties};
use crate::connection::{RESET, dma_map};

#[test]
fn every_request_is_answered() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    let (bar, at) = (vm.config.bar, vm.config.offset);
    let config = Config::parse(&vm.client.read_bytes(bar, at, wire::CONFIG_LEN));
    assert_eq!((config.input, config.bypass), ((0, (1 << 48) - 1), 1));
    assert_eq!(daemon.status()["connected"], true);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP2, 0)), OK);
    let map = wire::map(1, 0x10_0000, 0x10_0fff, 0x3000, wire::RW);
    assert_eq!(vm.call(&daemon, &map), OK);
    assert_eq!(daemon.gpa_of(EP, 0x10_0010), Some(0x3010));
    assert_eq!(daemon.gpa_of(EP2, 0x10_0010), Some(0x3010));
    assert_eq!(vm.call(&daemon, &map), wire::INVAL, "it is mapped");
    let probe = wire::probe(EP);
    let answer = vm.request(&daemon, &probe, config.probe_size as usize + wire::TAIL);
    let regions = parse_properties(&answer[..config.probe_size as usize]);
    assert_eq!((regions.len(), answer[config.probe_size as usize]), (1, OK));
    let unmap = wire::unmap(1, 0x10_0000, 0x10_0fff);
    assert_eq!(vm.call(&daemon, &unmap), OK);
    assert_eq!(daemon.gpa_of(EP, 0x10_0010), None);
    assert_eq!(vm.call(&daemon, &wire::detach(1, EP)), OK);
}

#[test]
fn rings_of_any_size_work() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::new(&daemon);
    for size in [2, 4, 64, 512, 1024] {
        vm.start(size);
        assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
        for n in 0..u64::from(size) + 5 {
            let (first, last) = (n << 12, (n << 12) + 0xfff);
            assert_eq!(vm.call(&daemon, &wire::map(1, first, last, 0x3000, RW)), OK);
        }
        assert_eq!(daemon.mappings(1).len(), usize::from(size) + 5);
    }
}

/// The driver resets the device while requests are in its ring, or the VMM does. Once the driver reads status 0, nothing
/// of these requests is left, and the device leaves the rings alone and sends no interrupt.
#[test]
fn a_reset_in_the_middle_of_traffic_is_exact() {
    // Passes of one request: the reset comes between two of them.
    let daemon = Daemon::over_vfio_user(&format!("batch = 1\n{CONFIG}"));
    let mut vm = Vm::new(&daemon);
    for round in 0..50 {
        vm.start(64);
        for slot in 0..32 {
            // Each of them leaves a domain behind.
            let attach = wire::attach(u32::from(slot) + 1, EP, 0);
            vm.publish(slot, &attach, wire::TAIL);
        }
        if round % 2 == 0 {
            vm.reset();
        } else {
            let reply = vm.client.connection.call(RESET, &[], &[]);
            assert_eq!((reply.errno(), vm.status()), (0, 0));
        }
        assert_silent(&daemon, &mut vm, round);
    }
}

/// A driver makes a request of the device that it has reset. The worker looks at the ring, and changes nothing.
fn assert_silent(daemon: &Daemon, vm: &mut Vm, round: u32) {
    assert_eq!(daemon.domains(), [0; 0], "round {round}: at once");
    vm.publish(0, &wire::attach(100, EP, 0), wire::TAIL);
    vm.take_interrupts();
    let before = vm.memory.regions[0].read_all();
    let wakeups = || daemon.status()["worker"]["wakeups"].as_u64();
    // When the second kick has woken the worker, the first one has been served.
    for _ in 0..2 {
        let woken = wakeups();
        vm.kick_requests();
        daemon.wait_for("the worker", || wakeups() > woken);
    }
    assert_eq!(daemon.domains(), [0; 0], "round {round}: later");
    let after = vm.memory.regions[0].read_all();
    assert!(before == after, "round {round}: the device writes");
    assert_eq!(vm.take_interrupts(), [0; 3], "round {round}");
}

#[test]
fn bypass_follows_the_reset_of_the_vm_and_not_the_drivers() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    let (bar, at) = (vm.config.bar, vm.config.offset + 36);
    vm.client.write(bar, at, &[0]);
    vm.reset();
    assert_eq!(vm.client.read(bar, at, 1), 0);
    let reply = vm.client.connection.call(RESET, &[], &[]);
    assert_eq!(reply.errno(), 0);
    assert_eq!(vm.client.read(bar, at, 1), 1);
    assert_eq!(vm.client.read(SPACE, 4, 2), 0, "the command register");
}

#[test]
fn memory_comes_and_goes_under_a_running_driver() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    let (at, size) = (1u64 << 32, 1u64 << 20);
    assert_eq!(vm.call(&daemon, &wire::map(1, 0, size - 1, at, RW)), OK);
    for _ in 0..50 {
        assert_eq!(daemon.translate(EP, 0x1000)["backed"], false);
        let file = memfd(size);
        assert_eq!(vm.client.map(&dma_map(RW, 0, at, size), &[file.as_fd()]), 0);
        assert_eq!(daemon.translate(EP, 0x1000)["backed"], true);
        let more = wire::map(1, size, size + 0xfff, at, RW);
        assert_eq!(vm.call(&daemon, &more), OK);
        assert_eq!(vm.client.unmap(at, size).errno(), 0);
        let less = wire::unmap(1, size, size + 0xfff);
        assert_eq!(vm.call(&daemon, &less), OK);
    }
    assert_eq!(vm.client.unmap(0, RAM).errno(), 0);
}

#[test]
fn a_kick_does_not_wait_for_the_worker_and_event_indices_keep_kicks_rare() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    let worker = StoppedThread::new(daemon.pid(), "pci-worker");
    let before = vm.kicks;
    for slot in 0..32 {
        let first = u64::from(slot) << 12;
        let map = wire::map(1, first, first + 0xfff, 0x3000, RW);
        vm.publish(slot, &map, wire::TAIL);
    }
    // The device asks for a kick with the next request only, or for none if the worker was polling.
    assert!(vm.kicks - before <= 1, "{}", vm.kicks - before);
    vm.kick_requests();
    assert!(!vm.requests.has_used(&vm.memory), "the worker serves them");
    worker.resume();
    daemon.wait_for("the answers", || {
        while vm.requests.take_used(&vm.memory).is_some() {}
        vm.requests.used_idx == vm.requests.avail_idx
    });
    assert_eq!(daemon.mappings(1).len(), 32);
}
