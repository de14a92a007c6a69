//! Reads the host's facts about passthrough devices from sysfs below a [`HostRoot`].
//!
//! Nothing here opens or changes a device. Unreadable files count as absent, and no content of a file is an error.

mod bridges;
#[cfg(test)]
pub(crate) mod fake;
mod iommu;
mod read;
mod refine;
mod reserved;
mod sharing;
mod ungrouped;
mod usage;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::topology::HostAddress;
use read::{link_name, names, printable, read_hex, read_value};

pub use bridges::{Acs, PciFunction, Port};
pub use iommu::{IommuArchitecture, IommuInstance, WriteOnlyRights};
pub use read::HostRoot;
pub use refine::{RefineError, Refined, refine};
pub use reserved::{HostRegion, HostRegionKind, gaps, merge, parse_regions};
pub use sharing::{PciPlace, SharingReason};
pub use ungrouped::NoGroupReason;
pub use usage::uses;

/// PCI class and subclass of bridges between PCI buses.
const CLASS_PCI_BRIDGE: u32 = 0x0604;
/// The name of groups that VFIO makes without an IOMMU.
const NO_IOMMU: &str = "vfio-noiommu";

/// Devices of the host and their groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    devices: BTreeMap<HostAddress, SysfsDevice>,
    groups: BTreeMap<u32, HostGroup>,
    /// The names of all IOMMUs.
    iommus: Vec<String>,
}

impl HostFacts {
    /// Reads the devices at `addresses` of the host below `root`, and their groups with all members.
    pub fn read(root: &HostRoot, addresses: impl IntoIterator<Item = HostAddress>) -> Self {
        let mut facts = Self {
            iommus: iommu::instances(root),
            ..Self::default()
        };
        for address in addresses {
            let folder = root.path(format!("sys/bus/pci/devices/{address}"));
            if !folder.is_dir() {
                continue;
            }
            let device = SysfsDevice::read(&folder);
            if let Some(number) = device.group {
                let group = facts.groups.entry(number);
                group.or_insert_with(|| HostGroup::read(root, number));
            }
            facts.devices.insert(address, device);
        }
        facts
    }

    /// The device at `address`; `None` if the host has none there.
    pub fn device(&self, address: HostAddress) -> Option<&SysfsDevice> {
        self.devices.get(&address)
    }

    /// The names of all IOMMUs that the kernel uses, in alphabetical order.
    pub fn iommus(&self) -> &[String] {
        &self.iommus
    }

    /// The group `number`, if one of the devices is in it.
    pub fn group(&self, number: u32) -> Option<&HostGroup> {
        self.groups.get(&number)
    }

    /// The group of the device at `address`, if the device exists and is in one.
    pub fn group_of(&self, address: HostAddress) -> Option<&HostGroup> {
        self.group(self.device(address)?.group?)
    }
}

/// One device of the host, most often a PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysfsDevice {
    /// Its name in sysfs: for a PCI function, the full address.
    pub name: String,
    /// The driver that is bound to it.
    pub driver: Option<String>,
    /// The only driver that may bind to it, if one is set.
    pub driver_override: Option<String>,
    /// PCI vendor ID.
    pub vendor: Option<u32>,
    /// PCI device ID.
    pub device: Option<u32>,
    /// PCI class, subclass and programming interface: 24 bits.
    pub class: Option<u32>,
    /// The number of its IOMMU group; `None` without an IOMMU.
    pub group: Option<u32>,
    /// The VFIO device, if a VFIO driver holds this device.
    pub vfio: Option<VfioDevice>,
    /// Its place in the tree of PCI buses.
    pub place: PciPlace,
}

/// A device as VFIO knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioDevice {
    /// Its name: `vfioN`.
    pub name: String,
    /// Whether the kernel made its character device, `/dev/vfio/devices/vfioN`.
    pub has_node: bool,
}

