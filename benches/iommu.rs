//! Requests through the core: rules, plan and commit, for an endpoint without a backend.
#![expect(
    clippy::expect_used,
    reason = "a bench ends by panicking; its counts are small"
)]

use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, Predecessor, Settings};
use vhost_device_iommu::page_table::Encoding;
use vhost_device_iommu::topology::{EndpointSpec, PciRange, ReservedRegions, Topology};

const ENDPOINT: EndpointId = EndpointId(0x30);
const DOMAIN: DomainId = DomainId(1);
const LIVE: [u64; 4] = [256, 4096, 65536, 1 << 20];
/// Number of requests in one timed run.
const RUN: u64 = 256;

fn topology() -> Topology {
    let at = "00:06.0".parse().expect("an address");
    let spec = EndpointSpec {
        range: PciRange::new(at, at).expect("one function"),
        group: None,
        reserved: Vec::new(),
    };
    Topology::new(
        "00:05.0".parse().expect("an address"),
        ReservedRegions::new(Vec::new()).expect("none"),
        &[spec],
    )
    .expect("a topology")
}

fn settings() -> Settings {
    Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 0xffff,
        bypass_at_boot: false,
        arena_limit: 256 << 20,
        encoding: Encoding::default(),
    }
}

fn iommu() -> Iommu {
    let mut iommu = Iommu::new(settings(), topology()).expect("an arena");
    iommu.attach(ENDPOINT, DOMAIN, false).expect("attached");
    iommu
}

/// Page number `n`: even pages stay mapped, odd ones are mapped and unmapped.
fn page(n: u64) -> Mapping {
    Mapping {
        range: IovaRange::from_len(Iova(n << 12), 4096).expect("a page"),
        gpa: Gpa((n ^ 0x5555) << 12),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn requests(c: &mut Criterion) {
    let mut group = c.benchmark_group("iommu");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1));
    for live in LIVE {
        let mut iommu = iommu();
        for n in 0..live {
            iommu.map(DOMAIN, &page(2 * n)).expect("mapped");
        }
        let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
        let mut pages = move || -> Vec<Mapping> {
            let mut chosen: Vec<_> = (0..RUN).map(|_| 2 * rng.below(live) + 1).collect();
            chosen.sort_unstable();
            chosen.dedup();
            // The requests come in random order.
            for i in (1..chosen.len()).rev() {
                let j = rng.below(i as u64 + 1);
                chosen.swap(i, usize::try_from(j).expect("an index"));
            }
            chosen.into_iter().map(page).collect()
        };
        let mut timed = |iommu: &mut Iommu, iterations: u64, maps: bool| {
            let (mut total, mut done) = (Duration::ZERO, 0);
            while done < iterations {
                let pages = pages();
                let start = Instant::now();
                for page in &pages {
                    iommu.map(DOMAIN, page).expect("mapped");
                }
                let mapped = start.elapsed();
                let start = Instant::now();
                for page in &pages {
                    iommu.unmap(DOMAIN, page.range).expect("unmapped");
                }
                total += if maps { mapped } else { start.elapsed() };
                done += pages.len() as u64;
            }
            // Scaled to the number of iterations that criterion asked for.
            total.mul_f64(iterations as f64 / done as f64)
        };
        group.bench_function(BenchmarkId::new("map", live), |b| {
            b.iter_custom(|n| timed(&mut iommu, n, true));
        });
        group.bench_function(BenchmarkId::new("unmap", live), |b| {
            b.iter_custom(|n| timed(&mut iommu, n, false));
        });
        let mut rng = Rng(0x2545_f491_4f6c_dd1d);
        group.bench_function(BenchmarkId::new("translate", live), |b| {
            b.iter(|| {
                let iova = Iova((2 * rng.below(live)) << 12);
                black_box(iommu.translate(ENDPOINT, iova, Access::READ)).expect("mapped")
            });
        });
    }
    group.finish();
}

/// Taking over what an earlier process has left.
fn restore(c: &mut Criterion) {
    let mut group = c.benchmark_group("restore");
    group.sample_size(10);
    let live = LIVE[LIVE.len() - 1];
    let mut old = Iommu::new(settings(), topology()).expect("an arena");
    old.keep_journal();
    old.attach(ENDPOINT, DOMAIN, false).expect("attached");
    for n in 0..live {
        old.map(DOMAIN, &page(2 * n)).expect("mapped");
    }
    let (arena, store) = (old.arena().memory().clone(), old.store().memory().clone());
    // Each restore makes the store obsolete.
    let whole: Vec<_> = store.words().iter().take(1 << 14).collect();
    let whole: Vec<u64> = whole
        .iter()
        .map(|word| word.load(Ordering::Relaxed))
        .collect();
    group.bench_function(BenchmarkId::new("mappings", live), |b| {
        b.iter_custom(|n| {
            let mut total = Duration::ZERO;
            for _ in 0..n {
                for (index, word) in whole.iter().enumerate() {
                    store.store(index, *word);
                }
                let start = Instant::now();
                let mut iommu = Iommu::successor(settings(), topology()).expect("an arena");
                let restored = iommu.restore(Predecessor {
                    arena: arena.words(),
                    store: store.words(),
                });
                total += start.elapsed();
                assert_eq!(restored.expect("restored").mappings, live);
            }
            total
        });
    });
    group.finish();
}

criterion_group!(benches, requests, restore);
criterion_main!(benches);
