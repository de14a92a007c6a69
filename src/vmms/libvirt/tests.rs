//! The domain as a whole, read by a parser of XML.

use roxmltree::{Document, Node};

use super::*;
use crate::qemu::args::QemuArgs;

const VM: &str = "socket = '/run/a.sock'\nmemory = '2G'\naddress = '00:05.0'\n";
const TABLE: &str = "/var/lib/t.viot";

fn config(text: &str) -> Config {
    Config::from_text(Path::new("vm1.toml"), text).expect("a good configuration")
}

fn made(text: &str) -> Result<String, LibvirtError> {
    domain(&config(text), Path::new(TABLE))
}

fn refusal(text: &str) -> String {
    made(text).expect_err(text).to_string()
}

fn children<'a>(document: &'a Document<'_>, name: &str) -> Vec<Node<'a, 'a>> {
    let all = document.descendants();
    all.filter(|node| node.tag_name().name() == name).collect()
}

fn arguments(document: &Document<'_>) -> Vec<String> {
    let all = children(document, "arg").into_iter();
    all.map(|node| node.attribute("value").expect("a value").to_owned())
        .collect()
}

/// The numbers in an `<address>` of `node`: bus, slot, function, and whether the slot has several functions.
fn place(node: &Node<'_, '_>) -> (u8, u8, u8, bool) {
    let mut addresses = node.children().filter(|it| it.has_tag_name("address"));
    let address = addresses.next().expect("an address");
    // The schema requires it here, and refuses it in the <source> of a <hostdev>.
    assert_eq!(address.attribute("type"), Some("pci"));
    let number = |name| {
        let text = address.attribute(name).expect(name);
        u8::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number")
    };
    let several = address.attribute("multifunction") == Some("on");
    (number("bus"), number("slot"), number("function"), several)
}

#[test]
fn the_domain_has_all_that_the_iommu_needs() {
    let text = format!(
        "{VM}qmp = '/run/q'\n[[endpoint]]\nrange = '00:10.0-00:11.7'\n\
         [[endpoint]]\naddress = '00:06.0'\nvfio-user = {{ listen = '/l', connect = '/k' }}\n\
         [[endpoint]]\naddress = '00:07.0'\nvfio = '65:00.0'\nexport = '/e'\n"
    );
    let text = made(&text).expect("a domain");
    let document = Document::parse(&text).expect("XML");
    let root = document.root_element();
    assert_eq!(root.attribute("type"), Some("kvm"));
    let content = |name| children(&document, name)[0].text();
    assert_eq!(content("name"), Some("vm1"));
    assert_eq!(content("memory"), Some("2097152"));
    assert_eq!(content("table"), Some(TABLE));
    assert_eq!(
        children(&document, "access")[0].attribute("mode"),
        Some("shared")
    );
    for name in ["suspend-to-mem", "suspend-to-disk"] {
        assert_eq!(
            children(&document, name)[0].attribute("enabled"),
            Some("no")
        );
    }
    let commandline = children(&document, "commandline")[0];
    assert_eq!(commandline.tag_name().namespace(), Some(QEMU_NAMESPACE));
    assert_eq!(
        arguments(&document),
        [
            "-chardev",
            "socket,id=viommu-socket,path=/run/a.sock",
            "-device",
            "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,chardev=viommu-socket,addr=05.0",
            "-device",
            r#"{"addr":"07.0","driver":"vfio-user-pci","id":"viommu-vfio-user-00-07-0","socket":{"path":"/e","type":"unix"}}"#,
            "-device",
            r#"{"addr":"06.0","driver":"vfio-user-pci","id":"viommu-vfio-user-00-06-0","socket":{"path":"/l","type":"unix"}}"#,
            "-qmp",
            "unix:/run/q,server=on,wait=off",
        ]
    );
    for part in [
        "Endpoint 0000:00:10.0-0000:00:11.7:",
        "<address type='pci' bus='0x00' slot='0x10' function='0x0'/>",
        "one of them: 05.0, 06.0, 07.0.",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("hostdev"), "{text}");
}

