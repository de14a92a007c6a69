//! The daemon dies, or is replaced, while a VMM and its driver go on: nothing of what the guest sees may differ from a daemon
//! that lives. The VMM, the driver and the service manager are the test's own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

#[path = "../virtio_pci/bed.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod bed;
#[path = "../common/mod.rs"]
mod common;
#[path = "../vfio_user_messages/connection.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod connection;
mod emulated;
mod hotplug;
mod pci;
mod upgrade;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP, EP2, EP3};
use common::guest::{Guest, HIGH_RAM, Layout, Setup};
use common::kept::Keeper;
use common::memory::Region;
use common::rng::Rng;
use common::wire::{self, DEVERR, INVAL, NOENT, OK, RANGE, RW, TAIL};

const PAGE: u64 = 0x1000;
const ARGS: [&str; 8] = [
    "--iommu",
    "00:05.0",
    "--endpoint",
    "00:06.0",
    "--endpoint",
    "00:07.0",
    "--endpoint",
    "00:08.0",
];

/// Kills in a run of the suite; the environment can ask for more.
fn kills() -> u32 {
    let more = std::env::var("VIOMMU_KILLS").ok();
    more.map_or(100, |text| text.parse().expect("VIOMMU_KILLS is a number"))
}

fn start() -> (Keeper, Daemon) {
    let keeper = Keeper::empty();
    let daemon = Daemon::kept(&keeper, &ARGS);
    (keeper, daemon)
}

/// The mappings that a domain should have, page by page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model(BTreeMap<u32, BTreeMap<u64, (u64, u64)>>);

#[derive(Clone, Copy, Debug)]
enum Req {
    Attach(u32, u32),
    Detach(u32, u32),
    Map(u32, u64, u64, u64),
    Unmap(u32, u64, u64),
}

impl Req {
    fn random(rng: &mut Rng) -> Self {
        let domain = 1 + rng.below(3) as u32;
        let endpoint = [EP, EP2, EP3][rng.below(3) as usize];
        let first = rng.below(64);
        match rng.below(20) {
            0..=2 => Self::Attach(domain, endpoint),
            3 => Self::Detach(domain, endpoint),
            4..=13 => Self::Map(domain, first, 1 + rng.below(4), 0x100 + rng.below(64)),
            _ => Self::Unmap(domain, first, 1 + rng.below(16)),
        }
    }

    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Attach(domain, endpoint) => wire::attach(domain, endpoint, 0),
            Self::Detach(domain, endpoint) => wire::detach(domain, endpoint),
            Self::Map(domain, first, pages, gpa) => wire::map(
                domain,
                first * PAGE,
                (first + pages) * PAGE - 1,
                gpa * PAGE,
                RW,
            ),
            Self::Unmap(domain, first, pages) => {
                wire::unmap(domain, first * PAGE, (first + pages) * PAGE - 1)
            }
        }
    }
}

/// The specification's IOMMU, as small as it can be.
#[derive(Debug, Default)]
struct Spec {
    attached: BTreeMap<u32, u32>,
    /// First page, pages, page of the target; by domain.
    domains: BTreeMap<u32, BTreeMap<u64, (u64, u64)>>,
}

impl Spec {
    fn leave(&mut self, endpoint: u32) {
        if let Some(old) = self.attached.remove(&endpoint)
            && !self.attached.values().any(|domain| *domain == old)
        {
            self.domains.remove(&old);
        }
    }

    /// The status of a request.
    fn execute(&mut self, request: Req) -> u8 {
        match request {
            Req::Attach(domain, endpoint) => {
                if self.attached.get(&endpoint) != Some(&domain) {
                    self.leave(endpoint);
                    self.attached.insert(endpoint, domain);
                    self.domains.entry(domain).or_default();
                }
                OK
            }
            Req::Detach(domain, endpoint) => {
                if self.attached.get(&endpoint) != Some(&domain) {
                    return INVAL;
                }
                self.leave(endpoint);
                OK
            }
            Req::Map(domain, first, pages, gpa) => {
                let Some(table) = self.domains.get_mut(&domain) else {
                    return NOENT;
                };
                let overlaps =
                    |(&at, &(len, _)): (&u64, &(u64, u64))| at < first + pages && first < at + len;
                if table.iter().any(overlaps) {
                    return INVAL;
                }
                table.insert(first, (pages, gpa));
                OK
            }
            Req::Unmap(domain, first, pages) => {
                let Some(table) = self.domains.get_mut(&domain) else {
                    return NOENT;
                };
                let end = first + pages;
                let is_split = |(&at, &(len, _)): (&u64, &(u64, u64))| {
                    at < end && first < at + len && (at < first || at + len > end)
                };
                if table.iter().any(is_split) {
                    return RANGE;
                }
                table.retain(|&at, _| at < first || at >= end);
                OK
            }
        }
    }

