//! The VMM reaches the daemon's own virtio-pci device over vfio-user. Its client and the guest's driver go on while the daemon
//! dies at any moment.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::bed::{CONFIG, EVENTS, MSIX, RW as WINDOW_RW, SPACE, Vm};
use super::common::daemon::Daemon;
use super::common::kept::Keeper;
use super::common::memory::memfd;
use super::common::ring::{Desc, NEXT, WRITE};
use super::common::rng::Rng;
use super::common::wire::{OK, TAIL};
use super::connection::{dma_map, irqs};
use super::{Req, Spec, kills, model_of};

/// A window that comes and goes, above the RAM.
const EXTRA_AT: u64 = 1 << 32;
const EXTRA_BYTES: u64 = 1 << 20;
/// Guest-physical address of the buffers of a batch.
const BUFFERS: u64 = 0x20_0000;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most requests of a batch: two descriptors each.
const BATCH: u16 = 32;

fn start() -> (Keeper, Daemon) {
    let keeper = Keeper::empty();
    let daemon = Daemon::kept_over_vfio_user(&keeper, CONFIG);
    (keeper, daemon)
}

/// A VM, and what its driver knows.
struct Driver {
    vm: Vm,
    spec: Spec,
    rng: Rng,
    has_extra: bool,
}

impl Driver {
    fn new(daemon: &Daemon, seed: u64) -> Self {
        Self {
            vm: Vm::started(daemon),
            spec: Spec::default(),
            rng: Rng::new(seed),
            has_extra: false,
        }
    }

    fn step(&mut self) {
        match self.rng.below(12) {
            0..=4 => self.batch(),
            5 => self.change_windows(),
            6 => self.give_an_event(),
            7 => self.restart_now_and_then(),
            8 => self.change_configuration_space(),
            _ => self.look_at_registers(),
        }
    }

    /// Makes requests, and checks each answer.
    fn batch(&mut self) {
        let count = 1 + self.rng.below(u64::from(BATCH)) as u16;
        let mut expected = BTreeMap::new();
        let vm = &mut self.vm;
        vm.requests.enable_notification(&vm.memory);
        for slot in 0..count {
            let request = Req::random(&mut self.rng);
            let bytes = request.bytes();
            let at = BUFFERS + 0x200 * u64::from(slot);
            vm.memory.write(at, &bytes);
            vm.memory.write(at + 0x100, &[0xa5; TAIL]);
            let head = 2 * slot;
            let first = Desc::new(at, bytes.len() as u32, NEXT, head + 1);
            vm.requests.set_desc(&vm.memory, head, first);
            let second = Desc::new(at + 0x100, TAIL as u32, WRITE, 0);
            vm.requests.set_desc(&vm.memory, head + 1, second);
            vm.requests.publish(&vm.memory, head);
            expected.insert(u32::from(head), (request, self.spec.execute(request)));
            if slot == count / 2 && vm.requests.kick(&vm.memory) {
                vm.kick_requests();
            }
        }
        if vm.requests.kick(&vm.memory) {
            vm.kick_requests();
        }
        let deadline = Instant::now() + PATIENCE;
        for _ in 0..count {
            while !vm.requests.has_used(&vm.memory) {
                assert!(Instant::now() < deadline, "an answer");
                thread::sleep(Duration::from_micros(50));
            }
            let (head, len) = vm.requests.take_used(&vm.memory).expect("used");
            assert_eq!(len as usize, TAIL);
            let (request, status) = expected.remove(&head).expect("answered once");
            let at = BUFFERS + 0x100 * u64::from(head);
            let answer = vm.memory.read(at + 0x100, TAIL);
            assert_eq!(answer[0], status, "{request:x?}");
        }
    }

