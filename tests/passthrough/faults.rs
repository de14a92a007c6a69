//! The kernel injects failures into the daemon's system calls. After each failure, the daemon's mappings, the
//! state that it reports for each endpoint, and the memory that devices reach on the host must agree.
//!
//! With `fail-nth` the kernel counts the points of failure of a thread's next calls, mostly allocations, and fails the
//! n-th. With `make-it-fail` it fails a share of all calls.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use vhost::vhost_user::VhostUserFrontend;

use crate::common::daemon::number;
use crate::common::guest::{Guest, HIGH_RAM, LOW_LEN, LOW_RAM, Setup};
use crate::common::memory::{Memory, Region, memfd};
use crate::common::rng::Rng;

use crate::bed::{BACKENDS, Backend, Bed, endpoint};
use crate::common::wire::{CONFIG_BYPASS, DEVERR, OK, READ, RW};
use crate::devices::{Function, TestDev};
use crate::words;

const PAGE: u64 = 4096;
/// First I/O virtual address of the devices' accesses. It is an address of RAM too, for bypass mode, and apart from
/// the requests' buffers.
const WINDOW: u64 = LOW_RAM + 0xa0_0000;
const PAGES: u64 = 12;
/// The first guest page that mappings lead to.
const TARGET: u64 = HIGH_RAM + 0x10_0000;
const TARGETS: u64 = 10;
/// A memory slot that the VMM adds and removes. It follows another slot without a hole.
const EXTRA: u64 = LOW_RAM + LOW_LEN;
const EXTRA_LEN: u64 = 2 << 20;
/// Two pages across the border of two slots.
const ACROSS: u64 = EXTRA - PAGE;

/// The kinds of failures that the kernel injects.
const KINDS: [&str; 3] = ["failslab", "fail_page_alloc", "fail_iommufd"];
/// The thread that serves requests.
const WORKER: &str = "vring_worker";
/// The thread that serves vhost-user messages.
const PROTOCOL: &str = "vhost-user";

