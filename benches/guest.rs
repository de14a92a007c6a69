//! Time of a mapping in a stock guest: the daemon and QEMU's own virtio-iommu in alternation.
//!
//! `qemu-scripts/bench.sh` prepares the machine and runs this. With `--accel kvm`, KVM runs the
//! guest. The emulated machine of `qemu-scripts/l1.sh` loses its files when it ends, so `-` in
//! place of a file name prints the figures and the plot instead.
#![allow(clippy::expect_used, reason = "a bench ends by panicking")]

#[path = "../tests/common/vm.rs"]
mod vm;

#[path = "common/fragment.rs"]
mod fragment;
#[path = "guest/machine.rs"]
mod machine;
#[path = "guest/plot.rs"]
mod plot;

use std::fs;
use std::time::Duration;

use machine::Machine;
use serde_json::json;
use vhost_device_iommu::process::realtime::Realtime;
use vm::{Daemon, Kernel, Setup, TestDir, Vm, VmOptions};

/// The device of the kernel's DMA benchmark, and the one that is bound to vfio-pci.
const DMA: &str = "0000:00:06.0";
const VFIO: &str = "0000:00:07.0";
const CONFIG: &str = r#"
memory = "512M"
address = "00:05.0"

[[endpoint]]
range = "00:06.0-00:07.0"
"#;
/// For the daemon whose worker preempts the guest's processors.
const PRIORITY: &str = "realtime-priority = 1\n";
const RUN: Duration = Duration::from_secs(120);
const DEFAULT_ROUNDS: usize = 5;

/// Name of the measure, mode of the guest, command.
const MEASURES: [(&str, &str, &str); 7] = [
    ("strict", "DMA", "dma-bench 1 1"),
    ("strict_2_threads", "DMA", "dma-bench 2 1"),
    ("lazy", "DMA-FQ", "dma-bench 1 1"),
    ("lazy_2_threads", "DMA-FQ", "dma-bench 2 1"),
    ("vfio_page", "", "vfio-bench 0000:00:07.0 page 2048 6"),
    ("vfio_huge", "", "vfio-bench 0000:00:07.0 huge 32 40"),
    ("vfio_random", "", "vfio-bench 0000:00:07.0 random 1024 6"),
];

/// The virtio-iommu that serves the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Iommu {
    Qemu,
    Daemon,
    /// The daemon as a virtio-pci device over vfio-user; only with `--transport both`.
    VirtioPci,
    /// The daemon with a realtime priority; measured only with as many busy processors as the host
    /// has.
    Realtime,
}

/// Nanoseconds of one MAP and of one UNMAP, measured in the guest.
type Times = [f64; 2];

/// The figures of one measure in one boot.
#[derive(Clone, Copy)]
struct Measured {
    times: Times,
    /// Exits from the guest for a MAP and its UNMAP, if KVM counts them.
    exits: Option<f64>,
}

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let rounds = option("--rounds").map_or(DEFAULT_ROUNDS, |n| n.parse().expect("--rounds N"));
    let setup = Setup::from_environment();
    let kernel = host_kernel();
    let machine = Machine::new(option("--accel").as_deref().unwrap_or("tcg"));
    let mut qemu: Vec<Vec<Measured>> = vec![Vec::new(); MEASURES.len()];
    let (mut ours, mut realtime) = (qemu.clone(), qemu.clone());
    let mut virtio_pci = qemu.clone();
    let with_virtio_pci = match option("--transport").as_deref() {
        Some("both") => true,
        None | Some("vhost-user") => false,
        Some(other) => panic!("--transport {other}: give vhost-user or both"),
    };
    let allowed = Realtime::new(1);
    if let Err(cause) = &allowed {
        eprintln!("skipped: {cause}");
    }
    for round in 0..rounds {
        // The order alternates.
        let mut order = vec![Iommu::Qemu, Iommu::Daemon];
        order.extend(with_virtio_pci.then_some(Iommu::VirtioPci));
        let with_realtime = allowed.is_ok() && machine.processors() > 1;
        order.extend(with_realtime.then_some(Iommu::Realtime));
        if round % 2 == 1 {
            order.reverse();
        }
        for iommu in order {
            eprintln!("round {} of {rounds}: {}", round + 1, iommu.name());
            let into = match iommu {
                Iommu::Qemu => &mut qemu,
                Iommu::Daemon => &mut ours,
                Iommu::VirtioPci => &mut virtio_pci,
                Iommu::Realtime => &mut realtime,
            };
            for (all, times) in into
                .iter_mut()
                .zip(boot_and_measure(&setup, &kernel, machine, iommu))
            {
                all.extend(times);
            }
        }
    }
    let mut rows = Vec::new();
    for (index, (name, ..)) in MEASURES.iter().enumerate() {
        if !qemu[index].is_empty() {
            rows.push(Row::new((*name).to_owned(), &qemu[index], &ours[index]));
        }
        if !virtio_pci[index].is_empty() {
            let name = format!("{name}_virtio_pci");
            rows.push(Row::new(name, &qemu[index], &virtio_pci[index]));
        }
        if !realtime[index].is_empty() {
            let name = format!("{name}_realtime");
            rows.push(Row::new(name, &qemu[index], &realtime[index]));
        }
    }
    print_table(&rows, rounds);
    let figures = machine.in_group(figures(&rows));
    match option("--svg").as_deref() {
        Some("-") => println!("{figures}\n{}", plot::bars(&rows)),
        Some(path) => fs::write(path, plot::bars(&rows)).expect("plot written"),
        None => {}
    }
    fragment::write(machine.fragment(), &figures);
}