    /// The VMM adds guest memory, or takes it back.
    fn change_windows(&mut self) {
        if self.has_extra {
            let reply = self.vm.client.unmap(EXTRA_AT, EXTRA_BYTES);
            assert_eq!(reply.errno(), 0);
        } else {
            let file = memfd(EXTRA_BYTES);
            let body = dma_map(WINDOW_RW, 0, EXTRA_AT, EXTRA_BYTES);
            assert_eq!(self.vm.client.map(&body, &[file.as_fd()]), 0);
            // It exists now, so another one cannot.
            assert_eq!(self.vm.client.map(&body, &[file.as_fd()]), libc::EEXIST);
        }
        self.has_extra = !self.has_extra;
    }

    /// The VMM gives the eventfd of a vector again.
    fn give_an_event(&mut self) {
        let vector = self.rng.below(3) as u32;
        let event = self.vm.vectors[vector as usize]
            .try_clone()
            .expect("a copy");
        let body = irqs(EVENTS, MSIX, vector, 1);
        assert_eq!(self.vm.client.set_irqs(&body, &[event.as_fd()]), 0);
    }

    /// The driver resets the device and starts it again.
    fn restart_now_and_then(&mut self) {
        if self.rng.below(4) == 0 {
            self.vm.start(64);
            self.spec = Spec::default();
        }
    }

    fn change_configuration_space(&mut self) {
        let line = self.rng.below(256) as u8;
        self.vm.client.write(SPACE, 0x3c, &[line]);
        assert_eq!(self.vm.client.read(SPACE, 0x3c, 1), u64::from(line));
        // Through the window: BAR 0, offset 20, one byte is the status.
        let window = |vm: &mut Vm| {
            let mut at = vm.client.read(SPACE, 0x34, 1);
            while vm.client.read(SPACE, at, 4) >> 24 != 5 {
                at = vm.client.read(SPACE, at + 1, 1);
            }
            at
        };
        let at = window(&mut self.vm);
        self.vm.client.write(SPACE, at + 4, &[0]);
        self.vm.client.write(SPACE, at + 8, &20u32.to_le_bytes());
        self.vm.client.write(SPACE, at + 12, &1u32.to_le_bytes());
        assert_eq!(self.vm.client.read(SPACE, at + 16, 1), 15);
    }

    fn look_at_registers(&mut self) {
        let queue = self.rng.below(2) as u16;
        self.vm.write(22, &queue.to_le_bytes());
        assert_eq!(self.vm.status(), 15);
        assert_eq!(self.vm.read(22, 2), u64::from(queue));
        assert_eq!(self.vm.read(24, 2), 64);
        assert_eq!(self.vm.read(26, 2), u64::from(queue) + 1);
        assert_eq!(self.vm.read(28, 2), 1);
        let ring = if queue == 0 {
            self.vm.requests.desc
        } else {
            self.vm.events.desc
        };
        let low = self.vm.read(32, 4);
        assert_eq!(low | self.vm.read(36, 4) << 32, ring);
        assert_eq!(self.vm.client.read(SPACE, 4, 2), 6);
        assert_eq!(self.vm.client.read(SPACE, 0x42, 2) & 0xc000, 0x8000);
    }
}

/// The driver makes steps while `end` ends the daemon and starts it again. Afterwards the daemon has what the driver has
/// asked for.
fn rounds(count: u32, seed: u64, mut end: impl FnMut(&mut Daemon, &mut Keeper, u32) + Send) {
    let (mut keeper, mut daemon) = start();
    let mut driver = Driver::new(&daemon, seed);
    for round in 0..count {
        thread::scope(|scope| {
            let over = scope.spawn(|| end(&mut daemon, &mut keeper, round));
            while !over.is_finished() {
                driver.step();
            }
            over.join().expect("the daemon runs");
        });
        driver.step();
        assert_eq!(model_of(&daemon), driver.spec.model());
        let life = &daemon.status()["life"];
        assert_eq!(life["state"], "taken-over", "{life}");
        assert_eq!(life["lost"].as_array().map(Vec::len), Some(0), "{life}");
        assert_eq!(daemon.status()["connected"], true);
    }
    // Nothing is kept that nobody needs: lives leave nothing behind.
    keeper.take();
    assert!(keeper.files.len() < 20, "{:?}", keeper.files.keys());
    // The next VMM finds a new device.
    drop(driver);
    daemon.wait_for("the VMM's end", || daemon.status()["connected"] == false);
    let mut next = Driver::new(&daemon, seed);
    next.batch();
    assert_eq!(model_of(&daemon), next.spec.model());
}

