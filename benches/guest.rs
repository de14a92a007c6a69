//! What mapping costs a stock guest: the daemon beside QEMU's own virtio-iommu, in turn.
//!
//! `qemu-scripts/bench.sh` sets up what this needs and runs it.
#![allow(clippy::expect_used, reason = "a bench ends by panicking")]

#[path = "../tests/common/vm.rs"]
mod vm;

#[path = "common/fragment.rs"]
mod fragment;
#[path = "guest/plot.rs"]
mod plot;

use std::fs;
use std::time::Duration;

use serde_json::json;
use vhost_device_iommu::realtime::Realtime;
use vm::{Daemon, Kernel, Setup, Vm, VmOptions, Workplace};

/// The device that the kernel's benchmark maps for, and the one given to VFIO.
const DMA: &str = "0000:00:06.0";
const VFIO: &str = "0000:00:07.0";
const CONFIG: &str = r#"
memory = "512M"
address = "00:05.0"

[[endpoint]]
range = "00:06.0-00:07.0"
"#;
/// For the daemon whose worker comes before the guest's processors.
const PRIORITY: &str = "realtime-priority = 1\n";
const RUN: Duration = Duration::from_secs(120);
const DEFAULT_ROUNDS: usize = 5;

/// Name, the guest's mode, the command.
const MEASURES: [(&str, &str, &str); 7] = [
    ("strict", "DMA", "dma-bench 1 1"),
    ("strict_2_threads", "DMA", "dma-bench 2 1"),
    ("lazy", "DMA-FQ", "dma-bench 1 1"),
    ("lazy_2_threads", "DMA-FQ", "dma-bench 2 1"),
    ("vfio_page", "", "vfio-bench 0000:00:07.0 page 2048 6"),
    ("vfio_huge", "", "vfio-bench 0000:00:07.0 huge 32 40"),
    ("vfio_random", "", "vfio-bench 0000:00:07.0 random 1024 6"),
];

/// Who answers the guest's requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Iommu {
    Qemu,
    Daemon,
    /// The daemon with a realtime priority. Only for as many busy processors as the host has.
    Realtime,
}

/// Nanoseconds of one MAP and one UNMAP, as the guest sees it.
type Times = [f64; 2];

fn main() {
    // `cargo test --benches` runs this too, with nothing to measure.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let rounds = option("--rounds").map_or(DEFAULT_ROUNDS, |n| n.parse().expect("--rounds N"));
    let setup = Setup::from_environment();
    let kernel = host_kernel();
    let mut qemu: Vec<Vec<Times>> = vec![Vec::new(); MEASURES.len()];
    let (mut ours, mut realtime) = (qemu.clone(), qemu.clone());
    let allowed = Realtime::new(1);
    if let Err(cause) = &allowed {
        eprintln!("left out: {cause}");
    }
    for round in 0..rounds {
        // Each goes first in turn.
        let mut order = vec![Iommu::Qemu, Iommu::Daemon];
        order.extend(allowed.is_ok().then_some(Iommu::Realtime));
        if round % 2 == 1 {
            order.reverse();
        }
        for iommu in order {
            eprintln!("round {} of {rounds}: {}", round + 1, iommu.name());
            let into = match iommu {
                Iommu::Qemu => &mut qemu,
                Iommu::Daemon => &mut ours,
                Iommu::Realtime => &mut realtime,
            };
            for (all, times) in into
                .iter_mut()
                .zip(boot_and_measure(&setup, &kernel, iommu))
            {
                all.extend(times);
            }
        }
    }
    let mut rows = Vec::new();
    for (index, (name, ..)) in MEASURES.iter().enumerate() {
        rows.push(Row::new((*name).to_owned(), &qemu[index], &ours[index]));
        if !realtime[index].is_empty() {
            let name = format!("{name}_realtime");
            rows.push(Row::new(name, &qemu[index], &realtime[index]));
        }
    }
    print_table(&rows, rounds);
    fragment::leave("guest", &figures(&rows));
    if let Some(path) = option("--svg") {
        fs::write(path, plot::bars(&rows)).expect("plot written");
    }
}

