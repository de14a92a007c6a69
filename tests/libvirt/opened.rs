//! Devices of the host that libvirt opens for QEMU (`<hostdev>` with iommufd). The daemon takes them over through its helper.
//!
//! The daemon waits five seconds for the helper when the guest's driver starts. The emulated machine needs a large part of that,
//! so this test fails on a host that is too busy.

use crate::domain::{self, Domain};
use crate::machine::{Vm, run_ok};
use crate::{
    BEHIND_PORT, DEVICES, NAME, Notes, ON_BUS_0, assert_no_errors, destroy, drive, is_free,
    service, wait_until,
};

/// Whether the daemon has the device's open file.
fn is_taken_over(vm: &Vm, address: &str) -> bool {
    let status = vm.status();
    let mut endpoints = status["endpoints"].as_array().expect("a list").iter();
    let found = endpoints.find(|it| it["address"] == address);
    found.expect("an endpoint")["taken_over"] == true
}

/// Takes the element of the device that comes later out of the domain.
fn split(xml: &str) -> (String, String) {
    let end = "</hostdev>";
    let last = xml.rfind("<hostdev").expect("two devices");
    let after = last + xml[last..].find(end).expect("its end") + end.len();
    let (before, device) = (&xml[..last], &xml[last..after]);
    (before.to_owned() + &xml[after..], device.to_owned())
}

/// Waits until the guest has the device and the daemon its file. The guest's kernel attaches a device once, when it finds it, and
/// the daemon waits a second for the helper. In an emulated machine the helper may start later: then the guest must find the
/// device again.
fn plugged_in(vm: &Vm, domain: &mut Domain, notes: &Notes) {
    let path = format!("/sys/bus/pci/devices/{BEHIND_PORT}");
    domain.guest.run(&format!(
        "for _ in $(seq 600); do [ -e {path} ] && break; sleep 0.1; done; [ -e {path} ]"
    ));
    wait_until("the device taken over", || is_taken_over(vm, BEHIND_PORT));
    let (_, status) = domain.guest.try_run(&format!("[ -e {path}/iommu_group ]"));
    if status != 0 {
        notes.add("the helper was late");
        domain.guest.run(&format!(
            "echo 1 >{path}/remove && echo 1 >/sys/bus/pci/rescan && [ -e {path}/iommu_group ]"
        ));
    }
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh --libvirt-newest"]
fn a_device_that_libvirt_opens_obeys_the_guest() {
    let notes = Notes::begin();
    domain::confine_libvirt();
    let vm = service(&format!(
        "vfio-from = 'vmm'\n[[endpoint]]\naddress = '{ON_BUS_0}'\nvfio = '{}'\n\
         [[endpoint]]\nport = '00:02.0'\nvfio = '{}'\n",
        DEVICES[0], DEVICES[1]
    ));
    vm.start();
    for device in DEVICES {
        assert!(is_free(device), "the daemon opens no device");
    }
    let mut later = String::new();
    let mut domain = Domain::define(NAME, &vm.file(), |xml| {
        let (xml, device) = split(&xml);
        later = device;
        xml
    });
    domain.start();
    notes.add("started");
    let profile = format!("libvirt-{} (enforce)", domain.uuid);
    assert_eq!(domain.profile(), profile);
    assert!(!is_free(DEVICES[0]), "QEMU has it");
    domain.guest.wait_until_up();
    notes.add("up");
    assert!(is_taken_over(&vm, ON_BUS_0), "{}", vm.journal());
    drive(&vm, &mut domain, ON_BUS_0);
    notes.add("driven");

    domain.change("attach-device", &later);
    notes.add("a second device plugged in");
    plugged_in(&vm, &mut domain, &notes);
    drive(&vm, &mut domain, BEHIND_PORT);
    notes.add("driven, too");

    run_ok(&["virsh", "reset", NAME]);
    domain.guest.wait_until_up();
    notes.add("up after a reset");
    drive(&vm, &mut domain, ON_BUS_0);
    drive(&vm, &mut domain, BEHIND_PORT);
    notes.add("driven");

    destroy(&vm);
    for device in DEVICES {
        assert!(is_free(device), "{device} is the host's");
    }
    assert_no_errors(&vm);
}
