//! Reads PCI functions from their configuration space: the kind of bridge or port, and access control
//! services (ACS).

use std::fmt;
use std::path::Path;

use super::read::{printable, read_bytes};

/// The bytes that are readable without privileges: the header, without capabilities.
const HEADER: usize = 64;
/// Where extended capabilities begin.
const EXTENDED: usize = 0x100;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 0x10;
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;
const BRIDGE_HEADER: u8 = 1;
const CAPABILITIES: usize = 0x34;
const CAPABILITY_EXPRESS: u8 = 0x10;
const EXTENDED_ACS: u16 = 0x000d;

/// The services that the kernel requires to isolate two functions.
const ACS_NAMES: [(u16, &str); 4] = [
    (0x01, "source validation"),
    (0x04, "request redirect"),
    (0x08, "completion redirect"),
    (0x10, "upstream forwarding"),
];

/// The kind of a PCI function, by its PCI Express capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Its configuration space could not be read far enough.
    Unknown,
    /// A device: PCI Express, integrated into the root complex, or conventional.
    Device,
    /// A root port.
    Root,
    /// The upstream port of a switch.
    Upstream,
    /// A downstream port of a switch.
    Downstream,
    /// A bridge from PCI Express to conventional PCI.
    ToConventional,
    /// A conventional PCI bridge, or a bridge from conventional PCI to PCI Express.
    Conventional,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "function",
            Self::Device => "device",
            Self::Root => "root port",
            Self::Upstream => "switch upstream port",
            Self::Downstream => "switch downstream port",
            Self::ToConventional => "PCI Express to PCI bridge",
            Self::Conventional => "conventional PCI bridge",
        })
    }
}

/// The access control services of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acs {
    /// Its configuration space could not be read far enough.
    Unknown,
    /// The function has no ACS.
    Missing,
    /// The function has ACS; one bit for each service, as in the ACS capability.
    Present {
        /// Services that can be switched.
        supported: u16,
        /// Services that are on.
        enabled: u16,
    },
}

impl Acs {
    /// The required services that can be switched on and are off; `None` if that is unknown.
    pub(super) fn lacking(self) -> Option<Vec<&'static str>> {
        let (supported, enabled) = match self {
            Self::Unknown => return None,
            Self::Missing => (u16::MAX, 0),
            Self::Present { supported, enabled } => (supported, enabled),
        };
        let off = |bit: u16| supported & bit != 0 && enabled & bit == 0;
        let lacking = ACS_NAMES.iter().filter(|(bit, _)| off(*bit));
        Some(lacking.map(|(_, name)| *name).collect())
    }
}

impl fmt::Display for Acs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.lacking()) {
            (Self::Unknown, _) | (_, None) => f.write_str("ACS unknown"),
            (Self::Missing, _) => f.write_str("no ACS"),
            (_, Some(lacking)) if lacking.is_empty() => f.write_str("ACS on"),
            (_, Some(lacking)) => write!(f, "ACS without {}", lacking.join(", ")),
        }
    }
}

/// A PCI function, as its configuration space shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// Its name in sysfs: `segment:bus:device.function`. The segment may have more digits than a
    /// guest's can.
    pub name: String,
    /// Its kind.
    pub port: Port,
    /// Whether the device has other functions.
    pub multi_function: bool,
    /// Its access control services.
    pub acs: Acs,
}

impl PciFunction {
    /// The function in a folder of sysfs.
    pub(super) fn read(folder: &Path) -> Self {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let config = read_bytes(&folder.join("config")).unwrap_or_default();
        Self::parse(&printable(&name), &config)
    }

    /// The function `name` with the `config` space, which may hold anything and be of any length.
    pub fn parse(name: &str, config: &[u8]) -> Self {
        // Only function 0 must have the multi-function bit.
        let function_zero = name.ends_with(".0");
        let header_type = config.get(HEADER_TYPE).copied().unwrap_or(0);
        let port = port(config, header_type);
        Self {
            name: name.to_owned(),
            port,
            multi_function: !function_zero || header_type & MULTI_FUNCTION != 0,
            acs: acs(config, port),
        }
    }

    /// Whether it isolates the devices on its sides from each other; `None` if that is unknown.
    pub fn isolates(&self) -> Option<bool> {
        let by_acs = || Some(self.acs.lacking()?.is_empty());
        match self.port {
            Port::Unknown => None,
            Port::ToConventional | Port::Conventional => Some(false),
            Port::Root | Port::Downstream => by_acs(),
            Port::Device | Port::Upstream if self.multi_function => by_acs(),
            Port::Device | Port::Upstream => Some(true),
        }
    }

    pub(super) fn is_port(&self) -> bool {
        matches!(self.port, Port::Root | Port::Upstream | Port::Downstream)
    }

    pub(super) fn is_conventional_bridge(&self) -> bool {
        matches!(self.port, Port::Conventional | Port::ToConventional)
    }

    /// The name of its device: the name without the function.
    pub(super) fn device(&self) -> &str {
        self.name
            .rsplit_once('.')
            .map_or(&self.name, |(device, _)| device)
    }
}

impl fmt::Display for PciFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.port, self.name)?;
        if self.is_port() {
            write!(f, " ({})", self.acs)?;
        }
        Ok(())
    }
}

