//! Ports, and the endpoints behind them: their addresses, once the buses have numbers.

use super::Machine;
use super::bounds::MAX_RESERVED_BUSES;
use super::checker::Checker;
use super::draft::{Draft, EndpointDraft, Located, Origin, PortDraft, Scalar};
use super::error::ProblemKind;
use super::passthrough::range_in;
use super::text::shown;
use crate::topology::ports::{LinkSettings, Place, PlaceError, PortSpec};
use crate::topology::{
    EndpointSpec, PciAddress, Port, PortError, PortKind, PortPath, Ports, Topology,
};

/// The speeds of a link in GT/s, and QEMU's names of them.
const SPEEDS: [(&str, &str); 6] = [
    ("2.5", "2_5"),
    ("5", "5"),
    ("8", "8"),
    ("16", "16"),
    ("32", "32"),
    ("64", "64"),
];
/// The numbers of lanes that a link can have.
const WIDTHS: [u8; 7] = [1, 2, 4, 8, 12, 16, 32];

impl Checker<'_> {
    /// The ports of the draft, with the numbers of their buses. Endpoints with `port` get the address that follows in
    /// the draft, so that the other checks see it.
    pub(super) fn ports(&mut self, draft: &mut Draft, machine: Machine) -> Option<Ports> {
        let before = self.problems.len();
        let mut specs: Vec<PortSpec> = Vec::with_capacity(draft.port.len());
        for (index, given) in draft.port.iter().enumerate() {
            specs.extend(self.port(index, given, machine));
        }
        let mut behind = Vec::new();
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            let Some(given) = &endpoint.value.port else {
                continue;
            };
            let path = self.port_path(given, &format!("endpoint[{index}].port"));
            let places = self.places(index, &endpoint.value);
            let (Some(path), Some(places)) = (path, places) else {
                continue;
            };
            if !specs.iter().any(|spec| spec.path == path) {
                specs.push(PortSpec::implied(path.clone()));
            }
            behind.push((index, path, places));
        }
        if self.problems.len() > before {
            return None;
        }
        let ports = match Ports::new(specs) {
            Ok(ports) => ports,
            Err(error) => {
                self.refuse_port(draft, error);
                return None;
            }
        };
        for (index, path, (first, last)) in behind {
            if let Some(port) = ports.at_path(&path)
                && let Some(endpoint) = draft.endpoint.get_mut(index)
            {
                endpoint.value.put_on_bus(port.bus, first, last);
            }
        }
        Some(ports)
    }

    fn port(
        &mut self,
        index: usize,
        given: &Located<PortDraft>,
        machine: Machine,
    ) -> Option<PortSpec> {
        let key = |name: &str| format!("port[{index}].{name}");
        let value = &given.value;
        let Some(address) = &value.address else {
            let cure = "give the port's place, such as `address = \"00:02.0\"`";
            self.refuse(&given.origin, &key("address"), ProblemKind::Missing(cure));
            return None;
        };
        let path = self.port_path(address, &key("address"))?;
        let mut spec = PortSpec::implied(path);
        if let Some(kind) = &value.kind {
            let wanted =
                "\"root-port\", \"upstream-port\", \"downstream-port\" or \"pcie-pci-bridge\"";
            let found = PortKind::named(self.text(kind, &key("kind"), wanted)?);
            if found.is_none() {
                let problem = ProblemKind::PortKind(shown(&kind.value));
                self.refuse(&kind.origin, &key("kind"), problem);
            }
            spec.kind = Some(found?);
        }
        if let Some(number) = &value.reserve_buses {
            let key = key("reserve-buses");
            let found = self.integer(number, &key, "a number of buses, such as 4")?;
            let range = 1..=i128::from(MAX_RESERVED_BUSES);
            match u8::try_from(found).ok().filter(|_| range.contains(&found)) {
                None => self.refuse(&number.origin, &key, ProblemKind::ReserveBuses(found)),
                Some(_) if machine == Machine::Virt => {
                    self.refuse(&number.origin, &key, ProblemKind::ReserveOnVirt);
                }
                Some(buses) => spec.reserved_buses = buses,
            }
        }
        if let Some(hotplug) = &value.hotplug {
            match hotplug.value {
                Scalar::Bool(on) => spec.hotplug = on,
                ref other => {
                    self.wrong_type(hotplug, &key("hotplug"), other.found(), "true or false");
                }
            }
        }
        spec.link = LinkSettings {
            speed: self.link_speed(value.speed.as_ref(), &key("speed")),
            width: self.link_width(value.width.as_ref(), &key("width")),
        };
        Some(spec)
    }

    fn link_speed(&mut self, given: Option<&Located<Scalar>>, key: &str) -> Option<&'static str> {
        let given = given?;
        let text = match &given.value {
            Scalar::Integer(number) => number.to_string(),
            Scalar::Text(text) => text.clone(),
            other => {
                let wanted = "a speed in GT/s: a number, or \"2.5\"";
                self.wrong_type(given, key, other.found(), wanted);
                return None;
            }
        };
        let found = SPEEDS.iter().find(|(speed, _)| *speed == text);
        if found.is_none() {
            let problem = ProblemKind::LinkSpeed(shown(&given.value));
            self.refuse(&given.origin, key, problem);
        }
        found.map(|(_, name)| *name)
    }

    fn link_width(&mut self, given: Option<&Located<Scalar>>, key: &str) -> Option<u8> {
        let given = given?;
        let number = self.integer(given, key, "a number of lanes, such as 16")?;
        let found = WIDTHS
            .into_iter()
            .find(|width| i128::from(*width) == number);
        if found.is_none() {
            self.refuse(&given.origin, key, ProblemKind::LinkWidth(number));
        }
        found
    }

    fn port_path(&mut self, given: &Located<Scalar>, key: &str) -> Option<PortPath> {
        let text = self.text(given, key, "a port as a text, such as \"00:02.0\"")?;
        match text.parse() {
            Ok(path) => Some(path),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::PortPath { value, source });
                None
            }
        }
    }

    /// The places of an endpoint behind its port: the first and the last.
    fn places(&mut self, index: usize, value: &EndpointDraft) -> Option<(Place, Place)> {
        let (given, name) = match (&value.address, &value.range) {
            (Some(given), _) => (given, "address"),
            (None, Some(given)) => (given, "range"),
            (None, None) => return Some((Place::FIRST, Place::FIRST)),
        };
        let key = format!("endpoint[{index}].{name}");
        let wanted = "a place behind the port as a text, such as \"00.0\"";
        let text = self.text(given, &key, wanted)?;
        let parse = |text: &str| -> Result<(Place, Place), PlaceError> {
            match text.split_once('-') {
                Some((first, last)) if name == "range" => {
                    Ok((first.trim_end().parse()?, last.trim_start().parse()?))
                }
                _ => text.parse().map(|place| (place, place)),
            }
        };
        match parse(text) {
            Ok(places) => Some(places),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, &key, ProblemKind::Place { value, source });
                None
            }
        }
    }

    /// Checks the ports against the IOMMU's own address.
    pub(super) fn check_iommu_port(&mut self, draft: &Draft, ports: &Ports, iommu: PciAddress) {
        if let Err(error) = ports.check_iommu(iommu) {
            self.refuse_port(draft, error);
        }
    }

    /// Checks the ports against the endpoints. Adds the endpoints that bridges to conventional PCI need.
    pub(super) fn with_aliases(
        &mut self,
        draft: &Draft,
        ports: &Ports,
        mut topology: Topology,
    ) -> Option<Topology> {
        if let Err(error) = ports.check(&topology) {
            self.refuse_port(draft, error);
            return None;
        }
        for port in ports.iter() {
            let Some(alias) = alias(port, &topology) else {
                continue;
            };
            let spec = EndpointSpec {
                range: alias.into(),
                group: None,
                reserved: Vec::new(),
            };
            if let Err(error) = topology.add(&spec) {
                let (origin, key) = origin_of(draft, &port.path);
                self.refuse(&origin, &key, ProblemKind::Topology(error));
                return None;
            }
        }
        Some(topology)
    }

    fn refuse_port(&mut self, draft: &Draft, error: PortError) {
        let at_endpoint = error.range().and_then(|range| {
            let mut endpoints = draft.endpoint.iter().enumerate();
            endpoints.find_map(|(index, endpoint)| {
                let value = &endpoint.value;
                let given = value.address.as_ref().or(value.range.as_ref())?;
                let name = value.place_key();
                (range_in(given)? == range)
                    .then(|| (given.origin.clone(), format!("endpoint[{index}].{name}")))
            })
        });
        let (origin, key) = at_endpoint.unwrap_or_else(|| origin_of(draft, error.path()));
        self.refuse(&origin, &key, ProblemKind::Port(error));
    }
}

