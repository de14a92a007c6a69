//! The arguments and the notes as a whole.

use super::*;

fn config(text: &str) -> Config {
    Config::from_text(Path::new("vm0.toml"), text).expect("a good configuration")
}

fn arguments(text: &str) -> Result<QemuArgs, QemuArgsError> {
    QemuArgs::new(&config(text), Path::new("/run/vm,0/it's.viot"))
}

#[test]
fn arguments_describe_the_whole_configuration() {
    let made = arguments(
        "socket = '/run/a b,c.sock'\nmemory = '2G'\naddress = '00:1e.0'\n\
         [[endpoint]]\naddress = '00:10.0'\ngroup = 'nic0'\n\
         [[endpoint]]\nrange = '00:11.0-00:11.7'\n\
         [[endpoint]]\nrange = '01:00.0-01:00.7'\n\
         [[endpoint]]\nrange = '02:00.0-03:1f.7'\n\
         [[endpoint]]\naddress = '0001:00:00.0'\n",
    )
    .expect("arguments");
    assert_eq!(
        made.arguments,
        [
            "-machine",
            "q35,memory-backend=viommu-ram",
            "-m",
            "2048M",
            "-object",
            "memory-backend-memfd,id=viommu-ram,size=2147483648,share=on",
            "-global",
            "ICH9-LPC.disable_s3=1",
            "-global",
            "ICH9-LPC.disable_s4=1",
            "-chardev",
            "socket,id=viommu-socket,path=/run/a b,,c.sock",
            "-device",
            "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,\
             chardev=viommu-socket,addr=1e.0",
            "-acpitable",
            "file=/run/vm,,0/it's.viot",
        ]
    );
    assert!(shell_line(&made.arguments).ends_with(
        r"'socket,id=viommu-socket,path=/run/a b,,c.sock' -device vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,chardev=viommu-socket,addr=1e.0 -acpitable 'file=/run/vm,,0/it'\''s.viot'"
    ));
    let notes = made.notes.join("\n");
    for part in [
        "QEMU 10.2",
        "at /run/vm,0/it's.viot",
        "endpoint 0000:00:10.0 (host group nic0): give its device addr=10.0 (bus=pcie.0)",
        "give devices addr=11.0 to addr=11.7, and multifunction=on where a slot has several (bus=pcie.0)",
        "several, on the bridge that the guest numbers as bus 01",
        "(02 to 03)",
        "QEMU's machine has segment 0 only",
    ] {
        assert!(notes.contains(part), "{part} in {notes}");
    }
}

#[test]
fn over_vfio_user_the_iommu_is_a_vfio_user_device() {
    let text = "vfio-user-socket = '/run/a b,c.sock'\nmemory = '2G'\naddress = '00:1e.0'\n";
    let made = arguments(text).expect("arguments");
    assert_eq!(
        made.arguments[10..],
        [
            "-device",
            r#"{"addr":"1e.0","driver":"vfio-user-pci","id":"viommu-vfio-user-00-1e-0","socket":{"path":"/run/a b,c.sock","type":"unix"}}"#,
            "-acpitable",
            "file=/run/vm,,0/it's.viot",
        ]
    );
    assert!(made.arguments.iter().any(|text| text.contains("share=on")));
}

#[test]
fn inexpressible_configurations_are_refused_with_a_cure() {
    for (text, cure) in [
        ("memory = '2G'\naddress = '00:05.0'", "give `socket ="),
        ("socket = 'a'\naddress = '00:05.0'", "give `memory ="),
        (
            "socket = 'a'\nmemory = '2G'\naddress = '01:05.0'",
            "not on bus 00",
        ),
        (
            "socket = 'a'\nmemory = '2G'\naddress = '0001:00:05.0'",
            "not on bus 00",
        ),
        (
            "socket = 'a'\nmemory = '2G'\naddress = '00:05.0'\nhost-iommu = 'type1'\n\
             [[endpoint]]\naddress = '00:10.0'\nvfio = '65:00.0'",
            "set `host-iommu = \"iommufd\"`",
        ),
    ] {
        let error = arguments(text).expect_err(text).to_string();
        assert!(error.contains(cure), "{error}");
    }
    let good = config("socket = 'a'\nmemory = '2G'\naddress = '00:05.0'");
    for path in ["two\nlines", "/run/vm:0.viot"] {
        let error = QemuArgs::new(&good, Path::new(path)).expect_err(path);
        assert!(error.to_string().contains("use another"), "{error}");
    }
}

