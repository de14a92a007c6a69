//! Checks that the guest can find the configured functions: the rule of PCI slots, and the devices that the machine
//! has itself.
//!
//! A guest looks for functions 1 to 7 of a slot only if it finds function 0, and only if function 0 says that
//! the device has several functions.

use thiserror::Error;

use super::{Config, DeviceKind, Machine};
use crate::ids::EndpointId;
use crate::topology::{PciAddress, PciRange};

/// A function that the guest does not find, or that is not free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SlotProblem {
    /// The guest would not find the IOMMU.
    #[error(
        "nothing is configured at {zero}, function 0 of the slot of the IOMMU {iommu}, and a guest looks for \
         other functions only where it finds function 0: it would run without an IOMMU; give the IOMMU function \
         0 of a slot, such as `address = \"00:05.0\"`, or make the device at {zero} an endpoint"
    )]
    IommuHidden {
        /// The address of the IOMMU.
        iommu: PciAddress,
        /// Function 0 of its slot.
        zero: PciAddress,
    },
    /// The guest would not find a device.
    #[error(
        "nothing is configured at {zero}, function 0 of the slot of endpoint {endpoint}, and a guest looks for \
         other functions only where it finds function 0: the device would be missing; give the endpoint function \
         0 of a slot, such as `address = \"00:06.0\"`, or make the device at {zero} an endpoint"
    )]
    DeviceHidden {
        /// The endpoint.
        endpoint: PciAddress,
        /// Function 0 of its slot.
        zero: PciAddress,
    },
    /// The guest would not find a port.
    #[error(
        "nothing is configured at {zero}, function 0 of the slot of the port {port}, and a guest looks for other \
         functions only where it finds function 0: all devices behind the port would be missing; give the port \
         function 0 of a slot, such as `address = \"00:02.0\"`, or make {zero} a port or an endpoint"
    )]
    PortHidden {
        /// The port.
        port: PciAddress,
        /// Function 0 of its slot.
        zero: PciAddress,
    },
    /// The address belongs to a device of the machine.
    #[error(
        "{address} cannot be used, because QEMU's {} machine has its {name} in that place; give another \
         address, such as 00:05.0",
        .machine.name()
    )]
    OfMachine {
        /// The machine.
        machine: Machine,
        /// The address.
        address: PciAddress,
        /// The device of the machine.
        name: &'static str,
    },
    /// The guest finds the first functions of an endpoint without a device of its own only beside a device
    /// that the file does not list.
    #[error(
        "nothing is configured at {zero}, function 0 of the slot in which endpoint {range} begins, and a guest \
         looks for other functions only where it finds function 0; put a device with multifunction=on there, or \
         let the endpoint begin at {zero}"
    )]
    RangeHidden {
        /// The endpoint's functions.
        range: PciRange,
        /// Function 0 of the first slot.
        zero: PciAddress,
    },
    /// A range has a device of the machine, whose DMA the daemon cannot translate.
    #[error(
        "endpoint {range} contains {address}, where QEMU's {} machine has its {name}, whose DMA the daemon \
         cannot translate; leave that function out: split the range around it",
        .machine.name()
    )]
    RangeOverMachine {
        /// The machine.
        machine: Machine,
        /// The endpoint's functions.
        range: PciRange,
        /// The first address of a device of the machine.
        address: PciAddress,
        /// The device of the machine.
        name: &'static str,
    },
}

impl SlotProblem {
    /// Whether a VM with this problem lacks a device or its IOMMU. Otherwise it depends on devices that the
    /// file does not have.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::IommuHidden { .. }
            | Self::DeviceHidden { .. }
            | Self::PortHidden { .. }
            | Self::OfMachine { .. } => true,
            Self::RangeHidden { .. } | Self::RangeOverMachine { .. } => false,
        }
    }

    /// The problem that the guest does not find `function`, which is the IOMMU of `config`, one of its ports or one of its
    /// endpoints.
    pub fn hidden(config: &Config, function: PciAddress) -> Self {
        let zero = function_zero(function);
        let iommu = config.topology.iommu();
        if function == iommu {
            Self::IommuHidden { iommu, zero }
        } else if config.ports.has_port_at(function) {
            let port = function;
            Self::PortHidden { port, zero }
        } else {
            let endpoint = function;
            Self::DeviceHidden { endpoint, zero }
        }
    }
}

