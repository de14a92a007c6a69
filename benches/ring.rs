//! Requests through the rings: the time that the device needs for a request, and the time that the
//! driver waits.
//!
//! The driver's part is as small as possible. Its chains are like the stock driver's: two
//! descriptors, one for the request and one for the tail behind it, and the chain freed last is
//! used first.
//!
//! `cargo bench --bench ring -- journal` measures only what the journal costs.
#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a bench ends by panicking; its counts are small"
)]

#[path = "../tests/virtio_pci/bed.rs"]
#[allow(dead_code, reason = "the bench uses a part of it")]
mod bed;
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/vfio_user_messages/connection.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "the bench uses a part of it")]
mod connection;
#[path = "common/fragment.rs"]
mod fragment;

use std::hint::spin_loop;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::guest::{Guest, HIGH_LEN as LEN, HIGH_RAM, LOW_RAM, RING_RAM, STOCK, Setup};
use common::memory::{Memory, Region, memfd};
use common::ring::{Desc, NEXT, Queue, WRITE};
use common::rng::Rng;
use common::wire::{self, OK, RW, TAIL};

use serde_json::json;
use tempfile::TempDir;
use vhost_device_iommu::args::RunArgs;
use vhost_device_iommu::config::Config;
use vhost_device_iommu::control::{ControlPaths, ControlServer, SetLimits, Subjects};
use vhost_device_iommu::daemon::Daemon;
use vhost_device_iommu::device::{Device, WorkerSettings};
use vhost_device_iommu::endpoints::changes::ChangeRecord;
use vhost_device_iommu::endpoints::hotplug::{ChangedVm, Hotplug};
use vhost_device_iommu::export::HotResetRegistry;
use vhost_device_iommu::faults::report::FaultReporter;
use vhost_device_iommu::iommu::{Iommu, Settings};
use vhost_device_iommu::locks::{Mutex, Rank};
use vhost_device_iommu::metrics::Metrics;
use vhost_device_iommu::page_table::Encoding;
use vhost_device_iommu::process::handover::Handover;
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::life::Life;
use vhost_device_iommu::process::socket::SocketRights;
use vhost_device_iommu::transport::vhost_user::backend::VhostUserDevice;
use vhost_device_iommu::transport::vhost_user::ring::VmmRing;
use vhost_user_backend::{VhostUserBackend, VringT};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::epoll::EventSet;

/// Mappings that stay.
const LIVE: u64 = 65_536;
/// Requests in the ring at a time.
const BATCH: u16 = 32;
const BATCHES: usize = 4000;
const ROUND_TRIPS: usize = 20_000;
const PAGE: u64 = 4096;
/// Bytes of a chain's buffer. The buffer holds the request, and the tail at `TAIL_AT`.
const SLOT: u64 = 128;
const TAIL_AT: u64 = 36;
const ENDPOINT: u32 = 0x30;
const DOMAIN: u32 = 1;
const RING_SIZE: u16 = 256;

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    if std::env::args().any(|arg| arg == "journal") {
        cost_of_the_journal();
        return;
    }
    let (request, watched) = device_alone();
    let round_trip = through_a_daemon();
    let over_virtio_pci = over_virtio_pci();
    let figures = json!({ "ring": {
        "request_ns": request,
        "request_while_mappings_are_listed_ns": watched,
        "round_trip_ns": round_trip,
        "round_trip_virtio_pci_ns": over_virtio_pci.round_trip,
        "kick_virtio_pci_ns": over_virtio_pci.kick,
        "kicks_virtio_pci_per_1000_requests": over_virtio_pci.kicks_per_1000,
    } });
    fragment::write("ring", &figures);
}

/// A device that is called on the driver's thread.
struct Alone {
    core: Arc<Mutex<Iommu>>,
    device: Arc<Device>,
    metrics: Arc<Metrics>,
    backend: VhostUserDevice,
    rings: [VmmRing; 2],
    memory: Memory,
    driver: Driver<'static>,
    rng: Rng,
}