fn word(config: &[u8], at: usize) -> Option<u16> {
    let bytes = config.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn port(config: &[u8], header_type: u8) -> Port {
    let Some(status) = word(config, STATUS).filter(|_| config.len() >= HEADER) else {
        return Port::Unknown;
    };
    let is_bridge = header_type & !MULTI_FUNCTION == BRIDGE_HEADER;
    let plain = if is_bridge {
        Port::Conventional
    } else {
        Port::Device
    };
    if status & STATUS_CAPABILITIES == 0 {
        return plain;
    }
    if config.len() <= HEADER {
        return Port::Unknown;
    }
    match express_capability(config) {
        None => plain,
        // The port's kind is in bits 7:4 of the capability's second word.
        Some(flags) => match flags >> 4 & 0xf {
            0x4 => Port::Root,
            0x5 => Port::Upstream,
            0x6 => Port::Downstream,
            0x7 => Port::ToConventional,
            0x8 => Port::Conventional,
            _ => plain,
        },
    }
}

/// The flags of the PCI Express capability, if there is one.
fn express_capability(config: &[u8]) -> Option<u16> {
    let mut at = usize::from(config.get(CAPABILITIES)? & !3);
    // No list that fits has more entries; a list with a loop ends here.
    for _ in 0..(EXTENDED - HEADER) / 4 {
        if at < HEADER {
            return None;
        }
        if *config.get(at)? == CAPABILITY_EXPRESS {
            return word(config, at + 2);
        }
        at = usize::from(config.get(at + 1)? & !3);
    }
    None
}

fn acs(config: &[u8], port: Port) -> Acs {
    if port == Port::Unknown {
        return Acs::Unknown;
    }
    let mut at = EXTENDED;
    for _ in 0..(4096 - EXTENDED) / 4 {
        // Without extended configuration space, or with a list that leads out of it, the kernel finds
        // no ACS either.
        let (Some(id), Some(next)) = (word(config, at), word(config, at + 2)) else {
            return Acs::Missing;
        };
        if id == EXTENDED_ACS {
            return match (word(config, at + 4), word(config, at + 6)) {
                (Some(supported), Some(enabled)) => Acs::Present { supported, enabled },
                _ => Acs::Missing,
            };
        }
        at = usize::from(next >> 4 & !3);
        if at < EXTENDED {
            return Acs::Missing;
        }
    }
    Acs::Missing
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeConfigSpace;
    use super::*;
    use proptest::prelude::*;

    const ALL_ON: Option<(u16, u16)> = Some((0x1d, 0x1d));

    fn function(name: &str, config: FakeConfigSpace) -> PciFunction {
        PciFunction::parse(name, &config.bytes())
    }

    #[test]
    fn kinds_and_acs_are_read() {
        for (code, port) in [
            (0, Port::Device),
            (4, Port::Root),
            (5, Port::Upstream),
            (6, Port::Downstream),
            (7, Port::ToConventional),
            (8, Port::Conventional),
            (9, Port::Device),
        ] {
            let made = function("0000:00:01.0", FakeConfigSpace::express(code, ALL_ON));
            assert_eq!(made.port, port);
            let (supported, enabled) = (0x1d, 0x1d);
            assert_eq!(made.acs, Acs::Present { supported, enabled });
        }
        let plain = function("0000:00:01.0", FakeConfigSpace::conventional(false));
        assert_eq!((plain.port, plain.acs), (Port::Device, Acs::Missing));
        let bridge = function("0000:00:01.0", FakeConfigSpace::conventional(true));
        assert_eq!(bridge.port, Port::Conventional);
    }

    #[test]
    fn isolation_follows_the_kernels_rules() {
        let isolates = |name, config| function(name, config).isolates();
        let express = FakeConfigSpace::express;
        assert_eq!(isolates("0:0:1.0", express(4, ALL_ON)), Some(true));
        assert_eq!(isolates("0:0:1.0", express(4, None)), Some(false));
        // A required service that cannot be switched counts as on.
        assert_eq!(
            isolates("0:0:1.0", express(6, Some((0x05, 0x05)))),
            Some(true)
        );
        assert_eq!(
            isolates("0:0:1.0", express(6, Some((0x1d, 0x0d)))),
            Some(false)
        );
        // The only function of a device needs no isolation from others.
        assert_eq!(isolates("0:0:1.0", express(0, None)), Some(true));
        assert_eq!(isolates("0:0:1.0", express(0, None).multi()), Some(false));
        assert_eq!(isolates("0:0:1.1", express(0, None)), Some(false));
        assert_eq!(isolates("0:0:1.1", express(0, ALL_ON)), Some(true));
        assert_eq!(isolates("0:0:1.0", express(7, ALL_ON)), Some(false));
    }

    #[test]
    fn without_privileges_port_and_acs_are_unknown() {
        let mut config = FakeConfigSpace::express(4, ALL_ON).bytes();
        for length in [0, 63, 64] {
            let made = PciFunction::parse("0000:00:01.0", &config[..length]);
            assert_eq!((made.port, made.isolates()), (Port::Unknown, None));
        }
        config.truncate(256);
        let made = PciFunction::parse("0000:00:01.0", &config);
        assert_eq!((made.port, made.acs), (Port::Root, Acs::Missing));
    }

    #[test]
    fn capability_lists_with_loops_end() {
        let mut config = vec![0; 4096];
        config[STATUS] = 0x10;
        config[CAPABILITIES] = 0x40;
        config[0x40] = 1;
        config[0x41] = 0x40;
        // Extended: an unknown capability that names itself as the next.
        config[EXTENDED] = 1;
        config[EXTENDED + 3] = 0x10;
        let made = PciFunction::parse("0000:00:01.0", &config);
        assert_eq!((made.port, made.acs), (Port::Device, Acs::Missing));
    }

    proptest! {
        #[test]
        fn no_configuration_space_panics(
            mut config in proptest::collection::vec(any::<u8>(), 0..600),
            capabilities: bool,
            pad in 0usize..4096,
        ) {
            if capabilities && config.len() > STATUS {
                config[STATUS] |= 0x10;
            }
            config.resize(config.len().max(pad), 0xff);
            let made = PciFunction::parse("x", &config);
            let _ = (made.isolates(), made.to_string());
        }
    }
}
