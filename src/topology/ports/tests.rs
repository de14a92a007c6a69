//! The numbers of buses, compared with written tables and with a model of what firmware does.

use proptest::prelude::*;

use super::*;
use crate::topology::{EndpointSpec, ReservedRegions};

fn path(text: &str) -> PortPath {
    text.parse().expect(text)
}

/// A port from `PATH [KIND] [+RESERVED]`.
fn spec(text: &str) -> PortSpec {
    let mut words = text.split_whitespace();
    let mut spec = PortSpec::implied(path(words.next().expect("a path")));
    for word in words {
        match word.strip_prefix('+') {
            Some(number) => spec.reserved_buses = number.parse().expect("a number"),
            None => spec.kind = Some(PortKind::named(word).expect(word)),
        }
    }
    spec
}

fn ports(list: &[&str]) -> Result<Ports, PortError> {
    Ports::new(list.iter().map(|text| spec(text)).collect())
}

/// `PATH=BUS` or `PATH=BUS-LAST` of each port.
fn numbers(list: &[&str]) -> Vec<String> {
    let ports = ports(list).unwrap_or_else(|error| panic!("{list:?}: {error}"));
    let text = |port: &Port| match port.last_bus == port.bus {
        true => format!("{}={:02x}", port.path, port.bus),
        false => format!("{}={:02x}-{:02x}", port.path, port.bus, port.last_bus),
    };
    ports.iter().map(text).collect()
}

#[test]
fn buses_are_numbered_depth_first() {
    for (given, expected) in [
        (&["00:02.0"][..], &["00:02.0=01"][..]),
        // In the order of the addresses, not of the file.
        (
            &["00:1c.0", "00:02.1", "00:02.0", "00:03.0"],
            &["00:02.0=01", "00:02.1=02", "00:03.0=03", "00:1c.0=04"],
        ),
        // A switch between two ports. The ports on the way to a downstream port are implied.
        (
            &[
                "00:04.0",
                "00:02.0",
                "00:03.0/00.0/01.0",
                "00:03.0/00.0/00.0",
            ],
            &[
                "00:02.0=01",
                "00:03.0=02-05",
                "00:03.0/00.0=03-05",
                "00:03.0/00.0/00.0=04",
                "00:03.0/00.0/01.0=05",
                "00:04.0=06",
            ],
        ),
        // A switch behind a switch.
        (
            &["00:02.0/00.0/00.0/00.0/1f.0", "00:02.0/00.0/01.0"],
            &[
                "00:02.0=01-06",
                "00:02.0/00.0=02-06",
                "00:02.0/00.0/00.0=03-05",
                "00:02.0/00.0/00.0/00.0=04-05",
                "00:02.0/00.0/00.0/00.0/1f.0=05",
                "00:02.0/00.0/01.0=06",
            ],
        ),
        (
            &[
                "00:02.0/00.0 pcie-pci-bridge",
                "00:03.0",
                "00:1e.0 pcie-pci-bridge",
            ],
            &[
                "00:02.0=01-02",
                "00:02.0/00.0=02",
                "00:03.0=03",
                "00:1e.0=04",
            ],
        ),
        // Reserved numbers: beside its own, and beside those of ports behind it.
        (&["00:02.0 +3", "00:03.0"], &["00:02.0=01-04", "00:03.0=05"]),
        (
            &["00:02.0 +5", "00:02.0/00.0/01.0", "00:03.0"],
            &[
                "00:02.0=01-06",
                "00:02.0/00.0=02-03",
                "00:02.0/00.0/01.0=03",
                "00:03.0=07",
            ],
        ),
    ] {
        assert_eq!(numbers(given), expected, "{given:?}");
    }
}

#[test]
fn ports_know_their_addresses() {
    let ports = ports(&["00:03.0/00.0/01.0", "00:02.1", "00:02.0"]).expect("good");
    let addresses: Vec<_> = ports.iter().map(|port| port.address.to_string()).collect();
    assert_eq!(
        addresses,
        [
            "0000:00:02.0",
            "0000:00:02.1",
            "0000:00:03.0",
            "0000:03:00.0",
            "0000:04:01.0"
        ]
    );
    let function = "05:00.3".parse().expect("an address");
    let before = ports.before(function).map(|port| port.path.to_string());
    assert_eq!(before.as_deref(), Some("00:03.0/00.0/01.0"));
    assert!(ports.before("06:00.0".parse().expect("one")).is_none());
    assert!(ports.before("0001:05:00.0".parse().expect("one")).is_none());
}

