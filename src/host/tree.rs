//! The tree of the host's groups, their devices and the endpoints of these devices, as text for operators and as
//! JSON for programs. The file is long because the tests show both forms whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::address::{Iova, IovaRange};
use crate::config::{Config, Passthrough};
use crate::host::sysfs::{
    HostFacts, HostGroup, HostRegion, HostRoot, IommuInstance, RefineError, SharingReason,
    SysfsDevice, refine,
};
use crate::topology::{EndpointRange, HostAddress, PciAddress, PciRange, ReservedRegion, Topology};

/// Every endpoint of a configuration, below its device and group of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostTree {
    /// Groups with a device that is an endpoint, by number.
    pub groups: Vec<TreeGroup>,
    /// Devices of endpoints that are not on this host, or in no group.
    pub without_group: Vec<TreeDevice>,
    /// Endpoints without a device of the host.
    pub without_device: Vec<TreeEndpoint>,
    /// Notes on groups of the configuration that had to be joined.
    pub notes: Vec<String>,
}

/// A group of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeGroup {
    /// Its number.
    pub number: u32,
    /// The IOMMU that translates for the group; `None` if the host names none.
    pub iommu: Option<IommuInstance>,
    /// The group's reserved regions, as the kernel lists them.
    pub regions: Vec<TreeRegion>,
    /// All devices in the group, ordered by name.
    pub devices: Vec<TreeDevice>,
}

/// A reserved region of a group of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeRegion {
    /// The addresses: `first..=last`.
    pub range: String,
    /// The kernel's word for its purpose.
    pub kind: String,
    /// Whether a guest may map it nevertheless.
    pub mappable: bool,
}

/// A device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeDevice {
    /// Its address.
    pub address: String,
    /// Whether the device is on this host.
    pub present: bool,
    /// PCI vendor and device ID, `vvvv:dddd`.
    pub id: Option<String>,
    /// The driver that is bound to it.
    pub driver: Option<String>,
    /// Its name as a VFIO device: `vfioN`.
    pub vfio: Option<String>,
    /// The host bridge and the bridges above the device, the nearest last.
    pub below: Vec<String>,
    /// Why the device shares its group with the first endpoint's device; `None` for that device itself.
    pub shares_because: Option<String>,
    /// The endpoint of the device.
    pub endpoint: Option<TreeEndpoint>,
}

/// One endpoint, or a range of endpoints with equal properties.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeEndpoint {
    /// Its address in the guest, or the range.
    pub address: String,
    /// The group whose endpoints the guest must keep in one domain.
    pub group: Option<String>,
    /// The backend: `iommufd`, `type1`, or `none` without a device of the host.
    pub backend: &'static str,
    /// The socket of an exported device.
    pub exported: Option<String>,
    /// The regions that PROBE reports.
    pub reserved: Vec<TreeReserved>,
}

/// A region that PROBE reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeReserved {
    /// The addresses: `first..=last`.
    pub range: String,
    /// `reserved` or `msi`.
    pub kind: String,
    /// Where it comes from: the configuration, a host group.
    pub owners: Vec<String>,
}

impl HostTree {
    /// The tree of `config` on the host below `root`.
    ///
    /// # Errors
    ///
    /// The configuration contradicts the host.
    pub fn new(root: &HostRoot, config: &Config) -> Result<Self, RefineError> {
        let pairs: Vec<_> = config
            .devices
            .passthrough
            .iter()
            .map(|device| (device.endpoint, device.host))
            .collect();
        let facts = HostFacts::read(root, pairs.iter().map(|(_, host)| *host));
        let last = u64::MAX >> (64 - u32::from(config.address_width).clamp(1, 64));
        let input = IovaRange::new(Iova(0), Iova(last)).unwrap_or(IovaRange::ALL);
        let refined = refine(&config.topology, &pairs, &facts, &BTreeMap::new(), input)?;
        let builder = TreeBuilder {
            config,
            facts: &facts,
            topology: &refined.topology,
        };
        Ok(Self {
            groups: builder.groups(),
            without_group: builder.without_group(),
            without_device: builder.without_device(),
            notes: refined.notes,
        })
    }
}