impl Alone {
    /// A device with [`LIVE`] mappings.
    fn new(core: Iommu) -> Self {
        let files = [LOW_RAM, RING_RAM, HIGH_RAM].map(|gpa| (gpa, Arc::new(memfd(LEN))));
        let memory = Memory {
            regions: files
                .iter()
                .map(|(gpa, file)| Region::of_file(*gpa, LEN, file.clone(), 0))
                .collect(),
        };
        let seen = files.map(|(gpa, file)| {
            let range = MmapRegion::from_file(FileOffset::from_arc(file, 0), LEN as usize);
            GuestRegionMmap::new(range.expect("mapped"), GuestAddress(gpa)).expect("a region")
        });
        let seen = GuestMemoryMmap::from_regions(seen.into()).expect("guest memory");
        let seen = GuestMemoryAtomic::new(seen);
        let metrics = Arc::new(Metrics::default());
        let worker = WorkerSettings {
            longest_poll: Duration::ZERO,
            max_batch: 64,
            realtime: None,
        };
        let core = Arc::new(Mutex::new(Rank::Core, core));
        let device = Device::new(core.clone(), metrics.clone(), worker).expect("a device");
        let device = Arc::new(device);
        let backend = VhostUserDevice::new(device.clone());
        backend.update_memory(seen.clone()).expect("memory taken");
        backend.acked_features(STOCK);
        let driver = Driver::new(Queue::new(0, RING_SIZE, RING_RAM, true));
        let rings = [0, 1].map(|_| VmmRing::new(seen.clone(), RING_SIZE).expect("a ring"));
        let queue = &driver.queue;
        rings[0]
            .set_queue_info(queue.desc, queue.avail, queue.used)
            .expect("addresses");
        rings[0].set_queue_event_idx(true);
        rings[0].set_queue_ready(true);
        rings[0].set_enabled(true);
        let mut alone = Self {
            core,
            device,
            metrics,
            backend,
            rings,
            memory,
            driver,
            rng: Rng::new(1),
        };
        let Self { driver, memory, .. } = &mut alone;
        driver.put(memory, &wire::attach(DOMAIN, ENDPOINT, 0));
        alone.serve();
        for n in 0..LIVE {
            alone.driver.put(&alone.memory, &map_page(2 * n));
            if n % 128 == 127 {
                alone.serve();
            }
        }
        alone
    }

    /// Serves the ring. Returns the time that this takes the device.
    fn serve(&mut self) -> Duration {
        let start = Instant::now();
        let served = self.backend.handle_event(0, EventSet::IN, &self.rings, 0);
        let time = start.elapsed();
        served.expect("served");
        self.driver.take_all(&self.memory);
        time
    }

    /// Appends the time for a request, in nanoseconds, in each of twice `count` batches of `len` requests.
    fn time_batches(&mut self, count: usize, len: usize, times: &mut Vec<f64>) {
        for _ in 0..count {
            let pages = distinct_pages(&mut self.rng);
            for request in [map_page, unmap_page] {
                for &page in pages.iter().take(len) {
                    self.driver.put(&self.memory, &request(page));
                }
                times.push(self.serve().as_nanos() as f64 / len as f64);
            }
        }
    }
}

/// Times the device alone, called on this thread: take a batch off the ring, serve it, return it.
/// Measured by itself, and while an operator queries all mappings without a pause.
fn device_alone() -> (f64, f64) {
    let mut alone = Alone::new(core());
    let batches = |alone: &mut Alone, label| {
        let mut times = Vec::new();
        alone.time_batches(BATCHES, usize::from(BATCH), &mut times);
        report(label, &mut times)
    };
    let request = batches(&mut alone, "device alone, a request in batches of 32");
    let (core, device) = (alone.core.clone(), alone.device.clone());
    let operator = Operator::start(core, device, alone.metrics.clone());
    let watched = batches(
        &mut alone,
        "the same while all mappings are asked for without a pause",
    );
    println!(
        "  ({} answers of {LIVE} mappings meanwhile)",
        operator.stop()
    );
    (request, watched)
}

