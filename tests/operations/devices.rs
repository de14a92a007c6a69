//! Two VMs with a device of the host each, whose daemons are services of one user.

use std::fs;
use std::path::PathBuf;

use crate::common::guest::{Guest, HIGH_RAM, Setup};
use crate::edu_driver::{Driver, PAGE};
use crate::machine::{Vm, run_ok};

/// The devices that `debian.sh --devices` binds to vfio-pci.
const DEVICES: [&str; 2] = ["0000:00:10.0", "0000:00:11.0"];
/// The endpoint of each, at 00:0f.0.
const ENDPOINT: u32 = 0x78;
const BYTES: [u8; PAGE as usize] = [0x5a; PAGE as usize];

fn export_socket(name: &str) -> PathBuf {
    format!("/run/vhost-device-iommu/{name}/edu.sock").into()
}

/// A VM with `device`. The kernel of the machine has no iommufd, so VFIO's own interface maps.
fn vm(name: &'static str, device: &str) -> Vm {
    let export = export_socket(name);
    let vm = Vm::new(
        name,
        &format!("[[endpoint]]\naddress = '00:0f.0'\nvfio = '{device}'\nexport = {export:?}\n"),
    );
    let text = fs::read_to_string(vm.file()).expect("its file");
    fs::write(vm.file(), format!("host-iommu = 'type1'\n{text}")).expect("its file");
    // The generator gives the service the device and its limits.
    run_ok(&["systemctl", "daemon-reload"]);
    vm
}

/// A VMM and its driver, which attaches nothing: the device is in bypass mode.
fn guest(vm: &Vm) -> Guest {
    let mut guest = Guest::connect_to(vm.socket(), Setup::default());
    guest.driver_ok();
    // The daemon sets up all endpoints before it serves the first request.
    guest.probe(ENDPOINT);
    guest
}

/// Whether the device of the VM copies a page of this guest's memory.
fn does_dma(name: &str, guest: &Guest) -> bool {
    let (source, target) = (HIGH_RAM + 0x10_0000, HIGH_RAM + 0x20_0000);
    guest.memory.write(source, &BYTES);
    guest.memory.write(target, &[0; PAGE as usize]);
    let mut driver = Driver::connect(&export_socket(name));
    driver.dma_read(source);
    driver.dma_write(target);
    guest.memory.read(target, PAGE as usize) == BYTES
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn two_services_have_a_device_each() {
    let [first, second] = DEVICES;
    let (one, two) = (vm("one", first), vm("two", second));
    one.start();
    two.start();
    for vm in [&one, &two] {
        assert_eq!(vm.property("User"), "vhost-device-iommu");
        assert_eq!(vm.property("LimitMEMLOCK"), "infinity");
        println!("{}: {}", vm.service(), vm.property("DeviceAllow"));
    }
    let guests = [guest(&one), guest(&two)];
    assert!(does_dma("one", &guests[0]), "{}", one.journal());
    assert!(does_dma("two", &guests[1]), "{}", two.journal());
    // Both work while both run, and the end of one leaves the other.
    assert!(does_dma("one", &guests[0]), "{}", one.journal());
    run_ok(&["systemctl", "stop", &one.service()]);
    assert_eq!(one.property("Result"), "success");
    assert!(does_dma("two", &guests[1]), "{}", two.journal());
    for vm in [&one, &two] {
        let warnings = vm.journal_from("warning");
        assert!(!warnings.contains("MEMLOCK"), "{warnings}");
    }
}
