//! The time of a register access in a guest: by QEMU's own vfio-pci, and by the client of an exported device.

use std::path::Path;
use std::time::Instant;

use vhost_device_iommu::vfio::{Container, DeviceAccess, Group};

use crate::common::daemon::Daemon;
use crate::devices::Function;
use crate::edu_driver::{BAR, CONFIG, Driver};
use crate::mapped_bar::{LentRegion, MappedBar};
use crate::nested::{Nested, with_a_working_guest};
use crate::vm::Setup;
use crate::words;

/// Accesses of one measurement.
const ACCESSES: u32 = 4096;
/// Measurements of each way, whose median counts.
const ROUNDS: usize = 9;
/// The same in a guest.
const GUEST_ROUNDS: usize = 64;

/// A read and a write, in nanoseconds.
type Access = [u64; 2];

fn medians(rounds: &[Access]) -> Access {
    [0, 1].map(|which| {
        let mut all: Vec<_> = rounds.iter().map(|round| round[which]).collect();
        all.sort_unstable();
        all[rounds.len() / 2]
    })
}

/// An address of `edu` where a write does nothing.
const FREE: u64 = 0x1000;

/// The nanoseconds of one of `count` calls.
fn each(count: u32, mut call: impl FnMut()) -> u64 {
    let begun = Instant::now();
    (0..count).for_each(|_| call());
    (begun.elapsed() / count).as_nanos() as u64
}

/// Without a guest: a process of L1 with mappings of its own. Prints figures of docs/performance.md.
#[test]
#[ignore = "measures, on a machine that does nothing else; see docs/performance.md"]
fn a_process_reaches_mapped_registers_as_fast_as_with_vfio() {
    let names = words("VIOMMU_EDU");
    let folder = tempfile::tempdir().expect("a folder");
    let paths = ["mapped", "trapped"].map(|name| folder.path().join(name));
    let mut text = "address = '00:05.0'\nhost-iommu = 'type1'\n".to_owned();
    for (n, (path, registers)) in paths.iter().zip(["mapped", "trapped"]).enumerate() {
        text += &format!(
            "[[endpoint]]\naddress = '00:0{}.0'\nvfio = '{}'\nexport = {path:?}\nregisters = '{registers}'\n",
            n + 6,
            names[n + 1]
        );
    }
    let daemon = Daemon::with_config(&text);
    let mut client = Driver::connect(&paths[0]);
    let mapped = LentRegion::ask(&mut client.0, BAR).expect("mapped").map();
    let mut trapped = Driver::connect(&paths[1]);

    let mut container = Container::open(Path::new("/dev/vfio/vfio")).expect("a container");
    let group = Path::new("/dev/vfio").join(Function::new(&names[0]).group());
    let group = Group::open(&group).expect("a group");
    container.set_group(group).expect("set");
    let group = container.group().expect("a group");
    let device = group.device(&names[0], None).expect("opened");
    let config = device.region(CONFIG).expect("a configuration space");
    device.write(&config, 4, &[6, 0]).expect("written");
    let region = device.region(BAR).expect("a BAR");
    let own = LentRegion {
        size: region.size,
        offset: region.offset,
        has_table: false,
        file: device.device_file().expect("a duplicate"),
    };
    let own = own.map();
    let through = |bar: &MappedBar| {
        let read = each(ACCESSES, || assert_eq!(bar.load(FREE as usize), u32::MAX));
        [read, each(ACCESSES, || bar.store(FREE as usize, 1))]
    };
    let mut rounds: [Vec<Access>; 3] = Default::default();
    // The ways alternate, so that all of them have the same company.
    for _ in 0..ROUNDS {
        rounds[0].push(through(&own));
        rounds[1].push(through(&mapped));
        let read = each(ACCESSES / 16, || assert_eq!(trapped.load(FREE), u32::MAX));
        let write = each(ACCESSES / 16, || trapped.write(BAR, FREE, &[1, 0, 0, 0]));
        rounds[2].push([read, write]);
    }
    let [own, mapped, trapped] = rounds.map(|rounds| medians(&rounds));
    eprintln!("VFIO: read, write {own:?} ns; mapped: {mapped:?}; trapped: {trapped:?}");
    for which in [0, 1] {
        assert!(mapped[which] * 2 < own[which] * 3);
        assert!(mapped[which] * 2 < trapped[which]);
    }
    daemon.terminate();
    daemon.wait_for_end();
}

/// Devices of one guest, each with its way to the registers. Prints figures of docs/performance.md.
#[test]
#[ignore = "measures, on a machine that does nothing else; see docs/performance.md"]
fn mapped_registers_are_as_fast_as_those_of_vfio() {
    with_a_working_guest(|| {
        let names = words("VIOMMU_EDU");
        let mut endpoint = format!("vfio = \"{}\"", names[0]);
        for (slot, name, registers) in [(11, &names[1], "mapped"), (12, &names[2], "trapped")] {
            endpoint += &format!(
                "\n[[endpoint]]\naddress = \"00:{slot}.0\"\nvfio = \"{name}\"\nexport = \"@/{registers}.sock\"\n\
                 registers = \"{registers}\""
            );
        }
        let setup = Setup::from_environment();
        let mut nested = Nested::launch(&setup, "registers", "", &endpoint);
        nested.vm.wait_until_up();
        for (slot, way) in [(10, "vfio"), (11, "mapped"), (12, "trapped")] {
            let address = format!("0000:00:{slot}.0");
            nested.vm.run(&format!("vfio_bind {address}"));
            nested.vm.run(&format!("start {way} vfio-edu {address}"));
        }
        let mut access = |way: &str, accesses: u32| -> Access {
            let answer = nested.vm.run(&format!("ask {way} registers {accesses}"));
            let numbers = answer[0].split_whitespace().skip(1);
            let numbers: Vec<u64> = numbers.map(|n| n.parse().expect("a number")).collect();
            [numbers[0], numbers[1]]
        };
        let mut rounds: [Vec<Access>; 3] = Default::default();
        // The ways alternate, so that all of them have the same company. Each is the first in every other round.
        for round in 0..GUEST_ROUNDS {
            let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
            for way in order {
                rounds[way].push(access(["vfio", "mapped"][way], ACCESSES));
            }
            if round % 8 == 0 {
                rounds[2].push(access("trapped", ACCESSES / 16));
            }
        }
        // In a thousandth.
        let ratios: Vec<Access> = (rounds[0].iter().zip(&rounds[1]))
            .map(|(vfio, mapped)| [0, 1].map(|which| mapped[which] * 1000 / vfio[which].max(1)))
            .collect();
        let ratio = medians(&ratios);
        let [vfio, mapped, trapped] = rounds.map(|rounds| medians(&rounds));
        eprintln!(
            "QEMU's vfio-pci: read, write {vfio:?} ns; mapped: {mapped:?}; trapped: {trapped:?}; mapped to vfio-pci, \
             in a thousandth: {ratio:?}"
        );
        nested.vm.begin("poweroff -f");
        assert_eq!(nested.vm.wait_for_end().code(), Some(0));
        nested.wait_for_end();
        for which in [0, 1] {
            assert!(mapped[which] * 2 < vfio[which] * 3);
            assert!(mapped[which] * 2 < trapped[which]);
        }
    });
}
