//! Whether the host keeps devices from raising interrupts of others. The kernel reports it only when VFIO takes a device.

use super::Finding;
use crate::config::HostIommu;
use crate::host::sysfs::HostRoot;

/// The interrupt controllers that take the interrupts of devices, by their names in `/proc/interrupts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controllers {
    /// They check which device raises an interrupt: x86 with interrupt remapping (`IR-...`), or the translation service
    /// of an Arm GIC (`ITS-...`).
    Isolating,
    /// x86 without interrupt remapping.
    PlainX86,
    /// An Arm GIC without a translation service: frames of GICv2m.
    PlainArm,
    /// An Arm GIC. No device of the host has an MSI yet, so the names do not show whether there is a translation service.
    UnknownArm,
    /// Others, or no list.
    Unknown,
}

impl Controllers {
    fn of(interrupts: &str) -> Self {
        let is_count = |word: &&str| word.bytes().all(|byte| byte.is_ascii_digit());
        let names = interrupts
            .lines()
            .filter_map(|line| line.split_whitespace().skip(1).find(|word| !is_count(word)));
        let mut found = Self::Unknown;
        for name in names {
            found = match name {
                _ if name.starts_with("IR-")
                    || name.starts_with("ITS-")
                    || name.starts_with("GICv5-ITS") =>
                {
                    return Self::Isolating;
                }
                _ if name.starts_with("IO-APIC") || name.starts_with("PCI-MSI") => Self::PlainX86,
                // Kernels before 6.11 call the GICv2m's MSIs just so.
                _ if name.starts_with("GICv2m") || name == "MSI" => Self::PlainArm,
                _ if name.starts_with("GIC") && found == Self::Unknown => Self::UnknownArm,
                _ => found,
            };
        }
        found
    }
}