/// Writes a setting of one kind of failures.
fn set(kind: &str, name: &str, value: &str) {
    let path = format!("/sys/kernel/debug/{kind}/{name}");
    fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// A thread of the daemon whose system calls fail on demand.
struct Victim {
    directory: PathBuf,
}

impl Victim {
    fn new(bed: &FaultBed, name: &str) -> Self {
        let tasks = format!("/proc/{}/task", bed.vm.daemon.pid());
        let mut found = fs::read_dir(tasks)
            .expect("the daemon's threads")
            .map(|entry| entry.expect("a thread").path())
            .filter(|path| {
                let comm = fs::read_to_string(path.join("comm"));
                comm.is_ok_and(|comm| comm.trim() == name)
            });
        let directory = found.next().unwrap_or_else(|| panic!("no thread {name}"));
        Self { directory }
    }

    /// Lets the n-th point of failure fail. 0 switches failures off.
    fn fail_nth(&self, n: u32) {
        fs::write(self.directory.join("fail-nth"), n.to_string()).expect("fail-nth");
    }

    /// Switches failures off. Returns whether the n-th point of failure was reached.
    fn has_failed(&self) -> bool {
        let path = self.directory.join("fail-nth");
        let left = fs::read_to_string(&path).expect("fail-nth");
        self.fail_nth(0);
        left.trim() == "0"
    }

    /// Sets whether a share of all calls fails.
    fn fail_at_random(&self, on: bool) {
        let flag = if on { "1" } else { "0" };
        fs::write(self.directory.join("make-it-fail"), flag).expect("make-it-fail");
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The messages of the kernel.
fn kernel_log() -> String {
    let output = std::process::Command::new("dmesg").output();
    output.map_or_else(
        |error| format!("dmesg: {error}"),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// The daemon's answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// A status.
    Status(u8),
    /// The daemon has closed the connection.
    Disconnected,
}

/// The daemon's endpoints and mappings, from the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
struct View {
    /// State, state of DMA, and domain of each endpoint.
    endpoints: Vec<(String, String, Option<u32>)>,
    domains: BTreeMap<u32, Vec<Line>>,
}

/// First, last, guest-physical address, access, MMIO.
type Line = (u64, u64, u64, String, bool);

impl View {
    fn is_quarantined(&self, n: usize) -> bool {
        self.endpoints[n].0 == "quarantined"
    }

    /// The guest-physical address that a write of device `n` at `iova` must reach, or `None`.
    fn gpa_of(&self, n: usize, iova: u64) -> Option<u64> {
        match (self.endpoints[n].1.as_str(), self.endpoints[n].2) {
            ("bypass", _) => Some(iova),
            ("translated", Some(domain)) => {
                let lines = self.domains[&domain].iter();
                let mut hits = lines.filter(|(first, last, ..)| (*first..=*last).contains(&iova));
                let (first, _, gpa, access, _) = hits.next()?;
                access.contains('w').then_some(gpa + (iova - first))
            }
            ("blocked", _) => None,
            other => panic!("endpoint {n}: {other:?}"),
        }
    }
}

/// A VM with two passthrough devices and a memory slot that the VMM adds and removes.
struct FaultBed {
    vm: Bed,
    devices: [TestDev; 2],
    extra: Arc<fs::File>,
}

impl FaultBed {
    fn new(backend: Backend) -> Self {
        for kind in KINDS {
            // No stack trace for each failure: that would take longer than the test.
            set(kind, "verbose", "0");
            set(kind, "task-filter", "Y");
            set(kind, "probability", "0");
            set(kind, "times", "-1");
            set(kind, "space", "0");
            set(kind, "interval", "1");
        }
        // Otherwise the kernel spares nearly all allocations.
        set("failslab", "ignore-gfp-wait", "N");
        set("fail_page_alloc", "ignore-gfp-wait", "N");
        set("fail_page_alloc", "min-order", "0");
        let names = words("VIOMMU_TESTDEV");
        let vm = Bed::new(backend, &[&names[0], &names[1]]);
        let mut bed = Self {
            vm,
            devices: [0, 1].map(|n| TestDev::new(&names[n])),
            extra: Arc::new(memfd(EXTRA_LEN)),
        };
        bed.clean();
        // Makes the objects that the daemon makes only once.
        bed.fill(1);
        bed.attach(1, 0);
        bed.clean();
        bed
    }

    fn has_extra(&self) -> bool {
        let mut slots = self.vm.guest.memory.regions.iter();
        slots.any(|slot| slot.gpa == EXTRA)
    }

    fn extra(&self) -> Region {
        Region::of_file(EXTRA, EXTRA_LEN, self.extra.clone(), 0)
    }

    fn view(&self) -> View {
        let status = self.vm.daemon.status();
        let list = status["endpoints"].as_array().expect("endpoints");
        let endpoints = (0..2).map(|n| {
            let entry = list
                .iter()
                .find(|entry| number(&entry["id"]) == u64::from(endpoint(n)))
                .expect("an endpoint");
            let text = |key: &str| entry[key].as_str().expect("a text").to_owned();
            let domain = entry["domain"].as_u64().map(|id| id as u32);
            (text("state"), text("dma"), domain)
        });
        let endpoints = endpoints.collect();
        let domains = status["domains"].as_array().expect("domains");
        let domains = domains.iter().map(|domain| {
            let id = number(&domain["id"]) as u32;
            (id, self.vm.daemon.mappings(id))
        });
        View {
            endpoints,
            domains: domains.collect(),
        }
    }

    /// The pages that a device may write, each with its first 256 bytes.
    fn pages(&self) -> Vec<(u64, Vec<u8>)> {
        let removed = Memory {
            regions: Vec::from_iter((!self.has_extra()).then(|| self.extra())),
        };
        let identity = (0..PAGES).map(|n| WINDOW + n * PAGE);
        let targets = (0..TARGETS).map(|n| TARGET + n * PAGE);
        identity
            .chain(targets)
            .chain([ACROSS, EXTRA])
            .map(|gpa| {
                let memory = if gpa == EXTRA && !self.has_extra() {
                    &removed
                } else {
                    &self.vm.guest.memory
                };
                (gpa, memory.read(gpa, 256))
            })
            .collect()
    }

    /// Checks that the devices reach exactly the addresses that `reach` gives, and that their bytes arrive there.
    fn check_reach(&self, reach: impl Fn(usize, u64) -> Option<u64>, what: &str) {
        let mut expected: BTreeMap<u64, Vec<u8>> = self
            .pages()
            .into_iter()
            .map(|(gpa, bytes)| (gpa, vec![0; bytes.len()]))
            .collect();
        for (n, device) in self.devices.iter().enumerate() {
            for page in 0..PAGES {
                let iova = WINDOW + page * PAGE;
                // Each device and address has an offset of its own.
                let offset = (page * 2 + n as u64) * 8;
                let gpa = reach(n, iova).filter(|gpa| *gpa != EXTRA || self.has_extra());
                let let_through = device.write(iova + offset, 8);
                assert_eq!(
                    let_through,
                    gpa.is_some(),
                    "{what}: device {n} at {iova:#x}, which leads to {gpa:x?}\n{:#?}\n{}",
                    self.view(),
                    self.log()
                );
                if let Some(gpa) = gpa {
                    let bytes = expected.get_mut(&gpa).expect("one of the checked pages");
                    let at = offset as usize;
                    bytes[at..at + 4].copy_from_slice(&TestDev::PATTERN.to_le_bytes());
                    bytes[at + 4..at + 8].copy_from_slice(&TestDev::PATTERN.to_le_bytes());
                }
            }
        }
        for (gpa, bytes) in self.pages() {
            assert!(
                bytes == expected[&gpa],
                "{what}: page {gpa:#x} has other bytes than expected\n{:#?}",
                self.view()
            );
            if bytes.iter().any(|byte| *byte != 0) {
                self.vm.guest.memory.write(gpa, &vec![0; bytes.len()]);
            }
        }
    }

    /// Checks that the devices reach exactly the mappings of `view`.
    fn check(&self, view: &View, what: &str) {
        self.check_reach(|n, iova| view.gpa_of(n, iova), what);
    }

    /// Unmaps the window in every domain of `view`. After an answer of OK no device may reach a page of it, whatever
    /// failed before: the devices have just used these pages, so an IOMMU may have them in its caches.
    fn check_unmapping(&mut self, view: &View, what: &str) {
        for (&domain, _) in view.domains.iter().filter(|(_, lines)| !lines.is_empty()) {
            assert_eq!(self.unmap(domain, 0, PAGES), OK, "{what}: {}", self.log());
        }
        let now = self.view();
        assert!(now.domains.values().all(Vec::is_empty), "{what}: {now:#?}");
        let addresses = (0..PAGES).map(|page| WINDOW + page * PAGE);
        for (n, device) in self.devices.iter().enumerate() {
            // One page of each device suffices: a kernel that sends no invalidations sends none at all.
            let reached = |iova: &u64| view.gpa_of(n, *iova).is_some();
            let gone = |iova: &u64| now.gpa_of(n, *iova).is_none();
            if let Some(iova) = addresses.clone().find(|iova| reached(iova) && gone(iova)) {
                assert!(
                    !device.write(iova, 8),
                    "{what}, then UNMAP: device {n} still writes at {iova:#x}\n{now:#?}\n{}",
                    self.log()
                );
            }
        }
    }

    /// The end of the daemon's log, and that of the kernel's: what the IOMMU's driver says of a call that fails.
    fn log(&self) -> String {
        format!(
            "{}\n--- the kernel:\n{}",
            last_lines(&self.vm.daemon.log(), 6),
            last_lines(&kernel_log(), 20)
        )
    }

    /// Detaches and blocks both devices and adds the extra slot again. This must succeed after any failure.
    fn clean(&mut self) {
        if !self.has_extra() {
            let extra = self.extra();
            self.vm.guest.add_region(extra);
        }
        // Off except in the cases that need it: filling the host's tables for bypass mode takes long.
        self.set_bypass(false);
        let view = self.view();
        for (n, (state, _, domain)) in view.endpoints.iter().enumerate() {
            let domain = match domain {
                Some(domain) => *domain,
                None if state == "quarantined" => {
                    self.attach(9, n);
                    9
                }
                None => continue,
            };
            let status = self.vm.guest.detach(domain, endpoint(n));
            assert_eq!(status, OK, "{}", self.log());
        }
        for name in words("VIOMMU_TESTDEV") {
            // As the driver does: the daemon may have switched off its DMA.
            Function::new(&name).enable();
        }
    }

    /// Sets whether detached devices are in bypass mode.
    fn set_bypass(&mut self, on: bool) {
        self.vm.guest.set_config(CONFIG_BYPASS, &[on.into()]);
    }

    fn attach(&mut self, domain: u32, n: usize) {
        assert_eq!(self.vm.guest.attach(domain, endpoint(n)), OK);
    }

    /// Attaches device 1 to a domain and maps a few pages.
    fn fill(&mut self, domain: u32) {
        self.attach(domain, 1);
        for (page, pages, gpa, flags) in [
            (0, 1, TARGET, RW),
            (1, 2, TARGET + 2 * PAGE, RW),
            (4, 1, TARGET + 5 * PAGE, READ),
            (6, 2, ACROSS, RW),
        ] {
            let status = self.map(domain, page, pages, gpa, flags);
            assert_eq!(status, OK, "{}", self.log());
        }
    }

    fn map(&mut self, domain: u32, page: u64, pages: u64, gpa: u64, flags: u32) -> u8 {
        let first = WINDOW + page * PAGE;
        let last = first + pages * PAGE - 1;
        self.vm.guest.map(domain, first, last, gpa, flags)
    }

    fn unmap(&mut self, domain: u32, page: u64, pages: u64) -> u8 {
        let first = WINDOW + page * PAGE;
        self.vm.guest.unmap(domain, first, first + pages * PAGE - 1)
    }

    /// Checks that the devices are blocked after the daemon has closed the connection, and connects another VMM.
    fn reconnect(&mut self) {
        let daemon = &self.vm.daemon;
        daemon.wait_for("the end of the connection", || {
            daemon.status()["connected"] == false
        });
        self.check_reach(|_, _| None, "without a VMM");
        let regions = self.vm.guest.memory.regions.iter().map(Region::duplicate);
        let regions = regions.collect();
        let mut guest = Guest::connect_with(self.vm.daemon.stream(), Setup::default(), regions);
        guest.clear_rings();
        guest.driver_ok();
        self.vm.guest = guest;
        // The daemon sets up all endpoints before it serves the first request.
        self.vm.guest.probe(endpoint(0));
        self.clean();
    }
}

/// A request to the daemon, during which one of its calls fails.
struct Case {
    name: &'static str,
    /// The thread that serves the request.
    thread: &'static str,
    /// Prepares a clean bed for the request.
    prepare: fn(&mut FaultBed),
    act: fn(&mut FaultBed) -> Outcome,
}

const CASES: [Case; 13] = [
    Case {
        name: "ATTACH to a new domain",
        thread: WORKER,
        prepare: |_| {},
        act: |bed| Outcome::Status(bed.vm.guest.attach(1, endpoint(0))),
    },
    Case {
        name: "ATTACH to a new domain, from bypass mode",
        thread: WORKER,
        prepare: |bed| bed.set_bypass(true),
        act: |bed| Outcome::Status(bed.vm.guest.attach(1, endpoint(0))),
    },
    Case {
        name: "ATTACH of a second device, to a domain with mappings",
        thread: WORKER,
        prepare: |bed| bed.fill(1),
        act: |bed| Outcome::Status(bed.vm.guest.attach(1, endpoint(0))),
    },
    Case {
        name: "ATTACH from one domain, which ends, to another",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(2, 0);
            assert_eq!(bed.map(2, 0, 1, TARGET + 8 * PAGE, RW), OK);
        },
        act: |bed| Outcome::Status(bed.vm.guest.attach(1, endpoint(0))),
    },
    Case {
        name: "ATTACH to a bypass domain",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
        },
        act: |bed| Outcome::Status(bed.vm.guest.attach_bypass(3, endpoint(0))),
    },
    Case {
        name: "MAP of a page",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
        },
        act: |bed| Outcome::Status(bed.map(1, 9, 1, TARGET + 7 * PAGE, RW)),
    },
    Case {
        name: "MAP over two slots",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
        },
        act: |bed| Outcome::Status(bed.map(1, 9, 2, ACROSS, RW)),
    },
    Case {
        name: "UNMAP of one mapping",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
        },
        act: |bed| Outcome::Status(bed.unmap(1, 1, 2)),
    },
    Case {
        name: "UNMAP of several",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
        },
        act: |bed| Outcome::Status(bed.unmap(1, 1, PAGES - 1)),
    },
    Case {
        name: "DETACH to blocked mode, which ends the domain",
        thread: WORKER,
        prepare: |bed| bed.fill(1),
        act: |bed| Outcome::Status(bed.vm.guest.detach(1, endpoint(1))),
    },
    Case {
        name: "DETACH to bypass mode",
        thread: WORKER,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
            bed.set_bypass(true);
        },
        act: |bed| Outcome::Status(bed.vm.guest.detach(1, endpoint(1))),
    },
    Case {
        name: "removal of a slot",
        thread: PROTOCOL,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
        },
        act: |bed| {
            let extra = bed.extra();
            match bed.vm.guest.frontend.remove_mem_region(&extra.info()) {
                Ok(()) => {
                    bed.vm.guest.memory.regions.retain(|r| r.gpa != EXTRA);
                    Outcome::Status(OK)
                }
                Err(_) => Outcome::Disconnected,
            }
        },
    },
    Case {
        name: "addition of a slot",
        thread: PROTOCOL,
        prepare: |bed| {
            bed.fill(1);
            bed.attach(1, 0);
            bed.vm.guest.remove_region(EXTRA);
        },
        act: |bed| {
            let extra = bed.extra();
            match bed.vm.guest.frontend.add_mem_region(&extra.info()) {
                Ok(_) => {
                    bed.vm.guest.memory.regions.push(extra);
                    Outcome::Status(OK)
                }
                Err(_) => Outcome::Disconnected,
            }
        },
    },
];

