//! Overhead of the daemon over the system calls that program the host's IOMMU. MAP and UNMAP
//! through the core and a backend alternate with the same system calls made directly, in the same
//! address space with a device attached.
//!
//! The bench needs a device bound to vfio-pci. It opens and attaches the device; the device does no
//! DMA:
//!
//! ```text
//! cargo bench --no-run --bench passthrough
//! qemu-scripts/l1.sh -- cargo bench --offline --bench passthrough
//! ```
//!
//! or, on a host with a free device, `cargo bench --bench passthrough -- 0000:65:00.0`. Without a
//! device, the bench measures only the daemon's own part, on a fake kernel that does nothing.
#![expect(clippy::expect_used, reason = "a bench ends by panicking")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "the counts of a bench are small"
)]

mod bare;
mod bed;
#[path = "../../tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../../tests/passthrough/devices.rs"]
mod devices;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../../tests/passthrough/host.rs"]
mod host;
mod no_kernel;
mod numbers;
mod ring;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../../tests/passthrough/bed.rs"]
mod vm_bed;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::rng::Rng;
use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange, Mapping};

use crate::bed::{Bed, RAM_LEN};
use crate::devices::Function;
use crate::numbers::{Compared, Row, median, report};

/// How a backend passes the domain's mappings to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    /// `VFIO_IOMMU_MAP_DMA`.
    Type1,
    /// `IOMMU_IOAS_MAP_FILE`: `pin = "mapped"`.
    Map,
    /// `IOMMU_IOAS_COPY`: `pin = "all"`.
    Copy,
}

impl Interface {
    const ALL: [Self; 3] = [Self::Type1, Self::Map, Self::Copy];

    /// The name in arguments.
    fn name(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Map => "map",
            Self::Copy => "copy",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Map => "iommufd MAP (pin = \"mapped\")",
            Self::Copy => "iommufd COPY (pin = \"all\")",
        }
    }
}

/// The side that makes the system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Daemon,
    Bare,
}

/// Size and number of the mappings.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    len: u64,
    /// Mappings that stay, with a gap after each for those of a batch.
    live: u64,
    /// Mappings made in one run, then removed in one run.
    batch: u64,
    /// Batches of each side in a round.
    pairs: usize,
}

const PAGE: Kind = Kind {
    name: "4 KiB",
    len: 4096,
    live: 1024,
    batch: 64,
    pairs: 48,
};
const BLOCK: Kind = Kind {
    name: "2 MiB",
    len: 2 << 20,
    live: 128,
    batch: 8,
    pairs: 48,
};

/// Rounds. Each runs in a process of its own, because the place of its memory decides which data
/// compete for the same cache lines.
const ROUNDS: usize = 15;
/// The first IOVA, with room for mappings of all kinds.
const FIRST: u64 = 0x10_0000_0000;
/// Number of single pages that are mapped and then unmapped by one request.
const MANY: u64 = 65536;
/// How often each side does that.
const MANY_ROUNDS: usize = 3;

/// The argument that makes a process run one round.
const ROUND: &str = "--round";

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let function = function();
    if let Some(interface) = std::env::args().skip_while(|a| a != ROUND).nth(1) {
        let interface = Interface::ALL.into_iter().find(|w| w.name() == interface);
        return round(interface.expect("an interface"), function.as_deref());
    }
    println!("us, medians of {ROUNDS} rounds.");
    println!("`own`: the daemon's own time, with a fake kernel that does nothing.");
    if let Some(function) = &function {
        println!("`daemon` and `bare`: with {function} attached. `added`: their difference.");
    }
    for interface in Interface::ALL {
        report(&rounds(interface, function.as_deref()));
    }
    let Some(function) = function else {
        println!(
            "\nNo device on this machine is bound to vfio-pci, so the bench ends. To compare with bare calls, run\n  \
             cargo bench --no-run --bench passthrough\n  \
             qemu-scripts/l1.sh -- cargo bench --offline --bench passthrough\n\
             or name a device bound to vfio-pci:\n  \
             cargo bench --bench passthrough -- 0000:65:00.0"
        );
        return;
    };
    println!("\nMany single pages; ms:");
    for interface in Interface::ALL {
        many(&mut Bed::with_device(interface, &function), interface);
    }
    println!("\nThrough the ring, from the kick to the last answer; us a request:");
    for interface in Interface::ALL {
        let [map, unmap] = ring::measure(interface, &function);
        let name = interface.title();
        println!("  {name:30} 4 KiB  MAP {map:7.1}  UNMAP {unmap:7.1}");
    }
}

/// Runs all rounds of one interface; each gives the same rows.
fn rounds(interface: Interface, function: Option<&str>) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for _ in 0..ROUNDS {
        let this = std::env::current_exe().expect("this program");
        let output = Command::new(this)
            .args(["--bench", ROUND, interface.name()])
            .args(function)
            .stderr(Stdio::inherit())
            .output()
            .expect("a round");
        assert!(output.status.success(), "a round fails");
        let text = String::from_utf8(output.stdout).expect("text");
        for (at, line) in text.lines().enumerate() {
            if at == rows.len() {
                rows.push(Row::new(interface, at));
            }
            rows[at].add(line);
        }
    }
    rows
}

