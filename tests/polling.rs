//! How the worker waits for requests: it polls a busy ring and sleeps on an idle one. Polling must
//! not delay any other thread.
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
use vhost_device_iommu::process::realtime::Realtime;

const PAGE: u64 = 4096;
/// The worker polls little on a busy machine. On one that stays busy, a test waits this long for it.
const HANG: Duration = Duration::from_secs(100);
/// With this configuration the worker polls long enough to see the next request even on a busy machine.
const POLLS: &str =
    "address = \"00:05.0\"\npoll-max-us = 10000\n[[endpoint]]\naddress = \"00:06.0\"\n";
const SLEEPS: &str =
    "address = \"00:05.0\"\npoll-max-us = 0\n[[endpoint]]\naddress = \"00:06.0\"\n";

/// The worker's wakeups, successful polls and failed polls.
fn worker(daemon: &Daemon) -> [u64; 3] {
    let status = daemon.status();
    ["wakeups", "polls_paid", "polls_unpaid"]
        .map(|key| status["worker"][key].as_u64().expect("a count"))
}

/// Sends requests one by one, each as soon as the answer to the last has come. Returns the number
/// of kicks.
fn request_one_by_one(guest: &mut Guest, requests: u64) -> u64 {
    (0..requests)
        .map(|n| u64::from(send_request(guest, n)))
        .sum()
}

/// Sends the request with this number: an even number maps a page, and the next one unmaps it.
/// Returns whether the worker had asked for a kick.
fn send_request(guest: &mut Guest, number: u64) -> bool {
    let (first, last) = (PAGE, 2 * PAGE - 1);
    let request = if number.is_multiple_of(2) {
        wire::map(1, first, last, HIGH_RAM, RW)
    } else {
        wire::unmap(1, first, last)
    };
    guest.submit(&request, &Layout::plain(request.len(), TAIL));
    let kicked = guest.requests.kick(&guest.memory);
    while !guest.requests.has_used(&guest.memory) {
        thread::yield_now();
    }
    assert_eq!(guest.complete().1.status(), OK);
    kicked
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
        let begun = worker(&daemon);
        let (deadline, mut requests) = (Instant::now() + HANG, 0);
        // The worker must learn the window first. While other threads need its processor, it polls little.
        loop {
            let before = worker(&daemon);
            let kicks = request_one_by_one(&mut guest, 24);
            requests += 24;
            let [wakeups, paid, _] = worker(&daemon);
            // The window before these requests may have ended without one.
            let polled = paid - before[1];
            assert!(kicks + polled <= 25, "{kicks} kicks, {polled} polls");
            let woken = wakeups - before[0];
            assert!(woken + polled <= 25, "{woken} wakeups, {polled} polls");
            if paid - begun[1] >= 100 {
                break;
            }
            let paid = paid - begun[1];
            assert!(
                Instant::now() < deadline,
                "{paid} polls paid in {requests} requests"
            );
        }
    }
}

/// On this machine, however busy it is, the guest and the worker run whenever they want to.
#[test]
fn a_busy_ring_costs_no_notification_at_all_if_nobody_takes_the_processors() {
    if !may_be_realtime() {
        eprintln!("skipped: this user may not have realtime threads (ulimit -r)");
        return;
    }
    let config = POLLS.replace("poll-max-us", "realtime-priority = 3\npoll-max-us");
    for features in [STOCK, STOCK & !wire::F_EVENT_IDX] {
        let (daemon, mut guest) = booted(&config, features);
        // In a thread of its own: a daemon that a realtime thread starts would be realtime as a whole.
        let guest = thread::spawn(move || {
            let realtime = Realtime::new(3).expect("tried before");
            realtime.apply().expect("tried before");
            let (deadline, mut silent) = (Instant::now() + HANG, false);
            while !silent {
                let before = worker(&daemon);
                let kicks = request_one_by_one(&mut guest, 500);
                let [wakeups, paid, _] = worker(&daemon);
                let (woken, polled) = (wakeups - before[0], paid - before[1]);
                silent = kicks < 20 && woken < 20 && polled > 400;
                assert!(
                    silent || Instant::now() < deadline,
                    "{kicks} kicks, {woken} wakeups, {polled} polls"
                );
            }
        });
        guest.join().expect("no check failed");
    }
}

#[test]
fn the_worker_sleeps_when_the_guest_becomes_idle() {
    let (daemon, mut guest) = booted(POLLS, STOCK);
    request_one_by_one(&mut guest, 500);
    thread::sleep(Duration::from_millis(100));
    let (before, switches) = (worker(&daemon), daemon.context_switches());
    thread::sleep(Duration::from_secs(2));
    // The request and its answer themselves.
    let woken = daemon.context_switches() - switches;
    assert!(woken < 10, "{woken} wakeups in 2 s");
    assert_eq!(worker(&daemon), before);
    // The worker serves the next request.
    assert!(
        request_one_by_one(&mut guest, 2) > 0,
        "a sleeping worker needs a kick"
    );
}