/// Times two devices in turn, one of which keeps the journal. Each figure is the tenth percentile of one round: other
/// processes only ever add to a time.
fn cost_of_the_journal() {
    const ROUNDS: usize = 150;
    let mut devices = [false, true].map(|keeps| {
        let mut core = core();
        if keeps {
            core.keep_journal();
        }
        Alone::new(core)
    });
    for len in [1, 4, usize::from(BATCH)] {
        let mut rounds = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (device, rounds) in devices.iter_mut().zip(&mut rounds) {
                let mut times = Vec::new();
                device.time_batches(100, len, &mut times);
                times.sort_by(f64::total_cmp);
                rounds.push(times[times.len() / 10]);
            }
        }
        let [without, with] = &rounds;
        let mut costs: Vec<_> = with.iter().zip(without).map(|(a, b)| a - b).collect();
        for list in rounds.iter_mut().chain([&mut costs]) {
            list.sort_by(f64::total_cmp);
        }
        let at = |list: &[f64], part: usize| list[list.len() * part / 100];
        println!(
            "batches of {len}: a request takes {:.1} ns without a journal and {:.1} ns with one (tenth percentiles of \
             {ROUNDS} rounds); the difference of a pair is {:.1} ns (from {:.1} to {:.1})",
            at(&rounds[0], 10),
            at(&rounds[1], 10),
            at(&costs, 50),
            at(&costs, 10),
            at(&costs, 90)
        );
    }
}

/// An operator who queries all mappings over and over.
struct Operator {
    over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
    _control: ControlServer,
    _directory: TempDir,
}

impl Operator {
    fn start(iommu: Arc<Mutex<Iommu>>, device: Arc<Device>, metrics: Arc<Metrics>) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path().join("control.sock");
        let access = SocketRights {
            mode: Some(0o600),
            group: None,
        };
        let places = ControlPaths {
            control: Some((path.clone(), access)),
            ..ControlPaths::default()
        };
        let config = Config::from_text(Path::new("bench"), "address = '00:05.0'");
        let config = config.expect("a configuration");
        let reporter = Arc::new(FaultReporter::new(metrics.clone(), 100));
        let keeper = Arc::new(Keeper::none());
        let vm = ChangedVm {
            config,
            record: ChangeRecord::unkept(),
        };
        let hotplug = Hotplug::new(
            vm,
            HotResetRegistry::default(),
            iommu.clone(),
            device.clone(),
            reporter,
            (keeper.clone(), Arc::new(Life::new(false))),
        );
        let subjects = Subjects {
            places: None,
            name: "bench".into(),
            iommu,
            device,
            metrics,
            readers: None,
            adoption: None,
            hotplug: Arc::new(hotplug),
            life: Arc::new(Life::new(false)),
            keeper,
            handover: Arc::new(Handover::default),
            limits: SetLimits {
                batch: 64,
                fault_rate: 100,
            },
            clients: Arc::default(),
        };
        let control = ControlServer::start(&places, subjects).expect("a control socket");
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let thread = std::thread::spawn(move || {
            let mut answers = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut stream = UnixStream::connect(&path).expect("connected");
                stream.write_all(b"mappings\n").expect("asked");
                std::io::copy(&mut stream, &mut std::io::sink()).expect("answered");
                answers += 1;
            }
            answers
        });
        Self {
            over,
            thread,
            _control: control,
            _directory: directory,
        }
    }

    fn stop(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client's thread")
    }
}