/// Runs one round and prints a line for each row.
fn round(interface: Interface, function: Option<&str>) {
    let mut alone_bed = Bed::without_kernel(interface);
    let own = [PAGE, BLOCK].map(|kind| alone(&mut alone_bed, kind));
    let mut bed = function.map(|function| Bed::with_device(interface, function));
    for (kind, own) in [PAGE, BLOCK].into_iter().zip(own) {
        let compared = bed.as_mut().map(|bed| compare(bed, kind));
        for request in 0..2 {
            let compared = compared.map_or(String::new(), |c| {
                let Compared {
                    daemon,
                    bare,
                    added,
                } = c[request];
                format!(" {daemon} {bare} {added}")
            });
            println!("{}{compared}", own[request]);
        }
    }
}

/// The device to attach: the one named in the arguments, or the device of `l1.sh`.
fn function() -> Option<String> {
    let named = std::env::args().skip(1).find(|arg| arg.contains(':'));
    if let Some(named) = named {
        let driver = std::fs::read_link(Function::new(&named).path("driver"));
        let bound = driver.is_ok_and(|d| d.ends_with("vfio-pci"));
        assert!(
            bound,
            "{named} is not bound to vfio-pci; give the full address of a device that is"
        );
        return Some(named);
    }
    let offered = ["VIOMMU_TESTDEV", "VIOMMU_EDU"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .find_map(|words| words.split_whitespace().next().map(str::to_owned))?;
    Path::new("/dev/iommu").exists().then_some(offered)
}

/// Mapping number `n`; those with even numbers stay.
fn mapping(kind: Kind, n: u64) -> Mapping {
    let places = RAM_LEN / kind.len;
    Mapping {
        range: IovaRange::from_len(Iova(FIRST + n * kind.len), kind.len).expect("not empty"),
        gpa: Gpa((n ^ 0x5555) % places * kind.len),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

/// Mappings of a batch: distinct odd numbers in random order.
fn batch(kind: Kind, rng: &mut Rng) -> Vec<Mapping> {
    let mut chosen: Vec<u64> = Vec::new();
    while (chosen.len() as u64) < kind.batch {
        let n = 2 * rng.below(kind.live) + 1;
        if !chosen.contains(&n) {
            chosen.push(n);
        }
    }
    chosen.into_iter().map(|n| mapping(kind, n)).collect()
}

/// Microseconds for one MAP and one UNMAP of a batch.
fn time(bed: &mut Bed, side: Side, batch: &[Mapping]) -> [f64; 2] {
    let start = Instant::now();
    for mapping in batch {
        bed.map(side, mapping);
    }
    let mapped = start.elapsed();
    let start = Instant::now();
    for mapping in batch {
        bed.unmap(side, mapping.range);
    }
    let unmapped = start.elapsed();
    [mapped, unmapped].map(|t| each(t, batch.len()))
}

/// Medians of the daemon's side.
fn alone(bed: &mut Bed, kind: Kind) -> [f64; 2] {
    let all: Vec<_> = (0..kind.live).map(|n| mapping(kind, 2 * n)).collect();
    all.iter().for_each(|m| bed.map(Side::Daemon, m));
    let mut rng = Rng::new(1);
    let mut found = [Vec::new(), Vec::new()];
    for _ in 0..4 * kind.pairs {
        let times = time(bed, Side::Daemon, &batch(kind, &mut rng));
        found.iter_mut().zip(times).for_each(|(f, t)| f.push(t));
    }
    all.iter().for_each(|m| bed.unmap(Side::Daemon, m.range));
    found.map(|mut f| median(&mut f))
}

/// Both sides in turn, with the same mappings.
fn compare(bed: &mut Bed, kind: Kind) -> [Compared; 2] {
    let all: Vec<_> = (0..kind.live).map(|n| mapping(kind, 2 * n)).collect();
    all.iter().for_each(|m| bed.map(Side::Daemon, m));
    let mut rng = Rng::new(2);
    let mut pairs = [Vec::new(), Vec::new()];
    for n in 0..kind.pairs {
        let batch = batch(kind, &mut rng);
        // The sides take turns in going first, because the second one finds warmer caches.
        let (daemon, bare) = if n % 2 == 0 {
            let daemon = time(bed, Side::Daemon, &batch);
            (daemon, time(bed, Side::Bare, &batch))
        } else {
            let bare = time(bed, Side::Bare, &batch);
            (time(bed, Side::Daemon, &batch), bare)
        };
        for (which, pairs) in pairs.iter_mut().enumerate() {
            pairs.push((daemon[which], bare[which]));
        }
    }
    all.iter().for_each(|m| bed.unmap(Side::Daemon, m.range));
    pairs.map(|pairs| Compared::of(&pairs))
}

/// Maps adjacent single pages, then unmaps them all with one UNMAP.
fn many(bed: &mut Bed, interface: Interface) {
    let count = bed.room().min(MANY);
    let all = IovaRange::from_len(Iova(FIRST), count * PAGE.len).expect("not empty");
    let mut times = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    for _ in 0..MANY_ROUNDS {
        for (side, times) in [Side::Daemon, Side::Bare].into_iter().zip(&mut times) {
            let start = Instant::now();
            for n in 0..count {
                bed.map(side, &mapping(PAGE, n));
            }
            let mapped = start.elapsed();
            let start = Instant::now();
            bed.unmap(side, all);
            times[0].push(mapped.as_secs_f64() * 1e3);
            times[1].push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let [daemon, bare] = times.map(|side| side.map(|mut t| median(&mut t)));
    println!(
        "  {:30} {count} times MAP {:.0} (bare {:.0}), one UNMAP of all {:.0} (bare {:.0})",
        interface.title(),
        daemon[0],
        bare[0],
        daemon[1],
        bare[1]
    );
}

/// The time of each of `count`, in microseconds.
fn each(time: Duration, count: usize) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}