/// What the elements and the arguments say together is what `qemu-args` prints.
#[test]
fn each_argument_of_qemu_args_has_its_element() {
    let text = format!(
        "{VM}[[endpoint]]\nport = '00:02.0'\nvfio-user = {{ listen = '/l', connect = '/k' }}\n"
    );
    let printed = QemuArgs::new(&config(&text), Path::new(TABLE)).expect("arguments");
    let text = made(&text).expect("a domain");
    let document = Document::parse(&text).expect("XML");
    let pairs = |words: &[String]| {
        let pairs = words.chunks(2).map(|pair| pair.join(" "));
        pairs.collect::<Vec<_>>()
    };
    let said = [
        "-machine ",
        "-m ",
        "-object memory-backend-memfd",
        "-global ICH9-LPC.disable_s",
        "-acpitable file=/var/lib/t.viot",
    ];
    let mut rest = pairs(&printed.arguments);
    rest.retain(|pair| !said.iter().any(|start| pair.starts_with(start)));
    assert_eq!(pairs(&arguments(&document)), rest);
}

#[test]
fn odd_characters_are_escaped() {
    let text =
        "name = 'a<b>&--\\'\nsocket = '/run/<&>\".sock'\nmemory = '1G'\naddress = '00:05.0'\n";
    let path = "/var/it's\t<a> & \"b\".viot";
    let text = domain(&config(text), Path::new(path)).expect("a domain");
    let document = Document::parse(&text).expect("XML");
    assert_eq!(children(&document, "name")[0].text(), Some("a<b>&--\\"));
    assert_eq!(children(&document, "table")[0].text(), Some(path));
    assert_eq!(
        arguments(&document)[1],
        "socket,id=viommu-socket,path=/run/<&>\".sock"
    );

    let error = domain(&config(VM), Path::new("/var/\u{1}")).expect_err("no XML");
    assert!(error.to_string().contains("XML cannot have"), "{error}");
}

#[test]
fn devices_of_the_host_are_libvirts_and_keep_their_address() {
    let text = format!(
        "{VM}vfio-from = 'vmm'\nqmp = '/run/q'\n\
         [[endpoint]]\naddress = '00:06.0'\nvfio = '0001:65:00.0'\ndevice = 'ua-nic'\n\
         [[endpoint]]\naddress = '00:06.1'\nvfio = '66:1f.7'\ndevice = 'hostdev0'\n\
         [[endpoint]]\nport = '00:02.0'\nvfio = '67:00.0'\n"
    );
    let text = made(&text).expect("a domain");
    assert!(text.contains("libvirt 12.1 or later"), "{text}");
    assert!(text.contains("one of them: 05.0."), "{text}");
    let document = Document::parse(&text).expect("XML");
    let devices = children(&document, "hostdev");
    let places: Vec<_> = devices.iter().map(place).collect();
    // In the order of the endpoints' addresses: bus 1 is libvirt's bus 1.
    assert_eq!(places, [(0, 6, 0, true), (0, 6, 1, true), (1, 0, 0, false)]);
    let hosts: Vec<_> = children(&document, "source")[1..]
        .iter()
        .map(|source| {
            let address = source.first_element_child().expect("an address");
            // libvirt's schema refuses the attribute here.
            assert_eq!(address.attribute("type"), None);
            let names = ["domain", "bus", "slot", "function"];
            names
                .map(|name| address.attribute(name).expect(name))
                .join(":")
        })
        .collect();
    assert_eq!(
        hosts,
        [
            "0x0001:0x65:0x00:0x0",
            "0x0000:0x66:0x1f:0x7",
            "0x0000:0x67:0x00:0x0"
        ]
    );
    for device in &devices {
        assert_eq!(device.attribute("managed"), Some("no"));
        let driver = device.first_element_child().expect("a driver");
        assert_eq!(driver.attribute("iommufd"), Some("yes"));
    }
    let aliases = children(&document, "alias");
    assert_eq!(aliases.len(), 1);
    assert_eq!(aliases[0].attribute("name"), Some("ua-nic"));
    let all = arguments(&document).join(" ");
    assert!(
        !all.contains("vfio") && !all.contains("pcie-root-port"),
        "{all}"
    );
}