impl fmt::Display for HostTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for group in &self.groups {
            writeln!(f, "host group {}", group.number)?;
            if let Some(iommu) = &group.iommu {
                write!(f, "  {iommu}")?;
                match iommu.write_only_note() {
                    Some(note) => writeln!(f, ", {note}")?,
                    None => writeln!(f)?,
                }
            }
            for TreeRegion {
                range,
                kind,
                mappable,
            } in &group.regions
            {
                let note = if *mappable { ", may be mapped" } else { "" };
                writeln!(f, "  region {range} {kind}{note}")?;
            }
            for device in &group.devices {
                write!(f, "{device}")?;
            }
        }
        if !self.without_group.is_empty() {
            writeln!(f, "in no host group")?;
            for device in &self.without_group {
                write!(f, "{device}")?;
            }
        }
        if !self.without_device.is_empty() {
            writeln!(f, "no devices of the host")?;
            for endpoint in &self.without_device {
                endpoint.print(f, "  ")?;
            }
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

/// Indented as a member of a group.
impl fmt::Display for TreeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  device {}", self.address)?;
        if self.present {
            if let Some(id) = &self.id {
                write!(f, " [{id}]")?;
            }
            match &self.driver {
                Some(driver) => write!(f, ", driver {driver}")?,
                None => write!(f, ", no driver")?,
            }
            if let Some(vfio) = &self.vfio {
                write!(f, ", {vfio}")?;
            }
        } else {
            write!(f, ", not on this host")?;
        }
        writeln!(f)?;
        if !self.below.is_empty() {
            writeln!(f, "    below {}", self.below.join(", "))?;
        }
        if let Some(why) = &self.shares_because {
            writeln!(f, "    shares the group {why}")?;
        }
        match &self.endpoint {
            Some(endpoint) => endpoint.print(f, "    "),
            None => Ok(()),
        }
    }
}

impl TreeEndpoint {
    fn print(&self, f: &mut fmt::Formatter<'_>, indent: &str) -> fmt::Result {
        write!(f, "{indent}endpoint {}", self.address)?;
        if let Some(group) = &self.group {
            write!(f, ", group {group}")?;
        }
        write!(f, ", backend {}", self.backend)?;
        if let Some(path) = &self.exported {
            write!(f, ", exported at {path}")?;
        }
        writeln!(f)?;
        for TreeReserved {
            range,
            kind,
            owners,
        } in &self.reserved
        {
            writeln!(
                f,
                "{indent}  reports {range} {kind} ({})",
                owners.join(", ")
            )?;
        }
        Ok(())
    }
}

/// Builds the parts of a tree.
struct TreeBuilder<'a> {
    config: &'a Config,
    facts: &'a HostFacts,
    /// The topology with the groups and regions of the host.
    topology: &'a Topology,
}