impl SysfsDevice {
    fn read(folder: &Path) -> Self {
        let vfio = names(&folder.join("vfio-dev"))
            .into_iter()
            .find(|name| is_node_name(name))
            .map(|name| VfioDevice {
                has_node: folder.join("vfio-dev").join(&name).join("dev").exists(),
                name: printable(&name),
            });
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        Self {
            name: printable(&name),
            driver: link_name(&folder.join("driver")),
            driver_override: read_value(&folder.join("driver_override"))
                .filter(|value| value != "(null)"),
            vendor: read_hex(&folder.join("vendor")),
            device: read_hex(&folder.join("device")),
            class: read_hex(&folder.join("class")),
            group: link_name(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
            vfio,
            place: place(folder),
        }
    }

    /// The path of its character device below `root`, if it has one.
    pub fn node(&self, root: &HostRoot) -> Option<PathBuf> {
        let vfio = self.vfio.as_ref().filter(|vfio| vfio.has_node)?;
        Some(root.path("dev/vfio/devices").join(&vfio.name))
    }

    /// Whether it is a bridge between PCI buses.
    pub fn is_bridge(&self) -> bool {
        self.class
            .is_some_and(|class| class >> 8 == CLASS_PCI_BRIDGE)
    }

    /// Whether a VFIO driver holds it: vfio-pci, or a driver for one kind of device, which has `vfio` in
    /// its name.
    pub fn is_held_by_vfio(&self) -> bool {
        let by_name = |driver: &String| driver.contains("vfio");
        self.vfio.is_some() || self.driver.as_ref().is_some_and(by_name)
    }

    /// Whether the kernel refuses the group to VFIO because of this member: one of the kernel's own
    /// drivers does DMA with it.
    pub fn spoils_group(&self) -> bool {
        let harmless = |driver: &String| driver == "pci-stub";
        !self.is_bridge()
            && !self.is_held_by_vfio()
            && self.driver.as_ref().is_some_and(|driver| !harmless(driver))
    }

    /// Whether some kernels refuse the group because of this member: it is a bridge with a driver that
    /// not every kernel accepts.
    pub fn may_spoil_group(&self) -> bool {
        let harmless = |driver: &String| driver == "pcieport" || driver == "pci-stub";
        self.is_bridge()
            && !self.is_held_by_vfio()
            && self.driver.as_ref().is_some_and(|driver| !harmless(driver))
    }
}

impl fmt::Display for SysfsDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let (Some(vendor), Some(device)) = (self.vendor, self.device) {
            write!(f, " [{vendor:04x}:{device:04x}]")?;
        }
        match &self.driver {
            Some(driver) => write!(f, " driver {driver}"),
            None => f.write_str(" no driver"),
        }
    }
}

/// Devices that the host's IOMMU cannot isolate from each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostGroup {
    /// Its number.
    pub number: u32,
    /// Whether VFIO made it without an IOMMU.
    pub without_iommu: bool,
    /// The IOMMU that translates for the group; `None` if sysfs names none.
    pub iommu: Option<IommuInstance>,
    /// All devices in the group, ordered by name.
    pub members: Vec<SysfsDevice>,
    /// The group's reserved regions, as the kernel lists them.
    pub regions: Vec<HostRegion>,
    /// Lines of that list that could not be parsed.
    pub odd_lines: Vec<String>,
}

impl HostGroup {
    fn read(root: &HostRoot, number: u32) -> Self {
        let folder = root.path(format!("sys/kernel/iommu_groups/{number}"));
        let members = names(&folder.join("devices"));
        let text = root.text(format!("sys/kernel/iommu_groups/{number}/reserved_regions"));
        let (regions, odd_lines) = parse_regions(&text.unwrap_or_default());
        let instance = |name| IommuInstance::of_device(root, &folder.join("devices").join(name));
        Self {
            number,
            iommu: members.iter().find_map(instance),
            without_iommu: read_value(&folder.join("name")).as_deref() == Some(NO_IOMMU),
            members: members
                .iter()
                .map(|name| SysfsDevice::read(&folder.join("devices").join(name)))
                .collect(),
            regions,
            odd_lines,
        }
    }
}

/// The place of the device in `folder`, a link into the tree of devices.
fn place(folder: &Path) -> PciPlace {
    let real = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let is_host_bridge = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.strip_prefix("pci")
            .is_some_and(|rest| rest.contains(':'))
    };
    let mut above: Vec<_> = real
        .ancestors()
        .skip(1)
        .take_while(|path| path.file_name().is_some_and(|name| !is_host_bridge(name)))
        .collect();
    let root = real
        .ancestors()
        .nth(above.len() + 1)
        .and_then(Path::file_name);
    let host_bridge = root.map(|name| printable(&name.to_string_lossy()));
    if host_bridge.is_none() {
        // Outside the tree of PCI buses, the folders above are not bridges.
        above.clear();
    }
    above.reverse();
    PciPlace {
        host_bridge,
        bridges: above.into_iter().map(PciFunction::read).collect(),
        function: PciFunction::read(&real),
    }
}