/// Times as the driver sees them, with a daemon that polls.
fn through_a_daemon() -> f64 {
    let directory = TempDir::new().expect("a temporary directory");
    let socket = directory.path().join("vhost.sock");
    let config = Config::try_from(&RunArgs {
        socket_path: Some(socket.clone()),
        iommu: Some("00:05.0".into()),
        endpoint: vec!["00:06.0".into()],
        ..RunArgs::default()
    });
    let mut daemon =
        Daemon::new(&config.expect("a configuration"), Arc::new(Keeper::none())).expect("a daemon");
    let stop = daemon.stop_handle();
    let thread = std::thread::spawn(move || daemon.run().expect("an orderly end"));
    let setup = Setup {
        queue_size: RING_SIZE,
        ..Setup::default()
    };
    let mut guest = Guest::connect_to(&socket, setup);
    guest.driver_ok();
    let memory = &guest.memory;
    let mut driver = Driver::new(guest.requests);
    driver.put(memory, &wire::attach(DOMAIN, ENDPOINT, 0));
    driver.wait(memory);
    let mut rng = Rng::new(2);
    driver.fill(memory, |driver| driver.wait(memory));

    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let page = 2 * rng.below(LIVE) + 1;
        for request in [map_page(page), unmap_page(page)] {
            let start = Instant::now();
            driver.put(memory, &request);
            driver.wait(memory);
            times.push(start.elapsed().as_nanos() as f64);
        }
    }
    let round_trip = report("round trip of one request", &mut times);
    let mut times = Vec::new();
    for _ in 0..BATCHES {
        let pages = distinct_pages(&mut rng);
        for request in [map_page, unmap_page] {
            let start = Instant::now();
            for &page in &pages {
                driver.put(memory, &request(page));
            }
            driver.wait(memory);
            times.push(start.elapsed().as_nanos() as f64 / f64::from(BATCH));
        }
    }
    report("both sides, a request in batches of 32", &mut times);
    drop(guest.frontend);
    stop.stop();
    thread.join().expect("the daemon's thread");
    round_trip
}

/// The figures of the virtio-pci transport.
struct OverVirtioPci {
    round_trip: f64,
    /// The driver's wait for one kick.
    kick: f64,
    kicks_per_1000: f64,
}

/// The same round trips with the daemon as a virtio-pci device: a kick is a message, for whose answer the driver waits.
fn over_virtio_pci() -> OverVirtioPci {
    let daemon = common::daemon::Daemon::over_vfio_user(bed::CONFIG);
    let mut vm = bed::Vm::new(&daemon);
    for gpa in [RING_RAM, HIGH_RAM] {
        let file = memfd(LEN);
        let body = connection::dma_map(bed::RW, 0, gpa, LEN);
        assert_eq!(vm.client.map(&body, &[std::os::fd::AsFd::as_fd(&file)]), 0);
        let region = Region::of_file(gpa, LEN, Arc::new(file), 0);
        vm.memory.regions.push(region);
    }
    vm.start(RING_SIZE);
    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS / 4 {
        let start = Instant::now();
        vm.kick_requests();
        times.push(start.elapsed().as_nanos() as f64);
    }
    let kick = report("virtio-pci: a kick with nothing in the ring", &mut times);
    let queue = std::mem::replace(&mut vm.requests, Queue::new(0, RING_SIZE, RING_RAM, true));
    let mut driver = Driver::new(queue);
    let bed::Vm { client, memory, .. } = &mut vm;
    let (memory, at) = (&*memory, bed::NOTIFY_REQUESTS);
    driver.notify = Some(Box::new(move || client.write(0, at, &[0, 0])));
    driver.put(memory, &wire::attach(DOMAIN, ENDPOINT, 0));
    driver.wait(memory);
    driver.fill(memory, |driver| driver.wait(memory));
    let mut rng = Rng::new(2);
    let (mut times, before) = (Vec::new(), driver.kicks);
    for _ in 0..ROUND_TRIPS {
        let page = 2 * rng.below(LIVE) + 1;
        for request in [map_page(page), unmap_page(page)] {
            let start = Instant::now();
            driver.put(memory, &request);
            driver.wait(memory);
            times.push(start.elapsed().as_nanos() as f64);
        }
    }
    let kicks_per_1000 = (driver.kicks - before) as f64 * 1000.0 / times.len() as f64;
    println!("virtio-pci: {kicks_per_1000:.1} kicks in 1000 round trips");
    let round_trip = report("virtio-pci: round trip of one request", &mut times);
    OverVirtioPci {
        round_trip,
        kick,
        kicks_per_1000,
    }
}

