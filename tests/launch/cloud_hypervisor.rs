//! cloud-hypervisor: a script of that name, whose arguments, files and moment of start are those of the VMM.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use vhost_device_iommu::host::sysfs::HostRoot;
use vhost_device_iommu::vmms::launch::Launch;

use super::{LaunchDir, PROGRAM, finish};

const CONFIG: &str = "vfio-user-socket = 'vm.sock'\ncontrol = 'control.sock'\nmemory = '64M'\naddress = '00:02.0'\n\
     [[endpoint]]\naddress = '00:05.0'\nvfio-user = { listen = 'client.sock', connect = 'server.sock' }\n";

impl LaunchDir {
    /// A directory with a VMM that runs `script`.
    fn with_cloud_hypervisor(script: &str) -> Self {
        let launch_dir = Self::new();
        launch_dir.write("vm.toml", CONFIG);
        launch_dir.write_program("cloud-hypervisor", script);
        launch_dir
    }

    fn write_program(&self, name: &str, script: &str) {
        self.write(name, &format!("#!/bin/sh\n{script}"));
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.path(name), mode).expect("executable");
    }

    fn lines(&self, name: &str) -> Vec<String> {
        self.read(name).lines().map(str::to_owned).collect()
    }
}

#[test]
fn the_vmm_gets_what_cloud_hypervisor_args_prints_before_its_own() {
    let script = format!(
        "printf '%s\\n' \"$@\" >args
         {PROGRAM} ctl control.sock status >status || exit 99
         [ -S vm.sock ] && [ -S client.sock ] || exit 98
         exit 7"
    );
    let launch_dir = LaunchDir::with_cloud_hypervisor(&script);
    let own = ["--kernel", "vmlinuz", "--disk", "path=a", "path=b"];
    let mut command = launch_dir.command();
    command.args(["--", "./cloud-hypervisor"]).args(own);
    let run = finish(command.args(["--cmdline", "root=/dev/vda1 quiet"]));
    assert_eq!(run.status.code(), Some(7), "{}", run.stderr);
    assert!(launch_dir.read("status").contains("no VM is connected"));

    let mut printed = Command::new(PROGRAM);
    printed.args(["cloud-hypervisor-args", "vm.toml", "--disks", "2"]);
    printed.args(["--cmdline", "root=/dev/vda1 quiet"]);
    let printed = printed.current_dir(launch_dir.path("")).output();
    let printed = String::from_utf8(printed.expect("it runs").stdout).expect("text");
    let expected: Vec<_> = printed.lines().chain(own).collect();
    assert_eq!(launch_dir.lines("args"), expected);
    let first = expected.iter().position(|word| *word == "--user-device");
    let iommu = expected[first.expect("the IOMMU") + 1];
    assert_eq!(iommu, "socket=vm.sock,pci_device_id=2");
    launch_dir.assert_clean();
}

#[test]
fn a_wrapper_keeps_its_own_arguments_in_front() {
    let launch_dir = LaunchDir::with_cloud_hypervisor("echo wrong >args");
    launch_dir.write_program("wrapper", "printf '%s\\n' \"$@\" >args");
    let mut command = launch_dir.command();
    command.args(["--vmm", "cloud-hypervisor", "--viot", "kept.viot", "--"]);
    command.args(["./wrapper", "-c", "3", "cloud-hypervisor", "--kernel", "k"]);
    let run = finish(&mut command);
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    let args = launch_dir.lines("args");
    assert_eq!(args[..4], ["-c", "3", "cloud-hypervisor", "--memory"]);
    assert_eq!(args[args.len() - 2..], ["--kernel", "k"]);
    // For a guest that boots through GRUB.
    let table = fs::read(launch_dir.path("kept.viot")).expect("a table");
    assert!(table.starts_with(b"VIOT"));
}

