//! Devices behind a controller of the host that does DMA for them. VFIO cannot have them, whatever driver they have.

use std::fs;
use std::path::Path;

use super::Finding;
use crate::host::sysfs::{HostRoot, SysfsDevice, uses};
use crate::topology::HostAddress;

/// The finding if VFIO cannot have the device because of the controller that it depends on.
///
/// Behind a controller with a PCI domain of its own (Intel's VMD), devices do DMA with the controller's requester ID.
/// The kernel puts them all into the controller's group, whose driver has made them: they vanish if it is unbound.
pub(super) fn finding(root: &HostRoot, device: &SysfsDevice) -> Option<Finding> {
    let link = root.path(format!("sys/bus/pci/devices/{}", device.name));
    let folder = fs::canonicalize(link).ok()?;
    let mut above = folder.ancestors().skip(1);
    above.find(|path| is_host_bridge(path))?;
    let name = above.next()?.file_name()?.to_str()?;
    let controller: HostAddress = name.parse().ok()?;
    let mut problem = format!(
        "{} is behind the controller {controller}, with whose ID the device does DMA: the IOMMU cannot tell them apart",
        device.name
    );
    let uses = uses(root, device);
    let whole = if uses.is_empty() {
        format!(
            "give `vfio` the address {controller}, and the guest has everything behind it and needs the controller's driver"
        )
    } else {
        problem += &format!("; the host uses it: {}", uses.join(", "));
        format!("use another device, because the guest would have everything behind {controller}")
    };
    let cure = format!(
        "{whole}; or turn the controller off in the firmware (VMD), and the devices behind it are devices of their own"
    );
    Some(Finding::missing(problem, cure))
}

/// Whether `other` is behind `device`, and vanishes when that is unbound from its driver.
pub(super) fn goes_with(root: &HostRoot, device: &SysfsDevice, other: &SysfsDevice) -> bool {
    let folder = |name: &str| fs::canonicalize(root.path(format!("sys/bus/pci/devices/{name}")));
    match (folder(&device.name), folder(&other.name)) {
        (Ok(device), Ok(other)) => other != device && other.starts_with(&device),
        _ => false,
    }
}

fn is_host_bridge(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_prefix("pci")
        .is_some_and(|rest| rest.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostIommu;
    use crate::host::check::{Severity, device};
    use crate::host::sysfs::fake::{FakeHost, Function};

    const PORT: &str = "0000:00:0e.0/pci10000:e0/10000:e0:06.0";
    const DISK: &str = "0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0";

    fn found(host: &FakeHost, address: &str) -> Vec<Finding> {
        device::found_at(host, address, HostIommu::Iommufd)
    }

    /// A server with VMD: a root port and a disk in the domain 10000, in the group of the controller.
    fn host_with_vmd() -> FakeHost {
        let host = FakeHost::new();
        let controller = Function {
            class: "0x010400",
            ..Function::bound("0000:00:0e.0", 8, Some("vmd"))
        };
        host.function(&controller);
        host.function(&Function {
            class: "0x060400",
            ..Function::bound(PORT, 8, Some("pcieport"))
        });
        host.function(&Function {
            class: "0x010802",
            ..Function::bound(DISK, 8, Some("nvme"))
        });
        host
    }

    #[test]
    fn a_disk_behind_vmd_is_not_taken_by_unbinding_its_controller() {
        let host = host_with_vmd();
        let behind_it = found(&host, "10000:e1:00.0");
        assert_eq!(behind_it.len(), 1, "{behind_it:#?}");
        let finding = &behind_it[0];
        assert_eq!(finding.severity, Severity::Missing);
        assert!(
            finding.problem.contains("controller 0000:00:0e.0"),
            "{finding:?}"
        );
        assert!(
            finding.cure.contains("the address 0000:00:0e.0"),
            "{finding:?}"
        );
        assert_eq!(finding.commands, [""; 0], "they would remove the disk");
    }

    /// The controller itself can be passed through. The disk's driver does DMA in the same group, but unbinding the
    /// controller removes the disk.
    #[test]
    fn devices_behind_a_controller_go_with_it() {
        let host = host_with_vmd();
        let commands: Vec<_> = found(&host, "0000:00:0e.0")
            .into_iter()
            .flat_map(|finding| finding.commands)
            .collect();
        let unbind = "echo 0000:00:0e.0 > /sys/bus/pci/devices/0000:00:0e.0/driver/unbind";
        assert!(commands.contains(&unbind.to_owned()), "{commands:?}");
        assert!(
            !commands.iter().any(|command| command.contains("10000:")),
            "{commands:?}"
        );
        // A mounted disk keeps the controller from being unbound.
        let block = format!("sys/devices/pci0000:00/{DISK}/nvme/nvme0/nvme0n1");
        host.file(&format!("{block}/dev"), "259:0\n");
        host.link(&block, "sys/class/block/nvme0n1");
        host.file(
            "proc/self/mountinfo",
            "29 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n",
        );
        let found = found(&host, "0000:00:0e.0");
        assert!(
            found.iter().all(|finding| finding.commands.is_empty()),
            "{found:#?}"
        );
        assert!(
            found[0].problem.contains("nvme0n1 is mounted at /"),
            "{found:#?}"
        );
    }
}
