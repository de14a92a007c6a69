//! Time of a MAP, an UNMAP and a translation, and memory of a mapping.

#![expect(clippy::expect_used, reason = "a bench may stop")]

#[path = "common/fragment.rs"]
mod fragment;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange};
use vhost_device_iommu::page_table::{Arena, Encoding, Format, Levels, Mapping, Table};

const PAGE: u64 = 4096;
const BASE: u64 = 0xff_0000_0000;
const LIVE: [u64; 4] = [256, 4 << 10, 64 << 10, 1 << 20];
/// Tables that an SMMUv3 walks.
const ARM: Encoding = Encoding {
    format: Format::Vmsav8Stage1,
    base: 1 << 40,
};

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn shuffled(pages: u64, state: &mut u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    for i in (1..order.len()).rev() {
        let other = random(state) % (i as u64 + 1);
        order.swap(i, usize::try_from(other).expect("an index"));
    }
    order
}

fn range(page: u64, pages: u64) -> IovaRange {
    IovaRange::from_len(Iova(BASE + page * PAGE), pages * PAGE).expect("a range")
}

fn mapping(page: u64, pages: u64) -> Mapping {
    Mapping {
        range: range(page, pages),
        gpa: Gpa(0x1_0000_1000 + (page ^ 0x55) * PAGE),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

fn map(table: &mut Table, arena: &mut Arena, wanted: &Mapping) {
    let plan = table.plan_map(arena, wanted).expect("free");
    table.commit_map(arena, plan);
}

fn unmap(table: &mut Table, arena: &mut Arena, range: IovaRange) -> u64 {
    let plan = table.plan_unmap(arena, range).expect("whole mappings");
    let unmapped = table.commit_unmap(arena, plan);
    arena.reclaim();
    unmapped.mappings
}

/// A table with `live` single pages at random places of a window twice that size. Returns the pages
/// in random order: first those that are mapped, then those that are free.
fn half_full(live: u64, encoding: Encoding) -> (Arena, Table, Vec<u64>) {
    let mut arena = Arena::with_encoding(64 << 20, encoding).expect("an arena");
    let mut table = Table::new(&mut arena, Levels::Four).expect("a root");
    let order = shuffled(2 * live, &mut 0x1234_5678_9abc_def1);
    for page in order.iter().take(usize::try_from(live).expect("a count")) {
        map(&mut table, &mut arena, &mapping(*page, 1));
    }
    (arena, table, order)
}

/// Maps a batch of pages of `spare` and unmaps it, over and over. Returns the time of all maps if
/// `time_maps` holds, and of all unmaps otherwise.
fn batches(
    table: &mut Table,
    arena: &mut Arena,
    spare: &[u64],
    iterations: u64,
    time_maps: bool,
) -> Duration {
    let mut spent = Duration::ZERO;
    let mut left = usize::try_from(iterations).expect("a count");
    for batch in spare.chunks(128).cycle() {
        let batch = batch.get(..left.min(batch.len())).expect("in range");
        let start = Instant::now();
        for page in batch {
            map(table, arena, &mapping(*page, 1));
        }
        let mapped = start.elapsed();
        let start = Instant::now();
        for page in batch {
            unmap(table, arena, range(*page, 1));
        }
        spent += if time_maps { mapped } else { start.elapsed() };
        left -= batch.len();
        if left == 0 {
            break;
        }
    }
    spent
}

fn single_pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("page_table");
    let software = LIVE.map(|live| (live, live.to_string(), Encoding::default()));
    let arm = (64 << 10, "vmsav8/65536".to_owned(), ARM);
    for (live, id, encoding) in software.into_iter().chain([arm]) {
        let (mut arena, mut table, order) = half_full(live, encoding);
        let spare = order.split_at(usize::try_from(live).expect("a count")).1;
        for (name, time_maps) in [("map", true), ("unmap", false)] {
            group.bench_function(BenchmarkId::new(name, &id), |b| {
                b.iter_custom(|n| batches(&mut table, &mut arena, spare, n, time_maps));
            });
        }
        let mut pages = spare.iter().cycle();
        group.bench_function(BenchmarkId::new("map+unmap", &id), |b| {
            b.iter(|| {
                let page = *pages.next().expect("endless");
                map(&mut table, &mut arena, &mapping(page, 1));
                unmap(&mut table, &mut arena, range(page, 1))
            });
        });
    }
    // The most expensive page: each mapping makes three tables, and each unmapping frees them.
    let mut arena = Arena::new(1 << 20).expect("an arena");
    let mut table = Table::new(&mut arena, Levels::Four).expect("a root");
    group.bench_function("map+unmap/empty", |b| {
        b.iter(|| {
            map(&mut table, &mut arena, &mapping(0, 1));
            unmap(&mut table, &mut arena, range(0, 1))
        });
    });
    group.finish();
}

fn bulk(c: &mut Criterion) {
    let mut group = c.benchmark_group("page_table/bulk");
    let pages = 64 << 10;
    let mut arena = Arena::new(64 << 20).expect("an arena");
    let mut table = Table::new(&mut arena, Levels::Four).expect("a root");
    group.throughput(Throughput::Elements(pages));
    for (name, each) in [("unmap single pages", 1), ("unmap one mapping", pages)] {
        group.bench_function(name, |b| {
            b.iter_custom(|n| {
                let mut spent = Duration::ZERO;
                for _ in 0..n {
                    for first in (0..pages).step_by(usize::try_from(each).expect("a count")) {
                        map(&mut table, &mut arena, &mapping(first, each));
                    }
                    let start = Instant::now();
                    let gone = unmap(&mut table, &mut arena, range(0, pages));
                    spent += start.elapsed();
                    assert_eq!(gone, pages / each);
                }
                spent
            });
        });
    }
    group.bench_function("map one mapping", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            for _ in 0..n {
                let start = Instant::now();
                map(&mut table, &mut arena, &mapping(0, pages));
                spent += start.elapsed();
                unmap(&mut table, &mut arena, range(0, pages));
            }
            spent
        });
    });
    group.finish();
}

fn translate(c: &mut Criterion) {
    let live = 64 << 10;
    for (id, encoding) in [("65536", Encoding::default()), ("vmsav8/65536", ARM)] {
        let (arena, table, order) = half_full(live, encoding);
        let mut pages = order
            .iter()
            .take(usize::try_from(live).expect("a count"))
            .cycle();
        c.bench_function(&format!("page_table/translate/{id}"), |b| {
            b.iter(|| {
                let page = *pages.next().expect("endless");
                let found = table.translate(&arena, Iova(BASE + page * PAGE + 0x123));
                black_box(found.expect("mapped"))
            });
        });
    }
}

fn memory(_: &mut Criterion) {
    let live = 1 << 20;
    let mut arena = Arena::new(64 << 20).expect("an arena");
    let mut table = Table::new(&mut arena, Levels::Four).expect("a root");
    for page in 0..live {
        map(&mut table, &mut arena, &mapping(page, 1));
    }
    let bytes = table.frames() * PAGE;
    let hundredths = bytes * 100 / live;
    println!(
        "page_table/memory: {live} single pages side by side take {bytes} bytes of tables, \
         {}.{:02} bytes each",
        hundredths / 100,
        hundredths % 100
    );
    let each = bytes as f64 / live as f64;
    fragment::write(
        "memory",
        &json!({ "engine": { "bytes_per_mapping": each } }),
    );
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .without_plots();
    targets = single_pages, bulk, translate, memory
}
criterion_main!(benches);
