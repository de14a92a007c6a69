//! The machine that the VMM emulates: where it takes interrupts, and which places on its root bus are not free.

use super::checker::Checker;
use super::draft::{Located, Scalar};
use super::error::ProblemKind;
use super::text::shown;
use crate::address::{Iova, IovaRange};
use crate::topology::{PciAddress, PciRange, ReservedKind, ReservedRegion};

/// The slot of the host bridge, which has one function and leaves no room for others.
const HOST_BRIDGE: u8 = 0x00;
const HOST_BRIDGE_NAME: &str = "host bridge";

/// A machine type of QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// x86: the guest learns from an ACPI table (VIOT) which devices are behind the IOMMU.
    #[default]
    Q35,
    /// Arm: the guest learns it from the device tree.
    Virt,
}

impl Machine {
    /// The name in the configuration file, and QEMU's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Virt => "virt",
        }
    }

    /// The addresses whose writes are interrupts: the local APICs' (Intel SDM volume 3, "Message Signalled
    /// Interrupts"), and the page of QEMU's GIC ITS that has its doorbell.
    pub(super) fn msi(self) -> Option<ReservedRegion> {
        let (first, last) = match self {
            Self::Q35 => (0xfee0_0000, 0xfeef_ffff),
            Self::Virt => (0x0809_0000, 0x0809_ffff),
        };
        Some(ReservedRegion {
            range: IovaRange::new(Iova(first), Iova(last))?,
            kind: ReservedKind::Msi,
        })
    }

    /// The functions that the machine has itself: device, function, name.
    fn own_functions(self) -> &'static [(u8, u8, &'static str)] {
        match self {
            Self::Q35 => &[
                (HOST_BRIDGE, 0, HOST_BRIDGE_NAME),
                (0x1f, 0, "LPC bridge"),
                (0x1f, 2, "SATA controller"),
                (0x1f, 3, "SMBus controller"),
            ],
            Self::Virt => &[(HOST_BRIDGE, 0, HOST_BRIDGE_NAME)],
        }
    }

    /// The device of the machine that takes the place of `function`.
    pub fn device_at(self, function: PciAddress) -> Option<&'static str> {
        if function.segment() != 0 || function.bus() != 0 {
            return None;
        }
        let device = function.device();
        let found = self.own_functions().iter().find(|&&(own, number, _)| {
            own == device && (device == HOST_BRIDGE || number == function.function())
        });
        found.map(|&(_, _, name)| name)
    }

    /// The first device of the machine whose place is in `range`.
    pub(super) fn device_in(self, range: PciRange) -> Option<(PciAddress, &'static str)> {
        self.own_functions()
            .iter()
            .find_map(|&(device, function, name)| {
                let address = PciAddress::new(0, 0, device, function)?;
                range.contains(address).then_some((address, name))
            })
    }
}

impl Checker<'_> {
    /// The machine of the file, or the VMM's. They must not differ.
    pub(super) fn machine(
        &mut self,
        given: Option<&Located<Scalar>>,
        of_vmm: Option<Machine>,
    ) -> Option<Machine> {
        let Some(given) = given else {
            return Some(of_vmm.unwrap_or_default());
        };
        let machine = match self.text(given, "machine", "\"q35\" or \"virt\"")? {
            "q35" => Machine::Q35,
            "virt" => Machine::Virt,
            _ => {
                let kind = ProblemKind::Machine(shown(&given.value));
                self.refuse(&given.origin, "machine", kind);
                return None;
            }
        };
        if let Some(of_vmm) = of_vmm
            && of_vmm != machine
        {
            let kind = ProblemKind::OtherMachine { of_vmm, machine };
            self.refuse(&given.origin, "machine", kind);
            return None;
        }
        Some(machine)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn config(keys: &str, machine: Option<Machine>) -> Result<Config, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vm.toml");
        std::fs::write(&path, format!("address = '00:05.0'\n{keys}")).expect("written");
        Config::for_machine(&path, machine).map_err(|error| error.to_string())
    }

    fn regions(config: &Config) -> Vec<String> {
        let regions = config.topology.common_reserved();
        regions.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_machine_decides_on_the_msi_region() {
        for (keys, machine, expected, region) in [
            ("", None, Machine::Q35, "0xfee00000..=0xfeefffff:msi"),
            (
                "",
                Some(Machine::Virt),
                Machine::Virt,
                "0x8090000..=0x809ffff:msi",
            ),
            (
                "machine = 'virt'",
                None,
                Machine::Virt,
                "0x8090000..=0x809ffff:msi",
            ),
            (
                "machine = 'q35'",
                Some(Machine::Q35),
                Machine::Q35,
                "0xfee00000..=0xfeefffff:msi",
            ),
        ] {
            let config = config(keys, machine).expect("good");
            assert_eq!(
                (config.machine, regions(&config)),
                (expected, vec![region.to_owned()])
            );
        }
        let none = config("machine = 'virt'\nreserved = []", None).expect("good");
        assert_eq!(regions(&none), [""; 0]);
    }

    #[test]
    fn unknown_machines_and_those_of_another_vmm_are_refused() {
        for (keys, machine, message) in [
            (
                "machine = 'microvm'",
                None,
                "\"microvm\" is not a machine; use \"q35\"",
            ),
            ("machine = 35", None, "\"q35\" or \"virt\""),
            (
                "machine = 'q35'",
                Some(Machine::Virt),
                "the VMM's machine is virt, not q35; leave the key out",
            ),
            (
                "machine = 'virt'\n[[endpoint]]\naddress = '00:06.0'\n\
                 reserved = [{ first = 0x8090000, last = 0x8090fff }]",
                None,
                "the MSI region of the machine virt is there by default",
            ),
        ] {
            let error = config(keys, machine).expect_err(message);
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn places_that_q35_takes_are_free_on_virt() {
        let text = |machine| format!("address = '00:1f.0'\nmachine = '{machine}'");
        let parse = |text: String| Config::from_text(Path::new("vm.toml"), &text).expect("good");
        let problems = |machine| parse(text(machine)).slot_problems().len();
        assert_eq!((problems("q35"), problems("virt")), (1, 0));
        let address = |text: &str| text.parse().expect("an address");
        assert_eq!(
            Machine::Virt.device_at(address("00:00.3")),
            Some("host bridge")
        );
        assert_eq!(Machine::Virt.device_at(address("01:00.0")), None);
    }
}