impl Iommu {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU's own",
            Self::Daemon => "the daemon",
            Self::Realtime => "the daemon, realtime",
        }
    }

    fn answers(self, measure: &str) -> bool {
        self != Self::Realtime || measure.contains("2_threads")
    }
}

/// One measure: medians of both, and the ratios of the rounds. MAP first, then UNMAP.
pub struct Row {
    /// Its name.
    pub name: String,
    /// Medians, in nanoseconds.
    pub qemu: Times,
    /// Medians, in nanoseconds.
    pub ours: Times,
    /// Ours : QEMU's; least, median and greatest of the rounds.
    pub ratio: [[f64; 3]; 2],
}

impl Row {
    fn new(name: String, qemu: &[Times], ours: &[Times]) -> Self {
        let column = |times: &[Times], what: usize| times.iter().map(|t| t[what]).collect();
        let ratio = |what: usize| {
            let pairs = qemu.iter().zip(ours);
            let mut ratios: Vec<_> = pairs.map(|(q, o)| o[what] / q[what]).collect();
            ratios.sort_by(f64::total_cmp);
            [
                ratios[0],
                ratios[ratios.len() / 2],
                ratios[ratios.len() - 1],
            ]
        };
        Self {
            name,
            qemu: [0, 1].map(|what| median(column(qemu, what))),
            ours: [0, 1].map(|what| median(column(ours, what))),
            ratio: [0, 1].map(ratio),
        }
    }
}

/// What was measured, by measure.
fn boot_and_measure(setup: &Setup, kernel: &Kernel, iommu: Iommu) -> Vec<Option<Times>> {
    let place = Workplace::new("bench");
    let config = match iommu {
        Iommu::Realtime => format!("{PRIORITY}{CONFIG}"),
        Iommu::Qemu | Iommu::Daemon => CONFIG.to_owned(),
    };
    let daemon = Daemon::start(&place, &config);
    let mut arguments = daemon.qemu_args.clone();
    let mut daemon = match iommu {
        Iommu::Daemon | Iommu::Realtime => Some(daemon),
        Iommu::Qemu => {
            daemon.stop();
            arguments = with_qemus_own(arguments);
            None
        }
    };
    let mut extra = vec!["-smp".to_owned(), "2".to_owned()];
    for address in ["06.0", "07.0"] {
        extra.extend(["-device".to_owned(), format!("edu,addr={address}")]);
    }
    let options = VmOptions {
        kernel,
        append: "iommu.strict=1".into(),
        iommu: arguments,
        extra,
    };
    let mut vm = Vm::start(setup, &place, "vm", &options);
    vm.wait_until_up();
    vm.run("mount -t debugfs debugfs /sys/kernel/debug");
    let driver = format!("/sys/bus/pci/devices/{DMA}/driver_override");
    vm.run(&format!("echo dma_map_benchmark >{driver}"));
    vm.run(&format!("echo {DMA} >/sys/bus/pci/drivers_probe"));
    vm.run("ls /sys/kernel/debug/dma_map_benchmark");
    vm.run(&format!("vfio_bind {VFIO}"));
    let mut times = Vec::new();
    for (name, mode, command) in MEASURES {
        if !iommu.answers(name) {
            times.push(None);
            continue;
        }
        if mode == "DMA-FQ" {
            set_mode(&mut vm, mode);
        }
        if !mode.is_empty() {
            let now = vm.run(&format!("cat /sys/bus/pci/devices/{DMA}/iommu_group/type"));
            assert_eq!(now, [mode], "the guest's mode");
        }
        let before = daemon.as_mut().map(polled);
        let answer = vm.run_within(command, RUN).join("");
        if let (Some((polls, ns)), Some(daemon)) = (before, &mut daemon) {
            let (more, waited) = polled(daemon);
            let each = (waited - ns) as f64 / (more - polls).max(1) as f64;
            eprintln!("    {command}: {each:.0} ns from an answer to the next request");
        }
        let both = parse(&answer).unwrap_or_else(|| panic!("{command}: {answer}"));
        times.push(Some(both));
    }
    vm.kill();
    drop(daemon);
    times
}

