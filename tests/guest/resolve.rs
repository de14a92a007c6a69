//! A QEMU that has not begun to run tells where its devices are, and its guest finds them there.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use super::vm::machine::Machine;
use super::vm::{Kernel, Setup, TestDir, Vm, VmOptions};

/// Devices without addresses, and their IDs: QEMU gives the first free ones.
const DEVICES: [&str; 10] = [
    "pci-testdev,addr=05.0",
    "edu,id=first",
    "pcie-root-port,id=outer,chassis=1",
    "edu,id=behind,bus=outer",
    "pcie-root-port,id=upper,chassis=2",
    "x3130-upstream,id=switch,bus=upper",
    "xio3130-downstream,id=lower,bus=switch,chassis=3,addr=2",
    "pcie-pci-bridge,id=bridge,bus=lower",
    "edu,id=conventional,bus=bridge,addr=3",
    "edu,id=second",
];
const IDS: [&str; 4] = ["first", "behind", "conventional", "second"];

const FILE: &str = "# The IOMMU is not there yet.\naddress = '00:05.0'\nqmp = 'QMP'\n\
    [[endpoint]]\ndevice = 'first'\n[[endpoint]]\ndevice = 'behind'\n\
    [[endpoint]]\ndevice = 'conventional'\n[[endpoint]]\ndevice = 'second'\n\
    [[port]]\naddress = '00:PORT/00.0/02.0/00.0'\nkind = 'pcie-pci-bridge'\n";

#[test]
#[ignore = "needs QEMU and guest kernels; see qemu-scripts/test.sh"]
fn addresses_of_a_paused_qemu_are_those_of_its_guest() {
    let setup = Setup::from_environment();
    let test_dir = TestDir::new("resolve");
    let socket = test_dir.path("resolve.qmp");
    let (file, table) = (test_dir.path("vm.toml"), test_dir.path("vm.viot"));
    let mut extra: Vec<String> = DEVICES
        .iter()
        .flat_map(|device| ["-device".to_owned(), (*device).to_owned()])
        .collect();
    let qmp = format!("unix:{},server=on,wait=off", socket.display());
    extra.extend(["-S", "-qmp", &qmp].map(str::to_owned));
    let kernel: &Kernel = setup.newest();
    let options = VmOptions {
        kernel,
        append: String::new(),
        iommu: match setup.machine {
            Machine::Q35 => vec!["-M".to_owned(), "q35".to_owned()],
            Machine::Virt => vec!["-M".to_owned(), "virt,gic-version=3".to_owned()],
        },
        extra,
    };
    let mut vm = Vm::start(&setup, &test_dir, "vm", &options);

    let place = |vm: &mut Vm, id: &str| -> i64 {
        let path = format!("/machine/peripheral/{id}");
        let answer = vm.qmp("qom-get", json!({ "path": path, "property": "addr" }));
        answer.as_i64().expect("a number")
    };
    let upper = place(&mut vm, "upper");
    let text = FILE
        .replace("QMP", &socket.display().to_string())
        .replace("PORT", &format!("{:02x}.{:x}", upper >> 3, upper & 7));
    let text = format!("{}{text}", setup.machine.config());
    fs::write(&file, text).expect("written");
    let run = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
            .args(words)
            .output()
            .expect("it runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), error)
    };
    let path = file.display().to_string();
    let (done, error) = run(&["check", "--file-only", &path]);
    assert!(!done && error.contains("resolve FILE --write"), "{error}");
    let (done, error) = run(&["resolve", &path, "--write"]);
    assert!(done, "{error}");
    let (done, error) = run(&["check", "--file-only", &path]);
    assert!(done, "{error}");
    let text = fs::read_to_string(&file).expect("the file");
    assert!(text.contains("# The IOMMU is not there yet."), "{text}");
    test_dir.note(&text);
    assert!(run(&["viot", &path, "-o", &table.display().to_string()]).0);

    // The addresses that the firmware and the guest give to the same devices.
    vm.qmp("cont", json!({}));
    vm.wait_until_up();
    let mut found = Vec::new();
    let tree = vm.qmp("query-pci", json!({}));
    note(&tree[0]["devices"], 0, &mut found);
    let summary = run_stdout(&["check", "--file-only", &path]);
    for id in IDS {
        let (_, address) = found
            .iter()
            .find(|(known, _)| known == id)
            .unwrap_or_else(|| panic!("{id} in {tree}"));
        assert!(summary.contains(address), "{id} at {address}:\n{summary}");
    }
}

fn run_stdout(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .args(words)
        .output()
        .expect("it runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Notes the IDs and addresses of devices.
fn note(devices: &Value, bus: i64, found: &mut Vec<(String, String)>) {
    for device in devices.as_array().into_iter().flatten() {
        let number = |name: &str| device[name].as_i64().expect(name);
        let (slot, function) = (number("slot"), number("function"));
        let id = device["qdev_id"].as_str().unwrap_or_default();
        found.push((id.to_owned(), format!("{bus:02x}:{slot:02x}.{function:x}")));
        let bridge = &device["pci_bridge"];
        let behind = bridge["bus"]["secondary"].as_i64().unwrap_or_default();
        note(&bridge["devices"], behind, found);
    }
}