/// Whether the name is `vfio` and a number.
fn is_node_name(name: &str) -> bool {
    name.strip_prefix("vfio")
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::fake::{FakeConfigSpace, FakeHost, Function};
    use super::*;

    fn address(text: &str) -> HostAddress {
        text.parse().expect("an address")
    }

    #[test]
    fn a_device_is_read_with_its_group_and_its_place() {
        let host = FakeHost::new();
        let root = "0000:00:1c.0";
        let acs = Some((0x1d, 0x1d));
        host.function(&Function::bridge(root, 3, FakeConfigSpace::express(4, acs)));
        host.function(&Function::ready("0000:00:1c.0/0000:01:00.0", 7));
        host.function(&Function::bound(
            "0000:00:1c.0/0000:01:00.1",
            7,
            Some("e1000e"),
        ));
        let facts = HostFacts::read(&host.root(), [address("01:00.0"), address("02:00.0")]);
        assert_eq!(facts.device(address("02:00.0")), None);
        let device = facts.device(address("01:00.0")).expect("it is there");
        assert_eq!(
            device.to_string(),
            "0000:01:00.0 [8086:10d3] driver vfio-pci"
        );
        assert_eq!(
            (device.group, device.driver_override.as_ref()),
            (Some(7), None)
        );
        let vfio = device.vfio.as_ref().expect("a VFIO device");
        assert_eq!((vfio.name.as_str(), vfio.has_node), ("vfio0", true));
        assert_eq!(device.place.host_bridge.as_deref(), Some("pci0000:00"));
        let bridges: Vec<_> = device
            .place
            .bridges
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(bridges, ["root port 0000:00:1c.0 (ACS on)"]);

        let group = facts.group_of(address("01:00.0")).expect("a group");
        assert_eq!((group.number, group.regions.len()), (7, 1));
        let members: Vec<_> = group.members.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(members, ["0000:01:00.0", "0000:01:00.1"]);
        assert_eq!(group.members[0].place, device.place);

        host.remove("sys/devices/pci0000:00/0000:00:1c.0/config");
        let facts = HostFacts::read(&host.root(), [address("01:00.0")]);
        let device = facts.device(address("01:00.0")).expect("it is there");
        assert_eq!(device.place.bridges[0].port, Port::Unknown);
    }

    #[test]
    fn members_with_drivers_of_the_kernel_spoil_a_group() {
        let host = FakeHost::new();
        for (path, driver, class, spoils, may) in [
            ("0000:00:01.0", Some("e1000e"), "0x020000", true, false),
            ("0000:00:02.0", None, "0x020000", false, false),
            ("0000:00:03.0", Some("pci-stub"), "0x020000", false, false),
            (
                "0000:00:04.0",
                Some("mlx5_vfio_pci"),
                "0x020000",
                false,
                false,
            ),
            ("0000:00:05.0", Some("pcieport"), "0x060400", false, false),
            ("0000:00:06.0", Some("shpchp"), "0x060400", false, true),
            (
                "0000:00:07.0",
                Some("snd_hda_intel"),
                "garbage",
                true,
                false,
            ),
        ] {
            let class = Function {
                class,
                ..Function::bound(path, 1, driver)
            };
            host.function(&class);
            let at = address(path);
            let facts = HostFacts::read(&host.root(), [at]);
            let device = facts.device(at).expect("it is there");
            assert_eq!(
                (device.spoils_group(), device.may_spoil_group()),
                (spoils, may),
                "{path}"
            );
        }
    }

    #[test]
    fn odd_trees_are_read_as_far_as_they_go() {
        let host = FakeHost::new();
        let odd = "sys/bus/pci/devices/0000:01:00.0";
        for file in [
            "class",
            "vendor",
            "driver_override",
            "driver",
            "iommu_group",
            "vfio-dev",
        ] {
            host.file(&format!("{odd}/{file}"), [0xff, 0x1b, b'\n', 0]);
        }
        host.file("sys/bus/pci/devices/0000:02:00.0", "not a folder");
        let facts = HostFacts::read(&host.root(), [address("01:00.0"), address("02:00.0")]);
        let device = facts.device(address("01:00.0")).expect("it is there");
        assert_eq!(
            (device.class, device.vendor, device.group, &device.driver),
            (None, None, None, &None)
        );
        assert_eq!(device.driver_override.as_deref(), Some("\u{fffd}?"));
        assert_eq!(device.place.host_bridge, None);
        assert_eq!(facts.device(address("02:00.0")), None);
    }

    #[test]
    fn a_group_without_an_iommu_is_known_by_its_name() {
        let host = FakeHost::new();
        host.function(&Function::ready("0000:00:01.0", 0));
        host.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
        let facts = HostFacts::read(&host.root(), [address("00:01.0")]);
        assert!(facts.group(0).is_some_and(|group| group.without_iommu));
    }
}