impl Iommu {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU's own",
            Self::Daemon => "the daemon",
            Self::VirtioPci => "the daemon over virtio-pci",
            Self::Realtime => "the daemon, realtime",
        }
    }

    /// Whether the bench makes this measure with this device on this machine.
    fn measures(self, measure: &str, machine: Machine) -> bool {
        if measure.contains("2_threads") {
            machine.processors() > 1
        } else {
            self != Self::Realtime
        }
    }
}

/// One measure: medians of both devices, and the ratios of the rounds. MAP first, then UNMAP.
pub struct Row {
    /// Its name.
    pub name: String,
    /// QEMU's medians, in nanoseconds.
    pub qemu: Times,
    /// The daemon's medians, in nanoseconds.
    pub ours: Times,
    /// The daemon's time divided by QEMU's; least, median and greatest of the rounds.
    pub ratio: [[f64; 3]; 2],
    /// Exits from the guest for a MAP and its UNMAP: medians with QEMU's device and with the
    /// daemon.
    pub exits: Option<[f64; 2]>,
}

impl Row {
    fn new(name: String, qemu: &[Measured], ours: &[Measured]) -> Self {
        let column =
            |all: &[Measured], request: usize| all.iter().map(|m| m.times[request]).collect();
        let exits = |all: &[Measured]| -> Option<f64> {
            let exits: Option<Vec<_>> = all.iter().map(|m| m.exits).collect();
            exits.map(median)
        };
        let ratio = |request: usize| {
            let pairs = qemu.iter().zip(ours);
            let mut ratios: Vec<_> = pairs
                .map(|(q, o)| o.times[request] / q.times[request])
                .collect();
            ratios.sort_by(f64::total_cmp);
            [
                ratios[0],
                ratios[ratios.len() / 2],
                ratios[ratios.len() - 1],
            ]
        };
        Self {
            name,
            qemu: [0, 1].map(|request| median(column(qemu, request))),
            ours: [0, 1].map(|request| median(column(ours, request))),
            ratio: [0, 1].map(ratio),
            exits: exits(qemu).zip(exits(ours)).map(Into::into),
        }
    }
}

