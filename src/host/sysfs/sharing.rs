//! Explains why devices share a group, by PCI bridges and access control services (ACS).
//!
//! The kernel's groups are binding. This explains them from the configuration space of the functions. The
//! kernel also knows devices that isolate better or worse than their configuration space claims; their
//! groups stay without explanation.

use std::fmt;

use super::{Acs, PciFunction};

/// The place of a function: the bridges above it, the one nearest to the root first, and the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPlace {
    /// The name of the host bridge, such as `pci0000:00`.
    pub host_bridge: Option<String>,
    /// The bridges between the host bridge and the function.
    pub bridges: Vec<PciFunction>,
    /// The function.
    pub function: PciFunction,
}

impl PciPlace {
    /// The bridges and the function.
    fn chain(&self) -> impl Iterator<Item = &PciFunction> {
        self.bridges.iter().chain([&self.function])
    }
}

/// Why the host cannot isolate two functions from each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharingReason {
    /// One or both are behind a conventional bridge, which replaces the requester ID of passing accesses
    /// by its own.
    BehindBridge(PciFunction),
    /// A port on the way lets functions reach each other without the IOMMU.
    Port(PciFunction),
    /// They are functions of one device, inside which they may reach each other.
    Functions {
        /// The device: a function's name without the function.
        device: String,
    },
    /// Only the first 64 bytes of the configuration space are readable.
    Unreadable,
    /// The configuration space of the functions does not explain it.
    Unexplained,
}

impl SharingReason {
    /// Why `a` and `b` are in one group.
    pub fn between(a: &PciPlace, b: &PciPlace) -> Self {
        let common: Vec<_> = a
            .chain()
            .zip(b.chain())
            .take_while(|(a, b)| a.name == b.name)
            .map(|(a, _)| a)
            .collect();
        if let Some(bridge) = common.iter().find(|f| f.is_conventional_bridge()) {
            return Self::BehindBridge((*bridge).clone());
        }
        let alone = || {
            a.chain()
                .chain(b.chain())
                .skip_while(|f| common.contains(f))
        };
        let leaks = |f: &&PciFunction| f.is_port() && f.isolates() == Some(false);
        let same_device = a
            .chain()
            .zip(b.chain())
            .find(|(a, b)| a.name != b.name && a.device() == b.device());
        // The nearest port first: it has to be cured first.
        if let Some(port) = common.iter().rev().copied().find(leaks) {
            return Self::Port(port.clone());
        }
        if let Some(port) = alone().find(leaks) {
            return Self::Port(port.clone());
        }
        if let Some((one, other)) = same_device
            && (one.isolates() == Some(false) || other.isolates() == Some(false))
        {
            return Self::Functions {
                device: one.device().to_owned(),
            };
        }
        if let Some(bridge) = alone().find(|f| f.is_conventional_bridge()) {
            return Self::BehindBridge(bridge.clone());
        }
        if a.chain().chain(b.chain()).any(|f| f.isolates().is_none()) {
            Self::Unreadable
        } else {
            Self::Unexplained
        }
    }
}

impl fmt::Display for SharingReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BehindBridge(bridge) => {
                let PciFunction { name, port, .. } = bridge;
                write!(
                    f,
                    "because of the {port} {name}: it replaces the requester IDs of the devices behind it"
                )
            }
            Self::Port(function) => {
                let PciFunction { name, port, .. } = function;
                match function.acs.lacking() {
                    Some(lacking) if function.acs != Acs::Missing => write!(
                        f,
                        "because the ACS of the {port} {name} has {} off",
                        lacking.join(", ")
                    ),
                    _ => write!(f, "because the {port} {name} has no ACS"),
                }
            }
            Self::Functions { device } => write!(
                f,
                "because they are functions of the device {device}, which has no ACS between them"
            ),
            Self::Unreadable => f.write_str(
                "for a reason that only root can read (the PCI configuration space beyond byte 64)",
            ),
            Self::Unexplained => f.write_str(
                "for a reason that their configuration space does not show (the kernel has its own list of such devices)",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeConfigSpace;
    use super::*;

    const ALL_ON: Option<(u16, u16)> = Some((0x1d, 0x1d));

    fn function(name: &str, config: FakeConfigSpace) -> PciFunction {
        PciFunction::parse(name, &config.bytes())
    }

    fn place(bridges: &[&PciFunction], last: &PciFunction) -> PciPlace {
        PciPlace {
            host_bridge: Some("pci0000:00".to_owned()),
            bridges: bridges.iter().map(|f| (*f).clone()).collect(),
            function: last.clone(),
        }
    }

    fn why(a: &PciPlace, b: &PciPlace) -> String {
        assert_eq!(
            std::mem::discriminant(&SharingReason::between(a, b)),
            std::mem::discriminant(&SharingReason::between(b, a))
        );
        SharingReason::between(a, b).to_string()
    }

    #[test]
    fn groups_are_explained() {
        let root = function("0000:00:1c.0", FakeConfigSpace::express(4, None));
        let good_root = function("0000:00:1d.0", FakeConfigSpace::express(4, ALL_ON));
        let half_root = function("0000:00:1c.0", FakeConfigSpace::express(4, Some((0x1d, 1))));
        let pci = function("0000:01:00.0", FakeConfigSpace::express(7, None));
        let one = function("0000:02:00.0", FakeConfigSpace::express(0, None).multi());
        let two = function("0000:02:00.1", FakeConfigSpace::express(0, None));
        let card = function("0000:02:01.0", FakeConfigSpace::conventional(false));

        assert_eq!(
            why(&place(&[&root, &pci], &one), &place(&[&root, &pci], &card)),
            "because of the PCI Express to PCI bridge 0000:01:00.0: \
             it replaces the requester IDs of the devices behind it"
        );
        assert_eq!(
            why(&place(&[&root], &one), &place(&[&root], &two)),
            "because the root port 0000:00:1c.0 has no ACS"
        );
        assert_eq!(
            why(&place(&[&half_root], &one), &place(&[], &half_root)),
            "because the ACS of the root port 0000:00:1c.0 has \
             request redirect, completion redirect, upstream forwarding off"
        );
        assert_eq!(
            why(&place(&[&good_root], &one), &place(&[&good_root], &two)),
            "because they are functions of the device 0000:02:00, which has no ACS between them"
        );
        let single = function("0000:03:00.0", FakeConfigSpace::express(0, None));
        let other = function("0000:04:00.0", FakeConfigSpace::express(0, None));
        assert_eq!(
            SharingReason::between(&place(&[&good_root], &single), &place(&[], &other)),
            SharingReason::Unexplained
        );
        // A leaking port above only one of the two functions.
        assert_eq!(
            SharingReason::between(&place(&[&root], &single), &place(&[&good_root], &other)),
            SharingReason::Port(root.clone())
        );
        assert!(matches!(
            SharingReason::between(&place(&[&pci], &single), &place(&[], &other)),
            SharingReason::BehindBridge(_)
        ));
        let hidden = PciFunction::parse("0000:05:00.0", &[]);
        assert_eq!(
            SharingReason::between(&place(&[&good_root], &hidden), &place(&[], &other)),
            SharingReason::Unreadable
        );
    }
}
