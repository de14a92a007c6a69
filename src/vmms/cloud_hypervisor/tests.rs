//! Tests of the arguments, without a VMM.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;

const BASE: &str = "vfio-user-socket = '/run/i'\nmemory = '4G'\naddress = '00:02.0'\n";

/// A host with the device 65:00.0, whose 32-bit BAR has 1 MiB and whose ROM has 64 KiB.
fn host() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let device = dir.path().join("sys/bus/pci/devices/0000:65:00.0");
    fs::create_dir_all(&device).expect("made");
    let resource = "0xfe000000 0xfe0fffff 0x0000000000040200\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x380000000000 0x38000000ffff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x000000000000e000 0x000000000000e07f 0x0000000000040101\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000fe100000 0x00000000fe10ffff 0x0000000000046200\n\
                    0x00000000f0000000 0x00000000f0ffffff 0x0000000000040200\n";
    fs::write(device.join("resource"), resource).expect("written");
    dir
}

fn made(text: &str, options: CloudHypervisorOptions<'_>) -> Result<VmmArgs, VmmArgsError> {
    let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
    arguments(&config, options, &HostRoot::new(host().path()))
}

/// The whole command line for the operator's arguments in `line`, and the notes.
fn launched_with(text: &str, line: &str) -> Result<(String, String), String> {
    let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
    let own: Vec<_> = line.split_whitespace().map(OsString::from).collect();
    let made = launched(&config, &own, &HostRoot::new(host().path()));
    let LaunchedArgs { arguments, notes } = made.map_err(|error| error.to_string())?;
    let words: Vec<_> = arguments
        .iter()
        .map(|word| word.to_string_lossy())
        .collect();
    Ok((words.join(" "), notes.join("\n")))
}

#[test]
fn the_iommu_comes_before_all_other_vfio_user_devices() {
    let text = format!(
        "{BASE}[[endpoint]]\naddress = '00:01.0'\nvfio-user = {{ listen = '/run/a', connect = '/run/b' }}\n\
         [[endpoint]]\naddress = '00:09.0'\n"
    );
    let made = made(
        &text,
        CloudHypervisorOptions {
            disks: 0,
            cmdline: "console=ttyS0",
        },
    );
    let made = made.expect("arguments");
    assert_eq!(
        made.arguments,
        [
            "--memory",
            "size=4096M,shared=on",
            "--user-device",
            "socket=/run/i,pci_device_id=2",
            "--user-device",
            "socket=/run/a,pci_device_id=1",
            "--cmdline",
            "console=ttyS0 acpi_rsdp=0xe7fff000",
        ]
    );
    assert!(
        made.notes
            .iter()
            .any(|note| note.contains("endpoint 0000:00:09.0: no argument"))
    );
}

#[test]
fn disks_and_passthrough_devices_move_the_bar() {
    let disks = CloudHypervisorOptions {
        disks: 2,
        cmdline: "",
    };
    let last = |text: &str| {
        let made = made(text, disks).expect("arguments");
        made.arguments.last().cloned().expect("a command line")
    };
    assert_eq!(last(BASE), "acpi_rsdp=0xe7eff000");
    // 1 MiB below the disks, then a ROM of 64 KiB above the IOMMU's BAR.
    let text = format!("{BASE}[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n");
    assert_eq!(last(&text), "acpi_rsdp=0xe7def000");
    let made = made(&text, disks).expect("arguments");
    assert_eq!(
        made.arguments[2..6],
        [
            "--platform",
            "iommufd_fd=3,vfio_p2p_dma=off",
            "--device",
            "fd=4,pci_device_id=6"
        ]
    );
    assert!(
        made.notes
            .iter()
            .any(|note| note.contains("exec 3<>/dev/iommu"))
    );
}

