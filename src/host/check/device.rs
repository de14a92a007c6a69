//! Checks one device of the host.

use super::access::node_finding;
use super::{Finding, Severity, depends, kernel, token};
use crate::config::{HostIommu, Passthrough};
use crate::host::sysfs::{
    HostFacts, HostGroup, HostRegionKind, HostRoot, SharingReason, SysfsDevice, uses,
};

/// The findings for the device of an endpoint.
pub(super) fn findings(
    root: &HostRoot,
    facts: &HostFacts,
    passthrough: &Passthrough,
    iommu: HostIommu,
) -> Vec<Finding> {
    let address = passthrough.host;
    let Some(device) = facts.device(address) else {
        return vec![Finding::missing(
            format!("{address}: no such device on this host"),
            "give `vfio` an address that lspci -D lists",
        )];
    };
    if let Some(finding) = depends::finding(root, device) {
        // No other driver would help.
        return vec![finding];
    }
    let mut found = Vec::new();
    if device.is_bridge() {
        found.push(Finding::missing(
            format!("{device} is a bridge"),
            "give `vfio` the address of a device behind it",
        ));
    }
    found.extend(token::finding(root, device, passthrough, iommu));
    let group = facts.translated_group(address);
    let mut obstacles = Vec::new();
    if !device.is_held_by_vfio() {
        obstacles.push(not_bound(root, device));
    }
    match &group {
        Err(reason) => obstacles.push(Finding::missing(
            format!("no IOMMU translates for {}: {reason}", device.name),
            reason.cure(),
        )),
        Ok(group) => obstacles.extend(group_findings(root, device, group)),
    }
    let has_no_command = |it: &Finding| it.severity == Severity::Missing && it.commands.is_empty();
    if obstacles.iter().any(has_no_command) {
        // VFIO would refuse the device nevertheless, and the commands would only take devices from the host.
        obstacles.iter_mut().for_each(Finding::postpone);
    }
    found.extend(obstacles);
    if device.is_held_by_vfio() {
        found.extend(match iommu {
            HostIommu::Iommufd => character_device(root, device),
            HostIommu::Type1 => group.ok().and_then(|group| {
                let node = format!("dev/vfio/{}", group.number);
                node_finding(root, &node, "SUBSYSTEM==\"vfio\"")
            }),
        });
    }
    found
}

fn not_bound(root: &HostRoot, device: &SysfsDevice) -> Finding {
    let problem = match &device.driver {
        Some(driver) => format!(
            "{} is bound to the driver {driver}, not to VFIO",
            device.name
        ),
        None => format!(
            "{} is bound to no driver, and must be bound to VFIO",
            device.name
        ),
    };
    match uses(root, device).as_slice() {
        [] => {
            let signed = kernel::signed_clause(root, "sys/bus/pci/drivers/vfio-pci");
            let cure = format!("bind it to vfio-pci{signed}");
            Finding::missing(problem, cure).with_commands(binding(root, device))
        }
        uses => Finding::missing(
            in_use(&problem, uses),
            "give `vfio` the address of a device that the host does not use, or take this device out of use; `check` \
             then prints the commands that bind it to vfio-pci",
        ),
    }
}

/// `problem` with the uses of a device: no commands are printed that would take them from the host.
fn in_use(problem: &str, uses: &[String]) -> String {
    format!("{problem}; the host uses it: {}", uses.join(", "))
}

/// The commands that bind a device to vfio-pci.
fn binding(root: &HostRoot, device: &SysfsDevice) -> Vec<String> {
    let name = &device.name;
    let mut commands = Vec::new();
    if !root.path("sys/bus/pci/drivers/vfio-pci").exists() {
        commands.push("modprobe vfio-pci".to_owned());
    }
    let folder = format!("/sys/bus/pci/devices/{name}");
    commands.push(format!("echo vfio-pci > {folder}/driver_override"));
    if device.driver.is_some() {
        commands.push(format!("echo {name} > {folder}/driver/unbind"));
    }
    commands.push(format!("echo {name} > /sys/bus/pci/drivers_probe"));
    commands
}

