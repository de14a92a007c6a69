//! The daemon is killed, and restarted, while a client drives an exported device: the device and its client go on.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::bed::{Backend, Bed, endpoint};
use crate::common::guest::HIGH_RAM;
use crate::common::kept::Keeper;
use crate::common::wire::{NOENT, OK, READ, RW};
use crate::connection::{REGION_READ, SET_IRQS, irqs, region};
use crate::edu_driver::{BAR, Driver, EDU_BUFFER, MASTER, PAGE};
use crate::export::{command_of, is_raised};
use crate::mapped_bar::LentRegion;
use crate::words;

/// Kills; the environment can ask for more.
fn kills() -> u64 {
    let more = std::env::var("VIOMMU_KILLS").ok();
    more.map_or(4, |text| text.parse().expect("VIOMMU_KILLS is a number"))
}

/// Has `transfer` move a page to `target`. Returns it; nothing else in memory may change.
fn moved(bed: &mut Bed, target: u64, transfer: impl FnOnce(&mut Bed)) -> Vec<u8> {
    let zeros = [0; PAGE as usize];
    bed.guest.memory.write(target, &zeros);
    let before = bed.memory();
    transfer(bed);
    let arrived = bed.guest.memory.read(target, PAGE as usize);
    bed.guest.memory.write(target, &zeros);
    let is_same = bed.memory() == before;
    assert!(is_same, "memory outside the mapping has changed");
    arrived
}

fn scenario(backend: Backend) {
    eprintln!("{backend:?}");
    let name = words("VIOMMU_EDU")[0].clone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("edu");
    let mut keeper = Keeper::empty();
    let mut bed = Bed::exported(backend, &name, "", &path, &keeper);
    goes_on(&mut bed, &mut keeper, &name, &path);
}

/// `ctl` adds the device while the VM runs, and removes it at the end.
fn added_scenario(backend: Backend) {
    eprintln!("{backend:?}, added");
    let name = words("VIOMMU_EDU")[0].clone();
    let mut keeper = Keeper::empty();
    let mut bed = Bed::kept_with(backend, &[], "hotplug = ['00:06.0']\n", &keeper);
    let path = bed.daemon.folder().join("edu");
    let add = format!("add-endpoint address = '00:06.0', vfio = '{name}', export = {path:?}");
    for _ in 0..2 {
        let added = bed.daemon.control(&add);
        assert!(added["error"].is_null(), "{added}");
        goes_on(&mut bed, &mut keeper, &name, &path);
        let removed = bed.daemon.control("remove-endpoint 00:06.0");
        assert!(removed["error"].is_null(), "{removed}");
        // Nothing of it is left that would keep it from being added again: VFIO opens a group once.
        keeper.take();
        let of_device = |name: &&String| {
            let prefixes = ["vfio.", "iommufd.", "export."];
            prefixes.iter().any(|prefix| name.starts_with(prefix))
        };
        let left: Vec<_> = keeper.files.keys().filter(of_device).collect();
        assert!(left.is_empty(), "{left:?}");
        bed.daemon.die(&mut keeper);
        assert_eq!(bed.guest.attach(1, endpoint(0)), NOENT);
    }
}