#[test]
fn segments_are_numbered_and_counted() {
    let text = format!(
        "{BASE}[[endpoint]]\naddress = '0001:00:03.0'\nvfio-user = {{ listen = '/run/a', connect = '/run/b' }}\n"
    );
    let made = made(&text, CloudHypervisorOptions::default()).expect("arguments");
    assert!(made.arguments.contains(&"num_pci_segments=2".to_owned()));
    let device = "socket=/run/a,pci_segment=1,pci_device_id=3".to_owned();
    assert!(made.arguments.contains(&device));
    assert_eq!(
        made.arguments.last().map(String::as_str),
        Some("acpi_rsdp=0xd3fff000")
    );
}
#[test]
fn the_operators_arguments_come_after_ours_and_join_them() {
    let text = format!("{BASE}[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n");
    let own = "-v --kernel k --platform uuid=u --disk path=d --cmdline root=/dev/vda1 --user-device socket=o";
    let (line, _) = launched_with(&text, own).expect("arguments");
    assert_eq!(
        line,
        "--memory size=4096M,shared=on --platform uuid=u,iommufd_fd=3,vfio_p2p_dma=off \
         --device fd=4,pci_device_id=6 --user-device socket=/run/i,pci_device_id=2 \
         --cmdline root=/dev/vda1 acpi_rsdp=0xe7f6f000 -v --kernel k --disk path=d --user-device socket=o"
    );
    // The VMM's own mappings of device memory, where the operator's kernel can.
    let (line, _) = launched_with(&text, "--platform vfio_p2p_dma=on").expect("arguments");
    let platform = "--platform vfio_p2p_dma=on,iommufd_fd=3 ";
    assert!(line.contains(platform), "{line}");
}

#[test]
fn the_operators_memory_replaces_ours() {
    for (own, start) in [
        ("", "--memory size=4096M,shared=on --user-device"),
        ("--memory size=2G,shared=on", "--user-device"),
        (
            "--memory-zone id=a,size=1G,shared=on",
            "--memory size=0,shared=on --user-device",
        ),
        (
            "--memory size=0 --memory-zone id=a,size=1G,shared=on",
            "--user-device",
        ),
    ] {
        let (line, _) = launched_with(BASE, own).expect("arguments");
        assert!(line.starts_with(start) && line.ends_with(own), "{line}");
    }
    let error = launched_with(BASE, "--memory size=4G").expect_err("not shared");
    assert!(error.contains("add shared=on"), "{error}");
    let sizeless = BASE.replace("memory = '4G'\n", "");
    assert!(launched_with(&sizeless, "--memory size=2G,shared=on").is_ok());
    let error = launched_with(&sizeless, "").expect_err("no size");
    assert!(error.contains("size of guest RAM"), "{error}");
}

#[test]
fn the_operators_devices_and_segments_move_the_bar() {
    for (own, parameter) in [
        ("", "acpi_rsdp=0xe7fff000"),
        ("--disk path=d path=e", "acpi_rsdp=0xe7eff000"),
        (
            "--disk path=d,pci_segment=1 --platform num_pci_segments=2",
            "acpi_rsdp=0xd3fff000",
        ),
        (
            "--device path=/sys/bus/pci/devices/0000:65:00.0",
            "acpi_rsdp=0xe7eef000",
        ),
        ("--cmdline acpi_rsdp=0x1000", "--cmdline acpi_rsdp=0x1000"),
    ] {
        let (line, _) = launched_with(BASE, own).expect("arguments");
        assert!(line.contains(parameter), "{own}: {line}");
        assert_eq!(line.matches("acpi_rsdp=").count(), 1, "{line}");
    }
    let (_, notes) = launched_with(BASE, "--device fd=9").expect("arguments");
    assert!(notes.contains("acpi_rsdp= is too high"), "{notes}");
    let (_, notes) = launched_with(BASE, "--cmdline acpi_rsdp=0x1000").expect("arguments");
    assert!(notes.contains("computed: 0xe7fff000"), "{notes}");
}

#[test]
fn firmware_gets_no_parameters() {
    let (line, notes) = launched_with(BASE, "--firmware f --cmdline x").expect("arguments");
    assert!(!line.contains("cmdline"), "{line}");
    assert!(notes.contains("GRUB's command acpi"), "{notes}");
}