/// How often the daemon's worker waited for the guest without sleeping, and how long in all.
fn polled(daemon: &mut Daemon) -> (u64, u64) {
    let status = daemon.status().0;
    ["polls_paid", "polls_paid_ns"]
        .map(|key| status["worker"][key].as_u64().unwrap_or(0))
        .into()
}

/// Gives the device's group another mode, which it takes while no driver is bound.
fn set_mode(vm: &mut Vm, mode: &str) {
    let device = format!("/sys/bus/pci/devices/{DMA}");
    vm.run(&format!("echo {DMA} >{device}/driver/unbind"));
    vm.run(&format!("echo {mode} >{device}/iommu_group/type"));
    vm.run(&format!("echo {DMA} >/sys/bus/pci/drivers_probe"));
}

/// QEMU's arguments for the daemon, as they are for the same machine with QEMU's own device.
fn with_qemus_own(arguments: Vec<String>) -> Vec<String> {
    let mut own = Vec::new();
    let mut words = arguments.into_iter();
    while let (Some(option), Some(value)) = (words.next(), words.next()) {
        match option.as_str() {
            "-chardev" | "-acpitable" => {}
            "-device" => own.extend([option, "virtio-iommu-pci,addr=05.0".into()]),
            _ => own.extend([option, value]),
        }
    }
    own
}

/// The kernel of the L1 machine, which has the benchmark, as a guest.
fn host_kernel() -> Kernel {
    let variable = |name: &str| {
        std::env::var(name)
            .unwrap_or_else(|_| panic!("{name} is not set; run qemu-scripts/bench.sh"))
    };
    Kernel {
        version: variable("VIOMMU_HOST_KERNEL_RELEASE"),
        image: variable("VIOMMU_HOST_KERNEL").into(),
        initramfs: variable("VIOMMU_L2_INITRAMFS").into(),
    }
}

/// "map 1200 unmap 900".
fn parse(answer: &str) -> Option<Times> {
    let mut words = answer.split_whitespace();
    (words.next()? == "map").then_some(())?;
    let map = words.next()?.parse().ok()?;
    (words.next()? == "unmap").then_some(())?;
    Some([map, words.next()?.parse().ok()?])
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn print_table(rows: &[Row], rounds: usize) {
    println!(
        "| measure | | QEMU's own, us | the daemon, us | ratio | least to greatest of {rounds} |"
    );
    println!("|---|---|---|---|---|---|");
    for row in rows {
        for (what, name) in ["map", "unmap"].into_iter().enumerate() {
            let [least, ratio, greatest] = row.ratio[what];
            println!(
                "| {} | {name} | {:.1} | {:.1} | {ratio:.2} | {least:.2} to {greatest:.2} |",
                row.name.replace('_', " "),
                row.qemu[what] / 1e3,
                row.ours[what] / 1e3,
            );
        }
    }
}

fn figures(rows: &[Row]) -> serde_json::Value {
    let all = rows.iter().map(|row| {
        let value = json!({
            "map_ratio": row.ratio[0][1],
            "unmap_ratio": row.ratio[1][1],
            "map_ns": row.ours[0],
            "unmap_ns": row.ours[1],
            "qemu_map_ns": row.qemu[0],
            "qemu_unmap_ns": row.qemu[1],
        });
        (row.name.clone(), value)
    });
    all.collect::<serde_json::Map<_, _>>().into()
}

/// The value after `name` on the command line.
fn option(name: &str) -> Option<String> {
    let mut words = std::env::args().skip_while(|word| word != name);
    words.next()?;
    words.next()
}
