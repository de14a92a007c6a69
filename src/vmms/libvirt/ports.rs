//! The ports that libvirt makes.
//!
//! libvirt puts devices without an address behind its ports, and does not know the devices in `<qemu:commandline>`. So a
//! port with such a device behind it, or one that must stay free, is an argument as well. All other ports are controllers
//! of libvirt: the devices of the domain can be behind them.

use std::collections::BTreeSet;

use super::xml::Xml;
use super::{LibvirtError, address, model};
use crate::config::{Config, Passthrough};
use crate::topology::ports::Place;
use crate::topology::{PciAddress, Port, PortPath};

/// The ports that are controllers of libvirt, in the order of their indices, which begin at 1. libvirt would add a port for
/// an index that is missing.
pub(super) struct PciControllers<'a>(Vec<&'a Port>);

impl<'a> PciControllers<'a> {
    /// The controllers for `config`, in which `hostdevs` are libvirt's.
    pub fn new(config: &'a Config, hostdevs: &[Passthrough]) -> Result<Self, LibvirtError> {
        let devices = &config.devices;
        let exported = devices.exported.iter().map(|it| it.endpoint);
        let emulated = devices.emulated.iter().map(|it| it.endpoint);
        let hotplug = config.ports.iter().filter(|port| port.hotplug);
        let unknown: BTreeSet<Place> = exported
            .chain(emulated)
            .filter_map(|endpoint| root_of(config.ports.before(endpoint)?))
            .chain(hotplug.filter_map(root_of))
            .collect();
        for device in hostdevs {
            if let Some(port) = config.ports.before(device.endpoint)
                && let Some(root) = root_of(port)
                && unknown.contains(&root)
            {
                return Err(LibvirtError::MixedPort {
                    port: root_path(port),
                });
            }
        }
        let ports = config.ports.iter();
        let is_known = |port: &&Port| root_of(port).is_some_and(|root| !unknown.contains(&root));
        Ok(Self(ports.filter(is_known).collect()))
    }

    /// The index of a port; `None` if it is an argument.
    pub fn index(&self, port: &Port) -> Option<u8> {
        let at = self.0.iter().position(|it| it.path == port.path)?;
        u8::try_from(at + 1).ok()
    }

    /// The number that libvirt has for the bus of a function; `None` if it does not know the bus.
    pub fn bus(&self, config: &Config, function: PciAddress) -> Option<u8> {
        match config.ports.before(function) {
            Some(port) => self.index(port),
            None => (function.segment() == 0 && function.bus() == 0).then_some(0),
        }
    }

    /// Writes the elements.
    pub fn write(&self, xml: &mut Xml, config: &Config) {
        if config.ports.is_empty() {
            return;
        }
        xml.comment(
            "Each port takes a bus number, and the table has the numbers for the ports of the file: the domain must have these\n\
             ports and no others. libvirt adds one for each device without an address that needs it. Give the file a [[port]]\n\
             for each such device, and make the domain anew; the devices take the ports below, in their order.",
        );
        // libvirt adds both to a domain that does not mention them.
        xml.empty("controller", &[("type", "usb"), ("model", "none")]);
        xml.empty("memballoon", &[("model", "none")]);
        for port in &self.0 {
            let index = self.index(port).unwrap_or_default().to_string();
            xml.open(
                "controller",
                &[("type", "pci"), ("index", &index), ("model", model(port))],
            );
            address(xml, config, self, port.address);
            xml.close();
        }
    }

    /// Writes the settings of ports for which libvirt has no elements.
    pub fn write_overrides(&self, xml: &mut Xml) {
        let properties: Vec<_> = self
            .0
            .iter()
            .map(|port| (port, properties(port)))
            .filter(|(_, properties)| !properties.is_empty())
            .collect();
        if properties.is_empty() {
            return;
        }
        xml.open("qemu:override", &[]);
        for (port, properties) in properties {
            let alias = format!("pci.{}", self.index(port).unwrap_or_default());
            xml.open("qemu:device", &[("alias", &alias)]);
            xml.open("qemu:frontend", &[]);
            for (name, kind, value) in properties {
                let attributes = [("name", name), ("type", kind), ("value", &value)];
                xml.empty("qemu:property", &attributes);
            }
            xml.close();
            xml.close();
        }
        xml.close();
    }
}

/// The properties of QEMU's device that libvirt does not have: name, type and value.
fn properties(port: &Port) -> Vec<(&'static str, &'static str, String)> {
    let mut all = Vec::new();
    if port.reserved_buses > 0 {
        all.push(("bus-reserve", "unsigned", port.reserved_buses.to_string()));
    }
    if let Some(speed) = port.link.speed {
        all.push(("x-speed", "string", speed.to_owned()));
    }
    if let Some(width) = port.link.width {
        all.push(("x-width", "string", width.to_string()));
    }
    all
}

/// The place on bus 00 of the port through which the way to `port` goes.
fn root_of(port: &Port) -> Option<Place> {
    port.path.places().first().copied()
}

/// The path of that port.
fn root_path(port: &Port) -> PortPath {
    let mut path = port.path.clone();
    while let Some(parent) = path.parent() {
        path = parent;
    }
    path
}