fn group_findings<'a>(
    root: &'a HostRoot,
    device: &'a SysfsDevice,
    group: &'a HostGroup,
) -> impl Iterator<Item = Finding> + 'a {
    let number = group.number;
    let others = group
        .members
        .iter()
        .filter(|other| other.name != device.name && !depends::goes_with(root, device, other));
    let spoiled = others.filter_map(move |other| {
        let spoils = other.spoils_group();
        if !spoils && !other.may_spoil_group() {
            return None;
        }
        let why = SharingReason::between(&device.place, &other.place);
        let uses = uses(root, other);
        let problem = if spoils {
            format!(
                "host group {number} is not viable: {other} makes the group unusable for VFIO; both devices are in the group {why}"
            )
        } else {
            format!(
                "host group {number} may not be viable: some kernels do not accept {other} in it; \
                 both devices are in the group {why}"
            )
        };
        let (problem, cure, commands) = match (uses.as_slice(), spoils) {
            ([], true) => (
                problem,
                "bind the other device to vfio-pci, too, or unbind it from its driver; a card of its own may get its \
                 own group in another slot",
                binding(root, other),
            ),
            ([], false) => (
                problem,
                "if VFIO refuses the group, unbind the bridge from its driver",
                vec![format!(
                    "echo {0} > /sys/bus/pci/devices/{0}/driver/unbind",
                    other.name
                )],
            ),
            (uses, _) => (
                in_use(&problem, uses),
                "do not unbind the other device while the host uses it: move this card to a slot with a group of its \
                 own, or take the other device out of use; `check` then prints the commands",
                Vec::new(),
            ),
        };
        let finding = if spoils {
            Finding::missing(problem, cure)
        } else {
            Finding::advice(problem, cure)
        };
        Some(finding.with_commands(commands))
    });
    let direct = |kind| kind == HostRegionKind::Direct;
    let claimed = group.regions.iter().find(|region| direct(region.kind));
    let claimed = claimed.map(move |region| {
        Finding::missing(
            format!(
                "the firmware requires {} to be mapped one to one for host group {number}, and \
                 Linux 6.6 and later refuse such devices to VFIO",
                region.range
            ),
            "turn off the firmware's option that needs it (shared memory with management \
             controllers, legacy USB, DMA protection before boot), update the firmware, or use \
             another device",
        )
    });
    let odd = group.odd_lines.first().map(move |line| {
        Finding::advice(
            format!("a reserved region of host group {number} cannot be read: {line:?}"),
            "compare with /sys/kernel/iommu_groups/N/reserved_regions, and name the region in \
             `reserved` of the endpoint",
        )
    });
    spoiled.chain(claimed).chain(odd)
}

fn character_device(root: &HostRoot, device: &SysfsDevice) -> Option<Finding> {
    match &device.vfio {
        Some(vfio) if vfio.has_node => {
            let node = format!("dev/vfio/devices/{}", vfio.name);
            node_finding(root, &node, "SUBSYSTEM==\"vfio-dev\"")
        }
        _ => Some(Finding::missing(
            match kernel::lacking(root, "CONFIG_VFIO_DEVICE_CDEV") {
                Some(why) => format!("there is no character device for {}: {why}", device.name),
                None => format!("the kernel has no character device for {}", device.name),
            },
            "use Linux 6.6 or later with CONFIG_VFIO_DEVICE_CDEV, or host-iommu = \"type1\"",
        )),
    }
}