/// Boots a guest and makes the measures. Returns the figures by measure.
fn boot_and_measure(
    setup: &Setup,
    kernel: &Kernel,
    machine: Machine,
    iommu: Iommu,
) -> Vec<Option<Measured>> {
    let test_dir = TestDir::new("bench");
    let priority = match iommu {
        Iommu::Realtime => PRIORITY,
        Iommu::Qemu | Iommu::Daemon | Iommu::VirtioPci => "",
    };
    let key = match iommu {
        Iommu::VirtioPci => "vfio-user-socket",
        Iommu::Qemu | Iommu::Daemon | Iommu::Realtime => "socket",
    };
    let config = format!("{}{priority}{CONFIG}", machine.config());
    let daemon = Daemon::start_over(key, &test_dir, &config);
    let mut arguments = daemon.qemu_args.clone();
    let mut daemon = match iommu {
        Iommu::Daemon | Iommu::VirtioPci | Iommu::Realtime => Some(daemon),
        Iommu::Qemu => {
            daemon.stop();
            arguments = with_qemus_own(arguments);
            None
        }
    };
    let mut extra = vec!["-smp".to_owned(), machine.processors().to_string()];
    for address in ["06.0", "07.0"] {
        extra.extend(["-device".to_owned(), format!("edu,addr={address}")]);
    }
    let options = VmOptions {
        kernel,
        append: format!("iommu.strict=1 {}", machine.append()),
        iommu: arguments,
        extra,
    };
    let mut vm = Vm::start_with(machine.accel(), setup, &test_dir, "vm", &options);
    vm.wait_until_up();
    vm.run("mount -t debugfs debugfs /sys/kernel/debug");
    let driver = format!("/sys/bus/pci/devices/{DMA}/driver_override");
    vm.run(&format!("echo dma_map_benchmark >{driver}"));
    vm.run(&format!("echo {DMA} >/sys/bus/pci/drivers_probe"));
    vm.run("ls /sys/kernel/debug/dma_map_benchmark");
    vm.run(&format!("vfio_bind {VFIO}"));
    let mut times = Vec::new();
    for (name, mode, command) in MEASURES {
        if !iommu.measures(name, machine) {
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
        if let (Some([polls, ns, kicks, requests]), Some(daemon)) = (before, &mut daemon) {
            let [more, waited, kicked, served] = polled(daemon);
            let each = (waited - ns) as f64 / (more - polls).max(1) as f64;
            let rate = (kicked - kicks) as f64 / (served - requests).max(1) as f64;
            eprintln!(
                "    {command}: {each:.0} ns from an answer to the next request, {rate:.3} kicks a request"
            );
        }
        let both = parse(&answer).unwrap_or_else(|| panic!("{command}: {answer}"));
        let exits = exits_a_pair(&mut vm, machine, command);
        times.push(Some(Measured { times: both, exits }));
    }
    vm.kill();
    drop(daemon);
    times
}

/// How often the daemon's worker polled for the guest, and for how long in all; how often a kick woke it; and how many
/// requests it has answered.
fn polled(daemon: &mut Daemon) -> [u64; 4] {
    let status = daemon.status().0;
    let [polls, ns, kicks] = ["polls_paid", "polls_paid_ns", "wakeups"]
        .map(|key| status["worker"][key].as_u64().unwrap_or(0));
    let kinds = status["requests"].as_object().into_iter().flatten();
    let requests = kinds
        .filter_map(|(_, counts)| counts.as_object())
        .flat_map(|counts| counts.values().filter_map(serde_json::Value::as_u64))
        .sum();
    [polls, ns, kicks, requests]
}

/// Changes the mode of the device's group, which is possible while no driver is bound.
fn set_mode(vm: &mut Vm, mode: &str) {
    let device = format!("/sys/bus/pci/devices/{DMA}");
    vm.run(&format!("echo {DMA} >{device}/driver/unbind"));
    vm.run(&format!("echo {mode} >{device}/iommu_group/type"));
    vm.run(&format!("echo {DMA} >/sys/bus/pci/drivers_probe"));
}

/// Exits from the guest for each page that VFIO maps and unmaps, without those of the program's
/// start and end; `None` for other measures.
fn exits_a_pair(vm: &mut Vm, machine: Machine, command: &str) -> Option<f64> {
    let words: Vec<_> = command.split(' ').collect();
    let ["vfio-bench", device, "page", count, rounds] = words[..] else {
        return None;
    };
    let [count, rounds]: [u64; 2] = [count, rounds].map(|word| word.parse().expect("a number"));
    let mut exits = |rounds: u64| {
        let before = machine.exits()?;
        vm.run_within(&format!("vfio-bench {device} page {count} {rounds}"), RUN);
        machine.exits()?.checked_sub(before)
    };
    let (one, all) = (exits(1)?, exits(rounds)?);
    let pairs = count * (rounds - 1);
    // If there are few exits, `all` may be less than `one` by chance.
    Some(all.saturating_sub(one) as f64 / pairs as f64)
}

/// QEMU's arguments for the daemon, changed to those of the same machine with QEMU's own device.
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

/// The kernel of the L1 machine as a guest's kernel; it has the DMA benchmark.
fn host_kernel() -> Kernel {
    let variable = |name: &str| {
        std::env::var(name)
            .unwrap_or_else(|_| panic!("{name} is not set; run qemu-scripts/bench.sh"))
    };
    Kernel {
        version: variable("VIOMMU_HOST_KERNEL_RELEASE"),
        page: 4096,
        image: variable("VIOMMU_HOST_KERNEL").into(),
        initramfs: variable("VIOMMU_L2_INITRAMFS").into(),
    }
}

/// Parses "map 1200 unmap 900".
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
        for (request, name) in ["map", "unmap"].into_iter().enumerate() {
            let [least, ratio, greatest] = row.ratio[request];
            println!(
                "| {} | {name} | {:.1} | {:.1} | {ratio:.2} | {least:.2} to {greatest:.2} |",
                row.name.replace('_', " "),
                row.qemu[request] / 1e3,
                row.ours[request] / 1e3,
            );
        }
    }
    for row in rows {
        if let Some([qemu, ours]) = row.exits {
            println!(
                "{}: exits from the guest for a MAP and its UNMAP: QEMU's own {qemu:.3}, the \
                 daemon {ours:.3}",
                row.name.replace('_', " ")
            );
        }
    }
}

fn figures(rows: &[Row]) -> serde_json::Value {
    let all = rows.iter().map(|row| {
        let mut value = json!({
            "map_ratio": row.ratio[0][1],
            "unmap_ratio": row.ratio[1][1],
            "map_ns": row.ours[0],
            "unmap_ns": row.ours[1],
            "qemu_map_ns": row.qemu[0],
            "qemu_unmap_ns": row.qemu[1],
        });
        if let Some([qemu, ours]) = row.exits {
            value["exits"] = ours.into();
            value["qemu_exits"] = qemu.into();
        }
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