#[test]
fn without_polling_each_request_is_a_wakeup() {
    let (daemon, mut guest) = booted(SLEEPS, STOCK);
    let before = worker(&daemon);
    request_one_by_one(&mut guest, 300);
    let [wakeups, paid, unpaid] = worker(&daemon);
    assert!(wakeups - before[0] > 250, "{wakeups} wakeups");
    assert_eq!((paid, unpaid), (0, 0));
}

/// Requests this far apart double the window, to nearly its maximum.
const APART: Duration = Duration::from_millis(4);
/// A step that waits for the end of a window takes longer than this; no other step should.
const AT_ONCE: Duration = Duration::from_millis(2);

/// Takes `step` while the worker polls until such a step has taken less than [`AT_ONCE`]. A busy machine delays some of
/// them; polling that delays the step delays all of them, and the test fails after [`HANG`].
fn assert_at_once(
    daemon: &Daemon,
    guest: &mut Guest,
    what: &str,
    mut step: impl FnMut(&Daemon, &mut Guest),
) {
    let deadline = Instant::now() + HANG;
    let (mut at_once, mut delayed) = (false, 0);
    while !at_once {
        assert!(
            Instant::now() < deadline,
            "{what}: {delayed} steps are delayed, and the worker does not poll during the others"
        );
        for number in 0..5 {
            send_request(guest, number);
            thread::sleep(APART);
        }
        let [wakeups, paid, unpaid] = worker(daemon);
        send_request(guest, 5);
        let asked = Instant::now();
        thread::sleep(Duration::from_micros(500));
        // The worker has polled for this request, and polls as long for the next, unless this one
        // was late.
        let polls = worker(daemon) == [wakeups, paid + 1, unpaid];
        let began = Instant::now();
        step(daemon, guest);
        let took = began.elapsed();
        if polls && began - asked < APART - AT_ONCE {
            at_once = took < AT_ONCE;
            delayed += u32::from(!at_once);
        }
    }
}

#[test]
fn polling_delays_no_other_thread() {
    // The daemon inherits the policy of the thread that starts it. Other processes then delay none of the threads.
    let checks = thread::spawn(|| {
        if let Ok(realtime) = Realtime::new(3) {
            realtime.apply().expect("tried before");
        }
        check_that_polling_delays_no_other_thread();
    });
    checks.join().expect("no check failed");
}

fn check_that_polling_delays_no_other_thread() {
    let (daemon, mut guest) = booted(POLLS, STOCK);
    assert_at_once(&daemon, &mut guest, "status", |daemon, _| {
        daemon.status();
    });
    assert_at_once(&daemon, &mut guest, "memory", |_, guest| {
        let slot = guest.remove_region(LOW_RAM);
        guest.add_region(slot);
        // The messages before have no answers; this one has, and the daemon sends it after it has
        // handled the others.
        guest.config_bytes(0, 1);
    });
    assert_at_once(&daemon, &mut guest, "rings", |_, guest| {
        guest.stop_rings();
        guest.driver_ok();
    });
    request_one_by_one(&mut guest, 50);
    drop(guest);
    daemon.wait_for("the VMM's end", || daemon.status()["connected"] == false);
}

/// Whether this user may have realtime threads.
fn may_be_realtime() -> bool {
    Realtime::new(3).is_ok()
}

/// Policy and realtime priority of the threads with this name, from `/proc/PID/task/TID/stat`.
fn scheduling(daemon: &Daemon, name: &str) -> Vec<(u32, u32)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("its threads");
    let stats = tasks
        .map(|task| std::fs::read_to_string(task.expect("a thread").path().join("stat")))
        .map(|stat| stat.expect("its state"));
    let of_name = stats.filter(|stat| stat.contains(&format!("({name})")));
    of_name
        .map(|stat| {
            // Fields 40 and 41; two fields come before the end of the name (proc_pid_stat(5)).
            let rest = stat.rsplit_once(") ").expect("a name").1;
            let fields: Vec<_> = rest.split(' ').collect();
            let number = |field: usize| fields[field - 3].parse().expect("a number");
            (number(41), number(40))
        })
        .collect()
}

#[test]
fn the_worker_and_nothing_else_has_the_realtime_priority() {
    let config = POLLS.replace("poll-max-us", "realtime-priority = 3\npoll-max-us");
    if !may_be_realtime() {
        eprintln!("skipped: this user may not have realtime threads (ulimit -r)");
        return;
    }
    let daemon = Daemon::with_config(&config);
    for _ in 0..2 {
        let mut guest = Guest::boot(&daemon);
        assert_eq!(guest.attach(1, EP), OK);
        let fifo = libc::SCHED_FIFO as u32;
        assert_eq!(scheduling(&daemon, "vring_worker"), [(fifo, 3)]);
        assert_eq!(scheduling(&daemon, "vhost-device-io"), [(0, 0)]);
        assert_eq!(scheduling(&daemon, "control")[..], [(0, 0)]);
    }
    let daemon = Daemon::with_config(POLLS);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(scheduling(&daemon, "vring_worker"), [(0, 0)]);
}