#[test]
fn a_port_is_libvirts_or_an_argument() {
    let text = format!(
        "{VM}vfio-from = 'vmm'\n\
         [[port]]\naddress = '00:02.0'\n\
         [[port]]\naddress = '00:02.1'\nhotplug = true\n\
         [[port]]\naddress = '00:03.0'\nreserve-buses = 3\nspeed = 32\nwidth = 16\n\
         [[port]]\naddress = '00:1c.0/00.0'\nkind = 'pcie-pci-bridge'\n\
         [[endpoint]]\nport = '00:04.0'\nvfio-user = {{ listen = '/l', connect = '/k' }}\n\
         [[endpoint]]\nport = '00:06.0/00.0/00.0'\nvfio = '67:00.0'\n\
         [[endpoint]]\nport = '00:1c.0/00.0'\nrange = '01.0-02.7'\n"
    );
    let text = made(&text).expect("a domain");
    let document = Document::parse(&text).expect("XML");
    let controllers: Vec<_> = children(&document, "controller")
        .iter()
        .filter(|node| node.attribute("type") == Some("pci"))
        .map(|node| {
            let attribute = |name| node.attribute(name).expect(name);
            (attribute("index"), attribute("model"), place(node))
        })
        .collect();
    assert_eq!(
        controllers,
        [
            ("1", "pcie-root-port", (0, 2, 0, true)),
            ("2", "pcie-root-port", (0, 3, 0, false)),
            ("3", "pcie-root-port", (0, 6, 0, false)),
            ("4", "pcie-switch-upstream-port", (3, 0, 0, false)),
            ("5", "pcie-switch-downstream-port", (4, 0, 0, false)),
            ("6", "pcie-root-port", (0, 0x1c, 0, false)),
            ("7", "pcie-to-pci-bridge", (6, 0, 0, false)),
        ]
    );
    assert_eq!(place(&children(&document, "hostdev")[0]), (5, 0, 0, false));
    // What libvirt would add, each on a port of its own.
    assert!(text.contains("<memballoon model='none'/>"), "{text}");
    assert!(
        text.contains("<controller type='usb' model='none'/>"),
        "{text}"
    );
    let all = arguments(&document);
    let ports: Vec<_> = all.iter().filter(|it| it.starts_with("pcie-")).collect();
    assert_eq!(
        ports,
        [
            "pcie-root-port,id=viommu-port-02-1,bus=pcie.0,addr=02.1,multifunction=on,chassis=2,slot=2",
            "pcie-root-port,id=viommu-port-04-0,bus=pcie.0,addr=04.0,chassis=7,slot=7",
        ]
    );
    let settings: Vec<_> = children(&document, "property")
        .iter()
        .map(|it| ["name", "type", "value"].map(|name| it.attribute(name).expect(name)))
        .collect();
    assert_eq!(
        settings,
        [
            ["bus-reserve", "unsigned", "3"],
            ["x-speed", "string", "32"],
            ["x-width", "string", "16"]
        ]
    );
    let device = children(&document, "device")[0];
    assert_eq!(device.attribute("alias"), Some("pci.2"));
    for part in [
        "one of them: 02.1, 04.0, 05.0.",
        "bus='0x07' slot='0x01' function='0x0'",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn arm_guests_get_their_device_tree() {
    let text = format!("{VM}machine = 'virt'\n");
    let text = domain(&config(&text), Path::new("/t.dtb")).expect("a domain");
    let document = Document::parse(&text).expect("XML");
    assert_eq!(children(&document, "dtb")[0].text(), Some("/t.dtb"));
    assert_eq!(
        children(&document, "gic")[0].attribute("version"),
        Some("3")
    );
    assert_eq!(
        children(&document, "type")[0].attribute("arch"),
        Some("aarch64")
    );
    assert!(children(&document, "acpi").is_empty() && children(&document, "pm").is_empty());
}

#[test]
fn what_libvirt_cannot_have_is_refused_with_a_cure() {
    let device = "[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n";
    let mixed = "[[endpoint]]\nport = '00:02.0/00.0/00.0'\nvfio = '65:00.0'\n\
                 [[endpoint]]\nport = '00:02.0/00.0/01.0'\nvfio-user = { listen = '/l', connect = '/k' }\n";
    for (text, cure) in [
        (format!("{VM}{device}"), "set `vfio-from = \"vmm\"`"),
        (
            format!("{VM}host-iommu = 'type1'\n{device}"),
            "set `host-iommu = \"iommufd\"`",
        ),
        (
            format!("{VM}vfio-from = 'vmm'\n{mixed}"),
            "port 00:02.0 are a device",
        ),
        (
            format!("{VM}vfio-from = 'vmm'\nqmp = '/q'\n{device}device = 'nic0'\n"),
            "or \"hostdev0\"",
        ),
        (
            format!("{VM}vfio-from = 'vmm'\nqmp = '/q'\n{device}device = 'ua-nic.0'\n"),
            "with letters, digits, - and _",
        ),
        (format!("{VM}name = 'a/b'\n"), "set another `name`"),
        (VM.replace("/run/", "run/"), "begins with /"),
        (format!("{VM}qmp = 'q'\n"), "begins with /"),
        (
            format!("{VM}[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nexport = 'e'\n"),
            "begins with /",
        ),
        (VM.replace("memory = '2G'\n", ""), "give `memory ="),
        (
            "memory = '1G'\naddress = '00:05.0'\n".into(),
            "give `socket =",
        ),
        (VM.replace("00:05.0", "01:05.0"), "not on bus 00"),
        (VM.replace("00:05.0", "00:1f.2"), "SATA controller"),
        (
            format!(
                "{VM}vfio-from = 'vmm'\n{}",
                device.replace("00:06.0", "03:00.0")
            ),
            "give it an address such as",
        ),
    ] {
        let error = refusal(&text);
        assert!(error.contains(cure), "{error}");
    }
    for (path, cure) in [("t.viot", "begins with /"), ("/a:b", "has a colon")] {
        let error = domain(&config(VM), Path::new(path)).expect_err(path);
        assert!(error.to_string().contains(cure), "{error}");
    }
}

#[test]
fn ids_are_those_that_libvirt_gives() {
    let text = |id: &str| {
        format!(
            "{VM}vfio-from = 'vmm'\nqmp = '/q'\n\
             [[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\ndevice = '{id}'\n"
        )
    };
    for (id, aliases) in [("ua-nic_0", 1), ("hostdev0", 0)] {
        let xml = domain(&config(&text(id)), Path::new("/t.viot")).expect("a domain");
        let document = Document::parse(&xml).expect("XML");
        assert_eq!(children(&document, "alias").len(), aliases, "{id}");
    }
}

/// libvirt numbers the devices without an alias.
#[test]
fn an_alias_takes_no_number() {
    let text = |id: &str| {
        format!(
            "{VM}vfio-from = 'vmm'\nqmp = '/q'\n\
             [[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\ndevice = 'ua-nic'\n\
             [[endpoint]]\naddress = '00:07.0'\nvfio = '66:00.0'\ndevice = '{id}'\n"
        )
    };
    domain(&config(&text("hostdev0")), Path::new("/t.viot")).expect("a domain");
    let error = refusal(&text("hostdev1"));
    assert!(error.contains("or \"hostdev0\""), "{error}");
}

#[test]
fn the_table_is_not_in_etc() {
    let path = table_path(Path::new("/etc/vhost-device-iommu/vm1.toml"), Machine::Q35);
    assert_eq!(path, Path::new("/var/lib/vhost-device-iommu/vm1.viot"));
    let path = table_path(Path::new("b"), Machine::Virt);
    assert_eq!(path, Path::new("/var/lib/vhost-device-iommu/b.dtb"));
}
