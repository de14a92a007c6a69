//! Devices plugged into a running guest: one that is plugged and unplugged twice, and an emulated disk that the guest
//! writes and reads. Then a reset of the guest, which the daemon must notice before the guest runs.
//!
//! The disk is not unplugged: QEMU 11.1 aborts when a vfio-user device is unplugged, also without the daemon.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::bed::{self, Server, new_image};
use crate::vm::{ANSWER, Daemon, LONG_ANSWER, Setup, Table, TestDir, Vm, VmOptions, wait_for};

/// PCI address of the disk, behind the first port.
const DISK: &str = "0000:01:00.0";
/// PCI address of a device that the guest binds to vfio-pci, behind the second port.
const EDU: &str = "0000:02:00.0";
/// Writes random data to the disk and reads it back past the guest's caches.
const WRITE: &str = "dd if=/dev/urandom of=/run/data bs=1M count=4 2>/dev/null && \
    dd if=/run/data of=/dev/nvme0n1 bs=1M 2>/dev/null && sync && \
    echo 3 >/proc/sys/vm/drop_caches && \
    dd if=/dev/nvme0n1 of=/run/back bs=1M count=4 2>/dev/null && cmp /run/data /run/back && \
    sha256sum </run/data | cut -c 1-64";

#[test]
#[ignore = "needs qemu-scripts/setup.sh; run qemu-scripts/test.sh emulated"]
fn plugged_and_unplugged() {
    let setup = Setup::with_storage();
    let test_dir = TestDir::new("plugged_and_unplugged");
    let qmp = test_dir.path("iommu-qmp.sock");
    let mut daemon = Daemon::start(
        &test_dir,
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
    let mut vm = Vm::start(&setup, &test_dir, "vm", &options);
    vm.wait_until_up();
    vm.run("load-storage");
    test_dir.note("up");
    for name in ["one", "two"] {
        plug_and_unplug(&mut vm, &mut daemon, name);
        test_dir.note(&format!("device {name} was plugged and unplugged"));
    }

    let image = new_image(&test_dir, "disk.img");
    let server = Server::start(&test_dir, "disk", &image, "messages");
    plug_disk(&mut vm, &mut daemon, &test_dir, &server);
    let sum = vm.run_within(WRITE, LONG_ANSWER);
    assert_eq!(
        sum,
        [checksum_of_start(&test_dir, &image)],
        "the image has the data"
    );
    assert_eq!(daemon.status().refusals(), Vec::<String>::new());
    test_dir.note("the disk returned the data");

    vm.qmp("stop", json!({}));
    assert!(!daemon.status().domains().is_empty());
    vm.qmp("system_reset", json!({}));
    // The guest is still stopped, so only the reset can have ended the domains.
    wait_for("no domain after the reset", ANSWER, || {
        daemon.status().domains().is_empty().then_some(())
    });
    assert_eq!(vm.qmp("query-status", json!({}))["running"], false);
    assert_eq!(daemon.status().dma_of(DISK), "blocked");
    test_dir.note("no domain after the reset");
    vm.qmp("cont", json!({}));
    vm.wait_until_up();
    vm.run("load-storage");
    wait_for_disk(&mut vm);
    vm.run_within(WRITE, LONG_ANSWER);
    drop(vm);
    daemon.stop();
    drop(server);
}

/// Adds the endpoint and plugs the device, lets a program in the guest map for it, unplugs the device and removes the
/// endpoint.
fn plug_and_unplug(vm: &mut Vm, daemon: &mut Daemon, name: &str) {
    let added = daemon.ask("add-endpoint address = '02:00.0'");
    assert_eq!(added["described"], true, "{added}");
    assert_eq!(daemon.status().dma_of(EDU), "blocked");
    let device = json!({ "driver": "edu", "id": "edu", "bus": "port2" });
    vm.qmp("device_add", device);
    let path = format!("/sys/bus/pci/devices/{EDU}");
    // Retried: sysfs shows the device before the guest's kernel can bind a driver.
    vm.run(&format!(
        "for _ in $(seq 200); do vfio_bind {EDU} 2>/dev/null && break; sleep 0.1; done; [ -e {path}/driver ]"
    ));
    assert_eq!(daemon.status().dma_of(EDU), "translated");
    vm.run(&format!("start {name} vfio-map --seed 7 {EDU}"));
    vm.run_within(&format!("ask {name} churn 2000"), LONG_ANSWER);
    let program = Table::from_dump(&vm.run_within(&format!("ask {name} dump"), LONG_ANSWER));
    assert!(!program.0.is_empty());
    let domain = daemon.status().domain_of(EDU);
    Table::assert_same(
        &program,
        &daemon.tables()[&domain],
        "the mappings of the program",
    );
    vm.run(&format!("ask {name} quit"));

    vm.qmp("device_del", json!({ "id": "edu" }));
    wait_for("the removal of the device", ANSWER, || {
        let left = vm.qmp("qom-list", json!({ "path": "/machine/peripheral" }));
        let left = left.as_array().expect("a list");
        (!left.iter().any(|device| device["name"] == "edu")).then_some(())
    });
    let removed = daemon.ask("remove-endpoint 02:00.0");
    assert!(removed["error"].is_null(), "{removed}");
    let status = daemon.status();
    assert!(!status.0.to_string().contains(EDU), "{}", status.0);
    assert!(status.domains().is_empty(), "{}", status.0);
    // No refusals: the guest had detached the endpoint before.
    assert_eq!(status.refusals(), Vec::<String>::new());
}

/// Adds the endpoint, then plugs the device. QEMU's device connects to the endpoint's socket.
fn plug_disk(vm: &mut Vm, daemon: &mut Daemon, test_dir: &TestDir, server: &Server) {
    let (listen, connect) = (test_dir.path("iommu-nvme.sock"), server.socket());
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
    wait_for_disk(vm);
    assert_eq!(daemon.status().dma_of(DISK), "translated");
}

/// The checksum of the first 4 MiB of the image.
fn checksum_of_start(test_dir: &TestDir, image: &Path) -> String {
    let bytes = fs::read(image).expect("the disk");
    let start = test_dir.path("start");
    fs::write(&start, &bytes[..4 << 20]).expect("written");
    let output = Command::new("sha256sum").arg(start).output();
    let text = String::from_utf8(output.expect("it runs").stdout).expect("text");
    text[..64].to_owned()
}

/// Waits until the guest has the disk.
fn wait_for_disk(vm: &mut Vm) {
    vm.run(
        "for _ in $(seq 200); do [ -e /dev/nvme0n1 ] && break; sleep 0.1; done; [ -e /dev/nvme0n1 ]",
    );
}