/// The points of failure to test: each of the first ones, then fewer and fewer.
fn failure_points() -> impl Iterator<Item = u32> {
    std::iter::successors(Some(1u32), |n| Some(n + 1 + n.saturating_sub(24) / 3))
}

/// The number of rounds by outcome.
#[derive(Debug, Default)]
struct OutcomeCounts {
    done: u32,
    refused: u32,
    quarantined: u32,
    disconnected: u32,
}

impl Case {
    /// Repeats the request. In each round the next point of failure fails.
    fn sweep(&self, bed: &mut FaultBed) {
        (self.prepare)(bed);
        let before = bed.view();
        bed.check(&before, self.name);
        assert_eq!((self.act)(bed), Outcome::Status(OK), "{}", self.name);
        let after = bed.view();
        bed.check(&after, self.name);
        bed.clean();
        let mut counts = OutcomeCounts::default();
        for n in failure_points() {
            let what = format!("{}, call {n} fails", self.name);
            // Guest RAM has fewer than 20000 pages, so no request has that many points of failure.
            assert!(n < 20_000, "{what}: the request never succeeds");
            (self.prepare)(bed);
            assert_eq!(bed.view(), before, "{what}");
            let victim = Victim::new(bed, self.thread);
            victim.fail_nth(n);
            let outcome = (self.act)(bed);
            if outcome == Outcome::Disconnected {
                counts.disconnected += 1;
                bed.reconnect();
                continue;
            }
            let failed = victim.has_failed();
            let now = bed.view();
            bed.check(&now, &what);
            let quarantined = (0..2).any(|n| now.is_quarantined(n));
            match outcome {
                _ if quarantined => {
                    counts.quarantined += 1;
                    // The mappings are those before the request or those after it.
                    assert!(
                        now.domains == before.domains || now.domains == after.domains,
                        "{what}: {now:#?}"
                    );
                    if self.thread == WORKER {
                        assert_eq!(outcome, Outcome::Status(DEVERR), "{what}");
                    }
                }
                Outcome::Status(OK) => {
                    counts.done += 1;
                    assert_eq!(now, after, "{what}");
                }
                Outcome::Status(_) | Outcome::Disconnected => {
                    counts.refused += 1;
                    assert_eq!(now, before, "{what}");
                }
            }
            bed.check_unmapping(&now, &what);
            bed.clean();
            if !failed {
                assert_eq!(outcome, Outcome::Status(OK), "{what}");
                assert!(!quarantined, "{what}");
                break;
            }
        }
        eprintln!("    {}: {counts:?}", self.name);
    }
}

