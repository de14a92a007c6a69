//! How long a guest waits for an answer when its daemon dies or leaves.
//!
//! The daemon is that of `launch`, or of the service named by VIOMMU_SERVICE: then this runs as root on the machine of
//! the service, whose unit must allow that many starts (`StartLimitIntervalSec=0`), and whose file must have the endpoint
//! 00:10.0. VIOMMU_KILLS sets the number of deaths of each manner.
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
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::daemon::ask;
use common::guest::{Guest, Layout, Setup};
use common::wire::{self, OK, RW, TAIL};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tempfile::TempDir;

const PAGE: u64 = 0x1000;
/// 00:10.0.
const EP: u32 = 0x80;
/// The mappings of the second measurement.
const MANY: u64 = 1_000_000;
/// Requests in the ring at a time.
const BATCH: u64 = 64;
/// A page that no other mapping has.
const FREE: u64 = 1 << 40;
const FILE: &str = "socket = \"vhost-user.sock\"\ncontrol = \"control.sock\"\nmemory = \"4G\"\n\
    address = \"00:05.0\"\n[[endpoint]]\naddress = \"00:10.0\"\n";

/// The daemon of a VM, which its keeper starts again.
struct Kept {
    folder: PathBuf,
    launch: Option<(Child, TempDir)>,
}

impl Kept {
    fn start() -> Self {
        if let Some(name) = std::env::var_os("VIOMMU_SERVICE") {
            let folder = Path::new("/run/vhost-device-iommu").join(name);
            return Self {
                folder,
                launch: None,
            };
        }
        let folder = TempDir::new().expect("a folder");
        fs::write(folder.path().join("vm.toml"), FILE).expect("written");
        let launch = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
            .args(["launch", "--config", "vm.toml", "--max-restarts", "1000000"])
            .args(["--", "sh", "-c", "sleep 100000"])
            .current_dir(folder.path())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let kept = Self {
            folder: folder.path().to_owned(),
            launch: Some((launch, folder)),
        };
        while !kept.folder.join("control.sock").exists() {
            sleep(Duration::from_millis(1));
        }
        kept
    }

    fn life(&self) -> Value {
        let text = ask(&self.folder.join("control.sock"), "stats");
        let mut answer: Value = serde_json::from_str(&text).expect("JSON");
        answer["life"].take()
    }

    /// The running daemon.
    fn daemon(&self) -> OwnedFd {
        let pid = self.life()["pid"].as_i64().expect("a number");
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        pidfd_open(pid.expect("a process"), PidfdFlags::empty()).expect("it runs")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some((launch, _)) = &mut self.launch {
            launch.kill().expect("a child");
            launch.wait().expect("a child");
        }
    }
}

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let deaths = std::env::var("VIOMMU_KILLS").ok();
    let deaths = deaths.map_or(200, |text| text.parse().expect("VIOMMU_KILLS is a number"));
    let mut figures = json!({});
    for (mappings, label) in [(0, "no mappings"), (MANY, "a million mappings")] {
        let kept = Kept::start();
        let mut guest = Guest::connect_to(kept.folder.join("vhost-user.sock"), Setup::default());
        guest.driver_ok();
        assert_eq!(guest.attach(1, EP), OK, "ATTACH");
        fill(&mut guest, mappings);
        for (signal, manner) in [(Signal::KILL, "killed"), (Signal::TERM, "planned")] {
            let waits = measure(&kept, &mut guest, signal, deaths);
            let key = format!("{manner}_{mappings}_ms");
            figures[key] = report(&format!("{manner}, {label}"), waits);
        }
        guest.reboot();
    }
    fragment::write("restart", &json!({ "restart": figures }));
}

/// Makes mappings of single pages, none beside another in memory.
fn fill(guest: &mut Guest, mappings: u64) {
    for first in (0..mappings).step_by(BATCH as usize) {
        let count = BATCH.min(mappings - first);
        for page in first..first + count {
            let (iova, gpa) = (page * PAGE, (page * 7 % 256) * PAGE);
            let bytes = wire::map(1, iova, iova + PAGE - 1, gpa, RW);
            guest.submit(&bytes, &Layout::plain(bytes.len(), TAIL));
        }
        guest.kick();
        for _ in 0..count {
            assert_eq!(guest.complete().1.status(), OK, "MAP");
        }
    }
}

/// The time for an answer, and the part of it in the next daemon, in milliseconds.
type Wait = (f64, f64);

/// Ends the daemon again and again. A daemon that is asked to leave goes on for a while, so the longest wait for an answer
/// counts.
fn measure(kept: &Kept, guest: &mut Guest, signal: Signal, deaths: usize) -> Vec<Wait> {
    let wait = |_| {
        let daemon = kept.daemon();
        pidfd_send_signal(&daemon, signal).expect("sent");
        let mut longest = Duration::ZERO;
        loop {
            let has_ended = has_ended(&daemon);
            let asked = Instant::now();
            assert_eq!(guest.map_page(1, FREE, 0), OK, "MAP");
            longest = longest.max(asked.elapsed());
            assert_eq!(guest.unmap(1, FREE, FREE + PAGE - 1), OK, "UNMAP");
            if has_ended {
                break;
            }
            // Two busy processes of realtime priority would keep the kernel from ending the daemon.
            sleep(Duration::from_millis(1));
        }
        let life = kept.life();
        assert_eq!(life["state"], "taken-over", "{life}");
        let resumed = life["resumed_after_ms"].as_f64();
        let longest = longest.as_secs_f64() * 1e3;
        (longest, resumed.expect("it has answered"))
    };
    (0..deaths).map(wait).collect()
}

fn has_ended(daemon: &OwnedFd) -> bool {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(daemon, PollFlags::IN)], Some(&at_once)).expect("a process") > 0
}

/// Prints and returns median and worst.
fn report(label: &str, mut waits: Vec<Wait>) -> Value {
    waits.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut inside: Vec<f64> = waits.iter().map(|wait| wait.1).collect();
    inside.sort_by(f64::total_cmp);
    let median = waits[waits.len() / 2].0;
    let (p95, worst) = (waits[waits.len() * 19 / 20].0, waits[waits.len() - 1].0);
    let inside = inside[inside.len() / 2];
    println!(
        "{label:<30} median {median:>6.1} ms, 95 % {p95:>6.1} ms, worst {worst:>6.1} ms; \
         in the next daemon {inside:.1} ms (median)"
    );
    json!({ "median": median, "p95": p95, "worst": worst, "in_the_next_daemon": inside })
}
