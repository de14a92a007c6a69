//! Exported devices: the daemon offers a device of the host to the VMM over vfio-user.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::bed::{Backend, Bed, endpoint};
use crate::common::guest::HIGH_RAM;
use crate::common::wire::{NOENT, OK, READ, RW};
use crate::connection::{REGION_INFO, RESET, SET_IRQS, irqs};
use crate::devices::{FaultLog, Function};
use crate::edu_driver::{BAR, CONFIG, Driver, EDU_BUFFER, MASTER, MEMORY, PAGE};
use crate::nested::{EDU, Nested, with_a_working_guest};
use crate::vm::Setup;
use crate::words;

/// An unmodified QEMU with a stock kernel and without access to VFIO. The machine with VT-d skips this test: a guest
/// that traps as often as this one sometimes hangs there, before QEMU has sent the daemon a message.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_stock_guest_drives_an_exported_device() {
    for host_iommu in ["type1", "iommufd"] {
        with_a_working_guest(|| a_stock_guest_with(host_iommu, "trapped"));
    }
}

/// The same with a QEMU that has the device's descriptor. The machine with VT-d skips it, too.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_stock_guest_drives_an_exported_device_with_mapped_registers() {
    for host_iommu in ["type1", "iommufd"] {
        with_a_working_guest(|| a_stock_guest_with(host_iommu, "mapped"));
    }
}

fn a_stock_guest_with(host_iommu: &str, registers: &str) {
    let setup = Setup::from_environment();
    let host = words("VIOMMU_EDU")[0].clone();
    let keys = format!("host-iommu = \"{host_iommu}\"");
    let endpoint =
        format!("vfio = \"{host}\"\nexport = \"@/edu.sock\"\nregisters = \"{registers}\"");
    let mut nested = Nested::launch(&setup, host_iommu, &keys, &endpoint);
    nested.vm.wait_until_up();
    nested.test_dir.note("up");
    nested.drive(&mut FaultLog::now());
    nested.test_dir.note("driven");
    for kind in ["intx", "msi", "intx"] {
        let answer = nested.ask(&format!("irq {kind} 5"));
        assert_eq!(answer, ["ok 10 interrupts"], "{kind}");
    }
    nested.test_dir.note("interrupted");

    let vmm = nested.process_with("vfio-user-pci");
    let daemon = nested.process_with("--ready-fd");
    let descriptors = vfio_descriptors(vmm);
    let mappings = fs::read_to_string(format!("/proc/{vmm}/maps")).expect("the VMM's mappings");
    let mappings = mappings.lines().filter(|line| line.contains("vfio"));
    if registers == "mapped" {
        let is_device =
            |name: &String| name.contains("vfio-device") || name.contains("vfio/devices");
        assert!(descriptors.iter().all(is_device), "{descriptors:?}");
        assert!(!descriptors.is_empty());
        assert_eq!(mappings.count(), 1, "BAR 0");
    } else {
        assert_eq!(descriptors, Vec::<String>::new());
        assert_eq!(mappings.count(), 0);
    }
    assert!(
        !vfio_descriptors(daemon).is_empty(),
        "the daemon holds the device"
    );
    let status = nested.control.status();
    assert_eq!(status.dma_of(EDU), "translated");

    nested.vm.begin("poweroff -f");
    assert_eq!(nested.vm.wait_for_end().code(), Some(0));
    nested.wait_for_end();
    assert!(!nested.test_dir.path("edu.sock").exists());
}

/// Whether the event is raised within `limit`.
pub fn is_raised(event: &OwnedFd, limit: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    let ready = poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&timeout));
    ready.expect("an event") == 1 && rustix::io::read(event, &mut [0; 8]).is_ok()
}

/// The command register, read through sysfs.
pub fn command_of(name: &str) -> u16 {
    let config = fs::read(Function::new(name).path("config")).expect("configuration space");
    u16::from_le_bytes([config[4], config[5]])
}

