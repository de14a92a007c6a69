//! Guests under QEMU that learn their endpoints without QEMU's option for ACPI tables: from BAR 2 of the device, and from
//! GRUB under a UEFI firmware.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use super::vm::machine::Machine;
use super::vm::{ANSWER, Daemon, Kernel, Setup, TestDir, Vm, VmOptions, wait_for};
use super::{
    FIRST, FOR_VFIO, Mode, Transport, bind_all, config_of, hot_add, memory_of, options,
    probed_as_configured, start_mapper, tables_agree,
};

/// Processors of the guest.
const PROCESSORS: u64 = 3;
/// RAM of the guest in MiB: more than fits below 4 GiB.
const RAM: u64 = 5120;
/// What the log says when the daemon has added the table.
const ADDED: &str = "the VIOT table is in guest RAM at";
/// What the log says when a driver has started without it.
const MISSED: &str =
    "the guest's driver has started the device, but the guest has not read the root pointer";

/// The guest reads its root pointer from the device, which adds the table: with several processors, memory above 4 GiB
/// and memory that is added later. SeaBIOS makes new tables at each reset of the VM, and the guest finds VIOT in those,
/// too.
pub fn tables_by_the_bar(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let config = config_of(setup.machine, kernel).replace("512M", &format!("{RAM}M"));
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config);
    let mut options = options(kernel, mode, &daemon.qemu_args, "slots=2,maxmem=9G", "");
    leave_out_the_table(setup.machine, &mut options);
    options
        .extra
        .extend(["-smp".to_owned(), PROCESSORS.to_string()]);
    let bar = address_of_the_bar(setup, test_dir, &options);
    test_dir.note(&format!("the BAR is at {bar:#x}"));
    assert_eq!(state(&mut daemon), "not read");

    options.append += &format!(" acpi_rsdp={bar:#x}");
    let mut vm = Vm::start(setup, test_dir, "vm", &options);
    vm.wait_until_up();
    test_dir.note("up");
    has_learnt(&mut vm, &mut daemon, test_dir, 1);
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    // The guest's kernel keeps some of it for itself.
    let before = memory_of(&mut vm);
    assert!(before > RAM * 1024 * 9 / 10, "{before} kB");
    hot_add(&mut vm);

    vm.qmp("system_reset", json!({}));
    vm.wait_until_up();
    test_dir.note("up again");
    has_learnt(&mut vm, &mut daemon, test_dir, 2);
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    assert!(memory_of(&mut vm) > before, "without the added memory");
    drop(vm);
    daemon.stop();
}

/// GRUB's command `acpi` adds the table before it starts the kernel. The guest does not read the BAR, and the daemon says
/// so.
pub fn tables_by_grub(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let config = config_of(setup.machine, kernel);
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config);
    let mut options = options(kernel, mode, &daemon.qemu_args, "slots=2,maxmem=4G", "");
    leave_out_the_table(setup.machine, &mut options);
    if setup.machine == Machine::Virt {
        write_viot(test_dir);
    }
    let mut arguments = options.devices();
    arguments.extend(disk_with_grub(setup, &options, test_dir));
    let mut vm = Vm::start_firmware(setup, test_dir, "vm", &arguments);
    vm.wait_until_up();
    test_dir.note("up");
    has_the_table(&mut vm, test_dir);
    assert_eq!(
        vm.run("ls -d /sys/firmware/efi").join(""),
        "/sys/firmware/efi"
    );
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    if transport == Transport::VirtioPci {
        assert_eq!(state(&mut daemon), "not read");
        let log = log(test_dir);
        assert_eq!(log.matches(MISSED).count(), 1, "{log}");
        assert_eq!(log.matches(ADDED).count(), 0, "{log}");
    }
    start_mapper(&mut vm, "mapper", 7, &FOR_VFIO);
    vm.run_within("ask mapper churn 1000", ANSWER);
    tables_agree(&mut vm, &mut daemon, &[("mapper", FIRST)]);
    drop(vm);
    daemon.stop();
}

/// Takes the table or device tree from QEMU's arguments. An Arm machine has ACPI then.
fn leave_out_the_table(machine: Machine, options: &mut VmOptions<'_>) {
    let name = match machine {
        Machine::Q35 => "-acpitable",
        Machine::Virt => "-dtb",
    };
    let mut arguments = options.iommu.iter();
    let at = arguments.position(|argument| argument == name);
    let at = at.expect("a table to leave out");
    options.iommu.drain(at..at + 2);
    for argument in &mut options.iommu {
        *argument = argument.replace("acpi=off,", "");
    }
}

/// Writes the table of the daemon's configuration, for GRUB.
fn write_viot(test_dir: &TestDir) {
    let status = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .arg("viot")
        .arg(test_dir.path("vm.toml"))
        .arg("-o")
        .arg(test_dir.path("vm.viot"))
        .status();
    assert!(status.expect("it runs").success());
}

