//! The PCI devices of a running VM, as QEMU's `query-pci` lists them, compared with the ports of the configuration.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;

use crate::config::NamedDevice;
use crate::topology::ports::Place;
use crate::topology::{PciAddress, PciRange, Port, PortPath, Ports};

/// The devices on the root bus, and those behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciTree(Vec<Device>);

/// The answer to `query-pci`.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    buses: Vec<RootBus>,
}

#[derive(Deserialize)]
struct RootBus {
    bus: i64,
    devices: Vec<Device>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct Device {
    slot: i64,
    function: i64,
    #[serde(default)]
    qdev_id: String,
    #[serde(default)]
    pci_bridge: Option<Bridge>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct Bridge {
    bus: BridgeBus,
    #[serde(default)]
    devices: Vec<Device>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct BridgeBus {
    secondary: i64,
}

/// A port whose bus has another number than the guest's table says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The port.
    pub path: PortPath,
    /// The number in the table.
    pub expected: u8,
    /// The number in the guest; `None` if no bridge is at the port's place.
    pub found: Option<i64>,
}

/// A device that is not at the address of its endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongDevice {
    /// Its ID in QEMU.
    pub id: String,
    /// The endpoint.
    pub endpoint: PciAddress,
    /// Its address in the guest, without the segment; `None` without such a device.
    pub found: Option<String>,
}

impl PciTree {
    /// The tree in the answer to `query-pci`, `{ "return": [...] }`.
    ///
    /// # Errors
    /// The answer is none that QEMU gives.
    pub fn parse(answer: &[u8]) -> serde_json::Result<Self> {
        let answer: Answer = serde_json::from_slice(answer)?;
        let root = answer.buses.into_iter().find(|root| root.bus == 0);
        Ok(Self(root.map_or_else(Vec::new, |root| root.devices)))
    }

    /// The ports whose buses have other numbers, in the order of the table.
    pub fn differences(&self, ports: &Ports) -> Vec<Difference> {
        let of_port = |port: &Port| {
            let found = self.bridge(&port.path).map(|bridge| bridge.bus.secondary);
            (found != Some(port.bus.into())).then(|| Difference {
                path: port.path.clone(),
                expected: port.bus,
                found,
            })
        };
        ports.iter().filter_map(of_port).collect()
    }

    /// The devices that are not at the address of their endpoint.
    pub fn wrong_devices(&self, named: &[NamedDevice]) -> Vec<WrongDevice> {
        let mut places = HashMap::new();
        let wanted = named.iter().map(|device| device.id.as_str()).collect();
        note_places(&self.0, 0, &wanted, &mut places);
        let of_device = |device: &NamedDevice| {
            let found = places.get(device.id.as_str()).copied();
            let address = device.endpoint;
            let expected = [address.bus(), address.device(), address.function()].map(i64::from);
            (address.segment() != 0 || found != Some(expected)).then(|| WrongDevice {
                id: device.id.clone(),
                endpoint: address,
                found: found
                    .map(|[bus, slot, function]| format!("{bus:02x}:{slot:02x}.{function:x}")),
            })
        };
        named.iter().filter_map(of_device).collect()
    }

    /// The bridge at the end of a way.
    fn bridge(&self, path: &PortPath) -> Option<&Bridge> {
        let mut here = &self.0;
        let mut found = None;
        for place in path.places() {
            let bridge = here.iter().find(|device| device.is_at(*place))?;
            let bridge = bridge.pci_bridge.as_ref()?;
            here = &bridge.devices;
            found = Some(bridge);
        }
        found
    }
}

/// Notes bus, device and function of each device with a wanted ID. The parser has limited the depth.
fn note_places<'a>(
    devices: &'a [Device],
    bus: i64,
    wanted: &HashSet<&str>,
    places: &mut HashMap<&'a str, [i64; 3]>,
) {
    for device in devices {
        if wanted.contains(device.qdev_id.as_str()) {
            places.insert(&device.qdev_id, [bus, device.slot, device.function]);
        }
        if let Some(bridge) = &device.pci_bridge {
            note_places(&bridge.devices, bridge.bus.secondary, wanted, places);
        }
    }
}

impl Device {
    fn is_at(&self, place: Place) -> bool {
        self.slot == i64::from(place.device()) && self.function == i64::from(place.function())
    }
}