impl TreeBuilder<'_> {
    fn groups(&self) -> Vec<TreeGroup> {
        let numbers: BTreeSet<u32> = self
            .config
            .devices
            .passthrough
            .iter()
            .filter_map(|device| self.facts.device(device.host)?.group)
            .collect();
        let groups = numbers
            .iter()
            .filter_map(|number| self.facts.group(*number));
        groups.map(|group| self.group(group)).collect()
    }

    fn group(&self, group: &HostGroup) -> TreeGroup {
        let is_endpoint = |device: &&SysfsDevice| self.passthrough(&device.name).is_some();
        let first = group.members.iter().find(is_endpoint);
        let device = |member: &SysfsDevice| {
            let other = first.filter(|first| first.name != member.name);
            TreeDevice {
                shares_because: other
                    .map(|first| SharingReason::between(&first.place, &member.place).to_string()),
                ..self.device(member)
            }
        };
        TreeGroup {
            number: group.number,
            iommu: group.iommu.clone(),
            regions: group.regions.iter().map(group_region).collect(),
            devices: group.members.iter().map(device).collect(),
        }
    }

    fn without_group(&self) -> Vec<TreeDevice> {
        let devices = self.config.devices.passthrough.iter();
        devices
            .filter_map(|device| match self.facts.device(device.host) {
                Some(found) if found.group.is_some() => None,
                Some(found) => Some(self.device(found)),
                None => Some(TreeDevice {
                    address: device.host.to_string(),
                    present: false,
                    id: None,
                    driver: None,
                    vfio: None,
                    below: Vec::new(),
                    shares_because: None,
                    endpoint: self.endpoint_at(device.endpoint),
                }),
            })
            .collect()
    }

    fn without_device(&self) -> Vec<TreeEndpoint> {
        let devices = self.config.devices.passthrough.iter();
        let ours: BTreeSet<_> = devices
            .map(|device| PciRange::from(device.endpoint))
            .collect();
        self.topology
            .ranges()
            .filter(|entry| !ours.contains(&entry.range))
            .map(|entry| self.endpoint(&entry, None))
            .collect()
    }

    fn device(&self, device: &SysfsDevice) -> TreeDevice {
        let ids = device.vendor.zip(device.device);
        let place = &device.place;
        let bridges = place.bridges.iter().map(ToString::to_string);
        TreeDevice {
            address: device.name.clone(),
            present: true,
            id: ids.map(|(vendor, device)| format!("{vendor:04x}:{device:04x}")),
            driver: device.driver.clone(),
            vfio: device.vfio.as_ref().map(|vfio| vfio.name.clone()),
            below: place.host_bridge.iter().cloned().chain(bridges).collect(),
            shares_because: None,
            endpoint: self
                .passthrough(&device.name)
                .and_then(|found| self.endpoint_at(found.endpoint)),
        }
    }

    /// The passthrough device with the host's name `name`.
    fn passthrough(&self, name: &str) -> Option<&Passthrough> {
        let address: HostAddress = name.parse().ok()?;
        let mut devices = self.config.devices.passthrough.iter();
        devices.find(|device| device.host == address)
    }

    fn endpoint_at(&self, address: PciAddress) -> Option<TreeEndpoint> {
        let mut devices = self.config.devices.passthrough.iter();
        let device = devices.find(|device| device.endpoint == address)?;
        let group = self.facts.group_of(device.host);
        let entry = EndpointRange {
            range: address.into(),
            info: self.topology.endpoint(address.endpoint_id())?,
        };
        let backend = self.config.host_iommu.name();
        let export = self.config.devices.exported_at(address);
        Some(TreeEndpoint {
            backend,
            exported: export.map(|export| export.path.display().to_string()),
            ..self.endpoint(&entry, group)
        })
    }

    fn endpoint(&self, entry: &EndpointRange<'_>, group: Option<&HostGroup>) -> TreeEndpoint {
        let named = entry.info.group.and_then(|id| self.topology.group_name(id));
        let first = entry.range.first().endpoint_id();
        let configured = self
            .config
            .topology
            .endpoint(first)
            .map(|info| info.reserved);
        let reserved = |region: &ReservedRegion| {
            let of_config = configured
                .filter(|regions| regions.overlapping(region.range).is_some())
                .map(|_| "configuration".to_owned());
            let of_host = group.filter(|group| {
                let kept = |r: &&HostRegion| r.kind.reserved_kind().is_some();
                let mut regions = group.regions.iter().filter(kept);
                regions.any(|r| r.range.overlaps(region.range))
            });
            let of_host = of_host.map(|group| format!("host group {}", group.number));
            TreeReserved {
                range: region.range.to_string(),
                kind: region.kind.to_string(),
                owners: of_config.into_iter().chain(of_host).collect(),
            }
        };
        TreeEndpoint {
            address: entry.range.to_string(),
            group: named.map(ToString::to_string),
            backend: "none",
            exported: None,
            reserved: entry.info.reserved.iter().map(reserved).collect(),
        }
    }
}