/// Neither the daemon nor the VMM starts with an option that undoes the IOMMU.
#[test]
fn options_that_undo_the_iommu_start_nothing() {
    let launch_dir = LaunchDir::with_cloud_hypervisor("echo started >started");
    for (options, cure) in [
        (&["--memory", "size=64M"][..], "add shared=on"),
        (&["--disk", "path=d,iommu=on"], "leave it out"),
        (&["--platform", "num_pci_segments=x"], "leave it out"),
    ] {
        let mut command = launch_dir.command();
        command.args(["--", "./cloud-hypervisor"]).args(options);
        let run = finish(&mut command);
        assert_eq!(run.status.code(), Some(1), "{options:?}: {}", run.stderr);
        assert!(run.stderr.contains(cure), "{cure} in {}", run.stderr);
        assert!(!launch_dir.path("started").exists());
        launch_dir.assert_clean();
    }
}

/// Both children inherit the same open files, under the numbers in their arguments.
#[test]
fn passthrough_devices_are_opened_once_for_both() {
    let list = |name: &str| {
        format!("ls -l /proc/$$/fd >{name}.files; printf '%s\\n' \"$@\" >{name}.args\n")
    };
    let launch_dir = LaunchDir::with_cloud_hypervisor("");
    let folder = launch_dir.path("").display().to_string();
    let cd = format!("cd {folder}\n");
    launch_dir.write_program(
        "cloud-hypervisor",
        &(cd.clone() + &list("vmm") + "[ -e served ]"),
    );
    launch_dir.write_program(
        "daemon",
        &(cd + &list("daemon") + ">served\necho >/proc/$$/fd/$4\nexec sleep 100\n"),
    );
    let device = "[[endpoint]]\naddress = '00:10.0'\nvfio = '65:00.0'\n";
    launch_dir.write("vm.toml", &(CONFIG.to_owned() + device));
    launch_dir.write("host/dev/iommu", "");
    launch_dir.write("host/dev/vfio/devices/vfio3", "");
    let sys = "host/sys/bus/pci/devices/0000:65:00.0";
    launch_dir.write(&format!("{sys}/vfio-dev/vfio3/dev"), "511:0");
    launch_dir.write(
        &format!("{sys}/resource"),
        "0xfe000000 0xfe0fffff 0x40200\n",
    );

    let program = launch_dir.path("cloud-hypervisor").into_os_string();
    let vmm = [program, OsString::from("--kernel"), OsString::from("k")];
    let launch = Launch {
        config: &launch_dir.path("vm.toml"),
        table: None,
        vmm: &vmm,
        kind: None,
        max_restarts: 5,
        daemon: &launch_dir.path("daemon"),
        host: &HostRoot::new(launch_dir.path("host")),
    };
    let status = launch.run().expect("both start and end");
    assert_eq!(status, 0, "the daemon was ready when the VMM started");

    let daemon = launch_dir.lines("daemon.args");
    let after = |name: &str| {
        let at = daemon.iter().position(|word| word == name);
        daemon[at.expect(name) + 1].clone()
    };
    let iommufd = after("--iommufd-fd");
    let device = after("--vfio-fd");
    let device = device.strip_prefix("0000:00:10.0=").expect("an endpoint");
    let vmm = launch_dir.lines("vmm.args");
    let expected = [
        "--memory",
        "size=64M,shared=on",
        "--platform",
        &format!("iommufd_fd={iommufd},vfio_p2p_dma=off"),
        "--device",
        &format!("fd={device},pci_device_id=16"),
        "--user-device",
        "socket=vm.sock,pci_device_id=2",
        "--user-device",
        "socket=client.sock,pci_device_id=5",
        "--cmdline",
        // Below the device's BAR of 1 MiB.
        "acpi_rsdp=0xe7eff000",
        "--kernel",
        "k",
    ];
    assert_eq!(vmm[..10], expected[..10]);
    for child in ["daemon", "vmm"] {
        let files = launch_dir.read(&format!("{child}.files"));
        for (fd, file) in [(&*iommufd, "iommu"), (device, "vfio/devices/vfio3")] {
            let line = format!(" {fd} -> {folder}host/dev/{file}\n");
            assert!(files.contains(&line), "{child}: {line} in {files}");
        }
    }
    assert_eq!(vmm[10..], expected[10..]);
}