/// The endpoint that the guest attaches beside each device behind a bridge to conventional PCI: the bridge gives its ID
/// to their accesses. `None` if there is such an endpoint, or no device.
fn alias(port: &Port, topology: &Topology) -> Option<PciAddress> {
    let alias = port.alias()?;
    let mut ranges = topology.ranges().map(|entry| entry.range);
    let is_used = port.hotplug
        || ranges.any(|range| {
            let buses = range.first().bus()..=range.last().bus();
            range.first().segment() == 0 && buses.contains(&port.bus)
        });
    (is_used && topology.endpoint(alias.endpoint_id()).is_none()).then_some(alias)
}

/// The place of a port in the file: its own table, or one of those behind it that imply it.
fn origin_of(draft: &Draft, path: &PortPath) -> (Origin, String) {
    let leads = |given: &Located<Scalar>| match &given.value {
        Scalar::Text(text) => text
            .parse()
            .is_ok_and(|other: PortPath| other == *path || path.leads_to(&other)),
        _ => false,
    };
    let ports = draft.port.iter().enumerate().filter_map(|(index, port)| {
        let given = port.value.address.as_ref()?;
        Some((given, format!("port[{index}].address")))
    });
    let endpoints = draft.endpoint.iter().enumerate();
    let endpoints = endpoints.filter_map(|(index, endpoint)| {
        let given = endpoint.value.port.as_ref()?;
        Some((given, format!("endpoint[{index}].port")))
    });
    // The last: of two ports with one place, the second is at fault.
    let found = endpoints.chain(ports).rfind(|(given, _)| leads(given));
    found.map_or((Origin::File(0..0), String::new()), |(given, key)| {
        (given.origin.clone(), key)
    })
}