fn export_and_drive(backend: Backend) {
    eprintln!("{backend:?}");
    let name = words("VIOMMU_EDU")[0].clone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("edu");
    let keys = format!("[[endpoint]]\naddress = '00:06.0'\nvfio = '{name}'\nexport = {path:?}\n");
    let mut bed = Bed::with(backend, &[], &keys);
    let (source, target) = (HIGH_RAM + 0x10_0000, HIGH_RAM + 0x20_0000);
    let bytes = [0x5a; PAGE as usize];
    bed.guest.memory.write(source, &bytes);
    let clear = |bed: &Bed| bed.guest.memory.write(target, &[0; PAGE as usize]);
    let arrived = |bed: &Bed| bed.guest.memory.read(target, PAGE as usize) == bytes;

    assert_eq!(
        command_of(&name) & MASTER,
        0,
        "DMA is off before a client connects"
    );
    let mut driver = Driver::connect(&path);
    assert_eq!(driver.load(0), 0x0100_00ed);
    let words = [4096, 0, BAR, 0, 0, 0, 0, 0];
    let body: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    let info = driver.0.call(REGION_INFO, &body, &[]);
    for fd in &info.fds {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let target = fs::read_link(link).expect("open").display().to_string();
        assert!(target.contains("dmabuf"), "{target} is more than a BAR");
    }
    eprintln!("BAR 0 can be mapped: {}", !info.fds.is_empty());

    eprintln!("DMA follows the guest's mappings");
    driver.dma_read(source);
    driver.dma_write(target);
    assert!(arrived(&bed), "bypass mode");
    clear(&bed);
    assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
    driver.dma_write(target);
    assert!(!arrived(&bed), "an empty domain");
    assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, source, READ), OK);
    assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
    driver.dma_read(0x1000);
    driver.dma_write(0x2000);
    assert!(arrived(&bed));

    eprintln!("interrupts arrive while the client is connected");
    let event = || eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    let line = event();
    let body = irqs(0x24, 0, 0, 1);
    assert_eq!(driver.0.call(SET_IRQS, &body, &[line.as_fd()]).errno(), 0);
    for _ in 0..3 {
        driver.write(BAR, 0x60, &7u32.to_ne_bytes());
        assert!(is_raised(&line, Duration::from_secs(20)));
        assert_eq!(driver.load(0x24), 7);
        driver.write(BAR, 0x64, &7u32.to_ne_bytes());
        assert_eq!(
            driver.0.call(SET_IRQS, &irqs(0x11, 0, 0, 1), &[]).errno(),
            0
        );
    }
    assert_eq!(
        driver.0.call(SET_IRQS, &irqs(0x21, 0, 0, 0), &[]).errno(),
        0
    );
    let message = event();
    let body = irqs(0x24, 1, 0, 1);
    assert_eq!(
        driver.0.call(SET_IRQS, &body, &[message.as_fd()]).errno(),
        0
    );
    driver.write(BAR, 0x60, &7u32.to_ne_bytes());
    assert!(is_raised(&message, Duration::from_secs(20)));
    assert!(!is_raised(&line, Duration::ZERO));

    eprintln!("the DMA and the interrupts of a client end with it");
    // The DMA takes 100 ms. On a busy host the daemon may see too late that the client is gone: then once more.
    for attempt in 1.. {
        assert!(attempt < 50, "the end of a client takes 80 ms each time");
        clear(&bed);
        let begun = Instant::now();
        driver.start(EDU_BUFFER, 0x2000, 2 | 4);
        drop(driver);
        while command_of(&name) & (MEMORY | MASTER) != 0 {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "bus master is on"
            );
            thread::sleep(Duration::from_millis(1));
        }
        let is_in_time = begun.elapsed() < Duration::from_millis(80);
        let is_interrupted = is_raised(&message, Duration::from_millis(400));
        if is_in_time {
            assert!(!is_interrupted && !arrived(&bed));
            break;
        }
        driver = Driver::connect(&path);
        let body = irqs(0x24, 1, 0, 1);
        let set = driver.0.call(SET_IRQS, &body, &[message.as_fd()]);
        assert_eq!(set.errno(), 0);
    }

    eprintln!("the next client has the guest's mappings");
    let mut driver = Driver::connect(&path);
    driver.dma_read(0x1000);
    driver.dma_write(0x2000);
    assert!(arrived(&bed));
    // `edu` cannot be reset alone.
    let reset = driver.0.call(RESET, &[], &[]).errno();
    assert!([0, libc::ENOTTY].contains(&reset), "{reset}");

    eprintln!("DMA is blocked while no VMM is connected to the vhost-user socket");
    clear(&bed);
    bed.disconnect();
    driver.write(CONFIG, 4, &[6, 0]);
    driver.dma_write(0x2000);
    driver.dma_write(target);
    assert!(!arrived(&bed));
    bed.daemon.terminate();
    let daemon = &bed.daemon;
    daemon.wait_for_end();
    assert!(driver.0.is_closed());
    assert_eq!(command_of(&name) & MASTER, 0);
    assert!(!path.exists());
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn an_exported_device_obeys_its_guest_and_nobody_else() {
    export_and_drive(Backend::Owned);
    export_and_drive(Backend::Type1);
}