/// The daemon's open descriptors, locked memory and objects in a shared iommufd.
fn held_resources(bed: &FaultBed) -> (usize, u64, Option<u32>) {
    let pid = bed.vm.daemon.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let locked = status.lines().find(|line| line.starts_with("VmLck"));
    let locked = locked.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    (
        bed.vm.daemon.fd_count(),
        locked.expect("locked memory"),
        bed.vm.shared_objects(),
    )
}

fn sweep(backend: Backend) {
    eprintln!("{backend:?}");
    let mut bed = FaultBed::new(backend);
    let held = held_resources(&bed);
    let rss = bed.vm.daemon.rss_kib();
    for case in &CASES {
        case.sweep(&mut bed);
    }
    assert_eq!(held_resources(&bed), held, "the daemon keeps resources");
    let now = bed.vm.daemon.rss_kib();
    assert!(now < rss + 2048, "{rss} KiB became {now} KiB");
}

/// A request of the storm: domains, devices by number, and pages of the window.
#[derive(Clone, Copy, Debug)]
enum StormRequest {
    Attach(u32, usize),
    AttachBypass(u32, usize),
    Detach(u32, usize),
    /// Domain, first page, pages, guest-physical address, flags.
    Map(u32, u64, u64, u64, u32),
    /// Domain, first page, pages.
    Unmap(u32, u64, u64),
}