const DEVICES: &str = "socket = '/run/s'\nmemory = '2G'\naddress = '00:05.0'\n\
     [[endpoint]]\naddress = '00:11.1'\nvfio = '66:00.1'\n\
     [[endpoint]]\naddress = '00:11.0'\nvfio = '66:00.0'\n\
     [[endpoint]]\naddress = '00:10.0'\nvfio = '0001:65:00.0'\n\
     [[endpoint]]\naddress = '01:00.0'\nvfio = '67:00.0'\n\
     [[endpoint]]\naddress = '0001:00:00.0'\nvfio = '68:00.0'\n";

#[test]
fn devices_of_the_host_come_before_the_iommu() {
    let made = arguments(DEVICES).expect("arguments");
    assert_eq!(
        made.arguments[6..14],
        [
            "-object",
            "iommufd,id=viommu-iommufd,fd=3",
            "-device",
            "vfio-pci,id=viommu-vfio-00-10-0,fd=4,iommufd=viommu-iommufd,addr=10.0",
            "-device",
            "vfio-pci,id=viommu-vfio-00-11-0,fd=5,iommufd=viommu-iommufd,addr=11.0,multifunction=on",
            "-device",
            "vfio-pci,id=viommu-vfio-00-11-1,fd=6,iommufd=viommu-iommufd,addr=11.1,multifunction=on",
        ]
    );
    assert_eq!(
        made.arguments[18..20],
        ["-chardev", "socket,id=viommu-socket,path=/run/s"]
    );
    let notes = made.notes.join("\n");
    for part in [
        "exec 3<>/dev/iommu",
        "exec 4<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/0001:65:00.0/vfio-dev)",
        "--iommufd-fd 3 --vfio-fd 0000:00:10.0=4 --vfio-fd 0000:00:11.0=5 \
         --vfio-fd 0000:00:11.1=6 --vfio-fd 0000:01:00.0=7 --vfio-fd 0001:00:00.0=8",
        "endpoint 0000:00:10.0: the host's device 0001:65:00.0, among the arguments",
        "add `-device vfio-pci,id=viommu-vfio-01-00-0,fd=7,iommufd=viommu-iommufd,addr=00.0`, on the bridge \
         that the guest numbers as bus 01 and before",
        "the host's device 0000:68:00.0, but QEMU's machine has segment 0 only",
    ] {
        assert!(notes.contains(part), "{part} in {notes}");
    }
}

/// The daemon takes over what QEMU opens.
#[test]
fn devices_that_the_vmm_opens_have_their_address_on_the_host() {
    let made = arguments(&format!("vfio-from = 'vmm'\n{DEVICES}")).expect("arguments");
    assert_eq!(
        made.arguments[6..10],
        [
            "-object",
            "iommufd,id=viommu-iommufd",
            "-device",
            "vfio-pci,id=viommu-vfio-00-10-0,host=0001:65:00.0,iommufd=viommu-iommufd,addr=10.0",
        ]
    );
    let notes = made.notes.join("\n");
    assert!(
        notes.contains("vhost-device-iommu-adopt@.socket"),
        "{notes}"
    );
    assert!(
        !notes.contains("exec ") && !notes.contains("-fd "),
        "{notes}"
    );
}

const TYPES: &str = "socket = '/run/s'\nmemory = '2G'\n";

