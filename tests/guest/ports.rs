//! Guests with devices behind ports: the firmware numbers the buses as the table says, or the endpoints are blocked.

use std::fs;

use serde_json::json;

use super::vm::machine::Machine;
use super::vm::{ANSWER, Daemon, Kernel, Setup, TestDir, Vm, VmOptions, wait_for};
use super::{MSI_OF_Q35, Mode, Transport, start_mapper, tables_agree};

/// Several functions of one slot that are ports, reserved numbers, a switch and a bridge to conventional PCI.
const PORTS: &str = r#"
address = "00:05.0"

[[endpoint]]
port = "00:02.0"

[[endpoint]]
port = "00:02.1"
range = "00.0-00.1"

[[port]]
address = "00:03.0"
hotplug = true

[[endpoint]]
port = "00:04.0/00.0/01.0"

[[port]]
address = "00:04.0/00.0/00.0"

[[port]]
address = "00:1c.0/00.0"
kind = "pcie-pci-bridge"

[[endpoint]]
port = "00:1c.0/00.0"
address = "01.0"
"#;
/// The guest has firmware, which reserves numbers.
const RESERVED: &str = "reserve-buses = 2\n";
/// The devices that the guest binds to vfio-pci, and the ports behind which they are. The numbers are those with
/// [`RESERVED`]: the port 03.0 has bus 03 to 05.
const DEVICES: [(&str, &str); 3] = [
    ("0000:01:00.0", "02-0"),
    ("0000:09:00.0", "04-0-00-0-01-0"),
    ("0000:0b:01.0", "1c-0-00-0"),
];
/// More endpoints.
const OTHERS: [&str; 2] = ["0000:02:00.0", "0000:02:00.1"];

/// The firmware of a guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Numbering {
    /// SeaBIOS, which QEMU starts before a kernel.
    SeaBios,
    /// OVMF.
    Ovmf,
}

fn config(setup: &Setup, test_dir: &TestDir) -> String {
    let reserved = match setup.machine {
        Machine::Q35 => format!(
            "{}{}",
            MSI_OF_Q35,
            PORTS.replace("hotplug = true\n", &format!("hotplug = true\n{RESERVED}"))
        ),
        Machine::Virt => PORTS.to_owned(),
    };
    let qmp = test_dir.path("iommu.qmp");
    format!("memory = \"512M\"\nqmp = {qmp:?}\n{reserved}")
}

/// QEMU's arguments for the devices, and for the firmware.
fn options<'a>(
    setup: &Setup,
    kernel: &'a Kernel,
    mode: Mode,
    daemon: &Daemon,
    numbering: Numbering,
    test_dir: &TestDir,
) -> VmOptions<'a> {
    let mut extra = Vec::new();
    let mut device = |text: String| extra.extend(["-device".to_owned(), text]);
    for (address, port) in DEVICES {
        let place = &address["0000:00:".len()..];
        device(format!("edu,bus=viommu-port-{port},addr={place}"));
    }
    for function in ["00.0,multifunction=on", "00.1"] {
        device(format!("edu,bus=viommu-port-02-1,addr={function}"));
    }
    if numbering == Numbering::Ovmf {
        let firmware = setup.firmware();
        let initial = firmware.variables.expect("flash memory of its own");
        let variables = test_dir.path("variables");
        fs::copy(initial, &variables).expect("copied");
        let flash = "if=pflash,format=raw";
        let code = format!("{flash},readonly=on,file={}", firmware.code.display());
        let variables = format!("{flash},file={}", variables.display());
        extra.extend(["-drive".into(), code, "-drive".into(), variables]);
    }
    VmOptions {
        kernel,
        append: mode.append().to_owned(),
        iommu: daemon.qemu_args.clone(),
        extra,
    }
}

fn boot(setup: &Setup, test_dir: &TestDir, options: &VmOptions<'_>) -> Vm {
    let mut vm = Vm::start(setup, test_dir, "vm", options);
    vm.wait_until_up();
    test_dir.note("up");
    vm
}

pub fn ports_under_seabios(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    ports_agree(setup, kernel, mode, transport, Numbering::SeaBios, test_dir);
}

pub fn ports_under_ovmf(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    // An Arm guest learns its endpoints from the device tree, without firmware.
    if setup.machine == Machine::Q35 {
        ports_agree(setup, kernel, mode, transport, Numbering::Ovmf, test_dir);
    }
}

