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
#[path = "../operations/machine.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use domain::Domain;
use machine::{Vm, run, run_ok};

/// The VM, its domain and its service.
const NAME: &str = "vm1";
/// A device that `debian.sh --devices` binds to vfio-pci, and its address in the guest.
const DEVICE: &str = "0000:00:10.0";
const ENDPOINT: &str = "0000:00:06.0";
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

/// The service, with a device of the host for the guest. The kernel of the machine has no iommufd.
fn service() -> Vm {
    let vm = Vm::new(NAME, "");
    let export = vm.socket().with_file_name("edu.sock");
    let text = format!(
        "socket = {:?}\ncontrol = {:?}\nmemory = '256M'\naddress = '00:05.0'\nhost-iommu = 'type1'\n\
         [[endpoint]]\naddress = '{ENDPOINT}'\nvfio = '{DEVICE}'\nexport = {export:?}\n",
        vm.socket(),
        vm.socket().with_file_name("control.sock"),
    );
    fs::write(vm.file(), text).expect("its file");
    run_ok(&["systemctl", "daemon-reload"]);
    vm
}

/// Whether this test can open the host group of the device, as the next program that wants it would.
fn is_device_free() -> bool {
    let link = format!("/sys/bus/pci/devices/{DEVICE}/iommu_group");
    let group = fs::read_link(link).expect("a host group");
    let node = Path::new("/dev/vfio").join(group.file_name().expect("a number"));
    fs::File::options()
        .read(true)
        .write(true)
        .open(node)
        .is_ok()
}

/// The guest binds the device to its VFIO, and the device copies a page between addresses that the guest has mapped.
fn drive(vm: &Vm, domain: &mut Domain) {
    let guest = &mut domain.guest;
    guest.run(&format!("vfio_bind {ENDPOINT}"));
    guest.run(&format!("start edu vfio-edu {ENDPOINT}"));
    guest.run(&format!("ask edu map {SOURCE} 1 r- 0"));
    guest.run(&format!("ask edu map {TARGET} 1 rw 8"));
    assert_eq!(copied(domain), ["c 8 0"]);
    assert_eq!(vm.endpoint(ENDPOINT), "attached");
}

/// The device copies the page once more. Returns the pages of the guest that have changed.
fn copied(domain: &mut Domain) -> Vec<String> {
    let mut lines = domain.guest.run(&format!("ask edu copy {SOURCE} {TARGET}"));
    lines.retain(|line| line.starts_with("c "));
    lines
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh --libvirt"]
fn libvirt_runs_a_vm_behind_the_daemon() {
    let begun = Instant::now();
    let note = |what: &str| eprintln!("{:4} s: {what}", begun.elapsed().as_secs());
    domain::confine_libvirt();
    let vm = service();
    // What the documentation says: the user of libvirt's QEMUs may connect to the daemon.
    run_ok(&["usermod", "-aG", "vhost-device-iommu", "libvirt-qemu"]);
    let table: PathBuf = format!("/var/lib/vhost-device-iommu/{NAME}.viot").into();
    let file = vm.file();
    let words = [
        "viot",
        file.to_str().expect("text"),
        "-o",
        table.to_str().expect("text"),
    ];
    run_ok(&[&["vhost-device-iommu"][..], &words].concat());
    vm.start();
    assert!(!is_device_free(), "the daemon has it");

    let mut domain = Domain::define(NAME, &vm.file());
    domain.start();
    note("started");
    assert_eq!(
        domain.profile(),
        format!("libvirt-{} (enforce)", domain.uuid)
    );
    domain.guest.wait_until_up();
    note("up");
    drive(&vm, &mut domain);
    domain.guest.run(&format!("ask edu unmap {TARGET} 1"));
    assert_eq!(
        copied(&mut domain),
        [""; 0],
        "an address that is not mapped"
    );
    note("driven");

    let refused = run(&["virsh", "managedsave", NAME]);
    assert!(!refused.success, "{}", refused.text);
    let why = "non-migratable device: 0000:00:05.0/vhost-user-test-device";
    assert!(refused.text.contains(why), "{}", refused.text);

    // Devices that are none of ours. The guest's kernel has no PCI hot-plug, so it gives up no PCI device.
    let tablet = "<input type='tablet' bus='usb'/>";
    domain.change("attach-device", tablet);
    assert!(domain.xml().contains("type='tablet'"));
    domain.change("detach-device", tablet);
    wait_until("the end of the tablet", || {
        !domain.xml().contains("type='tablet'")
    });
    let rng = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
    domain.change("attach-device", rng);
    assert!(domain.xml().contains("<rng"));
    run_ok(&["virsh", "suspend", NAME]);
    run_ok(&["virsh", "resume", NAME]);
    domain.guest.run(&format!("ask edu map {TARGET} 1 rw 9"));
    assert_eq!(copied(&mut domain), ["c 9 0"]);
    note("plugged, unplugged, suspended and resumed");

    let resets = vm.status()["resets"].as_u64().expect("a number");
    run_ok(&["virsh", "reset", NAME]);
    domain.guest.wait_until_up();
    note("up after a reset");
    assert_eq!(vm.status()["resets"], resets + 1);
    assert_eq!(vm.status()["connections"], 1);
    drive(&vm, &mut domain);

    run_ok(&["virsh", "destroy", NAME]);
    wait_until("the end of the connection", || {
        vm.status()["connected"] == false
    });
    // The service keeps an exported device for the next VMM, and its end gives it back.
    run_ok(&["systemctl", "stop", &vm.service()]);
    assert!(is_device_free(), "it is the host's");
    vm.start();
    domain.start();
    note("started again");
    domain.guest.wait_until_up();
    drive(&vm, &mut domain);
    note("driven again");
    assert_eq!(vm.property("NRestarts"), "0");
    let warnings = vm.journal_from("err");
    assert!(!warnings.contains("vhost-device-iommu@"), "{warnings}");
}