#[test]
fn functions_of_one_slot_say_so() {
    let made = arguments(&format!(
        "{TYPES}address = '00:05.0'\n\
         [[endpoint]]\naddress = '00:05.1'\nvfio-user = {{ listen = '/l', connect = '/k' }}\n\
         [[endpoint]]\naddress = '00:06.0'\nvfio = '66:00.0'\n\
         [[endpoint]]\nrange = '00:06.1-00:06.3'\n\
         [[endpoint]]\naddress = '00:07.0'\n\
         [[endpoint]]\naddress = '00:07.1'\nvfio = '67:00.0'\nexport = '/e'\n"
    ));
    let made = made.expect("arguments");
    let line = made.arguments.join(" ");
    for part in [
        "chardev=viommu-socket,addr=05.0,multifunction=on",
        r#""addr":"05.1","driver":"vfio-user-pci","id":"viommu-vfio-user-00-05-1","multifunction":true"#,
        "addr=06.0,multifunction=on",
        r#""addr":"07.1","driver":"vfio-user-pci","id":"viommu-vfio-user-00-07-1","multifunction":true"#,
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    let notes = made.notes.join("\n");
    let part = "endpoint 0000:00:07.0: give its device addr=07.0,multifunction=on (bus=pcie.0)";
    assert!(notes.contains(part), "{notes}");
}

#[test]
fn functions_that_the_guest_would_not_find_are_refused() {
    let device = |address: &str| {
        format!(
            "[[endpoint]]\naddress = '{address}'\nvfio-user = {{ listen = '/l', connect = '/k' }}\n"
        )
    };
    for (text, part) in [
        ("address = '00:05.1'\n".to_owned(), "without an IOMMU"),
        (
            "address = '00:05.0'\n".to_owned() + &device("00:06.1"),
            "would be missing",
        ),
        ("address = '00:1f.2'\n".to_owned(), "SATA controller"),
    ] {
        let text = format!("{TYPES}{text}");
        let error = arguments(&text).expect_err(&text).to_string();
        assert!(error.contains(part), "{error}");
        let error = QemuArgs::appended_to(&config(&text), Path::new("t"), &[]);
        assert!(error.expect_err(&text).to_string().contains(part));
    }
    // Only the operator's arguments show whether a device is at an endpoint without a device of ours.
    let text = format!("{TYPES}address = '00:05.1'\n[[endpoint]]\naddress = '00:05.0'\n");
    arguments(&text).expect("a device may be there");
    let plain = format!("{TYPES}address = '00:05.0'\n[[endpoint]]\nrange = '00:10.0-00:11.7'\n");
    for (text, others, found) in [
        (&text, "-nodefaults", false),
        (&text, "-device e1000e,addr=05.0,multifunction=on", true),
        (&plain, "-device e1000e,addr=10.0", true),
        (&plain, "-device e1000e,addr=10.2", false),
        (
            &plain,
            "-device e1000e,addr=10.2 -device e1000e,addr=10.0",
            true,
        ),
        // Not an endpoint.
        (&plain, "-device e1000e,addr=12.2", true),
    ] {
        let others: Vec<_> = others.split_whitespace().map(OsString::from).collect();
        let made = QemuArgs::appended_to(&config(text), Path::new("t"), &others);
        if found {
            made.expect("found");
        } else {
            let error = made.expect_err("hidden").to_string();
            assert!(error.contains(".0 and multifunction=on"), "{error}");
        }
    }
}

#[test]
fn endpoints_without_a_device_are_named() {
    let text = format!(
        "{TYPES}address = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\nshadow = '/h'\n\
         [[endpoint]]\nrange = '00:10.0-00:11.7'\n[[endpoint]]\nrange = '01:00.0-01:00.7'\n\
         [[endpoint]]\naddress = '00:12.0'\nvfio-user = {{ listen = '/l', connect = '/k' }}\n"
    );
    let notes = |others: &str| {
        let others: Vec<_> = others.split_whitespace().map(OsString::from).collect();
        let made = QemuArgs::appended_to(&config(&text), Path::new("t"), &others);
        made.expect("arguments").notes
    };
    let missing = notes("");
    let starts = [
        "no argument gives this endpoint a device; endpoint 0000:00:06.0: give its device addr=06.0 (bus=pcie.0)",
        "no argument gives this endpoint a device; endpoint 0000:00:10.0-0000:00:11.7: give",
        "no argument gives this endpoint a device; endpoint 0000:01:00.0-0000:01:00.7: give",
    ];
    assert_eq!(missing.len(), starts.len(), "{missing:#?}");
    for (note, start) in missing.iter().zip(starts) {
        assert!(note.starts_with(start), "{note}");
    }
    assert_eq!(notes("-device x,addr=06.0 -device x,addr=11.0").len(), 1);
    // An emulated device on a bus whose number the guest chooses cannot be placed.
    let other = text.replace("'00:12.0'", "'02:00.0'");
    let error = QemuArgs::appended_to(&config(&other), Path::new("t"), &[]);
    let error = error.expect_err("not on the root bus").to_string();
    assert!(
        error.contains("endpoint 0000:02:00.0 has a device"),
        "{error}"
    );
}

#[test]
fn options_that_undo_the_iommu_are_refused() {
    let good = config(&format!("{TYPES}address = '00:05.0'"));
    let others = ["-daemonize".into()];
    let error = QemuArgs::appended_to(&good, Path::new("t"), &others);
    let error = error.expect_err("it leaves").to_string();
    assert!(error.contains("-daemonize"), "{error}");
    // No ID of ours lacks the prefix that the operator's may not have.
    let made = QemuArgs::new(&config(DEVICES), Path::new("t")).expect("arguments");
    let ids = made.arguments.iter().flat_map(|text| text.split(','));
    for id in ids.filter_map(|part| part.strip_prefix("id=")) {
        assert!(id.starts_with(PREFIX), "{id}");
    }
}

#[test]
fn configured_descriptors_keep_their_numbers() {
    let mut config = config(DEVICES);
    let second = config.devices.passthrough[1].endpoint;
    config.descriptors.iommufd = Some(4);
    config.descriptors.devices.insert(second, 20);
    let made = QemuArgs::new(&config, Path::new("t")).expect("arguments");
    let fds: Vec<_> = made
        .arguments
        .iter()
        .filter_map(|text| text.split_once("fd=")?.1.split(',').next())
        .collect();
    assert_eq!(fds, ["4", "3", "20", "5"]);
}

#[test]
fn options_of_the_operator_are_not_repeated() {
    let text = "socket = 's'\nmemory = '1G'\naddress = '00:05.0'";
    let beside = |line: &str| {
        let others: Vec<_> = line.split_whitespace().map(OsString::from).collect();
        let made = QemuArgs::appended_to(&config(text), Path::new("t"), &others).expect(line);
        let own = made.arguments.len() - 10;
        made.arguments[..own].join(" ")
    };
    let object = "-object memory-backend-memfd,id=viommu-ram,size=1073741824,share=on";
    for (line, own) in [
        (
            "-nodefaults",
            format!("-machine q35,memory-backend=viommu-ram -m 1024M {object}"),
        ),
        (
            "-M q35",
            format!("-machine memory-backend=viommu-ram -m 1024M {object}"),
        ),
        (
            "-M q35 -m 1G",
            format!("-machine memory-backend=viommu-ram {object}"),
        ),
        ("-M q35,memory-backend=ram", String::new()),
        (
            "-machine accel=kvm -m 1G",
            format!("-machine q35,memory-backend=viommu-ram {object}"),
        ),
        ("-numa node,memdev=ram", "-machine q35".into()),
    ] {
        assert_eq!(beside(line), own, "{line}");
    }
    let unknown = config("socket = 's'\naddress = '00:05.0'");
    let others = ["-M".into(), "q35,memory-backend=ram".into()];
    QemuArgs::appended_to(&unknown, Path::new("t"), &others).expect("others bring the RAM");
    QemuArgs::appended_to(&unknown, Path::new("t"), &[]).expect_err("no size");
    let error = QemuArgs::appended_to(&config(DEVICES), Path::new("t"), &[]);
    let error = error.expect_err("a device on another bus").to_string();
    assert!(
        error.contains("endpoint 0000:01:00.0 has a device"),
        "{error}"
    );
}

#[test]
fn the_table_is_expected_beside_the_file() {
    assert_eq!(
        default_table_path(Path::new("/etc/vm0.toml"), Machine::Q35),
        Path::new("/etc/vm0.viot")
    );
}

#[test]
fn a_virt_machine_gets_a_device_tree() {
    let text = "socket = '/s'\nmemory = '1G'\naddress = '00:05.0'\nmachine = 'virt'\n\
                [[endpoint]]\naddress = '00:1f.0'\n";
    let made = QemuArgs::new(&config(text), Path::new("/run/a,b:c.dtb")).expect("arguments");
    let line = made.arguments.join(" ");
    assert!(
        line.starts_with("-machine virt,acpi=off,gic-version=3,memory-backend=viommu-ram -m 1024M"),
        "{line}"
    );
    // A path of -dtb is no list of properties.
    assert!(line.ends_with("-dtb /run/a,b:c.dtb"), "{line}");
    assert!(
        !line.contains("-acpitable") && !line.contains("disable_s3"),
        "{line}"
    );
    assert!(
        made.notes[1].contains("`vhost-device-iommu dtb`"),
        "{:?}",
        made.notes
    );

    for (others, machine) in [
        ("-M virt", "-machine acpi=off,gic-version=3,"),
        (
            "-M virt,gic-version=max -M virt,its=on",
            "-machine acpi=off,memory",
        ),
    ] {
        let others: Vec<_> = others.split(' ').map(OsString::from).collect();
        let made = QemuArgs::appended_to(&config(text), Path::new("t"), &others).expect("fine");
        let line = made.arguments.join(" ");
        assert!(line.starts_with(machine), "{line}");
    }
    for (others, message) in [
        ("-M virt,acpi=on", "leave acpi=on out"),
        ("-M virt,gic-version=2", "use gic-version=3"),
        ("-M virt,iommu=smmuv3", "second IOMMU"),
    ] {
        let others: Vec<_> = others.split(' ').map(OsString::from).collect();
        let error = QemuArgs::appended_to(&config(text), Path::new("t"), &others);
        let error = error.expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
    for line in [
        "-M virt,acpi=off -no-acpi",
        "-M virt,acpi=auto,gic-version=host",
    ] {
        let others: Vec<_> = line.split(' ').map(OsString::from).collect();
        QemuArgs::appended_to(&config(text), Path::new("t"), &others).expect(line);
    }
}
