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
        "socket = '/run/a b,c.sock'\nmemory = '2G'\naddress = '00:1e.3'\n\
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
            "q35,memory-backend=mem0",
            "-m",
            "2048M",
            "-object",
            "memory-backend-memfd,id=mem0,size=2147483648,share=on",
            "-chardev",
            "socket,id=viommu,path=/run/a b,,c.sock",
            "-device",
            "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,\
             chardev=viommu,addr=1e.3",
            "-acpitable",
            "file=/run/vm,,0/it's.viot",
        ]
    );
    assert!(made.shell_line().ends_with(
        r"'socket,id=viommu,path=/run/a b,,c.sock' -device vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,chardev=viommu,addr=1e.3 -acpitable 'file=/run/vm,,0/it'\''s.viot'"
    ));
    let notes = made.notes.join("\n");
    for part in [
        "QEMU 10.2",
        "at /run/vm,0/it's.viot",
        "endpoint 0000:00:10.0 (host group nic0): give its device addr=10.0 (bus=pcie.0)",
        "give devices addr=11.0 to addr=11.7 (bus=pcie.0)",
        "addr=00.0 to addr=00.7, on the bridge that the guest numbers as bus 01",
        "(02 to 03)",
        "q35 has segment 0 only",
    ] {
        assert!(notes.contains(part), "{part} in {notes}");
    }
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
            "iommufd,id=iommufd0,fd=3",
            "-device",
            "vfio-pci,id=vfio-00-10-0,fd=4,iommufd=iommufd0,addr=10.0",
            "-device",
            "vfio-pci,id=vfio-00-11-0,fd=5,iommufd=iommufd0,addr=11.0,multifunction=on",
            "-device",
            "vfio-pci,id=vfio-00-11-1,fd=6,iommufd=iommufd0,addr=11.1,multifunction=on",
        ]
    );
    assert_eq!(
        made.arguments[14..16],
        ["-chardev", "socket,id=viommu,path=/run/s"]
    );
    let notes = made.notes.join("\n");
    for part in [
        "exec 3<>/dev/iommu",
        "exec 4<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/0001:65:00.0/vfio-dev)",
        "--iommufd-fd 3 --vfio-fd 0000:00:10.0=4 --vfio-fd 0000:00:11.0=5 \
         --vfio-fd 0000:00:11.1=6 --vfio-fd 0000:01:00.0=7 --vfio-fd 0001:00:00.0=8",
        "endpoint 0000:00:10.0: the host's device 0001:65:00.0, among the arguments",
        "add `-device vfio-pci,id=vfio-01-00-0,fd=7,iommufd=iommufd0,addr=00.0`, on the bridge \
         that the guest numbers as bus 01 and before",
        "the host's device 0000:68:00.0, but q35 has segment 0 only",
    ] {
        assert!(notes.contains(part), "{part} in {notes}");
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
        let own = made.arguments.len() - 6;
        made.arguments[..own].join(" ")
    };
    let object = "-object memory-backend-memfd,id=mem0,size=1073741824,share=on";
    for (line, own) in [
        (
            "-nodefaults",
            format!("-machine q35,memory-backend=mem0 -m 1024M {object}"),
        ),
        (
            "-M q35",
            format!("-machine memory-backend=mem0 -m 1024M {object}"),
        ),
        (
            "-M q35 -m 1G",
            format!("-machine memory-backend=mem0 {object}"),
        ),
        ("-M q35,memory-backend=ram", String::new()),
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
        error.contains("endpoint 0000:01:00.0 is a device"),
        "{error}"
    );
}

#[test]
fn the_table_is_expected_beside_the_file() {
    assert_eq!(
        default_viot_path(Path::new("/etc/vm0.toml")),
        Path::new("/etc/vm0.viot")
    );
}
