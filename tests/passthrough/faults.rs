//! Failures that the kernel injects into the daemon's own system calls: whatever fails, at whatever
//! depth, the daemon's tables, its word on every endpoint and what devices reach on the host agree.
//!
//! The kernel counts the places where a thread's next calls could fail, allocations mostly, and fails
//! the n-th (`fail-nth`); where `make-it-fail` is on, a share of all.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use vhost::vhost_user::VhostUserFrontend;

use crate::common::daemon::number;
use crate::common::guest::{Guest, HIGH_RAM, LOW_LEN, LOW_RAM, Setup};
use crate::common::memory::{Memory, Region, memfd};
use crate::common::rng::Rng;

use crate::bed::{Bed, WAYS, Way, endpoint};
use crate::common::wire::{CONFIG_BYPASS, DEVERR, OK, READ, RW};
use crate::devices::{Function, TestDev};
use crate::words;

const PAGE: u64 = 4096;
/// The addresses the devices use: in RAM too, for bypass mode, and apart from the requests' buffers.
const WINDOW: u64 = LOW_RAM + 0xa0_0000;
const PAGES: u64 = 12;
/// Where most mappings lead.
const TARGET: u64 = HIGH_RAM + 0x10_0000;
const TARGETS: u64 = 10;
/// A slot that comes and goes, right behind another one.
const EXTRA: u64 = LOW_RAM + LOW_LEN;
const EXTRA_LEN: u64 = 2 << 20;
/// Two pages in two slots.
const ACROSS: u64 = EXTRA - PAGE;

/// The kinds of failures that are injected.
const KINDS: [&str; 3] = ["failslab", "fail_page_alloc", "fail_iommufd"];
/// The thread that serves requests, and the one that serves vhost-user messages.
const WORKER: &str = "vring_worker";
const PROTOCOL: &str = "vhost-user";

/// A setting of one kind of failures.
fn set(kind: &str, name: &str, value: &str) {
    let path = format!("/sys/kernel/debug/{kind}/{name}");
    fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// One thread of the daemon's, whose calls fail on demand.
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

    /// The n-th call that can fail does.
    fn fail_nth(&self, n: u32) {
        fs::write(self.directory.join("fail-nth"), n.to_string()).expect("fail-nth");
    }

    /// No more failures; whether there was the one.
    fn has_failed(&self) -> bool {
        let path = self.directory.join("fail-nth");
        let left = fs::read_to_string(&path).expect("fail-nth");
        self.fail_nth(0);
        left.trim() == "0"
    }

    /// Whether a share of all calls fails.
    fn fail_at_random(&self, on: bool) {
        let flag = if on { "1" } else { "0" };
        fs::write(self.directory.join("make-it-fail"), flag).expect("make-it-fail");
    }
}

/// What became of something that was asked of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Answered with a status.
    Status(u8),
    /// The connection is closed.
    Gone,
}

/// All that the daemon says of endpoints and mappings.
#[derive(Clone, Debug, PartialEq, Eq)]
struct View {
    /// State, what DMA meets, and domain, by endpoint.
    endpoints: Vec<(String, String, Option<u32>)>,
    domains: BTreeMap<u32, Vec<Line>>,
}

/// First, last, guest-physical address, access, MMIO.
type Line = (u64, u64, u64, String, bool);

impl View {
    fn is_quarantined(&self, n: usize) -> bool {
        self.endpoints[n].0 == "quarantined"
    }

