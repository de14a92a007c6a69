//! What a daemon costs that has nothing to do: memory and wakeups, without a VM and with one.
#![expect(clippy::expect_used, reason = "a bench ends by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the lengths of a test's own buffers"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP};
use common::guest::Guest;

/// How long the daemon is watched.
const WATCHED: Duration = Duration::from_secs(10);

fn main() {
    // `cargo test --benches` runs this too, with nothing to measure.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let started = Instant::now();
    let daemon = Daemon::with_args(&["--memory", "4G"]);
    println!(
        "start to sockets:          {:>8.1} ms",
        started.elapsed().as_secs_f64() * 1e3
    );
    sleep(Duration::from_millis(300));
    report("without a VM", &daemon);

    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0, "ATTACH");
    assert_eq!(guest.map_page(1, 0x1000, 0x1000), 0, "MAP");
    sleep(Duration::from_millis(300));
    report("with an idle VM", &daemon);
}

fn report(what: &str, daemon: &Daemon) {
    let before = daemon.context_switches();
    let ticks = cpu_ticks(daemon.pid());
    sleep(WATCHED);
    let wakeups = daemon.context_switches() - before;
    println!("{what}:");
    println!(
        "  resident:                {:>8} KiB",
        rss(daemon.pid(), "VmRSS:")
    );
    println!(
        "  resident, anonymous:     {:>8} KiB",
        rss(daemon.pid(), "RssAnon:")
    );
    println!("  threads:                 {:>8}", daemon.thread_count());
    println!(
        "  wakeups in {:>3} s:        {wakeups:>8}",
        WATCHED.as_secs()
    );
    println!(
        "  processor ticks:         {:>8}",
        cpu_ticks(daemon.pid()) - ticks
    );
}

fn rss(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon's status");
    text.lines()
        .find_map(|line| {
            line.strip_prefix(key)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .expect("a number")
}

/// User and system time in ticks.
fn cpu_ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the daemon's stat");
    let after_name = text.rsplit(')').next().expect("fields");
    after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum()
}