impl Config {
    /// The functions that the guest would not find, and those that are not free on the machine, in
    /// ascending order: the IOMMU first.
    pub fn slot_problems(&self) -> Vec<SlotProblem> {
        let iommu = self.topology.iommu();
        let mut problems = Vec::new();
        problems.extend(self.function_problem(iommu));
        let ports = self.ports.iter().map(|port| port.address);
        problems.extend(ports.filter_map(|port| self.function_problem(port)));
        for entry in self.topology.ranges() {
            let range = entry.range;
            if self.devices.kind_of(range.first()).is_some() {
                problems.extend(self.function_problem(range.first()));
                continue;
            }
            let machine = self.machine;
            problems.extend(machine.device_in(range).map(|(address, name)| {
                SlotProblem::RangeOverMachine {
                    machine,
                    range,
                    address,
                    name,
                }
            }));
            let zero = function_zero(range.first());
            if !self.has_function(zero) {
                problems.push(SlotProblem::RangeHidden { range, zero });
            }
        }
        problems
    }

    /// Whether the slot of `function` has another function: the IOMMU, a port or an endpoint.
    pub fn shares_slot(&self, function: PciAddress) -> bool {
        let zero = function_zero(function).endpoint_id().0;
        (zero..=zero | 7)
            .map(|id| PciAddress::from_endpoint_id(EndpointId(id)))
            .any(|other| other != function && self.is_configured(other))
    }

    /// The addresses of the IOMMU, of the ports and of the devices for which QEMU gets arguments.
    pub fn placed_functions(&self) -> impl Iterator<Item = PciAddress> {
        let devices = self.devices.iter();
        let placed = devices.filter(|device| device.kind() != DeviceKind::ShadowReader);
        std::iter::once(self.topology.iommu())
            .chain(self.ports.iter().map(|port| port.address))
            .chain(placed.map(|device| device.endpoint()))
    }

    /// The problem of one function that must be found.
    fn function_problem(&self, function: PciAddress) -> Option<SlotProblem> {
        let machine = self.machine;
        let own = machine
            .device_at(function)
            .map(|name| SlotProblem::OfMachine {
                machine,
                address: function,
                name,
            });
        let found = self.has_function(function_zero(function));
        own.or_else(|| (!found).then(|| SlotProblem::hidden(self, function)))
    }

    /// Whether a device is expected at `function`.
    fn has_function(&self, function: PciAddress) -> bool {
        self.is_configured(function) || self.machine.device_at(function).is_some()
    }

    fn is_configured(&self, function: PciAddress) -> bool {
        let id = function.endpoint_id();
        function == self.topology.iommu()
            || self.topology.endpoint(id).is_some()
            || self.ports.has_port_at(function)
    }
}

