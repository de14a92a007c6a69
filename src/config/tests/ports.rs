//! Endpoints behind ports.

use std::path::Path;

use crate::config::Config;
use crate::topology::PciAddress;

fn parse(text: &str) -> Result<Config, String> {
    let text = format!("socket = '/s'\naddress = '00:05.0'\n{text}");
    Config::from_text(Path::new("vm.toml"), &text).map_err(|error| error.to_string())
}

fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn endpoints(config: &Config) -> Vec<String> {
    let ranges = config.topology.ranges();
    ranges.map(|entry| entry.range.to_string()).collect()
}

const EVERY_KIND: &str = "host-iommu = 'type1'\n\
     [[port]]\naddress = '00:02.0'\n\
     [[endpoint]]\nport = '00:06.0'\nshadow = '/h'\n\
     [[endpoint]]\nport = '00:03.0'\nvfio = '65:00.0'\nexport = '/e'\n\
     [[endpoint]]\nport = '00:04.0'\naddress = '00.3'\n\
     vfio-user = { listen = '/l', connect = '/k' }\n\
     [[endpoint]]\naddress = '00:10.0'\ngroup = 'g'\n\
     [[endpoint]]\nport = '00:07.0'\nrange = '00.0 - 00.7'\n";

#[test]
fn endpoints_of_every_kind_can_be_behind_ports() {
    let config = good(EVERY_KIND);
    assert_eq!(
        endpoints(&config),
        [
            "0000:00:10.0",
            "0000:02:00.0",
            "0000:03:00.3",
            "0000:04:00.0",
            "0000:05:00.0-0000:05:00.7"
        ]
    );
    let devices = config.devices.iter().map(|device| device.endpoint());
    let devices: std::collections::BTreeSet<_> = devices.map(|it| it.to_string()).collect();
    let expected = ["0000:02:00.0", "0000:03:00.3", "0000:04:00.0"];
    assert!(
        devices.iter().map(String::as_str).eq(expected),
        "{devices:?}"
    );
    let summary = config.summary().to_string();
    for line in [
        "ports:            5",
        "  00:02.0 root-port, bus 01\n",
        "  00:07.0 root-port, bus 05\n",
        "  0000:03:00.3 behind port 00:04.0 vfio-user",
    ] {
        assert!(summary.contains(line), "{line} in {summary}");
    }
    // The device would be missing: nothing is function 0 beside it.
    let problems: Vec<_> = config
        .slot_problems()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("nothing is configured at 0000:03:00.0"));
}

#[test]
fn a_port_can_wait_for_devices() {
    // The bridge has an endpoint for its ID, where no device can be.
    let config = good(
        "[[port]]\naddress = '00:02.0'\nhotplug = true\n[[port]]\naddress = '00:03.0'\n\
         [[port]]\naddress = '00:04.0'\nkind = 'pcie-pci-bridge'\nhotplug = true\n",
    );
    let expected: Vec<_> = config
        .topology
        .expected()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        expected,
        ["0000:01:00.0-0000:01:00.7", "0000:03:01.0-0000:03:1f.7"]
    );
    assert!(
        config
            .summary()
            .to_string()
            .contains("bus 01, devices may come later")
    );
    let (made, range) = config
        .with_endpoint("address = \"01:00.0\"")
        .expect("behind the port");
    assert!(made.topology.is_expected(range));
    for (keys, message) in [
        ("address = \"01:01.0\"", "leads to one device"),
        ("address = \"00:03.0\"", "is the port 00:03.0 itself"),
        ("port = \"00:02.0\"", "leave `port` out"),
    ] {
        let error = config.with_endpoint(keys).expect_err(keys).to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// Linux attaches the ID of the bridge beside that of each device behind it.
#[test]
fn a_bridge_to_conventional_pci_has_an_endpoint_of_its_own() {
    let bridge = "[[port]]\naddress = '00:02.0/00.0'\nkind = 'pcie-pci-bridge'\n";
    assert_eq!(endpoints(&good(bridge)), [""; 0]);
    let behind = format!("{bridge}[[endpoint]]\nport = '00:02.0/00.0'\naddress = '03.0'\n");
    assert_eq!(endpoints(&good(&behind)), ["0000:02:00.0", "0000:02:03.0"]);
    let later = format!("{bridge}hotplug = true\n");
    assert_eq!(endpoints(&good(&later)), ["0000:02:00.0"]);
    let by_number = format!("{bridge}[[endpoint]]\naddress = '02:1f.7'\n");
    assert_eq!(
        endpoints(&good(&by_number)),
        ["0000:02:00.0", "0000:02:1f.7"]
    );
}

#[test]
fn messages_name_the_place_in_the_file() {
    for (text, place) in [
        (
            "[[port]]\naddress = '00:20.0'\n",
            "vm.toml:4: port[0].address: ",
        ),
        ("[[port]]\n", "port[0].address: is missing"),
        (
            "[[endpoint]]\nport = 2\n",
            "vm.toml:4: endpoint[0].port: must be a port",
        ),
        (
            "[[endpoint]]\nport = '00:02.0'\naddress = '00:00.0'\n",
            "vm.toml:5: endpoint[0].address: \"00:00.0\" is not a place",
        ),
        (
            "[[port]]\naddress = '00:02.0'\n[[port]]\naddress = '00:02.0'\n",
            "vm.toml:6: port[1].address: port 00:02.0 is given twice",
        ),
        (
            "[[endpoint]]\naddress = '00:02.0'\n[[endpoint]]\nport = '00:02.0'\n",
            "vm.toml:4: endpoint[0].address: endpoint 0000:00:02.0 contains",
        ),
        (
            "[[endpoint]]\nport = '00:02.0'\n[[endpoint]]\naddress = '01:00.0'\n",
            "endpoint[1].address: endpoint 0000:01:00.0 is given twice",
        ),
        (
            "[[endpoint]]\nport = '00:02.0'\n[[endpoint]]\nport = '00:02.0'\n",
            "vm.toml:6: endpoint[1].port: endpoint 0000:01:00.0 is given twice",
        ),
        (
            "[[endpoint]]\nport = '00:02.0/00.0/01.1'\n",
            "vm.toml:4: endpoint[0].port: no port is at 00:02.0/00.0/01.0",
        ),
        (
            "[[endpoint]]\nport = '00:02.0'\nrange = '00.0-02.0'\n",
            "vm.toml:5: endpoint[0].port: no device can be at 0000:01:00.0-0000:01:02.0",
        ),
        (
            "[[port]]\naddress = '00:02.0'\nhotplug = 'yes'\n",
            "port[0].hotplug: must be true or false, not a text",
        ),
        (
            "[[port]]\naddress = '00:02.0'\nlanes = 4\n",
            "unknown key `lanes`",
        ),
        ("port = '00:02.0'\n", "port"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(place), "{text}: {error}");
        assert!(!error.is_empty());
    }
}

#[test]
fn one_file_has_the_same_addresses_in_any_order() {
    let one = good("[[endpoint]]\nport = '00:03.0'\n[[endpoint]]\nport = '00:02.0'\n");
    let other = good("[[endpoint]]\nport = '00:02.0'\n[[endpoint]]\nport = '00:03.0'\n");
    assert_eq!(one.topology, other.topology);
    let first: PciAddress = "01:00.0".parse().expect("an address");
    let port = one.ports.before(first).map(|port| port.path.to_string());
    assert_eq!(port.as_deref(), Some("00:02.0"));
}