    fn model(&self) -> Model {
        Model(self.domains.clone())
    }
}

fn model_of(daemon: &Daemon) -> Model {
    let domains = daemon.domains().into_iter().map(|id| {
        let id = id as u32;
        let mappings = daemon.mappings(id).into_iter();
        let pages = mappings.map(|(first, last, gpa, access, mmio)| {
            assert_eq!((access.as_str(), mmio), ("rw", false));
            (first / PAGE, ((last - first + 1) / PAGE, gpa / PAGE))
        });
        (id, pages.collect())
    });
    Model(domains.collect())
}

fn submit(guest: &mut Guest, request: Req) -> u16 {
    let bytes = request.bytes();
    let layout = Layout::plain(bytes.len(), TAIL);
    guest.submit(&bytes, &layout)
}

/// Sends batches of random requests; `during` is called once all of a batch are in the ring. Checks each answer, and the
/// daemon's state after each batch.
fn work(
    guest: &mut Guest,
    spec: &mut Spec,
    rng: &mut Rng,
    daemon: &mut Daemon,
    during: impl FnOnce(&mut Daemon),
) {
    let count = 1 + rng.below(40);
    let mut expected = BTreeMap::new();
    for _ in 0..count {
        let request = Req::random(rng);
        let head = submit(guest, request);
        expected.insert(head, (request, spec.execute(request)));
    }
    guest.kick();
    during(daemon);
    for _ in 0..count {
        let (head, reply) = guest.complete();
        let (request, status) = expected.remove(&head).expect("answered once");
        assert_eq!(reply.status(), status, "{request:x?}");
    }
    assert_eq!(model_of(daemon), spec.model());
}

/// Also the states of the endpoints.
fn endpoints_agree(daemon: &Daemon, spec: &Spec) {
    for endpoint in [EP, EP2, EP3] {
        let found = daemon.endpoint(endpoint);
        match spec.attached.get(&endpoint) {
            Some(domain) => {
                assert_eq!(found["state"], "attached", "{found}");
                assert_eq!(found["domain"], *domain, "{found}");
            }
            None => assert_eq!(found["state"], "unattached", "{found}"),
        }
    }
}

#[test]
fn a_driver_notices_no_kill() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    let seed = 1;
    let mut rng = Rng::new(seed);
    let mut spec = Spec::default();
    for kill in 0..kills() {
        work(&mut guest, &mut spec, &mut rng, &mut daemon, |_| ());
        let pause = Duration::from_micros(rng_below(kill));
        work(&mut guest, &mut spec, &mut rng, &mut daemon, |daemon| {
            thread::sleep(pause);
            daemon.die(&mut keeper);
        });
        endpoints_agree(&daemon, &spec);
        let life = &daemon.status()["life"];
        assert_eq!(life["state"], "taken-over", "{life}");
        assert_eq!(life["number"], kill + 2, "{life}");
        assert_eq!(life["lost"].as_array().map(Vec::len), Some(0), "{life}");
    }
}

/// Pauses of 0 to 2 ms, in steps that do not repeat soon.
fn rng_below(kill: u32) -> u64 {
    u64::from(kill) * 37 % 2000
}

#[test]
fn a_driver_notices_no_planned_restart() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    let mut rng = Rng::new(2);
    let mut spec = Spec::default();
    for _ in 0..kills() / 4 {
        work(&mut guest, &mut spec, &mut rng, &mut daemon, |daemon| {
            daemon.terminate();
            let status = daemon.wait_for_end();
            assert!(status.success(), "{status}");
            daemon.start_again(&mut keeper);
        });
        endpoints_agree(&daemon, &spec);
    }
    // Nothing is kept that nobody needs: lives leave nothing behind.
    keeper.take();
    assert!(keeper.files.len() < 20, "{:?}", keeper.files.keys());
}

