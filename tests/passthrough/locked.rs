//! Locked memory: daemons of one user, with the limit of their services and with limits that fit a single VM.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::bed::endpoint;
use crate::common::daemon::Daemon;
use crate::common::guest::{
    Guest, HIGH_LEN, HIGH_RAM, LOW_LEN, LOW_RAM, RING_LEN, RING_RAM, Setup,
};
use crate::common::memory::Region;
use crate::common::wire::{NOMEM, OK, RW};
use crate::devices::Function;
use crate::edu_driver::Driver;
use crate::words;

/// The user of all daemons.
const USER: u32 = 4242;
/// Most of the guest's RAM.
const RAM: u64 = 0x2_0000_0000;
/// More than the spare part of [`ENOUGH_FOR_ONE`].
const RAM_LEN: u64 = 128 << 20;
/// A limit with 64 MiB more than the guest's RAM.
const ENOUGH_FOR_ONE: u64 = MEMORY + (64 << 20);
/// All of the guest's RAM.
const MEMORY: u64 = LOW_LEN + RING_LEN + HIGH_LEN + RAM_LEN;
const PAGE: usize = 4096;

/// A VM with exported devices. Its daemon is not root's.
struct Vm {
    daemon: Daemon,
    guest: Guest,
    sockets: TempDir,
}

fn config(host_iommu: &str, devices: &[String], sockets: &TempDir) -> String {
    let mut text = format!(
        "address = '00:05.0'\nmemory = '{}M'\nhost-iommu = '{host_iommu}'\n",
        MEMORY >> 20
    );
    for (n, device) in devices.iter().enumerate() {
        let path = sockets.path().join(n.to_string());
        text += &format!(
            "[[endpoint]]\naddress = '00:0{}.0'\nvfio = '{device}'\nexport = {path:?}\n",
            n + 6
        );
    }
    text
}

/// The limit of the VM's service.
fn limit_of_service(config: &str, folder: &TempDir) -> String {
    let file = folder.path().join("vm.toml");
    fs::write(&file, config).expect("written");
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .arg("drop-in")
        .arg(file)
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = text.lines();
    let limit = lines.find_map(|line| line.strip_prefix("LimitMEMLOCK="));
    limit.expect("a limit").replace("infinity", "unlimited")
}

impl Vm {
    /// Starts a daemon with `limit`, or with the limit of its service, and connects a VMM.
    fn start(host_iommu: &str, devices: &[String], limit: Option<u64>) -> Self {
        let sockets = tempfile::tempdir().expect("a folder");
        let config = config(host_iommu, devices, &sockets);
        let limit = limit.map_or_else(
            || limit_of_service(&config, &sockets),
            |limit| limit.to_string(),
        );
        let mut nodes: Vec<PathBuf> = vec![
            sockets.path().into(),
            "/dev/iommu".into(),
            "/dev/vfio/vfio".into(),
        ];
        for device in devices {
            let function = Function::new(device);
            nodes.push(function.node().into());
            nodes.push(format!("/dev/vfio/{}", function.group()).into());
        }
        for node in nodes {
            chown(&node, Some(USER), Some(USER)).expect("root");
        }
        let daemon = Daemon::with_config_as(USER, &limit, &config);
        let regions = [
            (LOW_RAM, LOW_LEN),
            (RING_RAM, RING_LEN),
            (HIGH_RAM, HIGH_LEN),
            (RAM, RAM_LEN),
        ]
        .map(|(gpa, len)| Region::new(gpa, len));
        let mut guest = Guest::connect_with(daemon.stream(), Setup::default(), regions.into());
        guest.driver_ok();
        daemon.wait_for_driver();
        Self {
            daemon,
            guest,
            sockets,
        }
    }

    /// Whether the first device reaches the guest's memory in bypass mode.
    fn does_dma(&self) -> bool {
        let (source, target) = (RAM + 0x10_0000, RAM + 0x20_0000);
        let memory = &self.guest.memory;
        memory.write(source, &[0x5a; PAGE]);
        memory.write(target, &[0; PAGE]);
        let mut driver = Driver::connect(&self.sockets.path().join("0"));
        driver.dma_read(source);
        driver.dma_write(target);
        memory.read(target, PAGE) == [0x5a; PAGE]
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // The next VM needs the devices.
        self.daemon.terminate();
        self.daemon.wait_for_end();
    }
}

/// Whether the devices of two VMs reach their guests' memory while both run.
fn two_vms(host_iommu: &str, limit: Option<u64>) -> [bool; 2] {
    let edu = words("VIOMMU_EDU");
    let first = Vm::start(host_iommu, &edu[..1], limit);
    let second = Vm::start(host_iommu, &edu[1..2], limit);
    let reached = [first.does_dma(), second.does_dma()];
    for (vm, reached) in [&first, &second].into_iter().zip(reached) {
        let log = vm.daemon.log();
        assert_eq!(log.contains("RLIMIT_MEMLOCK"), !reached, "{log}");
    }
    eprintln!("{host_iommu} with {limit:?}: {reached:?}");
    reached
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn two_vms_of_one_user_have_a_device_each() {
    for host_iommu in ["iommufd", "type1"] {
        assert_eq!(two_vms(host_iommu, None), [true, true], "{host_iommu}");
    }
    // The reason for the services' limit: iommufd compares the limit with the locked memory of both.
    assert_eq!(two_vms("iommufd", Some(ENOUGH_FOR_ONE)), [true, false]);
    assert_eq!(two_vms("type1", Some(ENOUGH_FOR_ONE)), [true, true]);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn one_vm_with_two_devices_locks_its_memory_twice() {
    let edu = words("VIOMMU_EDU");
    for (limit, status) in [(None, OK), (Some(ENOUGH_FOR_ONE), NOMEM)] {
        let mut vm = Vm::start("iommufd", &edu[..2], limit);
        assert!(vm.does_dma(), "both devices in bypass mode");
        // The other device stays in bypass mode, so the domain pins its memory itself.
        assert_eq!(vm.guest.attach(1, endpoint(0)), OK);
        let mapped = vm.guest.map(1, 0, RAM_LEN - 1, RAM, RW);
        assert_eq!(mapped, status, "{limit:?}: {}", vm.daemon.log());
    }
}