impl StormRequest {
    /// A random request, valid or not.
    fn random(rng: &mut Rng) -> Self {
        let domain = 1 + rng.below(2) as u32;
        let n = rng.below(2) as usize;
        let page = rng.below(PAGES - 1);
        match rng.below(16) {
            0..=3 => Self::Attach(domain, n),
            4 => Self::AttachBypass(3, n),
            5 => Self::Detach(domain, n),
            6 => Self::Detach(3, n),
            7..=10 => Self::Map(domain, page, 1, TARGET + rng.below(TARGETS) * PAGE, RW),
            11 => Self::Map(domain, page, 2, ACROSS, RW),
            12 => Self::Map(domain, page, 1, TARGET, READ),
            13..=14 => Self::Unmap(domain, page, 1 + rng.below(PAGES - page)),
            _ => Self::Unmap(domain, 0, PAGES),
        }
    }

    /// Sends the request. Returns its status.
    fn send(self, bed: &mut FaultBed) -> u8 {
        match self {
            Self::Attach(domain, n) => bed.vm.guest.attach(domain, endpoint(n)),
            Self::AttachBypass(domain, n) => bed.vm.guest.attach_bypass(domain, endpoint(n)),
            Self::Detach(domain, n) => bed.vm.guest.detach(domain, endpoint(n)),
            Self::Map(domain, page, pages, gpa, flags) => bed.map(domain, page, pages, gpa, flags),
            Self::Unmap(domain, page, pages) => bed.unmap(domain, page, pages),
        }
    }
}