#[test]
fn contradictions_are_refused() {
    for (given, message) in [
        (&["00:02.0", "00:02.0 root-port"][..], "given twice"),
        (
            &["00:02.0 downstream-port"],
            "downstream-port is behind the root bus",
        ),
        (
            &["00:02.0 upstream-port"],
            "upstream-port is behind the root bus",
        ),
        (
            &["00:02.0/00.0 root-port"],
            "is behind port 00:02.0 (root-port)",
        ),
        (
            &["00:02.0/00.0 downstream-port"],
            "is behind port 00:02.0 (root-port)",
        ),
        (
            &["00:02.0 pcie-pci-bridge", "00:02.0/01.0"],
            "is behind port 00:02.0 (pcie-pci-bridge)",
        ),
        (&["00:02.0/01.0"], "write 00.0 for that part"),
        (&["00:02.0/00.1"], "write 00.0 for that part"),
        (&["00:02.0/00.0/01.1"], "no port is at 00:02.0/00.0/01.0"),
        (&["00:02.0 +255"], "gets no bus number"),
        (
            &["00:02.0 +1", "00:02.0/00.0 pcie-pci-bridge"],
            "no more bus numbers than the 1",
        ),
        (&["00:02.0/00.0/00.0 +1"], "behind root ports only"),
    ] {
        let error = ports(given).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
    // All numbers but one; then one port too many.
    assert_eq!(numbers(&["00:02.0 +254"]), ["00:02.0=01-ff"]);
    assert!(ports(&["00:02.0 +254", "00:03.0"]).is_err());
}

#[test]
fn texts_that_are_no_paths_are_refused() {
    let deep = "00:02.0".to_owned() + &"/00.0".repeat(MAX_DEPTH);
    for text in [
        "",
        "02.0",
        "01:02.0",
        "0001:00:02.0",
        "00:02.0/",
        "/00:02.0",
        "00:02.0/00:00.0",
        "00:02.0/20.0",
        "00:02.0/00.8",
        "00:02.8",
        &deep,
    ] {
        assert!(text.parse::<PortPath>().is_err(), "{text}");
    }
    let deepest = "00:02.0".to_owned() + &"/00.0".repeat(MAX_DEPTH - 1);
    assert_eq!(path(&deepest).to_string(), deepest);
    assert_eq!(path("0000:0:2.0/0.0/1.0").to_string(), "00:02.0/00.0/01.0");
}

fn checked(list: &[&str], endpoints: &[&str], expected: &[&str]) -> Result<(), PortError> {
    let range = |text: &&str| text.parse::<PciRange>().expect(text);
    let specs: Vec<_> = endpoints
        .iter()
        .map(|text| EndpointSpec {
            range: range(text),
            group: None,
            reserved: Vec::new(),
        })
        .collect();
    let iommu = "00:05.0".parse().expect("an address");
    let topology = Topology::new(iommu, ReservedRegions::default(), &specs).expect("disjoint");
    let topology = topology.with_expected(expected.iter().map(range).collect());
    ports(list)?.check(&topology.expect("not the IOMMU"))
}

#[test]
fn endpoints_have_no_places_of_ports() {
    let list = &["00:02.0", "00:03.0/00.0/01.0", "00:1c.0 pcie-pci-bridge"];
    for (functions, message) in [
        ("00:02.0", "is the port 00:02.0 itself"),
        ("00:00.1-00:03.7", "is the port 00:02.0 itself"),
        ("02:00.0", "is the port 00:03.0/00.0 itself"),
        ("01:00.0-ff:1f.7", "is the port 00:03.0/00.0 itself"),
        ("01:01.0", "leads to one device"),
        ("01:00.0-01:1f.7", "leads to one device"),
        ("03:00.0", "put the device behind a downstream port"),
        ("05:00.0", "number 0 has no place"),
    ] {
        for (endpoints, expected) in [(&[functions][..], &[][..]), (&[], &[functions])] {
            let error = checked(list, endpoints, expected)
                .expect_err(functions)
                .to_string();
            assert!(error.contains(message), "{functions}: {error}");
        }
    }
    let error = checked(&["00:05.0"], &[], &[]).expect_err("the IOMMU's own address");
    assert!(error.to_string().contains("the IOMMU itself"));
    let good = [
        "00:06.0-00:1b.7",
        "01:00.0-01:00.7",
        "04:00.0",
        "05:01.0-05:1f.7",
    ];
    assert_eq!(checked(list, &good, &["20:00.0-ff:1f.7"]), Ok(()));
}

/// A bridge and those behind it, as firmware finds them.
#[derive(Clone, Debug)]
struct Bridge {
    place: Place,
    reserved: u8,
    behind: Vec<Bridge>,
}

/// What SeaBIOS does (`pci_bios_init_bus_rec`): each bridge of a bus gets the next number, then those behind it; in
/// the end a reservation moves the number on. Notes each bridge with its secondary and its subordinate bus.
fn firmware(
    bridges: &[Bridge],
    way: &[Place],
    bus: &mut u16,
    found: &mut Vec<(Vec<Place>, u16, u16)>,
) {
    for device in 0..32 {
        for function in 0..8 {
            let here = |bridge: &&Bridge| {
                (bridge.place.device(), bridge.place.function()) == (device, function)
            };
            let Some(bridge) = bridges.iter().find(here) else {
                continue;
            };
            *bus += 1;
            let secondary = *bus;
            let way = [way, &[bridge.place]].concat();
            let at = found.len();
            found.push((way.clone(), secondary, 0));
            firmware(&bridge.behind, &way, bus, found);
            if bridge.reserved > 0 {
                *bus = (*bus).max(secondary + u16::from(bridge.reserved));
            }
            found[at].2 = *bus;
        }
    }
}

fn place() -> impl Strategy<Value = Place> {
    (0u8..32, 0u8..8).prop_map(|(device, function)| {
        Place::from(PciAddress::new(0, 0, device, function).expect("in range"))
    })
}

/// Bridges at different places; each slot of a switch with its function 0.
fn bridges(behind: BoxedStrategy<Vec<Bridge>>) -> BoxedStrategy<Vec<Bridge>> {
    let one = (place(), 0u8..20, behind).prop_map(|(place, reserved, behind)| Bridge {
        place,
        reserved,
        behind,
    });
    prop::collection::vec(one, 0..5)
        .prop_map(|mut all| {
            all.sort_by_key(|bridge| bridge.place);
            all.dedup_by_key(|bridge| bridge.place);
            let mut zeroes = Vec::new();
            for bridge in &all {
                let zero = Place {
                    function: 0,
                    ..bridge.place
                };
                if !all.iter().chain(&zeroes).any(|other| other.place == zero) {
                    zeroes.push(Bridge {
                        place: zero,
                        reserved: 0,
                        behind: Vec::new(),
                    });
                }
            }
            all.extend(zeroes);
            all
        })
        .boxed()
}

/// A switch: its upstream port, with downstream ports.
fn switch(downstream: BoxedStrategy<Vec<Bridge>>) -> BoxedStrategy<Vec<Bridge>> {
    let upstream = |behind| {
        vec![Bridge {
            place: Place::FIRST,
            reserved: 0,
            behind,
        }]
    };
    prop_oneof![Just(Vec::new()), downstream.prop_map(upstream)].boxed()
}

fn machine() -> BoxedStrategy<Vec<Bridge>> {
    let none = Just(Vec::new()).boxed();
    let inner = switch(bridges(none));
    bridges(switch(bridges(inner)))
}

fn specs(bridges: &[Bridge], way: &[Place], all: &mut Vec<PortSpec>) {
    for bridge in bridges {
        let way = [way, &[bridge.place]].concat();
        let mut spec = PortSpec::implied(PortPath(way.clone()));
        spec.reserved_buses = if way.len() == 1 { bridge.reserved } else { 0 };
        all.push(spec);
        specs(&bridge.behind, &way, all);
    }
}

/// Only root ports reserve numbers.
fn clear_inner(bridges: &mut [Bridge], depth: usize) {
    for bridge in bridges {
        if depth > 0 {
            bridge.reserved = 0;
        }
        clear_inner(&mut bridge.behind, depth + 1);
    }
}

proptest! {
    #[test]
    fn numbers_agree_with_a_model_of_firmware(mut machine in machine(), seed in any::<u64>()) {
        clear_inner(&mut machine, 0);
        let mut all = Vec::new();
        specs(&machine, &[], &mut all);
        // The order in the file does not matter.
        if !all.is_empty() {
            let by = usize::try_from(seed % all.len() as u64).expect("small");
            all.rotate_left(by);
        }
        let mut found = Vec::new();
        let mut last = 0;
        firmware(&machine, &[], &mut last, &mut found);
        match Ports::new(all) {
            Ok(ports) => {
                let numbers: Vec<_> = ports
                    .iter()
                    .map(|port| (port.path.places().to_vec(), port.bus.into(), port.last_bus.into()))
                    .collect();
                prop_assert_eq!(numbers, found);
            }
            Err(PortError::TooMany { .. }) => prop_assert!(last > 255),
            Err(PortError::ReserveTooSmall { path, taken }) => {
                let (_, secondary, subordinate) = found
                    .iter()
                    .find(|(way, ..)| way == path.places())
                    .expect("there");
                prop_assert_eq!(subordinate - secondary, u16::from(taken));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn no_text_panics(text in "[0-9a-f:./]{0,40}") {
        if let Ok(path) = text.parse::<PortPath>() {
            prop_assert_eq!(path.to_string().parse(), Ok(path));
        }
    }
}