#[test]
fn deaths_of_a_daemon_that_takes_over_lose_nothing() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    let mut rng = Rng::new(3);
    let mut spec = Spec::default();
    for round in 0..kills() / 2 {
        work(&mut guest, &mut spec, &mut rng, &mut daemon, |daemon| {
            daemon.kill();
            // The next one dies at some moment of its start.
            daemon.start_and_kill(
                &mut keeper,
                Duration::from_micros(u64::from(round) * 331 % 40_000),
            );
            daemon.start_again(&mut keeper);
        });
        endpoints_agree(&daemon, &spec);
    }
}

#[test]
fn a_vmm_that_ends_meanwhile_leaves_no_domains() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map(1, 0, 0xfff, 0x1000, RW), OK);
    daemon.kill();
    drop(guest);
    daemon.start_again(&mut keeper);
    daemon.wait_for("the end of the connection", || {
        let status = daemon.status();
        status["connected"] == false && daemon.domains().is_empty()
    });
    // The next VMM begins anew.
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert!(daemon.mappings(1).is_empty());
}

#[test]
fn guest_memory_and_reboots_go_on_after_a_kill() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    daemon.die(&mut keeper);
    assert_eq!(guest.map(1, 0, 0xfff, 0x1000, RW), OK);
    // The VMM adds memory.
    guest.add_region(Region::new(0x2_0000_0000, 1 << 20));
    assert_eq!(guest.map(1, PAGE, 2 * PAGE - 1, 0x2_0000_0000, RW), OK);
    daemon.die(&mut keeper);
    let found = daemon.translate(EP, PAGE);
    assert_eq!(found["backed"], true, "{found}");
    assert_eq!(daemon.translate(EP, 0)["backed"], true);
    drop(guest.remove_region(0x2_0000_0000));
    daemon.die(&mut keeper);
    assert_eq!(daemon.translate(EP, PAGE)["backed"], false);
    assert_eq!(daemon.translate(EP, 0)["backed"], true);
    // A new driver starts.
    guest.reboot();
    assert!(daemon.domains().is_empty());
    daemon.die(&mut keeper);
    assert!(daemon.domains().is_empty());
    assert_eq!(guest.attach(2, EP2), OK);
    assert_eq!(guest.map(2, 0, 0xfff, HIGH_RAM, RW), OK);
    // The daemon dies while the guest is paused, and while it resets.
    guest.stop_rings();
    daemon.die(&mut keeper);
    guest.driver_ok();
    assert_eq!(daemon.gpa_of(EP2, 0), Some(HIGH_RAM));
    assert_eq!(guest.map(2, PAGE, 2 * PAGE - 1, HIGH_RAM, RW), OK);
    guest.stop_rings();
    daemon.die(&mut keeper);
    guest.clear_rings();
    guest.bases = [0; 2];
    guest.driver_ok();
    assert_eq!(guest.attach(3, EP2), OK);
    assert!(daemon.mappings(2).is_empty());
}

/// The VMM reports the reset over QMP to nobody. It waits for a daemon that stops the rings.
#[test]
fn a_reset_while_no_daemon_runs_leaves_no_mapping_behind() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    for round in 0..5 {
        for (domain, endpoint) in [(1, EP), (2, EP2)] {
            assert_eq!(guest.attach(domain, endpoint), OK);
            assert_eq!(guest.map(domain, 0, 0xfff, 0x1000, RW), OK);
        }
        daemon.kill();
        thread::scope(|scope| {
            let reset = scope.spawn(|| guest.reboot());
            thread::sleep(Duration::from_millis(round * 20));
            assert!(!reset.is_finished(), "nobody answers");
            daemon.start_again(&mut keeper);
            reset.join().expect("the VMM goes on");
        });
        daemon.wait_for("the end of the domains", || daemon.domains().is_empty());
        assert_eq!(guest.unmap(1, 0, 0xfff), NOENT);
        assert_eq!(daemon.status()["life"]["state"], "taken-over");
    }
}

