//! Kills the processes one after the other and starts them again.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::daemon::Daemon;
use crate::common::memory::memfd;
use crate::common::rng::Rng;
use crate::process::Role;
use crate::stamps::{KILLED_VM_FILL, PAGE, PAGES, Pages};

/// Rounds before the test notes the daemon's descriptors, threads and memory.
const WARM_UP: u64 = 20;
/// KiB by which the daemon's memory may grow. Its allocator does not return all that it frees.
const SLACK_KIB: u64 = 512;

/// A number from the environment.
pub fn number_from_env(name: &str, otherwise: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(otherwise, |n| n.parse().expect("a number"))
}

#[test]
#[ignore = "takes half a minute; run the suite `emulated`"]
fn processes_killed_at_any_moment_leave_nothing_behind() {
    let kills = number_from_env("VIOMMU_KILLS", 200);
    let seed = number_from_env("VIOMMU_KILLS_SEED", u64::from(std::process::id()));
    println!("{kills} kills, seed {seed}");
    let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let begun = Instant::now();
    let mut bed = KillBed::new();
    bed.wait_until_all_work();
    let mut before = None;
    let mut killed = [0; 5];
    for round in 0..WARM_UP + kills {
        if round == WARM_UP {
            before = Some(bed.figures(None));
        }
        let victim = rng.pick(&VICTIMS);
        sleep(Duration::from_micros(rng.below(20_000)));
        bed.kill(victim);
        bed.start(victim);
        killed[victim as usize] += usize::from(round >= WARM_UP);
        // In one of four rounds the next victim may die before it has done anything.
        if !rng.one_in(4) {
            bed.wait_until_all_work();
        }
        bed.assert_works();
    }
    let before = before.expect("there was a warm-up");
    let after = bed.figures(Some((before.0, before.1)));
    println!(
        "killed {killed:?} {VICTIMS:?} in {:?}; descriptors, threads, KiB: {before:?}, then {after:?}",
        begun.elapsed()
    );
    assert!(after.2 <= before.2 + SLACK_KIB, "{before:?}, {after:?}");
    bed.end();
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    MessageServer,
    MappingServer,
    Vmm,
    FirstReader,
    SecondReader,
}

pub const VICTIMS: [Victim; 5] = [
    Victim::MessageServer,
    Victim::MappingServer,
    Victim::Vmm,
    Victim::FirstReader,
    Victim::SecondReader,
];

/// The daemon and the processes around it.
pub struct KillBed {
    /// The processes in the order of [`VICTIMS`], each with whether it has worked since its start. They come before
    /// `daemon`, so they are dropped before it.
    roles: Vec<(Role, bool)>,
    pub daemon: Daemon,
    folder: TempDir,
    /// The memory of the running VM.
    ram: File,
    /// The memory of the last VM that was killed.
    killed_ram: Option<File>,
}

