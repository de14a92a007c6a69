//! Time of a reader's translation, and time of an UNMAP with readers.
#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a bench may stop"
)]

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vhost_device_iommu::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::MemorySlot;
use vhost_device_iommu::backends::shadow::Shadow;
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, Settings};
use vhost_device_iommu::page_table::Encoding;
use vhost_device_iommu::process::socket::SocketRights;
use vhost_device_iommu::shadow::{
    Limits, Registry, ShadowEndpoint, ShadowReader, ShadowServer, ShadowSocket,
};
use vhost_device_iommu::topology::{EndpointSpec, ReservedRegions, Topology};
use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion};

const ENDPOINT: EndpointId = EndpointId(0x18);
const DOMAIN: DomainId = DomainId(1);
const PAGE: u64 = 4096;
const RAM: u64 = 256 << 20;
/// Number of live mappings, one page each.
const MAPPINGS: u64 = 64 << 10;

struct Bed {
    iommu: Iommu,
    reader: ShadowReader,
    _server: ShadowServer,
    _folder: tempfile::TempDir,
}

#[expect(unsafe_code, reason = "memfd_create has no safe wrapper")]
fn memory() -> MemorySlot {
    // SAFETY: the name is a string with a final zero that outlives the call.
    let fd = unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a memfd");
    // SAFETY: the descriptor was just made and has no other owner.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(RAM).expect("room");
    let file = Arc::new(file);
    let backing = FileOffset::from_arc(file.clone(), 0);
    MemorySlot {
        range: GpaRange::from_len(Gpa(0), RAM).expect("not empty"),
        memory: Arc::new(MmapRegion::from_file(backing, RAM as usize).expect("mapped")),
        file,
        offset: 0,
        block_len: 4096,
        is_shared_memory: true,
        identity: (0, 0),
    }
}

impl Bed {
    fn new() -> Self {
        let settings = Settings {
            address_width: 48,
            page_sizes: PageMask::TABLE,
            last_domain: 15,
            bypass_at_boot: false,
            arena_limit: 64 << 20,
            encoding: Encoding::default(),
        };
        let spec = EndpointSpec {
            range: "00:03.0".parse().expect("an address"),
            group: None,
            reserved: Vec::new(),
        };
        let own = "00:01.0".parse().expect("an address");
        let topology = Topology::new(own, ReservedRegions::default(), &[spec]);
        let mut iommu = Iommu::new(settings, topology.expect("a topology")).expect("an arena");
        let endpoint = ShadowEndpoint {
            id: ENDPOINT,
            reserved: Vec::new(),
        };
        let registry = Registry::new(iommu.arena_mut(), vec![endpoint], Limits::default());
        let registry = Arc::new(registry.expect("shared"));
        let backend = Shadow::new(registry.clone(), &[ENDPOINT]);
        iommu
            .add_backend(Box::new(backend), &[ENDPOINT])
            .expect("added");
        iommu.set_memory(vec![memory()]);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let socket = ShadowSocket {
            rights: SocketRights::default(),
            path: &path,
            endpoints: vec![ENDPOINT],
        };
        let server = ShadowServer::start(registry, &[socket], drop).expect("a socket");
        iommu.attach(ENDPOINT, DOMAIN, false).expect("attached");
        for page in 0..MAPPINGS {
            // Pages that are adjacent in memory are never adjacent for the endpoint.
            let gpa = page * 40_503 % MAPPINGS * PAGE;
            iommu.map(DOMAIN, &at(page, gpa)).expect("mapped");
        }
        Self {
            iommu,
            reader: ShadowReader::connect(&path, ENDPOINT).expect("accepted"),
            _server: server,
            _folder: folder,
        }
    }
}

fn at(page: u64, gpa: u64) -> Mapping {
    Mapping {
        range: IovaRange::from_len(Iova(page * PAGE), PAGE).expect("not empty"),
        gpa: Gpa(gpa),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

/// Addresses in random order, each in another page than the one before.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % MAPPINGS * PAGE + 8 * (self.0 >> 60)
    }
}

fn translations(c: &mut Criterion) {
    let bed = Bed::new();
    let mut group = c.benchmark_group("shadow");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    let reader = &bed.reader;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    group.bench_function("address_only", |b| b.iter(|| random.next()));
    group.bench_function("translate_random_of_64k", |b| {
        b.iter(|| {
            let guard = reader.enter().expect("a word");
            let found = guard.translate(Iova(random.next()), Access::READ);
            found.expect("mapped").gpa
        });
    });
    group.bench_function("translate_same_page", |b| {
        b.iter(|| {
            let guard = reader.enter().expect("a word");
            let found = guard.translate(Iova(black_box(0x5008)), Access::READ);
            found.expect("mapped").gpa
        });
    });
    group.bench_function("translate_within_a_guard", |b| {
        let guard = reader.enter().expect("a word");
        b.iter(|| {
            let found = guard.translate(Iova(random.next()), Access::READ);
            found.expect("mapped").gpa
        });
    });
    let memory = reader.memory();
    for page in 0..MAPPINGS {
        let touched = memory.write_obj(page, GuestAddress(page * PAGE));
        touched.expect("mapped");
    }
    group.bench_function("vm_memory_random_of_64k", |b| {
        b.iter(|| {
            let found = memory.read_obj::<u64>(GuestAddress(random.next()));
            found.expect("mapped")
        });
    });
    group.bench_function("vm_memory_same_page", |b| {
        b.iter(|| {
            let found = memory.read_obj::<u64>(GuestAddress(black_box(0x5008)));
            found.expect("mapped")
        });
    });
    let plain = memory.get_backend();
    group.bench_function("vm_memory_without_iommu", |b| {
        b.iter(|| {
            let found = plain.read_obj::<u64>(GuestAddress(random.next()));
            found.expect("memory")
        });
    });
    group.finish();
}

fn unmaps(c: &mut Criterion) {
    let mut group = c.benchmark_group("shadow_unmap");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    for busy in [false, true] {
        let mut bed = Bed::new();
        let range = IovaRange::from_len(Iova(0), PAGE).expect("not empty");
        let reader = bed.reader.clone();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = busy.then(|| {
            std::thread::spawn(move || {
                let memory = reader.memory();
                while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    let found = memory.read_obj::<u64>(GuestAddress(PAGE));
                    black_box(found.expect("mapped"));
                }
            })
        });
        let name = if busy { "busy_reader" } else { "idle_reader" };
        group.bench_function(name, |b| {
            b.iter(|| {
                bed.iommu.unmap(DOMAIN, range).expect("unmapped");
                bed.iommu.map(DOMAIN, &at(0, 0)).expect("mapped");
            });
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Some(thread) = thread {
            thread.join().expect("no panic");
        }
    }
    group.finish();
}

criterion_group!(benches, translations, unmaps);
criterion_main!(benches);
