//! The time of a register access in a guest: by QEMU's own vfio-pci, and by the client of an exported device.

use std::path::Path;
use std::time::Instant;

use vhost_device_iommu::vfio::{Container, DeviceAccess, Group};

use crate::common::daemon::Daemon;
use crate::devices::Function;
use crate::edu_driver::{BAR, CONFIG, Driver};
use crate::mapped_bar::{LentRegion, MappedBar};
use crate::nested::{EDU, Nested, with_a_working_guest};
use crate::vm::Setup;
use crate::words;

/// Accesses of one measurement.
const ACCESSES: u32 = 4096;
/// Measurements of each way, whose median counts.
const ROUNDS: usize = 9;

/// A read and a write, in nanoseconds.
type Access = [u64; 2];

/// The medians of an exported device, or of one that QEMU opens.
fn access_with(host_iommu: &str, keys: &str, accesses: u32) -> Access {
    let setup = Setup::from_environment();
    let host = words("VIOMMU_EDU")[0].clone();
    let host_key = format!("host-iommu = \"{host_iommu}\"");
    let endpoint = format!("vfio = \"{host}\"\n{keys}");
    let mut nested = Nested::launch(&setup, "registers", &host_key, &endpoint);
    nested.vm.wait_until_up();
    nested.vm.run(&format!("vfio_bind {EDU}"));
    nested.vm.run(&format!("start edu vfio-edu {EDU}"));
    let mut rounds: Vec<Access> = Vec::new();
    for _ in 0..ROUNDS {
        let answer = nested.ask(&format!("registers {accesses}"));
        let numbers = answer[0].split_whitespace().skip(1);
        let numbers: Vec<u64> = numbers.map(|n| n.parse().expect("a number")).collect();
        rounds.push([numbers[0], numbers[1]]);
    }
    nested.vm.begin("poweroff -f");
    assert_eq!(nested.vm.wait_for_end().code(), Some(0));
    nested.wait_for_end();
    medians(&rounds)
}

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

/// Prints figures of docs/performance.md.
#[test]
#[ignore = "measures, on a machine that does nothing else; see docs/performance.md"]
fn mapped_registers_are_as_fast_as_those_of_vfio() {
    let mapped = "export = \"@/edu.sock\"\nregisters = \"mapped\"";
    let trapped = "export = \"@/edu.sock\"\nregisters = \"trapped\"";
    with_a_working_guest(|| {
        let measured = |name: &str, host_iommu: &str, keys: &str, accesses: u32| {
            let access = access_with(host_iommu, keys, accesses);
            eprintln!("{name}, {host_iommu}: read, write {access:?} ns");
            access
        };
        let vfio = measured("QEMU's vfio-pci", "iommufd", "", ACCESSES);
        let mapped_type1 = measured("mapped", "type1", mapped, ACCESSES);
        let trapped = measured("trapped", "type1", trapped, ACCESSES / 16);
        let mapped_iommufd = measured("mapped", "iommufd", mapped, ACCESSES);
        let again = measured("QEMU's vfio-pci", "iommufd", "", ACCESSES);
        for mapped in [mapped_type1, mapped_iommufd] {
            for which in [0, 1] {
                let slowest = vfio[which].max(again[which]);
                assert!(mapped[which] * 2 < slowest * 3);
                assert!(mapped[which] * 2 < trapped[which]);
            }
        }
    });
}