fn goes_on(bed: &mut Bed, keeper: &mut Keeper, name: &str, path: &Path) {
    let (source, target) = (HIGH_RAM + 0x10_0000, HIGH_RAM + 0x20_0000);
    let bytes = [0x5a; PAGE as usize];
    bed.guest.memory.write(source, &bytes);
    assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
    assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, source, READ), OK);
    assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
    let mut driver = Driver::connect(path);
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    let body = irqs(0x24, 1, 0, 1);
    let set = driver.0.call(SET_IRQS, &body, &[event.as_fd()]);
    assert_eq!(set.errno(), 0);
    for round in 0..kills() {
        eprintln!("round {round}");
        driver.write(BAR, 4, &(round as u32).to_ne_bytes());
        driver.dma_read(0x1000);
        let arrived = moved(bed, target, |bed| {
            // It takes 100 ms, and ends with an interrupt.
            driver.start(EDU_BUFFER, 0x2000, 2 | 4);
            if round % 2 == 0 {
                bed.daemon.kill();
            } else {
                bed.daemon.terminate();
                assert!(bed.daemon.wait_for_end().success());
            }
            assert!(is_raised(&event, Duration::from_secs(20)));
        });
        assert_eq!(arrived, bytes, "its DMA goes on while there is no daemon");
        assert_ne!(command_of(name) & MASTER, 0);
        // The client asks, and nobody answers yet.
        let asked = driver.0.ask(REGION_READ, &region(4, BAR, 4, &[]), &[]);
        bed.daemon.start_again(keeper);
        let reply = driver.0.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno()), (asked, 0));
        assert_eq!(
            reply.u32_at(16),
            !(round as u32),
            "the device was not reset"
        );
        assert_ne!(command_of(name) & MASTER, 0);
        let pending = driver.load(0x24);
        driver.write(BAR, 0x64, &pending.to_ne_bytes());
        // The guest's mappings are those of the device, as before.
        let arrived = moved(bed, target, |_| driver.dma_write(0x2000));
        assert_eq!(arrived, bytes, "it is mapped");
        assert_eq!(bed.guest.unmap(1, 0x2000, 0x2fff), OK);
        let arrived = moved(bed, target, |_| driver.dma_write(0x2000));
        assert_eq!(arrived, [0; PAGE as usize], "it is unmapped");
        assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
        let status = bed.daemon.status();
        let life = &status["life"];
        assert_eq!(life["state"], "taken-over", "{life}");
        assert_eq!(life["lost"].as_array().map(Vec::len), Some(0), "{life}");
        assert_eq!(status["endpoints_quarantined"], 0);
        assert_eq!(bed.daemon.control("stats")["exports"][0]["clients"], 1);
    }
    // Without its client, the device does no DMA, and no later daemon takes it over.
    drop(driver);
    bed.daemon
        .wait_for("the client's end", || command_of(name) & MASTER == 0);
    bed.daemon.die(keeper);
    let mut driver = Driver::connect(path);
    driver.dma_read(0x1000);
    driver.dma_write(0x2000);
    assert_eq!(bed.guest.memory.read(target, PAGE as usize), bytes);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn an_exported_device_goes_on_over_kills_of_the_daemon_iommufd() {
    scenario(Backend::Owned);
    // By the numbers of descriptors.
    scenario(Backend::SharedAll);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn an_exported_device_goes_on_over_kills_of_the_daemon_type1() {
    scenario(Backend::Type1);
    scenario(Backend::Type1Inherited);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn an_added_device_goes_on_over_kills_of_the_daemon() {
    added_scenario(Backend::Owned);
    added_scenario(Backend::Type1);
}

/// `ctl` adds the device, which is then bound to an iommufd of its own. The next daemon's file names it with other keys, so
/// that daemon opens it for its own iommufd.
fn contradicted_scenario(backend: Backend) {
    eprintln!("{backend:?}, contradicted");
    let name = words("VIOMMU_EDU")[0].clone();
    let mut keeper = Keeper::empty();
    let mut bed = Bed::kept_with(backend, &[], "hotplug = ['00:06.0']\n", &keeper);
    let folder = bed.daemon.folder().to_owned();
    let path = folder.join("edu");
    let add = format!("add-endpoint address = '00:06.0', vfio = '{name}', export = {path:?}");
    let added = bed.daemon.control(&add);
    assert!(added["error"].is_null(), "{added}");
    let (source, target) = (HIGH_RAM + 0x10_0000, HIGH_RAM + 0x20_0000);
    let bytes = [0x5a; PAGE as usize];
    bed.guest.memory.write(source, &bytes);
    assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
    assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, source, READ), OK);
    assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
    let mut driver = Driver::connect(&path);
    driver.dma_read(0x1000);
    driver.dma_write(0x2000);
    assert_eq!(bed.guest.memory.read(target, PAGE as usize), bytes);

    bed.daemon.kill();
    keeper.take();
    let other = folder.join("other");
    let file = folder.join("vm.toml");
    let text = std::fs::read_to_string(&file).expect("the file");
    let endpoint_of_file =
        format!("[[endpoint]]\naddress = '00:06.0'\nvfio = '{name}'\nexport = {other:?}\n");
    std::fs::write(&file, format!("{text}\n{endpoint_of_file}")).expect("written");
    bed.daemon.start_again(&mut keeper);
    assert_eq!(bed.daemon.endpoint(endpoint(0))["state"], "quarantined");
    assert_eq!(command_of(&name) & MASTER, 0);
    assert!(driver.0.is_closed());
    // It is a device of the daemon's start now.
    for round in 0..2 {
        let mut driver = Driver::connect(&other);
        assert_eq!(bed.guest.attach(2, endpoint(0)), OK);
        if round == 0 {
            assert_eq!(bed.guest.map(2, 0x1000, 0x1fff, source, READ), OK);
            assert_eq!(bed.guest.map(2, 0x2000, 0x2fff, target, RW), OK);
        }
        driver.dma_read(0x1000);
        let arrived = moved(&mut bed, target, |_| driver.dma_write(0x2000));
        assert_eq!(arrived, bytes, "it is mapped");
        drop(driver);
        bed.daemon
            .wait_for("the client's end", || command_of(&name) & MASTER == 0);
        bed.daemon.die(&mut keeper);
        assert_eq!(bed.daemon.status()["life"]["lost"], serde_json::json!([]));
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn an_added_device_that_the_file_names_otherwise_is_opened_anew() {
    contradicted_scenario(Backend::Owned);
    contradicted_scenario(Backend::Type1);
}

/// The client of the added device has its descriptor, so nobody else can open the device, which the next daemon's file names with
/// other keys.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn the_daemon_starts_without_a_device_that_a_former_client_has_open() {
    let name = words("VIOMMU_EDU")[0].clone();
    let mut keeper = Keeper::empty();
    let keys = "hotplug = ['00:06.0']\n[[endpoint]]\naddress = '00:08.0'\n";
    let mut bed = Bed::kept_with(Backend::Owned, &[], keys, &keeper);
    let folder = bed.daemon.folder().to_owned();
    let (path, other) = (folder.join("edu"), folder.join("other"));
    let add = |path: &Path| {
        format!("add-endpoint address = '00:06.0', vfio = '{name}', export = {path:?}")
    };
    let added = bed
        .daemon
        .control(&format!("{}, registers = 'mapped'", add(&path)));
    assert!(added["error"].is_null(), "{added}");
    let emulated = 0x40;
    assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
    assert_eq!(bed.guest.attach(2, emulated), OK);
    assert_eq!(bed.guest.map(2, 0x1000, 0x1fff, HIGH_RAM, RW), OK);
    let mut driver = Driver::connect(&path);
    let region = LentRegion::ask(&mut driver.0, BAR).expect("BAR 0 can be mapped");

    bed.daemon.kill();
    keeper.take();
    let file = folder.join("vm.toml");
    let text = std::fs::read_to_string(&file).expect("the file");
    let endpoint_of_file =
        format!("[[endpoint]]\naddress = '00:06.0'\nvfio = '{name}'\nexport = {other:?}\n");
    std::fs::write(&file, format!("{text}\n{endpoint_of_file}")).expect("written");
    bed.daemon.start_again(&mut keeper);
    let lost = bed.daemon.status()["life"]["lost"].to_string();
    assert!(lost.contains("its device cannot be opened"), "{lost}");
    for _ in 0..2 {
        assert_eq!(bed.guest.attach(1, endpoint(0)), NOENT);
        assert_eq!(command_of(&name) & MASTER, 0);
        assert_eq!(bed.daemon.gpa_of(emulated, 0x1000), Some(HIGH_RAM));
        bed.daemon.die(&mut keeper);
        assert_eq!(bed.daemon.status()["life"]["lost"], serde_json::json!([]));
    }
    drop((driver, region));
    let added = bed.daemon.control(&add(&other));
    assert!(added["error"].is_null(), "{added}");
    assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
}

/// The device narrows the addresses that the guest is offered. `ctl` removes it, and then it leaves the file, too.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn the_offer_stays_when_the_device_that_narrowed_it_leaves_the_file() {
    let name = words("VIOMMU_EDU")[0].clone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("edu");
    let mut keeper = Keeper::empty();
    let keys = "hotplug = ['00:06.0']\n[[endpoint]]\naddress = '00:08.0'\n";
    let mut bed = Bed::exported(Backend::Owned, &name, keys, &path, &keeper);
    let other = 0x40;
    assert_eq!(bed.guest.attach(1, other), OK);
    assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, HIGH_RAM, RW), OK);
    let removed = bed.daemon.control("remove-endpoint 00:06.0");
    assert!(removed["error"].is_null(), "{removed}");
    let file = bed.daemon.folder().join("vm.toml");
    let text = std::fs::read_to_string(&file).expect("the file");
    let (without, device) = text.rsplit_once("[[endpoint]]").expect("an endpoint");
    assert!(device.contains(&name), "{device}");
    std::fs::write(&file, without).expect("written");
    for _ in 0..2 {
        bed.daemon.die(&mut keeper);
        assert_eq!(bed.daemon.status()["life"]["lost"], serde_json::json!([]));
        assert_eq!(bed.daemon.gpa_of(other, 0x1000), Some(HIGH_RAM));
    }
}