fn group_region(region: &HostRegion) -> TreeRegion {
    TreeRegion {
        range: region.range.to_string(),
        kind: region.kind.to_string(),
        mappable: region.kind.reserved_kind().is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::fake::{FakeConfigSpace, FakeHost, Function};
    use std::path::Path;

    const CONFIG: &str = r#"
address = "00:05.0"

[[endpoint]]
address = "00:10.0"
vfio = "0000:01:00.0"

[[endpoint]]
address = "00:11.0"
vfio = "0000:01:00.1"
reserved = [{ first = 0xfd00000000, last = 0xfd00000fff }]

[[endpoint]]
address = "00:12.0"
vfio = "0000:09:00.0"
export = "/run/nic.sock"

[[endpoint]]
range = "00:13.0-00:1e.7"
group = "cards"
"#;

    fn tree() -> HostTree {
        let host = FakeHost::new();
        let port = "0000:00:1c.0";
        host.function(&Function::bridge(
            port,
            7,
            FakeConfigSpace::express(4, None),
        ));
        host.function(&Function::ready("0000:00:1c.0/0000:01:00.0", 7));
        host.function(&Function {
            vfio: Some(("vfio1", true)),
            ..Function::ready("0000:00:1c.0/0000:01:00.1", 7)
        });
        host.file(
            "sys/kernel/iommu_groups/7/reserved_regions",
            "0x0 0xffffff direct-relaxable\n0xfee00000 0xfeefffff msi\n\
             0xfd00000000 0xffffffffff reserved\n",
        );
        host.iommu("dmar0", &["0000:01:00.0", "0000:01:00.1"]);
        host.file("sys/class/iommu/dmar0/intel-iommu/ecap", "f020fa\n");
        let config = Config::from_text(Path::new("vm.toml"), CONFIG).expect("a configuration");
        HostTree::new(&host.root(), &config).expect("a tree")
    }

    #[test]
    fn the_tree_is_printed_as_text() {
        let expected = "\
host group 7
  VT-d (dmar0)
  region 0x0..=0xffffff direct-relaxable, may be mapped
  region 0xfee00000..=0xfeefffff msi
  region 0xfd00000000..=0xffffffffff reserved
  device 0000:00:1c.0 [8086:10d3], driver pcieport
    below pci0000:00
    shares the group because the root port 0000:00:1c.0 has no ACS
  device 0000:01:00.0 [8086:10d3], driver vfio-pci, vfio0
    below pci0000:00, root port 0000:00:1c.0 (no ACS)
    endpoint 0000:00:10.0, group host-group-7, backend iommufd
      reports 0xfee00000..=0xfeefffff msi (configuration, host group 7)
      reports 0xfd00000000..=0xffffffffff reserved (host group 7)
  device 0000:01:00.1 [8086:10d3], driver vfio-pci, vfio1
    below pci0000:00, root port 0000:00:1c.0 (no ACS)
    shares the group because the root port 0000:00:1c.0 has no ACS
    endpoint 0000:00:11.0, group host-group-7, backend iommufd
      reports 0xfee00000..=0xfeefffff msi (configuration, host group 7)
      reports 0xfd00000000..=0xffffffffff reserved (configuration, host group 7)
in no host group
  device 0000:09:00.0, not on this host
    endpoint 0000:00:12.0, backend iommufd, exported at /run/nic.sock
      reports 0xfee00000..=0xfeefffff msi (configuration)
no devices of the host
  endpoint 0000:00:13.0-0000:00:1e.7, group cards, backend none
    reports 0xfee00000..=0xfeefffff msi (configuration)
";
        assert_eq!(tree().to_string(), expected);
    }

    #[test]
    fn the_tree_is_printed_as_json() {
        let json = serde_json::to_value(tree()).expect("JSON");
        let device = &json["groups"][0]["devices"][1];
        assert_eq!(json["groups"][0]["number"], 7);
        assert_eq!(
            json["groups"][0]["iommu"],
            serde_json::json!({ "name": "dmar0", "architecture": "vt-d", "write_only": "enforced" })
        );
        assert_eq!(json["groups"][0]["regions"][0]["mappable"], true);
        assert_eq!(device["address"], "0000:01:00.0");
        assert_eq!(device["endpoint"]["group"], "host-group-7");
        assert_eq!(device["endpoint"]["reserved"][0]["kind"], "msi");
        assert_eq!(
            device["endpoint"]["reserved"][0]["owners"][1],
            "host group 7"
        );
        assert!(device["endpoint"]["exported"].is_null());
        let absent = &json["without_group"][0];
        assert_eq!(absent["endpoint"]["exported"], "/run/nic.sock");
        assert_eq!(absent["present"], false);
        assert_eq!(json["without_device"][0]["backend"], "none");
        assert_eq!(json["notes"], serde_json::json!([]));
    }

    /// Two devices behind two SMMUs, of QEMU's machine `virt`.
    #[test]
    fn an_arm_host_is_told_apart() {
        const CONFIG: &str = "machine = 'virt'\naddress = '00:05.0'\n\
             [[endpoint]]\naddress = '00:10.0'\nvfio = '0000:01:00.0'\n\
             [[endpoint]]\naddress = '00:11.0'\nvfio = '0000:02:00.0'\n";
        let host = FakeHost::new();
        for (number, path) in [(1, "0000:01:00.0"), (2, "0000:02:00.0")] {
            host.function(&Function::ready(path, number));
            let file = format!("sys/kernel/iommu_groups/{number}/reserved_regions");
            host.file(&file, "0x0000000008000000 0x00000000080fffff msi\n");
            host.iommu(&format!("smmu3.0x000000000905{number}000"), &[path]);
        }
        let config = Config::from_text(Path::new("vm.toml"), CONFIG).expect("a configuration");
        let tree = HostTree::new(&host.root(), &config)
            .expect("a tree")
            .to_string();
        let expected = "\
host group 2
  SMMUv3 (smmu3.0x0000000009052000), no write-only pages: devices can also read memory that is mapped for writes only
  region 0x8000000..=0x80fffff msi
  device 0000:02:00.0 [8086:10d3], driver vfio-pci, vfio0
    below pci0000:00
    endpoint 0000:00:11.0, backend iommufd
      reports 0x8000000..=0x808ffff reserved (host group 2)
      reports 0x8090000..=0x809ffff msi (configuration, host group 2)
      reports 0x80a0000..=0x80fffff reserved (host group 2)
";
        assert!(tree.ends_with(expected), "{tree}");
        assert!(tree.contains("  SMMUv3 (smmu3.0x0000000009051000), no write-only pages"));
    }
}