    /// Where a write of a device's to an address leads.
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

/// A VM with two devices of the host's and a slot that comes and goes.
struct FaultBed {
    vm: Bed,
    devices: [TestDev; 2],
    extra: Arc<fs::File>,
}

impl FaultBed {
    fn new(way: Way) -> Self {
        for kind in KINDS {
            // No stack trace for each, which takes longer than all the rest.
            set(kind, "verbose", "0");
            set(kind, "task-filter", "Y");
            set(kind, "probability", "0");
            set(kind, "times", "-1");
            set(kind, "space", "0");
            set(kind, "interval", "1");
        }
        // Else nearly all allocations are spared.
        set("failslab", "ignore-gfp-wait", "N");
        set("fail_page_alloc", "ignore-gfp-wait", "N");
        set("fail_page_alloc", "min-order", "0");
        let names = words("VIOMMU_TESTDEV");
        let vm = Bed::new(way, &[&names[0], &names[1]]);
        let mut bed = Self {
            vm,
            devices: [0, 1].map(|n| TestDev::new(&names[n])),
            extra: Arc::new(memfd(EXTRA_LEN)),
        };
        bed.clean();
        // What is only made once is made.
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

    /// The pages a device might write to, and what is in the beginning of each.
    fn pages(&self) -> Vec<(u64, Vec<u8>)> {
        let away = Memory {
            regions: Vec::from_iter((!self.has_extra()).then(|| self.extra())),
        };
        let identity = (0..PAGES).map(|n| WINDOW + n * PAGE);
        let targets = (0..TARGETS).map(|n| TARGET + n * PAGE);
        identity
            .chain(targets)
            .chain([ACROSS, EXTRA])
            .map(|gpa| {
                let memory = if gpa == EXTRA && !self.has_extra() {
                    &away
                } else {
                    &self.vm.guest.memory
                };
                (gpa, memory.read(gpa, 256))
            })
            .collect()
    }

    /// What the devices reach is what the view says, and bytes arrive where it says.
    fn check_reach(&self, reach: impl Fn(usize, u64) -> Option<u64>, what: &str) {
        let mut expected: BTreeMap<u64, Vec<u8>> = self
            .pages()
            .into_iter()
            .map(|(gpa, bytes)| (gpa, vec![0; bytes.len()]))
            .collect();
        for (n, device) in self.devices.iter().enumerate() {
            for page in 0..PAGES {
                let iova = WINDOW + page * PAGE;
                // A place of its own for each device and address.
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
                    let bytes = expected.get_mut(&gpa).expect("a page that is looked at");
                    let at = offset as usize;
                    bytes[at..at + 4].copy_from_slice(&TestDev::PATTERN.to_le_bytes());
                    bytes[at + 4..at + 8].copy_from_slice(&TestDev::PATTERN.to_le_bytes());
                }
            }
        }
        for (gpa, bytes) in self.pages() {
            assert!(
                bytes == expected[&gpa],
                "{what}: page {gpa:#x} is not as it should be\n{:#?}",
                self.view()
            );
            if bytes.iter().any(|byte| *byte != 0) {
                self.vm.guest.memory.write(gpa, &vec![0; bytes.len()]);
            }
        }
    }

    fn check(&self, view: &View, what: &str) {
        self.check_reach(|n, iova| view.gpa_of(n, iova), what);
    }

    fn log(&self) -> String {
        let log = self.vm.daemon.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(6)..].join("\n")
    }

    /// Both devices blocked, in no domain, and all memory there. That this is possible, whatever has
    /// happened, is a part of what is tested.
    fn clean(&mut self) {
        if !self.has_extra() {
            let extra = self.extra();
            self.vm.guest.add_region(extra);
        }
        // Filling the host's tables for bypass mode takes long, so it is only on where it matters.
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
            // As its driver does: the daemon may have stopped it.
            Function::new(&name).enable();
        }
    }

    /// Whether devices in no domain are in bypass mode.
    fn set_bypass(&mut self, on: bool) {
        self.vm.guest.set_config(CONFIG_BYPASS, &[on.into()]);
    }

    fn attach(&mut self, domain: u32, n: usize) {
        assert_eq!(self.vm.guest.attach(domain, endpoint(n)), OK);
    }

    /// Device 1 in a domain with a few mappings.
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

    /// The daemon has closed the connection: nothing is reached any more. Another VMM, which finds
    /// all as a first one does.
    fn reconnect(&mut self) {
        let daemon = &self.vm.daemon;
        daemon.wait_for("the end of the connection", || {
            daemon.status()["connected"] == false
        });
        self.check_reach(|_, _| None, "without a VMM");
        let regions = self.vm.guest.memory.regions.iter().map(Region::duplicate);
        let regions = regions.collect();
        let mut guest = Guest::connect_with(self.vm.daemon.stream(), Setup::default(), regions);
        guest.forget_rings();
        guest.driver_ok();
        self.vm.guest = guest;
        // Served once, it has settled all endpoints.
        self.vm.guest.probe(endpoint(0));
        self.clean();
    }
}

/// Something the daemon is asked for, with one of its calls failing.
struct Case {
    name: &'static str,
    /// The thread that does it.
    thread: &'static str,
    /// From a clean bed to where it begins.
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
        name: "DETACH to blocked mode, the domain's end",
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
        name: "a slot goes",
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
                Err(_) => Outcome::Gone,
            }
        },
    },
    Case {
        name: "a slot comes",
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
                Err(_) => Outcome::Gone,
            }
        },
    },
];

/// The calls that fail: all of the first ones, then some.
fn places() -> impl Iterator<Item = u32> {
    std::iter::successors(Some(1u32), |n| Some(n + 1 + n.saturating_sub(24) / 3))
}

/// How often a case ended how.
#[derive(Debug, Default)]
struct Ends {
    done: u32,
    refused: u32,
    quarantined: u32,
    gone: u32,
}

