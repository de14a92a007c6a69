//! How the worker waits for requests: it polls a busy ring, sleeps on an idle one, and keeps nobody
//! waiting meanwhile.
#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP};
use common::guest::{Guest, HIGH_RAM, LOW_RAM, Layout, STOCK, Setup};
use common::wire::{self, OK, RW, TAIL};

const PAGE: u64 = 4096;
/// Long enough for a busy machine.
const POLLS: &str =
    "address = \"00:05.0\"\npoll-max-us = 10000\n[[endpoint]]\naddress = \"00:06.0\"\n";
const SLEEPS: &str =
    "address = \"00:05.0\"\npoll-max-us = 0\n[[endpoint]]\naddress = \"00:06.0\"\n";

/// Wakeups, polls that paid and that did not.
fn worker(daemon: &Daemon) -> [u64; 3] {
    let status = daemon.status();
    ["wakeups", "polls_paid", "polls_unpaid"]
        .map(|key| status["worker"][key].as_u64().expect("a count"))
}

/// One request at a time, the next as soon as the last has come back. The number of kicks.
fn converse(guest: &mut Guest, requests: u64) -> u64 {
    let mut kicks = 0;
    for n in 0..requests {
        let (first, last) = (PAGE, 2 * PAGE - 1);
        let request = if n % 2 == 0 {
            wire::map(1, first, last, HIGH_RAM, RW)
        } else {
            wire::unmap(1, first, last)
        };
        guest.submit(&request, &Layout::plain(request.len(), TAIL));
        kicks += u64::from(guest.requests.kick(&guest.memory));
        while !guest.requests.has_used(&guest.memory) {
            thread::yield_now();
        }
        assert_eq!(guest.complete().1.status(), OK);
    }
    kicks
}

fn booted(config: &str, features: u64) -> (Daemon, Guest) {
    let daemon = Daemon::with_config(config);
    let setup = Setup {
        features,
        ..Setup::default()
    };
    let mut guest = Guest::boot_with(&daemon, setup);
    assert_eq!(guest.attach(1, EP), OK);
    (daemon, guest)
}

#[test]
fn a_busy_ring_costs_neither_side_a_notification() {
    for features in [STOCK, STOCK & !wire::F_EVENT_IDX] {
        let (daemon, mut guest) = booted(POLLS, features);
        // The window is learned, and where others need the processors polling pauses.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let before = worker(&daemon);
            let kicks = converse(&mut guest, 500);
            let [wakeups, paid, _] = worker(&daemon);
            if kicks < 20 && wakeups - before[0] < 20 && paid - before[1] > 400 {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{kicks} kicks, {wakeups} wakeups"
            );
        }
    }
}

#[test]
fn a_guest_that_goes_quiet_leaves_the_worker_asleep() {
    let (daemon, mut guest) = booted(POLLS, STOCK);
    converse(&mut guest, 500);
    thread::sleep(Duration::from_millis(100));
    let (before, switches) = (worker(&daemon), daemon.context_switches());
    thread::sleep(Duration::from_secs(2));
    // The question and the answer themselves.
    let woken = daemon.context_switches() - switches;
    assert!(woken < 10, "{woken} wakeups in 2 s");
    assert_eq!(worker(&daemon), before);
    // And it is there again.
    assert!(converse(&mut guest, 2) > 0, "asleep, it wants to be told");
}

#[test]
fn without_polling_each_request_is_a_wakeup() {
    let (daemon, mut guest) = booted(SLEEPS, STOCK);
    let before = worker(&daemon);
    converse(&mut guest, 300);
    let [wakeups, paid, unpaid] = worker(&daemon);
    assert!(wakeups - before[0] > 250, "{wakeups} wakeups");
    assert_eq!((paid, unpaid), (0, 0));
}

/// With the longest window there is, and a worker in the middle of it.
#[test]
fn nobody_waits_for_a_worker_that_polls() {
    let (daemon, mut guest) = booted(POLLS, STOCK);
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        converse(&mut guest, 50);
        let began = Instant::now();
        daemon.status();
        slowest = slowest.max(began.elapsed());
        converse(&mut guest, 50);
        let began = Instant::now();
        let slot = guest.remove_region(LOW_RAM);
        guest.add_region(slot);
        slowest = slowest.max(began.elapsed());
        converse(&mut guest, 50);
        let began = Instant::now();
        guest.stop_rings();
        guest.driver_ok();
        slowest = slowest.max(began.elapsed());
    }
    // Far from one window for each step, which would be 10 ms and more.
    assert!(slowest < Duration::from_millis(200), "{slowest:?}");
    converse(&mut guest, 50);
    drop(guest);
    let began = Instant::now();
    while daemon.status()["connected"] == true {
        assert!(began.elapsed() < Duration::from_secs(2), "still connected");
    }
}
