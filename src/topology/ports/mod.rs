//! Ports: the bridges behind which devices are, and the numbers of their buses.
//!
//! No register of a machine fixes the number of a bus behind a bridge: firmware chooses it, or the guest's kernel if
//! there is no firmware. SeaBIOS, OVMF and Linux choose alike. They go through the functions of a bus in ascending
//! order, give each bridge the next free number, and number what is behind it before they go on (depth first). If a
//! port asks for spare numbers, they leave these free behind it.

mod error;
mod path;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use super::{PciAddress, PciRange, Topology};

pub use error::PortError;
pub use path::{MAX_DEPTH, Place, PlaceError, PortPath, PortPathError};

/// The kind of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A root port of PCI Express, on the root bus. One device can be behind it.
    RootPort,
    /// The upstream port of a switch. Only downstream ports are behind it.
    UpstreamPort,
    /// A downstream port of a switch. One device can be behind it.
    DownstreamPort,
    /// A bridge from PCI Express to conventional PCI. Up to 31 devices can be behind it.
    PciBridge,
}

impl PortKind {
    /// The name in the configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Self::RootPort => "root-port",
            Self::UpstreamPort => "upstream-port",
            Self::DownstreamPort => "downstream-port",
            Self::PciBridge => "pcie-pci-bridge",
        }
    }

    /// The kind with a name.
    pub fn named(name: &str) -> Option<Self> {
        let kinds = [
            Self::RootPort,
            Self::UpstreamPort,
            Self::DownstreamPort,
            Self::PciBridge,
        ];
        kinds.into_iter().find(|kind| kind.name() == name)
    }

    /// The kind that a port behind one of kind `parent` has, if nothing else is said.
    fn behind(parent: Option<Self>) -> Self {
        match parent {
            None => Self::RootPort,
            Some(Self::UpstreamPort) => Self::DownstreamPort,
            Some(_) => Self::UpstreamPort,
        }
    }

    /// Whether a port of this kind can be behind one of kind `parent`; `None` stands for the root bus.
    fn can_be_behind(self, parent: Option<Self>) -> bool {
        match (self, parent) {
            (Self::RootPort | Self::PciBridge, None) => true,
            (Self::RootPort, Some(_)) | (_, None) => false,
            (Self::DownstreamPort, Some(parent)) => parent == Self::UpstreamPort,
            (Self::UpstreamPort | Self::PciBridge, Some(parent)) => parent.is_link(),
        }
    }

    /// Whether a link of PCI Express is behind the port: with one device, which has number 0.
    pub fn is_link(self) -> bool {
        matches!(self, Self::RootPort | Self::DownstreamPort)
    }
}

impl fmt::Display for PortKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The link that a root port offers, if not QEMU's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkSettings {
    /// The speed, as `x-speed` of QEMU's `pcie-root-port` has it.
    pub speed: Option<&'static str>,
    /// The number of lanes.
    pub width: Option<u8>,
}

/// A port as the operator configures it: the input of [`Ports::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The way to it.
    pub path: PortPath,
    /// Its kind; `None` for the usual one of its place.
    pub kind: Option<PortKind>,
    /// The bus numbers that firmware leaves free behind it, beside that of its own bus; 0 for none.
    pub reserved_buses: u8,
    /// Whether devices may come behind it later.
    pub hotplug: bool,
    /// Its link.
    pub link: LinkSettings,
}

impl PortSpec {
    /// The port that an endpoint names without further settings.
    pub fn implied(path: PortPath) -> Self {
        Self {
            path,
            kind: None,
            reserved_buses: 0,
            hotplug: false,
            link: LinkSettings::default(),
        }
    }
}

/// A port whose bus has a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The way to it.
    pub path: PortPath,
    /// Its kind.
    pub kind: PortKind,
    /// Its own address.
    pub address: PciAddress,
    /// The bus behind it.
    pub bus: u8,
    /// The last of the buses behind it and its ports, with those that are reserved.
    pub last_bus: u8,
    /// See [`PortSpec::reserved_buses`].
    pub reserved_buses: u8,
    /// See [`PortSpec::hotplug`].
    pub hotplug: bool,
    /// See [`PortSpec::link`].
    pub link: LinkSettings,
}

impl Port {
    /// The functions that devices behind it can have. None but downstream ports are behind an upstream port.
    fn functions(&self) -> Option<(Place, Place)> {
        let device = |number| PciAddress::new(0, 0, number, 7).map(Place::from);
        let first = PciAddress::new(0, 0, 1, 0).map(Place::from)?;
        match self.kind {
            PortKind::RootPort | PortKind::DownstreamPort => Some((Place::FIRST, device(0)?)),
            // Slot 0 has no hot-plug controller, and QEMU puts no device there.
            PortKind::PciBridge => Some((first, device(31)?)),
            PortKind::UpstreamPort => None,
        }
    }

