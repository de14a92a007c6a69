//! The places of devices: what `bus=` and `addr=` can express, and the rule that each slot has a function 0.

use std::collections::BTreeSet;

use super::{PREFIX, QemuArgsError};
use crate::config::{Config, DeviceKind, function_zero};
use crate::topology::{PciAddress, PciRange, PortPath, Ports};

/// QEMU's root bus. On a machine of type q35 and virt it has this name.
pub(super) const ROOT_BUS: &str = "pcie.0";

/// Whether `addr=` alone can put a device at `address`.
pub(super) fn on_root_bus(address: PciAddress) -> bool {
    address.segment() == 0 && address.bus() == 0
}

/// The ID of a port in the arguments, which is also the name of the bus behind it.
pub fn port_id(path: &PortPath) -> String {
    let mut id = format!("{PREFIX}port");
    for place in path.places() {
        id.push_str(&format!("-{:02x}-{:x}", place.device(), place.function()));
    }
    id
}

/// Whether arguments can put a device at `address`: on the root bus, or behind one of the ports.
pub(super) fn has_bus(config: &Config, address: PciAddress) -> bool {
    on_root_bus(address) || config.ports.before(address).is_some()
}

/// The `bus=` of a device at `address`; `None` on the root bus, and behind a bridge that the configuration does not
/// have.
pub(super) fn bus(config: &Config, address: PciAddress) -> Option<String> {
    let port = config.ports.before(address)?;
    Some(port_id(&port.path))
}

/// The number of the bus with a name, if a device on it has an address that the configuration knows.
pub(super) fn bus_number(ports: &Ports, name: Option<&str>) -> Option<u8> {
    match name {
        None | Some(ROOT_BUS) => Some(0),
        Some(name) => {
            let mut ports = ports.iter();
            let port = ports.find(|port| port_id(&port.path) == name)?;
            Some(port.bus)
        }
    }
}

/// The ID of the device of an endpoint: the one that the file names, or `kind` and the address.
pub(super) fn device_id(config: &Config, endpoint: PciAddress, kind: &str) -> String {
    let mut named = config.named.iter();
    if let Some(device) = named.find(|device| device.endpoint == endpoint) {
        return device.id.clone();
    }
    let (bus, device, function) = (endpoint.bus(), endpoint.device(), endpoint.function());
    format!("{PREFIX}{kind}-{bus:02x}-{device:02x}-{function}")
}

/// `device.function` as QEMU's `addr=` takes it.
pub(super) fn slot(address: PciAddress) -> String {
    format!("{:02x}.{:x}", address.device(), address.function())
}

/// The properties of `-device` that put a device of this configuration at `function`.
pub(super) fn place(config: &Config, function: PciAddress) -> String {
    let several = has_several_functions(config, function);
    let several = if several { ",multifunction=on" } else { "" };
    let bus = bus(config, function);
    let bus = bus.map_or_else(String::new, |bus| format!("bus={bus},"));
    format!("{bus}addr={}{several}", slot(function))
}

/// Whether the device at `function` must have the property `multifunction`: QEMU lets no other function into a
/// slot whose function 0 is without it.
pub(crate) fn has_several_functions(config: &Config, function: PciAddress) -> bool {
    function.function() != 0 || config.shares_slot(function)
}

/// Refuses a slot in which only the operator could have put a device at function 0, and has not.
pub(super) fn check_slots(
    config: &Config,
    others: &BTreeSet<PciAddress>,
) -> Result<(), QemuArgsError> {
    let own: BTreeSet<_> = config.placed_functions().collect();
    let endpoint = |it: &&PciAddress| config.topology.endpoint(it.endpoint_id()).is_some();
    for &function in own.iter().chain(others.iter().filter(endpoint)) {
        let zero = function_zero(function);
        let found = own.contains(&zero)
            || others.contains(&zero)
            || config.machine.device_at(zero).is_some();
        if !found {
            return Err(QemuArgsError::NoFunctionZero { function, zero });
        }
    }
    Ok(())
}

/// Refuses a device of the operator that the guest's table puts behind the IOMMU while the daemon has no such endpoint.
pub(super) fn check_hotplug_ranges(
    config: &Config,
    others: &BTreeSet<PciAddress>,
) -> Result<(), QemuArgsError> {
    let topology = &config.topology;
    let is_unknown = |it: &&PciAddress| topology.endpoint(it.endpoint_id()).is_none();
    for &function in others.iter().filter(is_unknown) {
        let mut ranges = topology.expected().iter();
        if let Some(&range) = ranges.find(|range| range.contains(function)) {
            return Err(QemuArgsError::InHotplugRange { function, range });
        }
    }
    Ok(())
}

/// Whether our arguments or those of the operator, with devices at `others`, put a device at a function of `range`.
pub(super) fn has_device(config: &Config, others: &BTreeSet<PciAddress>, range: PciRange) -> bool {
    if config.ports.is_alias(range) {
        return true;
    }
    match config.devices.kind_of(range.first()) {
        Some(DeviceKind::Passthrough | DeviceKind::Exported | DeviceKind::Emulated) => true,
        Some(DeviceKind::ShadowReader) | None => {
            others.range(range.first()..=range.last()).next().is_some()
        }
    }
}