#[test]
fn a_driver_over_vfio_user_notices_no_kill() {
    rounds(kills(), 11, |daemon, keeper, round| {
        thread::sleep(Duration::from_micros(u64::from(round) * 377 % 9000));
        daemon.die(keeper);
    });
}

#[test]
fn a_driver_over_vfio_user_notices_no_planned_restart() {
    rounds(kills() / 2, 12, |daemon, keeper, round| {
        thread::sleep(Duration::from_micros(u64::from(round) * 377 % 9000));
        daemon.terminate();
        let status = daemon.wait_for_end();
        assert!(status.success(), "{status}");
        daemon.start_again(keeper);
    });
}

/// The next daemon dies while it takes over.
#[test]
fn deaths_of_a_daemon_that_takes_a_client_over_lose_nothing() {
    rounds(kills() / 4, 13, |daemon, keeper, round| {
        daemon.kill();
        let after = Duration::from_micros(u64::from(round) * 1331 % 60_000);
        daemon.start_and_kill(keeper, after);
        daemon.start_again(keeper);
    });
}

#[test]
fn a_client_that_ends_meanwhile_leaves_no_domains() {
    let (mut keeper, mut daemon) = start();
    let mut driver = Driver::new(&daemon, 14);
    let attach = Req::Attach(1, super::EP);
    assert_eq!(driver.vm.call(&daemon, &attach.bytes()), OK);
    daemon.kill();
    drop(driver);
    daemon.start_again(&mut keeper);
    daemon.wait_for("the end of the connection", || {
        daemon.status()["connected"] == false && daemon.domains().is_empty()
    });
    let mut next = Driver::new(&daemon, 15);
    next.batch();
}

#[test]
fn what_the_keeper_has_lost_of_a_client_is_said() {
    let (mut keeper, mut daemon) = start();
    let mut driver = Driver::new(&daemon, 16);
    let attach = Req::Attach(1, super::EP);
    assert_eq!(driver.vm.call(&daemon, &attach.bytes()), OK);
    daemon.kill();
    keeper.take();
    keeper.files.retain(|name, _| !name.starts_with("file."));
    daemon.start_again(&mut keeper);
    assert!(driver.vm.client.connection.is_closed());
    let status = daemon.status();
    assert_eq!(status["connected"], false);
    assert!(daemon.domains().is_empty());
    let lost = status["life"]["lost"].to_string();
    assert!(lost.contains("FileDescriptorStoreMax="), "{lost}");
}

/// How long a read of a register, and a notification, take without a keeper and with one. Not asserted.
#[test]
fn the_cost_of_a_keeper_is_small() {
    let plain = Daemon::over_vfio_user(CONFIG);
    let (_keeper, kept) = start();
    let mut vms = [Vm::started(&plain), Vm::started(&kept)];
    let mut times: [[Vec<Duration>; 2]; 2] = Default::default();
    for turn in 0..200u32 {
        for (vm, times) in vms.iter_mut().zip(&mut times) {
            for _ in 0..20 {
                let begun = Instant::now();
                vm.status();
                times[0].push(begun.elapsed());
            }
            let begun = Instant::now();
            vm.write(22, &[turn as u8 & 1, 0]);
            times[1].push(begun.elapsed());
        }
    }
    for (what, kind) in [(0, "a read"), (1, "a write that changes the state")] {
        let [without, with] = times.each_mut().map(|times| {
            times[what].sort_unstable();
            (
                times[what][times[what].len() / 10],
                times[what][times[what].len() / 2],
            )
        });
        println!(
            "{kind}, tenth percentile and median: {without:?} without a keeper, {with:?} with one"
        );
    }
}
