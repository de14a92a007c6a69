//! Cost of many idle daemons on one machine: memory, processor time, and the time that their start
//! takes.
//!
//! Each has its own configuration and sockets, and no VM.
#![expect(clippy::expect_used, reason = "a bench ends by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "figures for people"
)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Number of daemons, unless `VIOMMU_DAEMONS` gives another.
const DAEMONS: usize = 1000;
/// Duration of the measurement.
const WATCHED: Duration = Duration::from_secs(30);

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let count = std::env::var("VIOMMU_DAEMONS").ok();
    let count = count.and_then(|text| text.parse().ok()).unwrap_or(DAEMONS);
    let folder = tempfile::tempdir().expect("a folder");
    let before = kernel();
    let started = Instant::now();
    let mut daemons: Vec<_> = (0..count).map(|n| start(folder.path(), n)).collect();
    let listening = |n: usize| folder.path().join(format!("{n}.control")).exists();
    while !(0..count).all(listening) {
        assert!(
            started.elapsed() < Duration::from_secs(600),
            "the daemons do not start"
        );
        sleep(Duration::from_millis(20));
    }
    let start = started.elapsed();
    println!(
        "{count} daemons listen:     {:>8.1} s, {:.1} ms each",
        start.as_secs_f64(),
        start.as_secs_f64() * 1e3 / count as f64
    );
    sleep(Duration::from_secs(3));
    let pids: Vec<_> = daemons.iter().map(Child::id).collect();
    let (ticks, switches) = (sum(&pids, cpu_ticks), sum(&pids, context_switches));
    sleep(WATCHED);
    let total = |key: &str| sum(&pids, |pid| rollup(pid, key));
    let kernel = kernel().saturating_sub(before);
    let each = |kib: u64| {
        format!(
            "{:>8.1} MiB, {:>6} KiB each",
            kib as f64 / 1024.0,
            kib / count as u64
        )
    };
    println!("resident (RSS):            {}", each(total("Rss:")));
    println!("proportional (PSS):        {}", each(total("Pss:")));
    println!(
        "private:                   {}",
        each(total("Private_Dirty:"))
    );
    println!("kernel's part:             {}", each(kernel));
    println!("threads:                   {:>8}", sum(&pids, threads));
    println!(
        "processor ticks in {} s:   {:>8}",
        WATCHED.as_secs(),
        sum(&pids, cpu_ticks) - ticks
    );
    println!(
        "wakeups in {} s:           {:>8}",
        WATCHED.as_secs(),
        sum(&pids, context_switches) - switches
    );
    for daemon in &mut daemons {
        daemon.kill().expect("killed");
    }
    for daemon in &mut daemons {
        daemon.wait().expect("reaped");
    }
}

fn start(folder: &Path, number: usize) -> Child {
    let at = |kind: &str| folder.join(format!("{number}.{kind}"));
    let text = format!(
        "socket = {:?}\ncontrol = {:?}\naddress = '00:05.0'\nmemory = '4G'\n\
         [[endpoint]]\nrange = '00:06.0-00:09.0'\n",
        at("vhost"),
        at("control")
    );
    fs::write(at("toml"), text).expect("a configuration");
    Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .arg("--config")
        .arg(at("toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}

/// Memory of the kernel for processes, besides their own pages, on the whole machine; in KiB.
fn kernel() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("a readable file");
    let keys = ["Slab:", "KernelStack:", "PageTables:", "Percpu:"];
    keys.iter().map(|key| value(&text, key)).sum()
}

fn rollup(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it is alive");
    value(&text, key)
}

fn threads(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is alive");
    value(&text, "Threads:")
}

fn context_switches(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it is alive");
    let texts = tasks
        .flatten()
        .map(|task| fs::read_to_string(task.path().join("status")).expect("its status"));
    texts
        .map(|text| {
            value(&text, "voluntary_ctxt_switches:") + value(&text, "nonvoluntary_ctxt_switches:")
        })
        .sum()
}

/// User and system time in ticks.
fn cpu_ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is alive");
    let fields = text.rsplit(')').next().expect("fields").split_whitespace();
    fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum()
}

fn sum(pids: &[u32], figure: impl Fn(u32) -> u64) -> u64 {
    pids.iter().map(|pid| figure(*pid)).sum()
}

/// The number after the key at the beginning of a line.
fn value(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}
