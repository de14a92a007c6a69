//! Devices that depend on another function of the host: they are behind a controller that does DMA for them, or are
//! virtual functions. VFIO refuses some of them whatever driver they have.

use std::fs;
use std::path::Path;

use super::Finding;
use crate::host::sysfs::{HostRoot, SysfsDevice};
use crate::topology::HostAddress;

/// The finding if VFIO cannot have the device because of the function that it depends on.
pub(super) fn finding(root: &HostRoot, device: &SysfsDevice) -> Option<Finding> {
    behind_controller(root, device).or_else(|| of_vfio_function(root, device))
}

/// Behind a controller with a PCI domain of its own (Intel's VMD), devices do DMA with the controller's requester ID.
/// The kernel puts them all into the controller's group, whose driver has made them: they vanish if it is unbound.
fn behind_controller(root: &HostRoot, device: &SysfsDevice) -> Option<Finding> {
    let link = root.path(format!("sys/bus/pci/devices/{}", device.name));
    let folder = fs::canonicalize(link).ok()?;
    let mut above = folder.ancestors().skip(1);
    above.find(|path| is_host_bridge(path))?;
    let name = above.next()?.file_name()?.to_str()?;
    let controller: HostAddress = name.parse().ok()?;
    let problem = format!(
        "{} is behind the controller {controller}, with whose ID the device does DMA: the IOMMU cannot tell them apart",
        device.name
    );
    Some(Finding::missing(
        problem,
        format!(
            "give `vfio` the address {controller}, and the guest has everything behind it and needs the controller's \
             driver; or turn the controller off in the firmware (VMD), and the devices behind it are devices of their own"
        ),
    ))
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

/// VFIO asks for a secret (the VF token) for the virtual functions of a function that VFIO holds itself.
fn of_vfio_function(root: &HostRoot, device: &SysfsDevice) -> Option<Finding> {
    let link = root.path(format!("sys/bus/pci/devices/{}/physfn", device.name));
    let folder = fs::canonicalize(link).ok()?;
    let function: HostAddress = folder.file_name()?.to_str()?.parse().ok()?;
    let driver = fs::read_link(folder.join("driver")).ok()?;
    let driver = driver.file_name()?.to_str()?;
    driver.contains("vfio").then(|| {
        Finding::missing(
            format!(
                "{} is a virtual function of {function}, which has the driver {driver}: VFIO asks for a VF token then, and \
                 the daemon gives none",
                device.name
            ),
            format!(
                "remove the virtual functions, give {function} to its own driver, and let that make them; only virtual \
                 functions then belong to VFIO"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostIommu;
    use crate::host::check::{Severity, device};
    use crate::host::sysfs::HostFacts;
    use crate::host::sysfs::fake::{FakeHost, Function};

    const PORT: &str = "0000:00:0e.0/pci10000:e0/10000:e0:06.0";
    const DISK: &str = "0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0";

    fn found(host: &FakeHost, address: &str) -> Vec<Finding> {
        let address = address.parse().expect("an address");
        let facts = HostFacts::read(&host.root(), [address]);
        device::findings(&host.root(), &facts, address, HostIommu::Iommufd)
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

    /// A server with a network card that has virtual functions.
    #[test]
    fn a_virtual_function_of_a_function_of_vfio_needs_a_token() {
        for (driver, is_refused) in [("ice", false), ("vfio-pci", true)] {
            let host = FakeHost::new();
            let card = Function {
                driver: Some(driver),
                ..Function::ready("0000:01:00.0", 7)
            };
            host.function(&card);
            let function = Function {
                vfio: Some(("vfio1", true)),
                ..Function::ready("0000:01:01.0", 8)
            };
            host.function(&function);
            host.link(
                "sys/devices/pci0000:00/0000:01:00.0",
                "sys/devices/pci0000:00/0000:01:01.0/physfn",
            );
            let found = found(&host, "0000:01:01.0");
            assert_eq!(found.len(), usize::from(is_refused), "{found:#?}");
            if let Some(finding) = found.first() {
                assert_eq!(finding.severity, Severity::Missing);
                assert!(finding.problem.contains("VF token"), "{finding:?}");
                assert_eq!(finding.commands, [""; 0]);
            }
        }
    }
}