/// The guest finds each device at the address in its table. Endpoints behind ports have exactly the mappings that the
/// guest believes. A device that is plugged into a port is an endpoint, too. After a reboot the check is made again.
fn ports_agree(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    numbering: Numbering,
    test_dir: &TestDir,
) {
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config(setup, test_dir));
    let options = options(setup, kernel, mode, &daemon, numbering, test_dir);
    let mut vm = boot(setup, test_dir, &options);
    let bound = DEVICES.map(|(address, _)| at(setup, address));
    let bound = bound.each_ref().map(String::as_str);
    vm.run(&format!("vfio_bind {}", bound.join(" ")));
    let status = daemon.status();
    assert_eq!(
        status.0["places"]["state"], "agree",
        "{}",
        status.0["places"]
    );
    for endpoint in bound {
        assert_eq!(status.dma_of(endpoint), "translated", "{endpoint}");
    }
    for endpoint in OTHERS {
        vm.run(&format!("ls -d /sys/bus/pci/devices/{endpoint}"));
    }
    start_mapper(&mut vm, "all", 8, &bound);
    vm.run_within("ask all churn 2000", ANSWER);
    tables_agree(&mut vm, &mut daemon, &[("all", bound[0])]);
    // The bridge gives its own ID to accesses.
    let alias = at(setup, "0000:0b:00.0");
    let status = daemon.status();
    assert_eq!(status.domain_of(&alias), status.domain_of(bound[2]));
    test_dir.note("tables agree");

    daemon.ask("add-endpoint address = \"03:00.0\"");
    vm.qmp(
        "device_add",
        json!({"driver": "edu", "id": "plugged", "bus": "viommu-port-03-0"}),
    );
    vm.run("for n in $(seq 100); do [ -e /sys/bus/pci/devices/0000:03:00.0 ] && break; sleep 0.2; done");
    vm.run("vfio_bind 0000:03:00.0");
    wait_for("the plugged device's domain", ANSWER, || {
        (daemon.status().dma_of("0000:03:00.0") == "translated").then_some(())
    });
    assert_eq!(daemon.status().refusals(), Vec::<String>::new());

    if numbering == Numbering::SeaBios {
        let checks = daemon.status().0["places"]["checks"].as_u64();
        vm.qmp("system_reset", json!({}));
        vm.wait_until_up();
        test_dir.note("up again");
        let status = daemon.status();
        assert_eq!(status.0["places"]["state"], "agree");
        assert!(status.0["places"]["checks"].as_u64() > checks);
    }
    drop(vm);
    daemon.stop();
}

/// Another port takes a number. The endpoints whose ports have other numbers are blocked, and everyone is told; the
/// others are not. Linux 7.3 gives them no group all the same.
pub fn a_wrong_number(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config(setup, test_dir));
    let mut options = options(setup, kernel, mode, &daemon, Numbering::SeaBios, test_dir);
    // After the first port, and before the others.
    let stranger = "pcie-root-port,id=stranger,addr=02.2,chassis=99,slot=99";
    options.extra.extend(["-device".into(), stranger.into()]);
    let mut vm = boot(setup, test_dir, &options);
    let (first, second) = (DEVICES[0].0, at(setup, DEVICES[1].0));
    vm.run("ls /sys/bus/virtio/drivers/virtio_iommu/virtio0");
    let status = daemon.status();
    let places = &status.0["places"];
    assert_eq!(places["state"], "differ", "{places}");
    let ports = places["ports"].as_array().expect("a list");
    let has = |port: &str| ports.iter().any(|found| found["port"] == port);
    assert!(
        !has("00:02.0") && !has("00:02.1") && has("00:03.0"),
        "{places}"
    );
    assert_ne!(status.endpoint(first)["state"], "misplaced");
    assert_eq!(status.endpoint(&second)["state"], "misplaced");
    assert_eq!(status.dma_of(&second), "blocked");
    let log = fs::read_to_string(test_dir.path("daemon.log")).expect("a log");
    assert!(
        log.contains("the bus behind port 00:03.0 has the number 03"),
        "{log}"
    );
    drop(vm);
    daemon.stop();
}

/// The address of a device with the numbers of this machine, which reserves none if it has no firmware.
fn at(setup: &Setup, address: &str) -> String {
    match (setup.machine, address) {
        (Machine::Virt, "0000:09:00.0") => "0000:07:00.0".into(),
        (Machine::Virt, "0000:0b:01.0") => "0000:09:01.0".into(),
        (Machine::Virt, "0000:0b:00.0") => "0000:09:00.0".into(),
        _ => address.into(),
    }
}