    /// The range of functions in which devices may come later, if this port is for that.
    pub fn expected(&self) -> Option<PciRange> {
        let (first, last) = self.functions().filter(|_| self.hotplug)?;
        PciRange::new(first.on_bus(self.bus), last.on_bus(self.bus)).ok()
    }

    /// The function whose requester ID a bridge to conventional PCI gives to all accesses from behind it.
    pub fn alias(&self) -> Option<PciAddress> {
        (self.kind == PortKind::PciBridge).then(|| Place::FIRST.on_bus(self.bus))
    }
}

/// All ports of a machine, with the numbers of their buses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(Vec<Port>);

impl Ports {
    /// Numbers the buses behind `specs` and behind the ports on the way to them. The specs may be in any order.
    ///
    /// # Errors
    /// See [`PortError`]; it names the port.
    pub fn new(specs: Vec<PortSpec>) -> Result<Self, PortError> {
        let mut all: BTreeMap<PortPath, PortSpec> = BTreeMap::new();
        for spec in specs {
            let path = spec.path.clone();
            if all.insert(path.clone(), spec).is_some() {
                return Err(PortError::Duplicate { path });
            }
        }
        let mut missing = Vec::new();
        for path in all.keys() {
            let mut above = path.parent();
            while let Some(path) = above.filter(|path| !all.contains_key(path)) {
                above = path.parent();
                missing.push(path);
            }
        }
        for path in missing {
            all.insert(path.clone(), PortSpec::implied(path));
        }
        number(all)
    }

    /// The ports in the order of their buses.
    pub fn iter(&self) -> std::slice::Iter<'_, Port> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The port at the end of a way.
    pub fn at_path(&self, path: &PortPath) -> Option<&Port> {
        let at = self.0.binary_search_by(|port| port.path.cmp(path)).ok()?;
        self.0.get(at)
    }

    /// The port behind which a function is.
    pub fn before(&self, function: PciAddress) -> Option<&Port> {
        self.iter()
            .find(|port| function.segment() == 0 && port.bus == function.bus())
    }

    /// Whether a port has this address itself.
    pub fn has_port_at(&self, address: PciAddress) -> bool {
        self.iter().any(|port| port.address == address)
    }

    /// Whether `range` is the ID that a bridge to conventional PCI gives to accesses, which no device has.
    pub fn is_alias(&self, range: PciRange) -> bool {
        let mut aliases = self.iter().filter_map(Port::alias);
        aliases.any(|alias| range == alias.into())
    }

    /// Checks the place of the IOMMU against the ports.
    ///
    /// # Errors
    /// The IOMMU has the address of a port, or is behind one.
    pub fn check_iommu(&self, iommu: PciAddress) -> Result<(), PortError> {
        if let Some(port) = self.iter().find(|port| port.address == iommu) {
            let path = port.path.clone();
            return Err(PortError::IsIommu { path });
        }
        match self.before(iommu) {
            None => Ok(()),
            Some(port) => Err(PortError::BeforeIommu {
                path: port.path.clone(),
                iommu,
            }),
        }
    }

    /// Checks the places of the IOMMU and of the endpoints against the ports.
    ///
    /// # Errors
    /// A function has the address of a port, or is where none can be.
    pub fn check(&self, topology: &Topology) -> Result<(), PortError> {
        self.check_iommu(topology.iommu())?;
        for port in self.iter() {
            let (path, address) = (port.path.clone(), port.address);
            let mut ranges = topology.ranges().map(|entry| entry.range);
            if let Some(range) = ranges.find(|range| range.contains(address)) {
                return Err(PortError::IsEndpoint {
                    path,
                    address,
                    range,
                });
            }
            let mut ranges = topology.expected().iter();
            if let Some(&range) = ranges.find(|range| range.contains(address)) {
                return Err(PortError::IsExpected {
                    path,
                    address,
                    range,
                });
            }
        }
        let ranges = topology.ranges().map(|entry| entry.range);
        ranges
            .chain(topology.expected().iter().copied())
            .try_for_each(|range| self.check_range(range))
    }