/// The finding if the host does not isolate interrupts, or if that is unknown.
pub(super) fn finding(root: &HostRoot, iommu: HostIommu) -> Option<Finding> {
    let module = match iommu {
        HostIommu::Iommufd => "iommufd",
        HostIommu::Type1 => "vfio_iommu_type1",
    };
    let parameter = format!("sys/module/{module}/parameters/allow_unsafe_interrupts");
    let allowed = root.value(&parameter);
    let text = root.text("proc/interrupts").unwrap_or_default();
    let unsafe_allowed = matches!(allowed.as_deref(), Some("Y" | "y" | "1"));
    let (problem, cure) = match Controllers::of(&text) {
        Controllers::Isolating => return None,
        Controllers::PlainX86 => (
            "interrupt remapping is off",
            "turn it on in the firmware, and boot without intremap=off, nointremap or noapic",
        ),
        Controllers::PlainArm => (
            "the interrupt controller (GICv2m) does not check which device raises an interrupt",
            "use a machine with a GICv3 and its translation service (ITS)",
        ),
        Controllers::UnknownArm => {
            return Some(Finding::advice(
                "/proc/interrupts does not show whether the interrupt controller has a translation service (ITS), which \
                 keeps devices from raising interrupts of others",
                "look for a line with ITS in the kernel's log; with an ITS nothing unsafe has to be allowed",
            ));
        }
        Controllers::Unknown => {
            return Some(Finding::advice(
                "/proc/interrupts does not show whether interrupts are remapped",
                "read the kernel's log after VFIO has taken the device",
            ));
        }
    };
    Some(if unsafe_allowed {
        Finding::advice(
            format!(
                "{problem}, and allow_unsafe_interrupts makes VFIO accept that: a guest can raise any interrupt of the host"
            ),
            format!("{cure}; take allow_unsafe_interrupts back"),
        )
    } else {
        Finding::missing(
            format!("{problem}: a device could raise any interrupt of the host"),
            cure,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use crate::host::sysfs::fake::FakeHost;
    use proptest::prelude::*;

    #[test]
    fn controllers_are_recognized_by_their_names() {
        for (text, controllers) in [
            (
                "      CPU0 CPU1\n 0: 5 0 IR-IO-APIC 2-edge timer\n 24: 0 0 DMAR-MSI 0-edge",
                Controllers::Isolating,
            ),
            (
                "      CPU0\n 24: 0 IR-PCI-MSIX-0000:00:02.0 0-edge eth0",
                Controllers::Isolating,
            ),
            (
                "      CPU0\n 11: 0 GICv3 27 Level arch_timer\n 24: 0 ITS-PCI-MSI-0000:00:02.0 0-edge eth0",
                Controllers::Isolating,
            ),
            (
                "      CPU0 CPU1\n 0: 5 0 IO-APIC 2-edge timer\n 9: 0 0 PCI-MSI 5 IR-remote",
                Controllers::PlainX86,
            ),
            (
                "      CPU0\n 11: 0 GICv2 27 Level arch_timer\n 24: 0 GICv2m-PCI-MSIX-0000:00:02.0 0 Edge eth0",
                Controllers::PlainArm,
            ),
            (
                "      CPU0\n 11: 0 GICv2 27 Level arch_timer\n 24: 0 MSI 81920 Edge eth0",
                Controllers::PlainArm,
            ),
            (
                "      CPU0\n 11: 0 GICv3 27 Level arch_timer\nIPI0: 5 Rescheduling interrupts",
                Controllers::UnknownArm,
            ),
            (
                "      CPU0\nNMI: 0 Non-maskable interrupts\n",
                Controllers::Unknown,
            ),
            ("", Controllers::Unknown),
        ] {
            assert_eq!(Controllers::of(text), controllers, "{text}");
        }
    }

    #[test]
    fn missing_isolation_is_reported() {
        let x86 = " 0: 5 IO-APIC 2-edge timer\n";
        let arm = " 24: 0 GICv2m-PCI-MSI-0000:00:02.0 0 Edge eth0\n";
        for (interrupts, word) in [(x86, "in the firmware"), (arm, "translation service")] {
            for (iommu, module) in [
                (HostIommu::Iommufd, "iommufd"),
                (HostIommu::Type1, "vfio_iommu_type1"),
            ] {
                let host = FakeHost::new();
                host.file("proc/interrupts", interrupts);
                let found = || finding(&host.root(), iommu).expect("a finding");
                let parameter = format!("sys/module/{module}/parameters/allow_unsafe_interrupts");
                assert_eq!(found().severity, Severity::Missing);
                assert!(found().cure.contains(word), "{:?}", found());
                // The cure does not weaken the protection.
                assert!(!found().cure.contains("allow"), "{:?}", found());
                assert!(found().commands.is_empty(), "{:?}", found());
                host.file(&parameter, "Y\n");
                assert_eq!(found().severity, Severity::Advice);
                host.remove(&parameter);
                assert_eq!(found().severity, Severity::Missing);
                host.remove("proc/interrupts");
                assert_eq!(found().severity, Severity::Advice);
                assert!(found().problem.contains("does not show"), "{:?}", found());
            }
        }
    }

    #[test]
    fn an_arm_host_without_msis_is_advised() {
        let host = FakeHost::new();
        host.file("proc/interrupts", " 11: 0 GICv3 27 Level arch_timer\n");
        let found = finding(&host.root(), HostIommu::Iommufd).expect("advice");
        assert_eq!(found.severity, Severity::Advice);
        assert!(
            found.cure.contains("nothing unsafe has to be allowed"),
            "{found:?}"
        );
        host.file(
            "proc/interrupts",
            " 24: 0 ITS-MSI-0000:00:02.0 0 Edge eth0\n",
        );
        assert_eq!(finding(&host.root(), HostIommu::Iommufd), None);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(\\PC|GICv|ITS-| |[0-9]|:|\n){0,60}") {
            let _ = Controllers::of(&text);
        }
    }
}