/// A driver with two descriptors and a buffer for each chain.
struct Driver<'a> {
    queue: Queue,
    free: Vec<u16>,
    put: u16,
    /// Sends a kick where it is a message.
    notify: Option<Box<dyn FnMut() + 'a>>,
    kicks: u64,
}

impl Driver<'_> {
    fn new(queue: Queue) -> Self {
        let free = (0..queue.size).step_by(2).rev().collect();
        Self {
            queue,
            free,
            put: 0,
            notify: None,
            kicks: 0,
        }
    }

    fn at(head: u16) -> u64 {
        RING_RAM + 0x40_0000 + SLOT * u64::from(head)
    }

    fn put(&mut self, memory: &Memory, request: &[u8]) {
        let head = self.free.pop().expect("a free chain");
        let at = Self::at(head);
        let tail = at + TAIL_AT;
        memory.write(at, request);
        memory.write(tail, &[0xff; TAIL]);
        let readable = Desc::new(at, request.len() as u32, NEXT, head + 1);
        self.queue.set_desc(memory, head, readable);
        let writable = Desc::new(tail, TAIL as u32, WRITE, 0);
        self.queue.set_desc(memory, head + 1, writable);
        self.put = self.put.wrapping_add(1);
        self.queue.publish(memory, head);
        if self.queue.kick(memory) {
            self.kicks += 1;
            if let Some(notify) = &mut self.notify {
                notify();
            }
        }
    }

    fn take(&mut self, memory: &Memory) -> bool {
        let Some((head, len)) = self.queue.take_used(memory) else {
            return false;
        };
        assert_eq!(len, TAIL as u32);
        let tail = memory.read(Self::at(head as u16) + TAIL_AT, TAIL);
        assert_eq!(tail[0], OK, "a request is refused");
        self.free.push(head as u16);
        true
    }

    fn take_all(&mut self, memory: &Memory) {
        while self.take(memory) {}
        assert_eq!(self.queue.used_idx, self.put, "a request is left");
    }

    fn wait(&mut self, memory: &Memory) {
        while self.queue.used_idx != self.put {
            if !self.take(memory) {
                spin_loop();
            }
        }
    }

    /// Makes the mappings that stay.
    fn fill(&mut self, memory: &Memory, mut serve: impl FnMut(&mut Self)) {
        for n in 0..LIVE {
            self.put(memory, &map_page(2 * n));
            if n % 128 == 127 {
                serve(self);
            }
        }
    }
}

fn core() -> Iommu {
    let config = Config::try_from(&RunArgs {
        // This socket is never made.
        socket_path: Some("unused.sock".into()),
        iommu: Some("00:05.0".into()),
        endpoint: vec!["00:06.0".into()],
        ..RunArgs::default()
    });
    let config = config.expect("a configuration");
    let settings = Settings {
        address_width: config.address_width,
        page_sizes: config.page_mask,
        last_domain: config.max_domains - 1,
        bypass_at_boot: config.bypass_at_boot,
        arena_limit: config.arena_limit,
        encoding: Encoding::default(),
    };
    Iommu::new(settings, config.topology).expect("a core")
}

fn map_page(n: u64) -> Vec<u8> {
    let gpa = HIGH_RAM + n * PAGE % LEN;
    wire::map(DOMAIN, n * PAGE, n * PAGE + PAGE - 1, gpa, RW)
}

fn unmap_page(n: u64) -> Vec<u8> {
    wire::unmap(DOMAIN, n * PAGE, n * PAGE + PAGE - 1)
}

/// Distinct pages between the mappings that stay.
fn distinct_pages(rng: &mut Rng) -> Vec<u64> {
    let mut pages = Vec::new();
    while pages.len() < usize::from(BATCH) {
        let page = 2 * rng.below(LIVE) + 1;
        if !pages.contains(&page) {
            pages.push(page);
        }
    }
    pages
}

/// Prints and returns the median.
fn report(label: &str, times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times[times.len() * part / 100];
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    println!(
        "{label}: {:.0} ns (a tenth below {:.0}, a tenth above {:.0}, mean {mean:.0})",
        at(50),
        at(10),
        at(90)
    );
    at(50)
}