    /// Checks the place of an endpoint that is added.
    ///
    /// # Errors
    /// It has the address of a port, or is where none can be.
    pub fn check_added(&self, range: PciRange) -> Result<(), PortError> {
        match self.iter().find(|port| range.contains(port.address)) {
            None => self.check_range(range),
            Some(port) => Err(PortError::IsEndpoint {
                path: port.path.clone(),
                address: port.address,
                range,
            }),
        }
    }

    /// Checks that a device can be at each function of `range`, if all of them are behind one port.
    ///
    /// # Errors
    /// No device can be there.
    pub fn check_range(&self, range: PciRange) -> Result<(), PortError> {
        let (first, last) = (range.first(), range.last());
        let Some(port) = self.before(first).filter(|_| first.bus() == last.bus()) else {
            return Ok(());
        };
        let path = port.path.clone();
        let Some((lowest, highest)) = port.functions() else {
            return Err(PortError::BehindUpstream { path, range });
        };
        if (lowest..=highest).contains(&first.into()) && (lowest..=highest).contains(&last.into()) {
            return Ok(());
        }
        Err(match port.kind {
            PortKind::PciBridge => PortError::SlotZero { path, range },
            _ => PortError::OneDevice { path, range },
        })
    }
}

/// Gives numbers to the buses. `all` has every port on the way to another.
fn number(all: BTreeMap<PortPath, PortSpec>) -> Result<Ports, PortError> {
    let mut ports: Vec<Port> = Vec::with_capacity(all.len());
    // The indices of the ports on the way to the next one, from the root bus on.
    let mut way: Vec<usize> = Vec::new();
    let mut last_bus = 0u8;
    let leave = |ports: &mut Vec<Port>, index: usize, last_bus: u8| -> Result<u8, PortError> {
        let Some(port) = ports.get_mut(index) else {
            return Ok(last_bus);
        };
        port.last_bus = last_bus;
        if port.reserved_buses > 0 {
            let path = port.path.clone();
            let taken = last_bus - port.bus;
            if port.reserved_buses <= taken {
                return Err(PortError::ReserveTooSmall { path, taken });
            }
            let reserved = port.bus.checked_add(port.reserved_buses);
            port.last_bus = reserved.ok_or(PortError::TooMany { path })?;
        }
        Ok(port.last_bus)
    };
    for (path, spec) in &all {
        while let Some(&index) = way.last()
            && !ports
                .get(index)
                .is_some_and(|port| port.path.leads_to(path))
        {
            last_bus = leave(&mut ports, index, last_bus)?;
            way.pop();
        }
        let parent = way.last().and_then(|&index| ports.get(index));
        let kind = kind(spec, parent)?;
        let zero = path.function_zero();
        if parent.is_some() && !all.contains_key(&zero) {
            return Err(PortError::Hidden {
                path: path.clone(),
                zero,
            });
        }
        let bus = last_bus
            .checked_add(1)
            .ok_or_else(|| PortError::TooMany { path: path.clone() })?;
        last_bus = bus;
        way.push(ports.len());
        ports.push(Port {
            path: path.clone(),
            kind,
            address: path.place().on_bus(parent.map_or(0, |parent| parent.bus)),
            bus,
            last_bus: bus,
            reserved_buses: spec.reserved_buses,
            hotplug: spec.hotplug,
            link: spec.link,
        });
    }
    while let Some(index) = way.pop() {
        last_bus = leave(&mut ports, index, last_bus)?;
    }
    Ok(Ports(ports))
}

/// The kind of a port behind `parent`.
fn kind(spec: &PortSpec, parent: Option<&Port>) -> Result<PortKind, PortError> {
    let path = spec.path.clone();
    let above = parent.map(|parent| parent.kind);
    let kind = spec.kind.unwrap_or(PortKind::behind(above));
    if !kind.can_be_behind(above) {
        let above = parent.map_or_else(
            || "the root bus".to_owned(),
            |parent| format!("port {} ({})", parent.path, parent.kind),
        );
        return Err(PortError::Place { path, kind, above });
    }
    let place = path.place();
    let is_link = above.is_some_and(PortKind::is_link);
    if is_link && (place.device() != 0 || kind == PortKind::UpstreamPort && place.function() != 0) {
        return Err(PortError::NotFirst { path });
    }
    let is_root_port = kind == PortKind::RootPort;
    if spec.reserved_buses > 0 && !is_root_port {
        return Err(PortError::ReserveElsewhere { path, kind });
    }
    if spec.link != LinkSettings::default() && !is_root_port {
        return Err(PortError::LinkElsewhere { path, kind });
    }
    if spec.hotplug && kind == PortKind::UpstreamPort {
        return Err(PortError::HotplugUpstream { path });
    }
    Ok(kind)
}
