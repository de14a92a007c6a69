//! The way to a port from the root bus: what names the port before its bus has a number.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::topology::PciAddress;

/// The most ports on the way from the root bus to a device.
pub const MAX_DEPTH: usize = 16;

/// The place of a function on its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub(super) device: u8,
    pub(super) function: u8,
}

impl Place {
    /// The place that most devices behind a port have: device 0, function 0.
    pub const FIRST: Self = Self {
        device: 0,
        function: 0,
    };

    /// The device, `0..=31`.
    pub fn device(self) -> u8 {
        self.device
    }

    /// The function, `0..=7`.
    pub fn function(self) -> u8 {
        self.function
    }

    /// The function at this place of `bus` in segment 0.
    pub fn on_bus(self, bus: u8) -> PciAddress {
        // The constructors have checked both numbers.
        PciAddress::from_endpoint_id(crate::ids::EndpointId(
            u32::from(bus) << 8 | u32::from(self.device) << 3 | u32::from(self.function),
        ))
    }
}

impl From<PciAddress> for Place {
    fn from(address: PciAddress) -> Self {
        Self {
            device: address.device(),
            function: address.function(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.device, self.function)
    }
}

/// The text is not the place of a function on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "not a place behind a port, whose bus the firmware numbers; write device.function in hexadecimal, such as \
     00.0, or leave it out for 00.0"
)]
pub struct PlaceError;

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        if text.contains(':') {
            return Err(PlaceError);
        }
        let address: Result<PciAddress, _> = format!("00:{text}").parse();
        address.map(Self::from).map_err(|_| PlaceError)
    }
}

/// The way to a port: the places of the ports on it, from the root bus on. The last is the port itself.
///
/// The order of paths is that in which firmware numbers the buses behind them: a port comes before those behind it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortPath(pub(super) Vec<Place>);

impl PortPath {
    /// The places, at least one and at most [`MAX_DEPTH`].
    pub fn places(&self) -> &[Place] {
        &self.0
    }

    /// The place of the port on its bus.
    pub fn place(&self) -> Place {
        self.0.last().copied().unwrap_or(Place::FIRST)
    }

    /// The port behind which this one is; `None` on the root bus.
    pub fn parent(&self) -> Option<Self> {
        let (_, before) = self.0.split_last()?;
        (!before.is_empty()).then(|| Self(before.to_vec()))
    }

    /// Whether the way to `other` goes through this port. A port is not behind itself.
    pub fn leads_to(&self, other: &Self) -> bool {
        other.0.len() > self.0.len() && other.0.starts_with(&self.0)
    }

    /// The port with function 0 in the slot of this one.
    pub fn function_zero(&self) -> Self {
        let mut places = self.0.clone();
        if let Some(last) = places.last_mut() {
            last.function = 0;
        }
        Self(places)
    }
}

impl fmt::Display for PortPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00:")?;
        for (at, place) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { "/" };
            write!(f, "{separator}{place}")?;
        }
        Ok(())
    }
}

/// The text is not the way to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "not a port; write its address on bus 00, such as 00:02.0, and for a port behind others the way to it: \
     00:02.0/00.0/01.0, with at most {MAX_DEPTH} ports"
)]
pub struct PortPathError;

impl FromStr for PortPath {
    type Err = PortPathError;

    fn from_str(text: &str) -> Result<Self, PortPathError> {
        let mut parts = text.splitn(MAX_DEPTH + 1, '/');
        let first: PciAddress = parts
            .next()
            .and_then(|text| text.parse().ok())
            .ok_or(PortPathError)?;
        if first.segment() != 0 || first.bus() != 0 {
            return Err(PortPathError);
        }
        let mut places = vec![Place::from(first)];
        for part in parts {
            if places.len() == MAX_DEPTH {
                return Err(PortPathError);
            }
            places.push(part.parse().map_err(|_| PortPathError)?);
        }
        Ok(Self(places))
    }
}