/// A state that does not add up: every endpoint is blocked, and a new driver is served.
#[test]
fn a_damaged_state_is_refused_and_said() {
    for (word, expected) in [(1, "version"), (9, "damaged"), (8, "damaged")] {
        let (mut keeper, mut daemon) = start();
        let mut guest = Guest::boot(&daemon);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map(1, 0, 0xfff, 0x1000, RW), OK);
        daemon.kill();
        keeper.take();
        let store = keeper
            .files
            .iter()
            .find(|(name, _)| name.starts_with("store."));
        let store = store.expect("a store").1.try_clone().expect("a copy");
        let store = std::fs::File::from(store);
        store.write_all_at(&[0x77; 8], word * 8).expect("written");
        daemon.start_again(&mut keeper);
        daemon.wait_for("the refusal", || daemon.status()["driver_unknown"] == true);
        let status = daemon.status();
        assert_eq!(status["life"]["state"], "refused", "{}", status["life"]);
        let reason = status["life"]["reason"].as_str().expect("a reason");
        assert!(reason.contains(expected), "{reason}");
        for endpoint in [EP, EP2, EP3] {
            assert_eq!(daemon.endpoint(endpoint)["dma"], "blocked");
            assert_ne!(daemon.translate(endpoint, 0)["result"], "ok");
        }
        assert_eq!(guest.attach(2, EP2), DEVERR);
        guest.reboot();
        assert_eq!(guest.attach(2, EP2), OK);
        assert_eq!(guest.map(2, 0, 0xfff, 0x1000, RW), OK);
        assert_eq!(daemon.gpa_of(EP2, 0), Some(0x1000));
    }
}

#[test]
fn what_the_keeper_has_lost_is_said() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    daemon.kill();
    keeper.take();
    keeper.files.retain(|name, _| !name.starts_with("file."));
    daemon.start_again(&mut keeper);
    daemon.wait_for("the end of the connection", || {
        daemon.status()["connected"] == false
    });
    assert!(daemon.domains().is_empty());
    let status = daemon.status();
    let lost = status["life"]["lost"].to_string();
    assert!(lost.contains("FileDescriptorStoreMax="), "{lost}");
}

/// Without any connection of the device.
#[test]
fn the_state_goes_on_however_an_emulated_device_is_isolated() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("vm.toml");
    let device = |isolation: &str| {
        let at = |name: &str| folder.path().join(name).display().to_string();
        format!(
            "address = \"00:05.0\"\n[[endpoint]]\naddress = \"00:06.0\"\n\
             vfio-user = {{ listen = {:?}, connect = {:?}, isolation = \"{isolation}\" }}\n",
            at("listen"),
            at("connect")
        )
    };
    for isolation in ["mappings", "messages"] {
        std::fs::write(&file, device(isolation)).expect("written");
        let mut keeper = Keeper::empty();
        let mut daemon = Daemon::kept(&keeper, &["--config", file.to_str().expect("UTF-8")]);
        assert_eq!(daemon.status()["life"]["kept"], true);
        let mut guest = Guest::boot(&daemon);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map(1, 0, 0xfff, 0x1000, RW), OK);
        daemon.die(&mut keeper);
        let life = &daemon.status()["life"];
        assert_eq!(life["state"], "taken-over", "{life}");
        assert!(daemon.gpa_of(EP, 0).is_some());
    }
}

/// How long a driver waits for an answer, from the death on. Not asserted.
#[test]
fn the_wait_is_short() {
    let (mut keeper, mut daemon) = start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let mut waits: Vec<Duration> = (0..20u64)
        .map(|page| {
            daemon.kill();
            let died = Instant::now();
            daemon.start_again(&mut keeper);
            assert_eq!(
                guest.map(1, page * PAGE, page * PAGE + 0xfff, 0x1000, RW),
                OK
            );
            died.elapsed()
        })
        .collect();
    waits.sort_unstable();
    println!(
        "from a death to the next answer: median {:?}, worst {:?}",
        waits[10], waits[19]
    );
}

#[test]
fn without_a_keeper_the_state_ends() {
    let daemon = Daemon::with_args(&[]);
    let status = daemon.status();
    assert_eq!(status["life"]["kept"], false);
    let _guest = Guest::connect(&daemon, Setup::default());
}