fn add_and_remove(backend: Backend) {
    eprintln!("{backend:?}");
    let name = words("VIOMMU_EDU")[0].clone();
    let mut bed = Bed::with(backend, &[], "hotplug = ['00:06.0']");
    // In the directory of the daemon's other sockets.
    let path = bed.daemon.socket().with_file_name("edu");
    let (source, target) = (HIGH_RAM + 0x10_0000, HIGH_RAM + 0x20_0000);
    let bytes = [0xa5; PAGE as usize];
    bed.guest.memory.write(source, &bytes);
    for round in 0..2 {
        eprintln!("round {round}");
        assert_eq!(vfio_descriptors(bed.daemon.pid()), Vec::<String>::new());
        assert_eq!(bed.guest.attach(1, endpoint(0)), NOENT);
        let keys = format!("address = '00:06.0', vfio = '{name}', export = {path:?}");
        let added = bed.daemon.control(&format!("add-endpoint {keys}"));
        assert!(added["error"].is_null(), "{added}");
        assert_eq!(bed.daemon.endpoint(endpoint(0))["host"], name);
        let mut driver = Driver::connect(&path);
        bed.guest.memory.write(target, &[0; PAGE as usize]);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, source, READ), OK);
        assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, target, RW), OK);
        driver.dma_read(0x1000);
        driver.dma_write(0x2000);
        assert_eq!(bed.guest.memory.read(target, PAGE as usize), bytes);
        let removed = bed.daemon.control("remove-endpoint 00:06.0");
        assert!(removed["error"].is_null(), "{removed}");
        assert!(driver.0.is_closed());
        assert_eq!(command_of(&name) & MASTER, 0);
        assert!(!path.exists());
        assert_eq!(bed.guest.attach(1, endpoint(0)), NOENT);
    }
    bed.disconnect();
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_device_is_added_to_a_running_vm_and_given_back_to_the_host() {
    add_and_remove(Backend::Owned);
    add_and_remove(Backend::Type1);
}

/// A process's open files of VFIO, iommufd and DMA buffers.
fn vfio_descriptors(pid: u32) -> Vec<String> {
    let list = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process");
    let targets = list
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok());
    let targets: Vec<_> = targets.map(|t| t.display().to_string()).collect();
    assert!(targets.len() > 5, "{targets:?}");
    let parts = ["vfio", "/dev/iommu", "dmabuf"];
    targets
        .into_iter()
        .filter(|target| parts.iter().any(|part| target.contains(part)))
        .collect()
}