/// Where SeaBIOS puts BAR 2 of the device, which is the same at each start with the same devices.
fn address_of_the_bar(setup: &Setup, test_dir: &TestDir, options: &VmOptions<'_>) -> u64 {
    let mut vm = Vm::start_firmware(setup, test_dir, "firmware", &options.devices());
    let address = wait_for("the address of the BAR", ANSWER, || {
        let buses = vm.qmp("query-pci", json!({}));
        let find = |list: &Value, key: &str, wanted: u64| {
            let list = list.as_array().expect("a list");
            list.iter().find(|entry| entry[key] == wanted).cloned()
        };
        let device = find(&buses[0]["devices"], "slot", 5).expect("the device");
        // -1 until the firmware has chosen one.
        find(&device["regions"], "bar", 2)?["address"].as_u64()
    });
    vm.kill();
    address
}

/// The guest has VIOT, and the daemon has written it `boots` times.
fn has_learnt(vm: &mut Vm, daemon: &mut Daemon, test_dir: &TestDir, boots: usize) {
    has_the_table(vm, test_dir);
    assert_eq!(state(daemon), "written");
    let log = log(test_dir);
    assert_eq!(log.matches(ADDED).count(), boots, "{log}");
    assert!(!log.contains(MISSED), "{log}");
    let processors = vm.run("nproc").join("");
    assert_eq!(processors, PROCESSORS.to_string());
    vm.run(&bind_all());
}

/// The guest has one VIOT, that of `vhost-device-iommu viot`.
fn has_the_table(vm: &mut Vm, test_dir: &TestDir) {
    let tables = vm.run("ls /sys/firmware/acpi/tables");
    let named = tables.iter().filter(|name| name.starts_with("VIOT"));
    assert_eq!(named.count(), 1, "{tables:?}");
    let found = vm.run("xxd -p /sys/firmware/acpi/tables/VIOT");
    let table = fs::read(test_dir.path("vm.viot")).expect("a table");
    let expected: Vec<_> = table.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(found.join(""), expected.concat());
}

fn state(daemon: &mut Daemon) -> String {
    let status = daemon.status();
    let state = &status.0["acpi_tables"]["state"];
    state.as_str().expect("a state").to_owned()
}

fn log(test_dir: &TestDir) -> String {
    fs::read_to_string(test_dir.path("daemon.log")).expect("a log")
}

/// QEMU's arguments for the firmware, and for a disk with GRUB, the table and the kernel. QEMU makes a file system of a
/// folder.
fn disk_with_grub(setup: &Setup, options: &VmOptions<'_>, test_dir: &TestDir) -> Vec<String> {
    let firmware = setup.firmware();
    let disk = test_dir.path("disk");
    let boot = disk.join("EFI/BOOT");
    fs::create_dir_all(&boot).expect("a folder");
    for (from, to) in [
        (&firmware.grub, boot.join(setup.machine.boot_loader())),
        (&test_dir.path("vm.viot"), disk.join("vm.viot")),
        (&options.kernel.image, disk.join("vmlinuz")),
        (&options.kernel.initramfs, disk.join("initrd")),
    ] {
        fs::copy(from, to).expect("copied");
    }
    // The firmware of an Arm machine passes GRUB's text to the serial port.
    let terminal = match setup.machine {
        Machine::Q35 => "serial --unit=0\nterminal_input serial\nterminal_output serial\n",
        Machine::Virt => "",
    };
    let commands = format!(
        "{terminal}search --no-floppy --file --set=viot_disk /vm.viot\nacpi ($viot_disk)/vm.viot\nlinux /vmlinuz {}\n\
         initrd /initrd\nboot\n",
        options.command_line()
    );
    fs::write(boot.join("grub.cfg"), commands).expect("written");
    let mut words = Vec::new();
    let code = firmware.code.display();
    match &firmware.variables {
        Some(initial) => {
            let variables = test_dir.path("variables");
            fs::copy(initial, &variables).expect("copied");
            let flash = "if=pflash,format=raw";
            words.extend(["-drive".into(), format!("{flash},readonly=on,file={code}")]);
            let variables = format!("{flash},file={}", variables.display());
            words.extend(["-drive".into(), variables]);
        }
        None => words.extend(["-bios".into(), code.to_string()]),
    }
    let drive = format!("if=none,id=disk,format=raw,file=fat:rw:{}", disk.display());
    words.extend(["-drive".into(), drive]);
    // No endpoint: at the SATA controller, or in a slot that the configuration does not have.
    let device = match setup.machine {
        Machine::Q35 => "ide-hd,drive=disk,bootindex=0",
        Machine::Virt => "virtio-blk-pci,drive=disk,bootindex=0,addr=0a.0",
    };
    words.extend(["-device".into(), device.into()]);
    words
}
