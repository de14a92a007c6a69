//! The place of a device in QEMU, as the keys of an endpoint.

use std::io;

use super::ResolveError;
use super::monitor::{MonitorClient, MonitorRefusal};
use crate::config::is_device_id;
use crate::topology::PciAddress;
use crate::topology::ports::Place;

/// QEMU's name for the root bus of the machines `q35` and `virt`.
const ROOT_BUS: &str = "pcie.0";
/// The most buses between a device and the root bus. There are 256 buses.
const MOST: usize = 256;

/// The keys of an endpoint for the device with this ID.
pub(super) fn keys(
    monitor: &mut MonitorClient,
    id: &str,
) -> Result<Vec<(&'static str, String)>, ResolveError> {
    if !is_device_id(id) {
        // It is refused as soon as the file is read as a whole, and must not be a part of a path before.
        return Err(ResolveError::NoDevice { id: id.to_owned() });
    }
    let mut places = way(monitor, id)?;
    let Some(device) = places.pop() else {
        return Ok(Vec::new());
    };
    if places.is_empty() {
        return Ok(vec![("address", format!("00:{device}"))]);
    }
    let ports: Vec<_> = places.iter().map(Place::to_string).collect();
    let mut keys = vec![("port", format!("00:{}", ports.join("/")))];
    if device != Place::FIRST {
        keys.push(("address", device.to_string()));
    }
    Ok(keys)
}

/// The places of the ports on the way from the root bus, and of the device.
fn way(monitor: &mut MonitorClient, id: &str) -> Result<Vec<Place>, ResolveError> {
    let odd = |source| ResolveError::Unanswered {
        id: id.to_owned(),
        source,
    };
    let mut path = format!("/machine/peripheral/{id}");
    let mut bus = String::new();
    let mut places = Vec::new();
    loop {
        let number = match monitor.property(&path, "addr") {
            Ok(number) => number,
            Err(MonitorRefusal::Ended(cause)) => return Err(odd(cause)),
            Err(MonitorRefusal::Refused { class, why }) if places.is_empty() => {
                let id = id.to_owned();
                return Err(if class == "DeviceNotFound" {
                    ResolveError::NoDevice { id }
                } else {
                    ResolveError::NotPci { id, why }
                });
            }
            // A host bridge has no address.
            Err(MonitorRefusal::Refused { .. }) if bus == ROOT_BUS => break,
            Err(MonitorRefusal::Refused { .. }) => {
                let id = id.to_owned();
                return Err(ResolveError::OtherRoot { id, bus });
            }
        };
        let place = number.as_u64().and_then(place_of);
        places.push(place.ok_or_else(|| odd(nonsense()))?);
        let parent = match monitor.property(&path, "parent_bus") {
            Ok(parent) => parent,
            Err(MonitorRefusal::Ended(cause)) => return Err(odd(cause)),
            Err(MonitorRefusal::Refused { why, .. }) => return Err(odd(io::Error::other(why))),
        };
        let parent = parent.as_str().and_then(|parent| parent.rsplit_once('/'));
        let (above, name) = parent.ok_or_else(|| odd(nonsense()))?;
        (path, bus) = (above.to_owned(), name.to_owned());
        if places.len() > MOST {
            return Err(odd(nonsense()));
        }
    }
    places.reverse();
    Ok(places)
}

/// The place with QEMU's number `devfn`.
fn place_of(number: u64) -> Option<Place> {
    let number = u8::try_from(number).ok()?;
    PciAddress::new(0, 0, number >> 3, number & 7).map(Place::from)
}

fn nonsense() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "its answer is none that QEMU gives",
    )
}
