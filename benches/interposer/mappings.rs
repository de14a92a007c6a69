//! MAP and UNMAP of single pages with an emulated device in the domain, beside the same without a device; and MAPs with
//! a server that gets a window for each, in batches and one by one.

use std::collections::VecDeque;
use std::time::Instant;

use vhost_device_iommu::address::{Access, Mapping};
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, DOMAIN, RAM_LEN, answer, core_without_device, mapping, range};
use crate::median;

const PAGE: u64 = 4096;
/// Pages that one batch maps and unmaps.
const BATCH: u64 = 256;
const BATCHES: usize = 4000;
/// MAPs of a run, which a guest's driver sends before it kicks.
const RUN: u64 = 64;
const RUNS: usize = 1000;

/// Nanoseconds of MAP and UNMAP, by name.
pub fn measure() -> Vec<(&'static str, f64)> {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    let pair = bed.pair(|_, _| false);
    let mut bare = core_without_device();
    bare.attach(bed.endpoint(), DOMAIN, false)
        .expect("attached");
    let mut times: [Vec<f64>; 4] = Default::default();
    for batch in 0..BATCHES {
        let mut device = bed.iommu();
        for (iommu, at) in [(&mut bare, 0), (&mut *device, 2)] {
            let begin = Instant::now();
            for page in 0..BATCH {
                iommu.map(DOMAIN, &page_mapping(page)).expect("mapped");
            }
            let mapped = begin.elapsed();
            let begin = Instant::now();
            for page in 0..BATCH {
                let range = page_mapping(page).range;
                iommu.unmap(DOMAIN, range).expect("unmapped");
            }
            let unmapped = begin.elapsed();
            // The first batches bring tables and code into the processor's caches.
            if batch >= BATCHES / 10 {
                times[at].push(mapped.as_nanos() as f64 / BATCH as f64);
                times[at + 1].push(unmapped.as_nanos() as f64 / BATCH as f64);
            }
        }
    }
    drop(pair);
    let names = [
        "map_without_device",
        "unmap_without_device",
        "map_with_messages",
        "unmap_with_messages",
    ];
    let medians = times.iter_mut().filter_map(|t| median(t));
    names.into_iter().zip(medians).collect()
}

/// Nanoseconds of a MAP whose window the server gets with a descriptor: in a run, and by itself.
pub fn measure_runs() -> Vec<(&'static str, f64)> {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let (client, mut server) = bed.raw_pair();
    let server = std::thread::spawn(move || {
        while let Some(msg) = server.recv() {
            answer(&mut server, &msg);
        }
    });
    let run: Vec<_> = (0..RUN).map(page_mapping).collect();
    let mut iommu = bed.iommu();
    let mut times: [Vec<f64>; 2] = Default::default();
    for round in 0..RUNS {
        for (at, is_run) in [(0, true), (1, false)] {
            let mut outcomes = VecDeque::new();
            let begin = Instant::now();
            if is_run {
                iommu.map_all(DOMAIN, &run, &mut outcomes);
            } else {
                outcomes.extend(run.iter().map(|mapping| iommu.map(DOMAIN, mapping)));
            }
            let mapped = begin.elapsed();
            assert!(outcomes.iter().all(Result::is_ok));
            let all = range(0, RUN * PAGE);
            iommu.unmap(DOMAIN, all).expect("unmapped");
            if round >= RUNS / 10 {
                times[at].push(mapped.as_nanos() as f64 / RUN as f64);
            }
        }
    }
    // The interposer then closes the server's connection.
    drop(client);
    server.join().expect("it has answered all windows");
    let names = ["map_run_of_64_with_windows", "map_one_by_one_with_windows"];
    let medians = times.iter_mut().filter_map(|t| median(t));
    names.into_iter().zip(medians).collect()
}

/// The mapping of a page.
pub fn page_mapping(page: u64) -> Mapping {
    mapping(page * PAGE, page * PAGE % RAM_LEN, PAGE, Access::READ_WRITE)
}