/// What the storm has done so far. It is printed if the test fails: the kernel decides anew in each run which calls
/// fail, so the seed alone does not repeat a failure.
#[derive(Default)]
struct StormHistory {
    lines: Vec<String>,
    /// The views before and after the last request.
    views: Option<(View, View)>,
}

impl Drop for StormHistory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        eprintln!("--- the requests so far; the last one may have no answer:");
        for line in &self.lines {
            eprintln!("{line}");
        }
        if let Some((before, now)) = &self.views {
            eprintln!("--- the daemon's state before the last request: {before:#?}");
            eprintln!("--- and after it: {now:#?}");
        }
        eprintln!("--- the kernel's last messages:");
        eprintln!("{}", last_lines(&kernel_log(), 40));
    }
}

/// A number from the environment.
fn number_from_env(name: &str, otherwise: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(otherwise, |n| n.parse().expect("a number"))
}

/// Random failures, so that the calls that undo a request fail, too.
fn storm(backend: Backend) {
    let rounds = number_from_env("VIOMMU_STORM_ROUNDS", 150);
    let seed = number_from_env("VIOMMU_STORM_SEED", backend as u64);
    eprintln!("{backend:?}, {rounds} rounds, seed {seed}");
    let mut bed = FaultBed::new(backend);
    let held = held_resources(&bed);
    let mut rng = Rng::new(seed);
    let mut counts = OutcomeCounts::default();
    let mut history = StormHistory::default();
    for round in 0..rounds {
        let percent = [0, 2, 5, 20, 50][rng.below(5) as usize];
        let request = StormRequest::random(&mut rng);
        let what = format!("round {round} at {percent} percent: {request:x?}");
        history.lines.push(what.clone());
        history.views = None;
        let before = bed.view();
        for kind in KINDS {
            set(kind, "probability", &percent.to_string());
        }
        let victim = Victim::new(&bed, WORKER);
        victim.fail_at_random(true);
        let status = request.send(&mut bed);
        victim.fail_at_random(false);
        let now = bed.view();
        let states: Vec<_> = now
            .endpoints
            .iter()
            .map(|(state, dma, _)| (state, dma))
            .collect();
        history
            .lines
            .push(format!("    status {status}, {states:?}"));
        history.views = Some((before.clone(), now.clone()));
        for (n, name) in words("VIOMMU_TESTDEV").iter().enumerate() {
            // The daemon may have switched off its DMA. The driver switches it on, unless it is quarantined.
            if !now.is_quarantined(n) {
                Function::new(name).enable();
            }
        }
        bed.check(&now, &what);
        let quarantined = (0..2).any(|n| now.is_quarantined(n));
        match status {
            OK => counts.done += 1,
            _ if quarantined => counts.quarantined += 1,
            _ => {
                counts.refused += 1;
                assert_eq!(now, before, "{what}");
            }
        }
    }
    eprintln!("    {counts:?}");
    bed.clean();
    assert_eq!(held_resources(&bed), held, "the daemon keeps resources");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn random_failures_leave_daemon_and_host_in_agreement() {
    for backend in BACKENDS {
        storm(backend);
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_daemon_and_host_in_agreement_shared() {
    sweep(Backend::SharedAll);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_daemon_and_host_in_agreement_shared_pin_mapped() {
    sweep(Backend::SharedMapped);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_daemon_and_host_in_agreement_owned() {
    sweep(Backend::Owned);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_daemon_and_host_in_agreement_type1() {
    sweep(Backend::Type1);
}
