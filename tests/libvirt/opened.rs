//! A device of the host that libvirt opens for QEMU (`<hostdev>` with iommufd). The daemon takes it over through its helper.
//!
//! The daemon waits five seconds for the helper when the guest's driver starts. The emulated machine needs a large part of that,
//! so this test fails on a host that is too busy.

use crate::domain::{self, Domain};
use crate::machine::Vm;
use crate::{DEVICES, NAME, Notes, ON_BUS_0, drive, is_free, service};

/// Whether the daemon has the device's open file.
fn is_taken_over(vm: &Vm, address: &str) -> bool {
    let status = vm.status();
    let mut endpoints = status["endpoints"].as_array().expect("a list").iter();
    let found = endpoints.find(|it| it["address"] == address);
    found.expect("an endpoint")["taken_over"] == true
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh --libvirt-newest"]
fn a_device_that_libvirt_opens_obeys_the_guest() {
    let notes = Notes::begin();
    domain::confine_libvirt();
    let device = DEVICES[0];
    let vm = service(&format!(
        "vfio-from = 'vmm'\n[[endpoint]]\naddress = '{ON_BUS_0}'\nvfio = '{device}'\n"
    ));
    vm.start();
    assert!(is_free(device), "the daemon opens no device");
    let mut domain = Domain::define(NAME, &vm.file());
    domain.start();
    notes.add("started");
    let profile = format!("libvirt-{} (enforce)", domain.uuid);
    assert_eq!(domain.profile(), profile);
    assert!(!is_free(device), "QEMU has it");
    domain.guest.wait_until_up();
    notes.add("up");
    assert!(is_taken_over(&vm, ON_BUS_0), "{}", vm.journal());
    drive(&vm, &mut domain, ON_BUS_0);
    notes.add("driven");
}
