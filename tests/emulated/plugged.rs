//! Devices that are plugged into a running guest: one that is unplugged again, twice, and a disk in a
//! process of its own, with its data. Then a reset, of which the daemon hears before the guest does
//! anything.
//!
//! The disk is not unplugged: QEMU 11.1 aborts when a vfio-user device is, also where its server is
//! connected directly.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::bed::{self, Server, new_image};
use crate::vm::{ANSWER, Daemon, LONG_ANSWER, Setup, Table, Vm, VmOptions, Workplace, wait_for};

/// Behind the first port.
const DISK: &str = "0000:01:00.0";
/// Behind the second: something to bind to vfio-pci.
const EDU: &str = "0000:02:00.0";
/// Random data goes there and comes back, past the guest's caches.
const WRITE: &str = "dd if=/dev/urandom of=/run/data bs=1M count=4 2>/dev/null && \
    dd if=/run/data of=/dev/nvme0n1 bs=1M 2>/dev/null && sync && \
    echo 3 >/proc/sys/vm/drop_caches && \
    dd if=/dev/nvme0n1 of=/run/back bs=1M count=4 2>/dev/null && cmp /run/data /run/back && \
    sha256sum </run/data | cut -c 1-64";

#[test]
#[ignore = "needs qemu-scripts/setup.sh; run qemu-scripts/test.sh emulated"]
fn plugged_and_unplugged() {
    let setup = Setup::with_storage();
    let place = Workplace::new("plugged_and_unplugged");
    let qmp = place.path("iommu-qmp.sock");
    let mut daemon = Daemon::start(
        &place,
        &format!(
            "memory = '256M'\naddress = '00:05.0'\nbypass = false\nqmp = {qmp:?}\n\
             hotplug = ['01:00.0-01:00.7', '02:00.0-02:00.7']\n"
        ),
    );
    let ports = ["1,addr=3.0", "2,addr=4.0"].map(|port| {
        let number = &port[..1];
        format!("pcie-root-port,id=port{number},chassis={port}")
    });
    let ports = ports.iter().flat_map(|port| ["-device", port]);
    let options = VmOptions {
        kernel: setup.newest(),
        append: String::new(),
        iommu: daemon.qemu_args.clone(),
        extra: bed::CPU
            .into_iter()
            .chain(ports)
            .map(str::to_owned)
            .collect(),
    };
    let mut vm = Vm::start(&setup, &place, "vm", &options);
    vm.wait_until_up();
    vm.run("load-storage");
    place.note("up");
    for name in ["one", "two"] {
        comes_and_goes(&mut vm, &mut daemon, name);
        place.note(&format!("device {name} came and went"));
    }

    let image = new_image(&place, "disk.img");
    let server = Server::start(&place, "disk", &image, "messages");
    plug_disk(&mut vm, &mut daemon, &place, &server);
    let sum = vm.run_within(WRITE, LONG_ANSWER);
    assert_eq!(sum, [sum_of_start(&place, &image)], "what the disk holds");
    assert_eq!(daemon.status().refusals(), Vec::<String>::new());
    place.note("data went to the disk and came back");

    vm.qmp("stop", json!({}));
    assert!(!daemon.status().domains().is_empty());
    vm.qmp("system_reset", json!({}));
    // The guest is still stopped: nobody else can have ended them.
    wait_for("no domain after the reset", ANSWER, || {
        daemon.status().domains().is_empty().then_some(())
    });
    assert_eq!(vm.qmp("query-status", json!({}))["running"], false);
    assert_eq!(daemon.status().dma_of(DISK), "blocked");
    place.note("no domain after the reset");
    vm.qmp("cont", json!({}));
    vm.wait_until_up();
    vm.run("load-storage");
    disk_is_there(&mut vm);
    vm.run_within(WRITE, LONG_ANSWER);
    drop(vm);
    daemon.stop();
    drop(server);
}

/// The endpoint is added and the device plugged; a program in the guest maps for it; the device is
/// unplugged and the endpoint removed.
fn comes_and_goes(vm: &mut Vm, daemon: &mut Daemon, name: &str) {
    let added = daemon.ask("add-endpoint address = '02:00.0'");
    assert_eq!(added["described"], true, "{added}");
    assert_eq!(daemon.status().dma_of(EDU), "blocked");
    let device = json!({ "driver": "edu", "id": "edu", "bus": "port2" });
    vm.qmp("device_add", device);
    let path = format!("/sys/bus/pci/devices/{EDU}");
    // Its folder is there before the guest has a driver match it.
    vm.run(&format!(
        "for _ in $(seq 200); do vfio_bind {EDU} 2>/dev/null && break; sleep 0.1; done; [ -e {path}/driver ]"
    ));
    assert_eq!(daemon.status().dma_of(EDU), "translated");
    vm.run(&format!("start {name} vfio-map --seed 7 {EDU}"));
    vm.run_within(&format!("ask {name} churn 2000"), LONG_ANSWER);
    let believed = Table::from_dump(&vm.run_within(&format!("ask {name} dump"), LONG_ANSWER));
    assert!(!believed.0.is_empty());
    let domain = daemon.status().domain_of(EDU);
    Table::assert_same(&believed, &daemon.tables()[&domain], "what is mapped");
    vm.run(&format!("ask {name} quit"));

    vm.qmp("device_del", json!({ "id": "edu" }));
    wait_for("the end of the device", ANSWER, || {
        let left = vm.qmp("qom-list", json!({ "path": "/machine/peripheral" }));
        let left = left.as_array().expect("a list");
        (!left.iter().any(|device| device["name"] == "edu")).then_some(())
    });
    let removed = daemon.ask("remove-endpoint 02:00.0");
    assert!(removed["error"].is_null(), "{removed}");
    let status = daemon.status();
    assert!(!status.0.to_string().contains(EDU), "{}", status.0);
    assert!(status.domains().is_empty(), "{}", status.0);
    // The guest had detached it before.
    assert_eq!(status.refusals(), Vec::<String>::new());
}

/// In this order: the endpoint, then the device.
fn plug_disk(vm: &mut Vm, daemon: &mut Daemon, place: &Workplace, server: &Server) {
    let (listen, connect) = (place.path("iommu-nvme.sock"), server.socket());
    let added = daemon.ask(&format!(
        "add-endpoint address = '01:00.0', vfio-user = {{ listen = {listen:?}, connect = {connect:?} }}"
    ));
    assert_eq!(added["described"], true, "{added}");
    let device = json!({
        "driver": "vfio-user-pci",
        "id": "disk",
        "bus": "port1",
        "socket": { "type": "unix", "path": listen },
    });
    vm.qmp("device_add", device);
    disk_is_there(vm);
    assert_eq!(daemon.status().dma_of(DISK), "translated");
}

/// The checksum of what the guest has written.
fn sum_of_start(place: &Workplace, image: &Path) -> String {
    let bytes = fs::read(image).expect("the disk");
    let start = place.path("start");
    fs::write(&start, &bytes[..4 << 20]).expect("written");
    let output = Command::new("sha256sum").arg(start).output();
    let text = String::from_utf8(output.expect("it runs").stdout).expect("text");
    text[..64].to_owned()
}

fn disk_is_there(vm: &mut Vm) {
    vm.run(
        "for _ in $(seq 200); do [ -e /dev/nvme0n1 ] && break; sleep 0.1; done; [ -e /dev/nvme0n1 ]",
    );
}
