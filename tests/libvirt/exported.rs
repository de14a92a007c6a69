//! A device of the host that the daemon has opened, as on the kernels of Debian.

use crate::domain::{self, Domain};
use crate::machine::{Vm, run, run_ok};
use crate::{
    BEHIND_PORT, DEVICES, NAME, Notes, ON_BUS_0, assert_no_errors, copied, destroy, drive, is_free,
    service, wait_until,
};

/// A device that libvirt makes, at the place behind the port.
const RNG: &str = "<rng model='virtio'><backend model='random'>/dev/urandom</backend>\
    <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></rng>";

/// The guest switches itself off when its power button is pressed, as an operating system would. libvirt then resets it.
const SWITCH_OFF_BY_BUTTON: &str = "for event in /sys/class/input/event*; do \
    [ \"$(cat $event/device/name)\" != 'Power Button' ] || button=/dev/input/${event##*/}; done; [ -e $button ] && \
    { (dd if=$button bs=24 count=1; poweroff -f) >/dev/null 2>&1 & }";

/// libvirt plugs a device in where the file has an endpoint, and out.
fn plug_in_and_out(vm: &Vm, domain: &mut Domain, name: &str) {
    domain.change("attach-device", RNG);
    let path = format!("/sys/bus/pci/devices/{BEHIND_PORT}");
    // The guest's own driver comes first.
    domain.guest.run(&format!(
        "for _ in $(seq 600); do [ -e {path}/driver ] && break; sleep 0.1; done; \
         echo {BEHIND_PORT} >{path}/driver/unbind && vfio_bind {BEHIND_PORT} && \
         start {name} vfio-map --seed 7 {BEHIND_PORT} && ask {name} churn 100"
    ));
    assert_eq!(vm.endpoint(BEHIND_PORT), "attached");
    let before = vm.status()["domains"].as_array().expect("a list").len();
    domain.guest.run(&format!("ask {name} quit"));
    domain.change("detach-device", RNG);
    wait_until("the end of the device", || !domain.xml().contains("<rng"));
    domain.guest.run(&format!("! [ -e {path} ]"));
    assert_eq!(vm.endpoint(BEHIND_PORT), "unattached");
    let after = vm.status()["domains"].as_array().expect("a list").len();
    assert_eq!(after, before - 1);
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh --libvirt"]
fn libvirt_runs_a_vm_behind_the_daemon() {
    let notes = Notes::begin();
    domain::confine_libvirt();
    let export = format!("/run/vhost-device-iommu/{NAME}/edu.sock");
    let vm = service(&format!(
        "host-iommu = 'type1'\n[[endpoint]]\naddress = '{ON_BUS_0}'\nvfio = '{}'\nexport = {export:?}\n\
         [[endpoint]]\nport = '00:02.0'\n",
        DEVICES[0]
    ));
    vm.start();
    assert!(!is_free(DEVICES[0]), "the daemon has it");

    let mut domain = Domain::define(NAME, &vm.file(), |xml| xml);
    let ports = domain.xml().matches("model='pcie-root-port'").count();
    assert_eq!(ports, 1, "those of the file: {}", domain.xml());
    domain.start();
    notes.add("started");
    let profile = format!("libvirt-{} (enforce)", domain.uuid);
    assert_eq!(domain.profile(), profile);
    domain.guest.wait_until_up();
    notes.add("up");
    drive(&vm, &mut domain, ON_BUS_0);
    notes.add("driven");

    let refused = run(&["virsh", "managedsave", NAME]);
    assert!(!refused.success, "{}", refused.text);
    let why = "non-migratable device: 0000:00:05.0/vhost-user-test-device";
    assert!(refused.text.contains(why), "{}", refused.text);

    for name in ["one", "two"] {
        plug_in_and_out(&vm, &mut domain, name);
        notes.add("plugged in and out");
    }
    run_ok(&["virsh", "suspend", NAME]);
    run_ok(&["virsh", "resume", NAME]);
    assert_eq!(copied(&mut domain, ON_BUS_0), ["c 9 0"]);
    notes.add("suspended and resumed");

    destroy(&vm);
    // The service keeps an exported device for the next VMM, and its end gives it back.
    run_ok(&["systemctl", "stop", &vm.service()]);
    assert!(is_free(DEVICES[0]), "it is the host's");
    run_ok(&["systemctl", "start", &vm.socket_unit()]);
    domain.start();
    notes.add("started again, and the daemon with it");
    domain.guest.wait_until_up();
    drive(&vm, &mut domain, ON_BUS_0);
    notes.add("driven again");

    let resets = vm.status()["resets"].as_u64().expect("a number");
    run_ok(&["virsh", "reset", NAME]);
    domain.guest.wait_until_up();
    notes.add("up after a reset");
    assert_eq!(vm.status()["resets"], resets + 1);
    drive(&vm, &mut domain, ON_BUS_0);

    domain.guest.run(SWITCH_OFF_BY_BUTTON);
    run_ok(&["virsh", "reboot", NAME, "--mode", "acpi"]);
    domain.guest.wait_until_up();
    notes.add("up after a reboot");
    assert_eq!(vm.status()["resets"], resets + 2);
    assert_eq!(vm.status()["connections"], 1);
    drive(&vm, &mut domain, ON_BUS_0);
    assert_no_errors(&vm);
}