/// The findings for the device at `address` of the host.
#[cfg(test)]
pub(super) fn found_at(
    host: &crate::host::sysfs::fake::FakeHost,
    address: &str,
    iommu: HostIommu,
) -> Vec<Finding> {
    let passthrough = Passthrough {
        endpoint: "00:06.0".parse().expect("an address"),
        host: address.parse().expect("an address"),
        token: None,
    };
    let facts = HostFacts::read(&host.root(), [passthrough.host]);
    findings(&host.root(), &facts, &passthrough, iommu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::fake::{FakeConfigSpace, FakeHost, Function};

    const PATH: &str = "0000:00:1c.0/0000:01:00.0";

    fn host(function: &Function<'_>) -> FakeHost {
        let host = FakeHost::new();
        let port = FakeConfigSpace::express(4, None);
        host.function(&Function::bridge("0000:00:1c.0", 3, port));
        host.function(function);
        host
    }

    fn found(host: &FakeHost, iommu: HostIommu) -> Vec<Finding> {
        found_at(host, "0000:01:00.0", iommu)
    }

    /// The only finding of the host.
    fn only(host: &FakeHost, iommu: HostIommu) -> Finding {
        let found = found(host, iommu);
        assert_eq!(found.len(), 1, "{found:#?}");
        found.into_iter().next().expect("one")
    }

    #[test]
    fn a_ready_device_has_no_findings() {
        let host = host(&Function::ready(PATH, 7));
        for iommu in [HostIommu::Iommufd, HostIommu::Type1] {
            assert_eq!(found(&host, iommu), []);
        }
    }

    #[test]
    fn a_device_with_another_driver_must_be_bound_to_vfio() {
        let host = host(&Function::bound(PATH, 7, Some("e1000e")));
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.severity, Severity::Missing);
        assert!(
            finding.problem.contains("driver e1000e"),
            "{}",
            finding.problem
        );
        let folder = "/sys/bus/pci/devices/0000:01:00.0";
        let commands = [
            format!("echo vfio-pci > {folder}/driver_override"),
            format!("echo 0000:01:00.0 > {folder}/driver/unbind"),
            "echo 0000:01:00.0 > /sys/bus/pci/drivers_probe".to_owned(),
        ];
        assert_eq!(finding.commands, commands);

        host.remove("sys/bus/pci/drivers/vfio-pci");
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.commands[0], "modprobe vfio-pci");
    }

    #[test]
    fn a_device_without_a_driver_is_not_unbound() {
        let host = host(&Function::bound(PATH, 7, None));
        let finding = only(&host, HostIommu::Type1);
        assert!(finding.problem.contains("no driver"), "{}", finding.problem);
        assert_eq!(finding.commands.len(), 2, "{finding:?}");
    }

    #[test]
    fn a_device_without_an_iommu_is_reported() {
        let ready = Function::ready(PATH, 7);
        let without = host(&Function {
            group: None,
            ..ready.clone()
        });
        let finding = only(&without, HostIommu::Iommufd);
        assert!(finding.cure.contains("intel_iommu=on"), "{finding:?}");

        let pretended = host(&ready);
        pretended.file("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
        let finding = only(&pretended, HostIommu::Type1);
        assert!(finding.problem.contains("without an IOMMU"), "{finding:?}");
    }

    /// QEMU's `pcie-pci-bridge` behind an SMMU: Linux 7.3.4 gives a group to the first device only.
    #[test]
    fn an_alias_behind_an_smmu_is_reported_with_its_bridge() {
        let host = FakeHost::new();
        let to_conventional = FakeConfigSpace::express(7, None);
        host.function(&Function::bridge("0000:00:1c.0", 3, to_conventional));
        host.function(&Function {
            group: None,
            ..Function::ready(PATH, 7)
        });
        host.iommu("smmu3.0x0000000009050000", &[]);
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.severity, Severity::Missing);
        let text =
            "no IOMMU translates for 0000:01:00.0: the PCI Express to PCI bridge 0000:00:1c.0";
        assert!(finding.problem.starts_with(text), "{}", finding.problem);
        assert!(
            finding.cure.contains("not behind the bridge"),
            "{finding:?}"
        );
    }

    #[test]
    fn a_group_with_a_driver_of_the_kernel_is_not_viable() {
        let host = host(&Function::ready(PATH, 7));
        let sibling = "0000:00:1c.0/0000:01:00.1";
        host.function(&Function::bound(sibling, 7, Some("snd_hda_intel")));
        host.function(&Function::bound("0000:00:1c.0/0000:01:00.2", 7, None));
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.severity, Severity::Missing);
        for part in [
            "host group 7",
            "0000:01:00.1 [8086:10d3] driver snd_hda_intel makes the group unusable",
            "root port 0000:00:1c.0 has no ACS",
        ] {
            assert!(finding.problem.contains(part), "{}", finding.problem);
        }
        assert!(finding.commands[0].contains("0000:01:00.1"));

        // A bridge does not spoil the group, but a bridge with a driver other than pcieport may.
        host.remove("sys/devices/pci0000:00/0000:00:1c.0/0000:01:00.1/driver");
        let bridge = Function {
            driver: Some("shpchp"),
            ..Function::bridge("0000:00:02.0", 7, FakeConfigSpace::conventional(true))
        };
        host.function(&bridge);
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.severity, Severity::Advice);
        assert!(
            finding.problem.contains("0000:00:02.0"),
            "{}",
            finding.problem
        );
    }

    /// No commands are printed for a device that the host uses, be it the endpoint's own or another of its group.
    #[test]
    fn devices_in_use_are_not_unbound() {
        let host = host(&Function::ready(PATH, 7));
        let disk = Function {
            class: "0x010601",
            ..Function::bound("0000:00:1c.0/0000:01:00.1", 7, Some("ahci"))
        };
        host.function(&disk);
        let sda = "sys/devices/pci0000:00/0000:00:1c.0/0000:01:00.1/ata1/block/sda";
        host.file(&format!("{sda}/dev"), "8:0\n");
        host.link(sda, "sys/class/block/sda");
        assert!(!only(&host, HostIommu::Iommufd).commands.is_empty());
        host.file(
            "proc/self/mountinfo",
            "29 1 8:0 / / rw - ext4 /dev/sda rw\n",
        );
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(
            (finding.severity, finding.commands.as_slice()),
            (Severity::Missing, &[][..])
        );
        assert!(
            finding.problem.contains("sda is mounted at /"),
            "{finding:?}"
        );
        assert!(finding.cure.contains("do not unbind"), "{finding:?}");

        let found = found_at(&host, "0000:01:00.1", HostIommu::Type1);
        let unbound = found.first().expect("a finding");
        assert!(unbound.problem.contains("driver ahci"), "{unbound:?}");
        assert!(
            unbound.problem.contains("sda is mounted at /"),
            "{unbound:?}"
        );
        assert_eq!(unbound.commands, [""; 0]);
    }

    #[test]
    fn a_bridge_cannot_be_passed_through() {
        let class = Function {
            class: "0x060400",
            ..Function::ready(PATH, 7)
        };
        let finding = only(&host(&class), HostIommu::Iommufd);
        assert!(
            finding.problem.contains("is a bridge"),
            "{}",
            finding.problem
        );
    }

    #[test]
    fn regions_that_the_firmware_maps_are_reported() {
        let host = host(&Function::ready(PATH, 7));
        let regions = "sys/kernel/iommu_groups/7/reserved_regions";
        host.file(regions, "0x0 0xffffff direct-relaxable\n");
        assert_eq!(found(&host, HostIommu::Iommufd), []);
        host.file(regions, "0x8d000000 0x8d0fffff direct\n");
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.severity, Severity::Missing);
        assert!(finding.problem.contains("0x8d000000..=0x8d0fffff"));
        host.file(regions, "0x8d000000 direct\n");
        assert_eq!(only(&host, HostIommu::Iommufd).severity, Severity::Advice);
    }

    #[test]
    fn iommufd_needs_a_kernel_with_character_devices() {
        let ready = Function::ready(PATH, 7);
        for vfio in [None, Some(("vfio0", false))] {
            let host = host(&Function {
                vfio,
                ..ready.clone()
            });
            host.file("dev/vfio/7", "");
            let finding = only(&host, HostIommu::Iommufd);
            assert!(
                finding.cure.contains("CONFIG_VFIO_DEVICE_CDEV"),
                "{finding:?}"
            );
            assert_eq!(found(&host, HostIommu::Type1), []);
        }
    }

    #[test]
    fn missing_nodes_are_reported() {
        let host = host(&Function::ready(PATH, 7));
        host.remove("dev/vfio/7");
        assert_eq!(found(&host, HostIommu::Iommufd), []);
        let finding = only(&host, HostIommu::Type1);
        assert_eq!(finding.problem, "there is no /dev/vfio/7");
        host.remove("dev/vfio/devices/vfio0");
        let finding = only(&host, HostIommu::Iommufd);
        assert_eq!(finding.problem, "there is no /dev/vfio/devices/vfio0");
    }

    #[test]
    fn nodes_without_access_are_reported_with_a_udev_rule() {
        // A file in place of the folder refuses every user, even root.
        let host = FakeHost::new();
        host.file("dev/vfio/devices", "not a folder");
        let finding = node_finding(&host.root(), "dev/vfio/devices/vfio0", "KERNEL==\"vfio*\"");
        let finding = finding.expect("refused");
        let start = "/dev/vfio/devices/vfio0 cannot be opened";
        assert!(finding.problem.starts_with(start), "{finding:?}");
        assert!(
            finding.cure.contains("rule KERNEL==\"vfio*\", GROUP="),
            "{finding:?}"
        );
        let node = "/dev/vfio/devices/vfio0";
        assert_eq!(
            finding.commands,
            [format!("chgrp kvm {node}"), format!("chmod 660 {node}")]
        );
    }
}