impl Case {
    /// Does it, with every call failing in turn.
    fn sweep(&self, bed: &mut FaultBed) {
        (self.prepare)(bed);
        let before = bed.view();
        bed.check(&before, self.name);
        assert_eq!((self.act)(bed), Outcome::Status(OK), "{}", self.name);
        let after = bed.view();
        bed.check(&after, self.name);
        bed.clean();
        let mut ends = Ends::default();
        for n in places() {
            let what = format!("{}, call {n} fails", self.name);
            // More than there are pages of guest RAM.
            assert!(n < 20_000, "{what}: no end");
            (self.prepare)(bed);
            assert_eq!(bed.view(), before, "{what}");
            let victim = Victim::new(bed, self.thread);
            victim.fail_nth(n);
            let outcome = (self.act)(bed);
            if outcome == Outcome::Gone {
                ends.gone += 1;
                bed.reconnect();
                continue;
            }
            let failed = victim.has_failed();
            let now = bed.view();
            bed.check(&now, &what);
            let quarantined = (0..2).any(|n| now.is_quarantined(n));
            match outcome {
                _ if quarantined => {
                    ends.quarantined += 1;
                    // The mappings are as they were, or as they were to be.
                    assert!(
                        now.domains == before.domains || now.domains == after.domains,
                        "{what}: {now:#?}"
                    );
                    if self.thread == WORKER {
                        assert_eq!(outcome, Outcome::Status(DEVERR), "{what}");
                    }
                }
                Outcome::Status(OK) => {
                    ends.done += 1;
                    assert_eq!(now, after, "{what}");
                }
                Outcome::Status(_) | Outcome::Gone => {
                    ends.refused += 1;
                    assert_eq!(now, before, "{what}");
                }
            }
            bed.clean();
            if !failed {
                assert_eq!(outcome, Outcome::Status(OK), "{what}");
                assert!(!quarantined, "{what}");
                break;
            }
        }
        eprintln!("    {}: {ends:?}", self.name);
    }
}

/// What the daemon holds of the system.
fn holdings(bed: &FaultBed) -> (usize, u64, Option<u32>) {
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

fn sweep(way: Way) {
    eprintln!("{way:?}");
    let mut bed = FaultBed::new(way);
    let held = holdings(&bed);
    let rss = bed.vm.daemon.rss_kib();
    for case in &CASES {
        case.sweep(&mut bed);
    }
    assert_eq!(holdings(&bed), held, "something is left behind");
    let now = bed.vm.daemon.rss_kib();
    assert!(now < rss + 2048, "{rss} KiB became {now} KiB");
}

/// Something at random that a driver may ask for, sensible or not.
fn any_request(bed: &mut FaultBed, rng: &mut Rng) -> u8 {
    let domain = 1 + rng.below(2) as u32;
    let n = rng.below(2) as usize;
    let page = rng.below(PAGES - 1);
    match rng.below(16) {
        0..=3 => bed.vm.guest.attach(domain, endpoint(n)),
        4 => bed.vm.guest.attach_bypass(3, endpoint(n)),
        5 => bed.vm.guest.detach(domain, endpoint(n)),
        6 => bed.vm.guest.detach(3, endpoint(n)),
        7..=10 => bed.map(domain, page, 1, TARGET + rng.below(TARGETS) * PAGE, RW),
        11 => bed.map(domain, page, 2, ACROSS, RW),
        12 => bed.map(domain, page, 1, TARGET, READ),
        13..=14 => bed.unmap(domain, page, 1 + rng.below(PAGES - page)),
        _ => bed.unmap(domain, 0, PAGES),
    }
}

/// One failure after the other, so that what undoes a request fails too.
fn storm(way: Way) {
    const ROUNDS: u32 = 150;
    eprintln!("{way:?}");
    let mut bed = FaultBed::new(way);
    let held = holdings(&bed);
    let mut rng = Rng::new(way as u64);
    let mut ends = Ends::default();
    for round in 0..ROUNDS {
        let percent = [0, 2, 5, 20, 50][rng.below(5) as usize];
        let what = format!("round {round} at {percent} percent");
        let before = bed.view();
        for kind in KINDS {
            set(kind, "probability", &percent.to_string());
        }
        let victim = Victim::new(&bed, WORKER);
        victim.fail_at_random(true);
        let status = any_request(&mut bed, &mut rng);
        victim.fail_at_random(false);
        let now = bed.view();
        for (n, name) in words("VIOMMU_TESTDEV").iter().enumerate() {
            // The daemon may have stopped it; its driver starts it over where it may be used.
            if !now.is_quarantined(n) {
                Function::new(name).enable();
            }
        }
        bed.check(&now, &what);
        let quarantined = (0..2).any(|n| now.is_quarantined(n));
        match status {
            OK => ends.done += 1,
            _ if quarantined => ends.quarantined += 1,
            _ => {
                ends.refused += 1;
                assert_eq!(now, before, "{what}");
            }
        }
    }
    eprintln!("    {ends:?}");
    bed.clean();
    assert_eq!(holdings(&bed), held, "something is left behind");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failures_at_random_leave_agreement() {
    for way in WAYS {
        storm(way);
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_agreement_shared() {
    sweep(Way::SharedAll);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_agreement_shared_pinning_what_is_mapped() {
    sweep(Way::SharedMapped);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_agreement_owned() {
    sweep(Way::Owned);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn failed_calls_leave_agreement_type1() {
    sweep(Way::Type1);
}