/// Function 0 of the slot of `function`.
pub fn function_zero(function: PciAddress) -> PciAddress {
    PciAddress::from_endpoint_id(EndpointId(function.endpoint_id().0 & !7))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(iommu: &str, endpoints: &str) -> Config {
        let text = format!("address = '{iommu}'\n{endpoints}");
        Config::from_text(Path::new("vm.toml"), &text).expect("good")
    }

    fn one(address: &str, keys: &str) -> String {
        format!("[[endpoint]]\naddress = '{address}'\n{keys}\n")
    }

    fn problems(iommu: &str, endpoints: &str) -> Vec<String> {
        let found = config(iommu, endpoints).slot_problems();
        found.iter().map(ToString::to_string).collect()
    }

    const KINDS: [&str; 4] = [
        "vfio = '65:00.0'",
        "vfio = '65:00.0'\nexport = '/e'",
        "vfio-user = { listen = '/l', connect = '/k' }",
        "shadow = '/h'",
    ];

    #[test]
    fn a_function_needs_function_0_of_its_slot() {
        for keys in KINDS {
            for (address, zero) in [("00:06.1", "0000:00:06.0"), ("01:00.7", "0000:01:00.0")] {
                let alone = problems("00:05.0", &one(address, keys));
                let [problem] = alone.as_slice() else {
                    panic!("{keys}: {alone:?}");
                };
                assert!(problem.contains("the device would be missing"), "{problem}");
                assert!(problem.contains(&format!("nothing is configured at {zero}")));
                for other in ["", "shadow = '/z'"] {
                    let both = one(address, keys) + &one(zero, other);
                    assert_eq!(problems("00:05.0", &both), [""; 0], "{both}");
                }
                let range = format!("[[endpoint]]\nrange = '{zero}-{}.0'\n", &zero[..10]);
                assert_eq!(problems("00:05.0", &(one(address, keys) + &range)), [""; 0]);
            }
            // The IOMMU is a function as well.
            assert_eq!(problems("00:05.0", &one("00:05.3", keys)), [""; 0]);
        }
    }

    #[test]
    fn an_iommu_needs_function_0_of_its_slot() {
        let [problem] = &problems("00:05.1", "")[..] else {
            panic!("one problem");
        };
        assert!(problem.contains("would run without an IOMMU"), "{problem}");
        assert!(problem.contains("such as `address = \"00:05.0\"`"));
        assert!(problems("00:05.1", &one("00:06.0", "")).len() == 1);
        assert_eq!(problems("00:05.1", &one("00:05.0", "")), [""; 0]);
        // The machine's own LPC bridge is function 0 of a slot with several functions.
        assert_eq!(problems("00:1f.4", ""), [""; 0]);
    }

    #[test]
    fn places_of_the_machine_are_not_free() {
        for (address, name) in [
            ("00:00.0", "host bridge"),
            ("00:00.3", "host bridge"),
            ("00:1f.0", "LPC bridge"),
            ("00:1f.2", "SATA controller"),
            ("00:1f.3", "SMBus controller"),
        ] {
            let [problem] = &problems(address, "")[..] else {
                panic!("one problem");
            };
            assert!(problem.contains(name), "{problem}");
            for keys in KINDS {
                let found = problems("00:05.0", &one(address, keys));
                assert_eq!(found.len(), 1, "{found:?}");
                assert!(found[0].contains(name), "{found:?}");
            }
        }
        assert_eq!(problems("01:00.0", ""), [""; 0]);
    }

    #[test]
    fn ranges_are_advised_about() {
        for (range, part) in [
            ("00:00.0-00:04.7", "its host bridge, whose DMA"),
            ("00:10.0-00:1f.7", "its LPC bridge, whose DMA"),
            ("00:1f.1-00:1f.2", "its SATA controller, whose DMA"),
            ("00:10.1-00:11.7", "let the endpoint begin at 0000:00:10.0"),
        ] {
            let text = format!("[[endpoint]]\nrange = '{range}'\n");
            let config = config("00:05.0", &text);
            let [problem] = config.slot_problems()[..] else {
                panic!("one problem of {range}");
            };
            assert!(!problem.is_fatal());
            assert!(problem.to_string().contains(part), "{problem}");
        }
        let text =
            "[[endpoint]]\nrange = '00:06.0-00:1e.7'\n[[endpoint]]\nrange = '01:00.0-ff:1f.7'\n";
        assert_eq!(problems("00:05.0", text), [""; 0]);
    }

    #[test]
    fn every_function_of_a_slot_shares_it() {
        for keys in KINDS {
            let config = config(
                "00:05.0",
                &(one("00:05.7", keys)
                    + "[[endpoint]]\nrange = '00:06.1-00:06.3'\n[[endpoint]]\naddress = '00:07.0'\n"),
            );
            let shares = |text: &str| config.shares_slot(text.parse().expect("an address"));
            assert!(shares("00:05.0") && shares("00:05.7") && shares("00:06.0"));
            assert!(shares("00:06.1") && !shares("00:07.0") && !shares("00:08.0"));
        }
    }
}
