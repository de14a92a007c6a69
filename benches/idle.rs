//! Cost of an idle daemon: memory and wakeups, without a VM and with one.
#![expect(clippy::expect_used, reason = "a bench ends by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the lengths of a test's own buffers"
)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "common/fragment.rs"]
mod fragment;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP};
use common::guest::Guest;
use serde_json::json;

/// Duration of the measurement.
const WATCHED: Duration = Duration::from_secs(30);
/// Number of timed starts.
const STARTS: usize = 11;

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let mut starts: Vec<_> = (0..STARTS).map(|_| first_answer()).collect();
    starts.sort_unstable();
    let start = starts[STARTS / 2].as_secs_f64() * 1e3;
    println!("start to first answer:     {start:>8.1} ms");
    let daemon = Daemon::with_args(&["--memory", "4G"]);
    sleep(Duration::from_millis(300));
    report("without a VM", &daemon);

    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0, "ATTACH");
    assert_eq!(guest.map_page(1, 0x1000, 0x1000), 0, "MAP");
    sleep(Duration::from_millis(300));
    let wakeups = report("with an idle VM", &daemon);
    let figures = json!({ "daemon": {
        "idle_wakeups_per_min": wakeups as f64 * 60.0 / WATCHED.as_secs_f64(),
        "idle_rss_bytes": rss(daemon.pid(), "VmRSS:") * 1024,
        "start_to_first_answer_ms": start,
    }});
    fragment::write("daemon", &figures);
}

/// Time from the start of the program to the answer to a request in its ring.
fn first_answer() -> Duration {
    let started = Instant::now();
    let daemon = Daemon::with_args(&["--memory", "4G"]);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0, "ATTACH");
    started.elapsed()
}

/// Prints the cost of the daemon. Returns its wakeups.
fn report(label: &str, daemon: &Daemon) -> u64 {
    let before = daemon.context_switches();
    let ticks = cpu_ticks(daemon.pid());
    sleep(WATCHED);
    let wakeups = daemon.context_switches() - before;
    println!("{label}:");
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
    wakeups
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
