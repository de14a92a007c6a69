//! libvirt runs a VM behind the daemon, in the machine of `qemu-scripts/debian.sh --libvirt`: `qemu-scripts/test.sh libvirt`.
//!
//! The domain is what `libvirt-xml` prints, with a kernel and serial ports. libvirt, its AppArmor profiles and
//! the daemon's service are those of Debian's packages and of ours. KVM runs the guest if the machine has its modules; without
//! them the guest is emulated in an emulated machine, and a boot takes minutes.

#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failure here is a failed test wherever it happens"
)]

mod agent;
mod domain;
mod exported;
#[path = "../operations/machine.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod machine;
mod opened;

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use domain::Domain;
use machine::{Vm, run_ok};

/// The VM, its domain and its service.
const NAME: &str = "vm1";
/// The devices that `debian.sh --devices` binds to vfio-pci.
const DEVICES: [&str; 2] = ["0000:00:10.0", "0000:00:11.0"];
/// The addresses of devices in the guest: on its bus 00, and behind its first port.
const ON_BUS_0: &str = "0000:00:06.0";
const BEHIND_PORT: &str = "0000:01:00.0";
/// How long libvirt and the guest may take for an operation.
const PATIENCE: Duration = Duration::from_secs(180);

/// I/O virtual addresses that are no addresses of guest memory.
const SOURCE: &str = "40000000";
const TARGET: &str = "765432100000";

/// Waits until `done`, which the test cannot await otherwise.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} has not happened");
        sleep(Duration::from_millis(300));
    }
}

/// A service with this configuration besides the usual one, and its table. The user of libvirt's QEMUs may connect to it.
fn service(more: &str) -> Vm {
    let vm = Vm::new(NAME, "");
    let text = format!(
        "socket = {:?}\ncontrol = {:?}\nmemory = '256M'\naddress = '00:05.0'\n{more}",
        vm.socket(),
        vm.socket().with_file_name("control.sock"),
    );
    fs::write(vm.file(), text).expect("its file");
    run_ok(&["systemctl", "daemon-reload"]);
    run_ok(&["usermod", "-aG", "vhost-device-iommu", "libvirt-qemu"]);
    let table = format!("/var/lib/vhost-device-iommu/{NAME}.viot");
    let file = vm.file();
    let file = file.to_str().expect("text");
    run_ok(&["vhost-device-iommu", "viot", file, "-o", &table]);
    vm
}

/// Whether this test can open the host group of the device, as the next program that wants it would.
fn is_free(device: &str) -> bool {
    let link = format!("/sys/bus/pci/devices/{device}/iommu_group");
    let group = fs::read_link(link).expect("a host group");
    let node = Path::new("/dev/vfio").join(group.file_name().expect("a number"));
    fs::File::options()
        .read(true)
        .write(true)
        .open(node)
        .is_ok()
}

/// The guest binds the device to its VFIO, and the device copies a page between addresses that the guest has mapped, and to no
/// other.
fn drive(vm: &Vm, domain: &mut Domain, endpoint: &str) {
    let guest = &mut domain.guest;
    guest.run(&format!("vfio_bind {endpoint}"));
    guest.run(&format!("start {endpoint} vfio-edu {endpoint}"));
    guest.run(&format!("ask {endpoint} map {SOURCE} 1 r- 0"));
    guest.run(&format!("ask {endpoint} map {TARGET} 1 rw 8"));
    assert_eq!(copied(domain, endpoint), ["c 8 0"]);
    assert_eq!(vm.endpoint(endpoint), "attached");
    let guest = &mut domain.guest;
    guest.run(&format!("ask {endpoint} unmap {TARGET} 1"));
    assert_eq!(copied(domain, endpoint), [""; 0], "it is not mapped");
    let guest = &mut domain.guest;
    guest.run(&format!("ask {endpoint} map {TARGET} 1 rw 9"));
    assert_eq!(copied(domain, endpoint), ["c 9 0"]);
}

/// The device copies the page once more. Returns the pages of the guest that have changed.
fn copied(domain: &mut Domain, endpoint: &str) -> Vec<String> {
    let ask = format!("ask {endpoint} copy {SOURCE} {TARGET}");
    let mut lines = domain.guest.run(&ask);
    lines.retain(|line| line.starts_with("c "));
    lines
}

/// Ends the VM. The service goes on without it.
fn destroy(vm: &Vm) {
    run_ok(&["virsh", "destroy", NAME]);
    wait_until("the end of the connection", || {
        vm.status()["connected"] == false
    });
}

/// Notes what has happened, and when.
struct Notes(Instant);

impl Notes {
    fn begin() -> Self {
        Self(Instant::now())
    }

    fn add(&self, what: &str) {
        eprintln!("{:4} s: {what}", self.0.elapsed().as_secs());
    }
}

fn assert_no_errors(vm: &Vm) {
    assert_eq!(vm.property("NRestarts"), "0");
    let errors = vm.journal_from("err");
    assert!(!errors.contains("vhost-device-iommu"), "{errors}");
}