impl KillBed {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).display().to_string();
        let device = |address: &str, number: u8, isolation: &str| {
            let (listen, connect) = (
                at(&format!("client{number}")),
                at(&format!("server{number}")),
            );
            format!(
                "[[endpoint]]\naddress = '{address}'\nvfio-user = {{ listen = '{listen}', \
                 connect = '{connect}', isolation = '{isolation}', announce = 'exact', deadline-ms = 20000 }}\n"
            )
        };
        let daemon = Daemon::with_config(&format!(
            "address = '00:05.0'\nbypass = false\nhotplug = ['00:09.0-00:09.7']\n{}{}\
             [[endpoint]]\naddress = '00:08.0'\nshadow = '{}'\n\
             [readers]\npatience-ms = 20000\n",
            device("00:06.0", 1, "messages"),
            device("00:07.0", 2, "mappings"),
            at("shadow")
        ));
        let mut bed = Self {
            daemon,
            folder,
            roles: Vec::new(),
            ram: memfd(PAGES * PAGE),
            killed_ram: None,
        };
        for victim in VICTIMS {
            let role = bed.role(victim);
            bed.roles.push((role, false));
        }
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn role(&self, victim: Victim) -> Role {
        let start = |name: &'static str, path: &Path| Role::start(name, &[("KILLS_SOCKET", path)]);
        match victim {
            Victim::MessageServer => start("server by messages", &self.path("server1")),
            Victim::MappingServer => start("server by mappings", &self.path("server2")),
            Victim::FirstReader | Victim::SecondReader => start("reader", &self.path("shadow")),
            Victim::Vmm => {
                let (process, fd) = (std::process::id(), self.ram.as_raw_fd());
                let ram = PathBuf::from(format!("/proc/{process}/fd/{fd}"));
                let sockets = [
                    ("KILLS_VHOST", self.daemon.socket()),
                    ("KILLS_CLIENT_1", self.path("client1")),
                    ("KILLS_CLIENT_2", self.path("client2")),
                    ("KILLS_RAM", ram),
                    ("KILLS_CONTROL", self.daemon.control_socket()),
                ];
                let paths: Vec<_> = sockets.iter().map(|(n, p)| (*n, p.as_path())).collect();
                Role::start("VMM", &paths)
            }
        }
    }

    pub fn kill(&mut self, victim: Victim) {
        self.roles[victim as usize].0.kill();
        if victim != Victim::Vmm {
            return;
        }
        let status = || self.daemon.status();
        self.daemon
            .wait_for("the VMM's end", || status()["connected"] == false);
        // From now on no process may reach the memory of this VM.
        self.check_killed_vm();
        let ram = std::mem::replace(&mut self.ram, memfd(PAGES * PAGE));
        for page in 0..PAGES {
            Pages(&ram).fill(page, KILLED_VM_FILL);
        }
        self.killed_ram = Some(ram);
        // Every process must reach the memory of the new VM before it counts as working.
        for (role, works) in &mut self.roles {
            role.drop_lines();
            *works = false;
        }
    }

    fn check_killed_vm(&self) {
        for page in 0..PAGES {
            if let Some(killed_ram) = &self.killed_ram {
                Pages(killed_ram).check_untouched(page, KILLED_VM_FILL);
            }
        }
    }

    pub fn start(&mut self, victim: Victim) {
        self.roles[victim as usize] = (self.role(victim), false);
    }

    pub fn wait_until_all_work(&mut self) {
        for (role, works) in &mut self.roles {
            if !std::mem::replace(works, true) {
                role.wait_for("works");
            }
        }
    }

    /// The comparisons that the guest has made since the last call.
    pub fn comparisons(&mut self) -> usize {
        let (role, works) = &mut self.roles[Victim::Vmm as usize];
        // The test still waits for one of the lines of a VMM that does not work yet.
        if *works {
            role.count_lines("compared")
        } else {
            0
        }
    }

    pub fn assert_works(&mut self) {
        self.daemon.assert_alive();
        for (role, _) in &mut self.roles {
            role.assert_alive();
        }
        self.check_killed_vm();
    }

    /// The daemon's descriptors, threads and memory in KiB, when all processes work and the counts are not above `most`.
    /// On a busy machine the daemon may notice the last deaths late. A leak never goes away: the test fails.
    pub fn figures(&mut self, most: Option<(usize, usize)>) -> (usize, usize, u64) {
        self.wait_until_all_work();
        let counts = || (self.daemon.fd_count(), self.daemon.thread_count());
        let mut before = counts();
        self.daemon.wait_for("stable counts", || {
            sleep(Duration::from_millis(20));
            std::mem::replace(&mut before, counts()) == before
        });
        if let Some(most) = most {
            let what = format!("{most:?} descriptors and threads instead of {before:?}");
            self.daemon.wait_for(&what, || {
                before = counts();
                before.0 <= most.0 && before.1 <= most.1
            });
        }
        let rss = (0..5).map(|_| self.daemon.rss_kib()).min();
        (before.0, before.1, rss.expect("some"))
    }

    pub fn end(mut self) {
        self.assert_works();
        let status = self.daemon.status();
        assert_eq!(status["readers"]["killed"], 0, "{status}");
        for endpoint in status["endpoints"].as_array().expect("a list") {
            assert_ne!(endpoint["state"], "quarantined", "{status}");
        }
        let log = self.daemon.log();
        assert!(!log.contains("cut off"), "{log}");
    }
}
