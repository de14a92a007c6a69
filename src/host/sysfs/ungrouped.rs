//! Why the kernel has put a device into no IOMMU group.

use std::fmt;

use super::{HostFacts, HostGroup, IommuArchitecture, PciFunction, SysfsDevice};
use crate::topology::HostAddress;

/// Why no IOMMU translates for a device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoGroupReason {
    /// The kernel uses no IOMMU.
    Off,
    /// VFIO made the group itself, for use without an IOMMU.
    WithoutIommu,
    /// The device's DMA carries the ID of this bridge, and another device has that ID already. Linux's drivers of SMMUs
    /// give an ID (stream ID) to one device only; other drivers put all devices with one ID into one group.
    Alias(PciFunction),
    /// These IOMMUs of the host do not translate for the device.
    NotCovered(Vec<String>),
}

impl NoGroupReason {
    /// The reason for `device`, which is in no group.
    fn of(facts: &HostFacts, device: &SysfsDevice) -> Self {
        let instances = facts.iommus();
        if instances.is_empty() {
            return Self::Off;
        }
        let is_smmu = |name: &String| {
            matches!(
                IommuArchitecture::of(name),
                IommuArchitecture::SmmuV3 | IommuArchitecture::Smmu
            )
        };
        let mut bridges = device.place.bridges.iter();
        match bridges.find(|bridge| bridge.is_conventional_bridge()) {
            Some(bridge) if instances.iter().any(is_smmu) => Self::Alias(bridge.clone()),
            Some(_) | None => Self::NotCovered(instances.to_vec()),
        }
    }

    /// The operator's cure.
    pub fn cure(&self) -> &'static str {
        match self {
            Self::Off => {
                "turn the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU). On Intel, boot with intel_iommu=on. On Arm, the \
                 kernel needs the SMMU's driver (CONFIG_ARM_SMMU_V3), and the firmware a device tree or an IORT table \
                 that describes the SMMU"
            }
            Self::WithoutIommu => {
                "turn the IOMMU on in the firmware, and take enable_unsafe_noiommu_mode of the module vfio back: without \
                 an IOMMU the device reaches all memory of the host"
            }
            Self::Alias(_) => {
                "put the device into a slot of PCI Express that is not behind the bridge, or leave it the only device \
                 there"
            }
            Self::NotCovered(_) => {
                "use another slot, or update the firmware: its tables (DMAR, IVRS, IORT or device tree) say which devices \
                 are behind the IOMMU"
            }
        }
    }
}

impl fmt::Display for NoGroupReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("the host's IOMMU is off"),
            Self::WithoutIommu => f.write_str("its group is of VFIO's mode without an IOMMU"),
            Self::Alias(bridge) => write!(
                f,
                "the {} {} gives its own ID to the DMA of all devices behind it, and Linux lets an SMMU have one device \
                 for each ID (\"Aliasing StreamID\" in the kernel's log)",
                bridge.port, bridge.name
            ),
            Self::NotCovered(names) => write!(
                f,
                "the host's IOMMUs do not translate for it ({})",
                names.join(", ")
            ),
        }
    }
}

impl HostFacts {
    /// The group in which an IOMMU translates for the device at `address`, which is on this host; otherwise the reason why
    /// there is none.
    ///
    /// # Errors
    /// The reason.
    pub fn translated_group(&self, address: HostAddress) -> Result<&HostGroup, NoGroupReason> {
        match (self.group_of(address), self.device(address)) {
            (Some(group), _) if !group.without_iommu => Ok(group),
            (Some(_), _) => Err(NoGroupReason::WithoutIommu),
            (None, Some(device)) => Err(NoGroupReason::of(self, device)),
            (None, None) => Err(NoGroupReason::Off),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeConfigSpace, FakeHost, Function};
    use super::*;

    const SMMU: &str = "smmu3.0x0000000009050000";
    const BRIDGE: &str = "0000:00:1e.0";

    /// The reason for a device at `path` that is in no group, on a host with the IOMMU `instance`.
    fn reason(path: &str, instance: Option<&str>) -> NoGroupReason {
        let host = FakeHost::new();
        let to_conventional = FakeConfigSpace::express(7, None);
        host.function(&Function::bridge(BRIDGE, 1, to_conventional));
        host.function(&Function {
            group: None,
            ..Function::ready(path, 1)
        });
        if let Some(name) = instance {
            host.iommu(name, &[]);
        }
        let name = path.rsplit('/').next().expect("a name");
        let address = name.parse().expect("an address");
        let facts = HostFacts::read(&host.root(), [address]);
        facts.translated_group(address).expect_err("no group")
    }

    #[test]
    fn the_reason_follows_from_the_hosts_iommus_and_the_bridges() {
        let behind = format!("{BRIDGE}/0000:02:01.0");
        assert_eq!(reason(&behind, None), NoGroupReason::Off);
        let alias = reason(&behind, Some(SMMU));
        assert!(matches!(&alias, NoGroupReason::Alias(bridge) if bridge.name == BRIDGE));
        for part in [
            "PCI Express to PCI bridge 0000:00:1e.0",
            "Aliasing StreamID",
        ] {
            assert!(alias.to_string().contains(part), "{alias}");
        }
        assert!(alias.cure().contains("the only device"), "{}", alias.cure());
        // VT-d's driver puts all devices behind the bridge into one group.
        let not_covered = NoGroupReason::NotCovered(vec!["dmar0".to_owned()]);
        assert_eq!(reason(&behind, Some("dmar0")), not_covered);
        let not_covered = NoGroupReason::NotCovered(vec![SMMU.to_owned()]);
        assert_eq!(reason("0000:00:03.0", Some(SMMU)), not_covered);
    }

    #[test]
    fn a_group_without_an_iommu_translates_nothing() {
        let host = FakeHost::new();
        host.function(&Function::ready("0000:00:03.0", 5));
        let address = "0000:00:03.0".parse().expect("an address");
        let facts = HostFacts::read(&host.root(), [address]);
        assert_eq!(facts.translated_group(address).map(|it| it.number), Ok(5));
        host.file("sys/kernel/iommu_groups/5/name", "vfio-noiommu\n");
        let facts = HostFacts::read(&host.root(), [address]);
        let reason = facts.translated_group(address).expect_err("no IOMMU");
        assert_eq!(reason, NoGroupReason::WithoutIommu);
    }
}