/// All functions of a bus.
pub fn all_on(bus: u8) -> Option<PciRange> {
    let first = PciAddress::new(0, bus, 0, 0)?;
    let last = PciAddress::new(0, bus, 31, 7)?;
    PciRange::new(first, last).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::topology::ports::PortSpec;

    fn ports(list: &[&str]) -> Ports {
        let spec = |text: &&str| PortSpec::implied(text.parse().expect("a path"));
        Ports::new(list.iter().map(spec).collect()).expect("good")
    }

    fn bridge(slot: u8, function: u8, secondary: u8, devices: &[Value]) -> Value {
        let bus =
            json!({ "number": 0, "secondary": secondary, "subordinate": 255, "io_range": {} });
        json!({ "bus": 0, "slot": slot, "function": function, "qdev_id": "p", "regions": [],
            "pci_bridge": { "bus": bus, "devices": devices } })
    }

    fn tree(devices: &[Value]) -> PciTree {
        let all = json!([{ "bus": 0, "devices": devices }, { "bus": 128, "devices": [] }]);
        parse(&all.to_string()).expect("a tree")
    }

    fn parse(returned: &str) -> serde_json::Result<PciTree> {
        PciTree::parse(format!("{{\"id\": \"places\", \"return\": {returned}}}").as_bytes())
    }

    #[test]
    fn other_numbers_are_found() {
        let ports = ports(&["00:02.0", "00:02.1", "00:03.0/00.0/01.0"]);
        let device = json!({ "slot": 0, "function": 0, "class_info": {} });
        let switch = |upstream, downstream| {
            let downstream = bridge(1, 0, downstream, &[]);
            [bridge(0, 0, upstream, &[downstream])]
        };
        let good = [
            device.clone(),
            bridge(2, 0, 1, std::slice::from_ref(&device)),
            bridge(2, 1, 2, &[]),
            bridge(3, 0, 3, &switch(4, 5)),
        ];
        assert_eq!(tree(&good).differences(&ports), []);
        // Another port comes first, and the last one has no switch.
        let bad = [
            bridge(1, 0, 1, &[]),
            bridge(2, 0, 2, std::slice::from_ref(&device)),
            device.clone(),
            bridge(3, 0, 3, &[device]),
        ];
        let found: Vec<_> = tree(&bad)
            .differences(&ports)
            .into_iter()
            .map(|it| (it.path.to_string(), it.expected, it.found))
            .collect();
        assert_eq!(
            found,
            [
                ("00:02.0".to_owned(), 1, Some(2)),
                ("00:02.1".to_owned(), 2, None),
                ("00:03.0/00.0".to_owned(), 4, None),
                ("00:03.0/00.0/01.0".to_owned(), 5, None),
            ]
        );
        assert_eq!(tree(&[]).differences(&ports).len(), 5);
        let functions = all_on(7).map(|range| range.to_string());
        assert_eq!(functions.as_deref(), Some("0000:07:00.0-0000:07:1f.7"));
    }

    #[test]
    fn named_devices_are_found_behind_ports() {
        let device = |id: &str| json!({ "slot": 0, "function": 1, "qdev_id": id });
        let inner = bridge(3, 0, 9, &[device("a")]);
        let tree = tree(&[bridge(2, 0, 7, &[inner, device("b")]), device("")]);
        let named = |id: &str, endpoint: &str| NamedDevice {
            endpoint: endpoint.parse().expect(endpoint),
            id: id.to_owned(),
        };
        let good = [named("a", "09:00.1"), named("b", "07:00.1")];
        assert_eq!(tree.wrong_devices(&good), []);
        let bad = [
            named("a", "09:00.0"),
            named("b", "0001:07:00.1"),
            named("c", "00:00.1"),
        ];
        let found: Vec<_> = tree
            .wrong_devices(&bad)
            .into_iter()
            .map(|wrong| (wrong.id, wrong.found))
            .collect();
        assert_eq!(
            found,
            [
                ("a".to_owned(), Some("09:00.1".to_owned())),
                ("b".to_owned(), Some("07:00.1".to_owned())),
                ("c".to_owned(), None)
            ]
        );
    }

    #[test]
    fn other_answers_are_no_trees() {
        let deep = "[{\"bus\":0,\"devices\":".to_owned()
            + &"[{\"slot\":0,\"function\":0,\"pci_bridge\":{\"bus\":{\"secondary\":1},\"devices\":"
                .repeat(200);
        for text in [
            "",
            "{}",
            "[3]",
            "[{\"bus\":0}]",
            "[{\"bus\":\"0\",\"devices\":[]}]",
            &deep,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let numbers = "[{\"bus\":0,\"devices\":[{\"slot\":-1,\"function\":9999999999}]}]";
        let tree = parse(numbers).expect("numbers");
        assert_eq!(tree.differences(&ports(&["00:02.0"])).len(), 1);
    }
}
