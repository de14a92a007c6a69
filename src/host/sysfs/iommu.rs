//! The instance of the host's IOMMU that translates for a device, and the properties of its page tables that a guest can
//! notice.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::HostRoot;
use super::read::{link_name, names, read_value};

/// Bits of VT-d's extended capabilities: scalable mode (SMTS) and first-stage translation (FLTS).
const VTD_SCALABLE_MODE: u64 = 1 << 43;
const VTD_FIRST_STAGE: u64 = 1 << 47;
/// The kernel's option for AMD's tables of version 2.
const AMD_TABLES_V2: &str = "pgtbl_v2";

/// An instance of the host's IOMMU. A host may have several, and even of several architectures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IommuInstance {
    /// Its name in `/sys/class/iommu`, such as `dmar0` or `smmu3.0x0000000009050000`.
    pub name: String,
    /// Its architecture.
    pub architecture: IommuArchitecture,
    /// The rights of a mapping for writes only.
    pub write_only: WriteOnlyRights,
}

/// The architecture of an IOMMU. Linux names the instances of each one alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IommuArchitecture {
    /// Intel VT-d: `dmarN`.
    VtD,
    /// AMD-Vi: `ivhdN`.
    AmdVi,
    /// Arm SMMUv3: `smmu3.ADDRESS`.
    SmmuV3,
    /// Arm SMMUv1 and SMMUv2: `smmu.ADDRESS`.
    Smmu,
    /// RISC-V: `riscv-iommu@DEVICE`.
    RiscV,
    /// A virtio-iommu: this host is itself a guest.
    Virtio,
    /// Another one.
    Other,
}

/// Whether a device can read memory that is mapped for writes only.
///
/// First-stage tables have the formats of the processors' tables. Those of x86 and Arm have no write-only pages, and those
/// of RISC-V reserve them. Linux takes such a mapping, and lets the device read, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteOnlyRights {
    /// The tables have write-only pages: such a read faults.
    Enforced,
    /// The device can read.
    Readable,
    /// Either is possible: it depends on the kernel's version and options, which sysfs does not show.
    Unknown,
}

impl IommuInstance {
    /// The instance that translates for the device in `folder` of the host below `root`; `None` if sysfs names none.
    pub(super) fn of_device(root: &HostRoot, folder: &Path) -> Option<Self> {
        let link = folder.join("iommu");
        let name = link_name(&link)?;
        let architecture = IommuArchitecture::of(&name);
        let write_only = match architecture {
            IommuArchitecture::VtD => vtd_rights(&link),
            IommuArchitecture::AmdVi => amd_rights(root),
            // Linux uses stage 1 in every SMMU that has it, and SMMUs without it are rare. Not by
            // IOMMU_GET_HW_INFO: Linux forbids user space to read the bit that says so (S1P).
            IommuArchitecture::SmmuV3 | IommuArchitecture::Smmu | IommuArchitecture::RiscV => {
                WriteOnlyRights::Readable
            }
            IommuArchitecture::Virtio | IommuArchitecture::Other => WriteOnlyRights::Unknown,
        };
        Some(Self {
            name,
            architecture,
            write_only,
        })
    }

    /// The consequence of [`Self::write_only`] for the guest's mappings; `None` if the IOMMU has write-only pages.
    pub fn write_only_note(&self) -> Option<&'static str> {
        match self.write_only {
            WriteOnlyRights::Enforced => None,
            WriteOnlyRights::Readable => Some(
                "no write-only pages: devices can also read memory that is mapped for writes only",
            ),
            WriteOnlyRights::Unknown => Some(
                "perhaps no write-only pages: devices may be able to read memory that is mapped for writes only",
            ),
        }
    }
}

/// The architecture, and the name in parentheses.
impl fmt::Display for IommuInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.architecture, self.name)
    }
}

impl IommuArchitecture {
    /// The architecture of the instance with this name.
    pub fn of(name: &str) -> Self {
        let numbered = |prefix: &str| {
            let number = name.strip_prefix(prefix);
            number.is_some_and(|it| !it.is_empty() && it.bytes().all(|b| b.is_ascii_digit()))
        };
        match name.split(['.', '@']).next().unwrap_or_default() {
            "smmu3" => Self::SmmuV3,
            "smmu" => Self::Smmu,
            "riscv-iommu" => Self::RiscV,
            _ if numbered("dmar") => Self::VtD,
            _ if numbered("ivhd") => Self::AmdVi,
            _ if numbered("virtio") => Self::Virtio,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for IommuArchitecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VtD => "VT-d",
            Self::AmdVi => "AMD-Vi",
            Self::SmmuV3 => "SMMUv3",
            Self::Smmu => "SMMU",
            Self::RiscV => "RISC-V IOMMU",
            Self::Virtio => "virtio-iommu",
            Self::Other => "IOMMU",
        })
    }
}

/// The names of all instances of the host below `root`, in alphabetical order; none if the kernel uses no IOMMU.
pub(super) fn instances(root: &HostRoot) -> Vec<String> {
    names(&root.path("sys/class/iommu"))
}

/// Linux uses first-stage tables in scalable mode if the IOMMU has both (`intel_iommu_domain_alloc_paging_flags` of 7.3.4),
/// and second-stage tables otherwise. Neither the mode nor the choice of older kernels is in sysfs.
fn vtd_rights(instance: &Path) -> WriteOnlyRights {
    let digits = read_value(&instance.join("intel-iommu/ecap"));
    let capabilities =
        digits.and_then(|digits| u64::from_str_radix(digits.trim_start_matches("0x"), 16).ok());
    let both = VTD_SCALABLE_MODE | VTD_FIRST_STAGE;
    match capabilities {
        Some(has) if has & both != both => WriteOnlyRights::Enforced,
        _ => WriteOnlyRights::Unknown,
    }
}

/// Linux uses tables of version 1 unless an option asks for the others.
fn amd_rights(root: &HostRoot) -> WriteOnlyRights {
    match root.value("proc/cmdline") {
        Some(line) => {
            let values = line
                .split_whitespace()
                .filter_map(|word| word.strip_prefix("amd_iommu="));
            let mut options = values.flat_map(|value| value.split(','));
            if options.any(|option| option == AMD_TABLES_V2) {
                WriteOnlyRights::Readable
            } else {
                WriteOnlyRights::Enforced
            }
        }
        None => WriteOnlyRights::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeHost, Function};
    use super::*;

    const ADDRESS: &str = "0000:01:00.0";

    fn instance(host: &FakeHost, name: &str) -> IommuInstance {
        host.function(&Function::ready(ADDRESS, 7));
        host.iommu(name, &[ADDRESS]);
        let folder = host.path(&format!("sys/bus/pci/devices/{ADDRESS}"));
        IommuInstance::of_device(&host.root(), &folder).expect("an instance")
    }

    #[test]
    fn the_architecture_follows_from_the_name() {
        for (name, shown) in [
            ("dmar0", "VT-d (dmar0)"),
            ("ivhd12", "AMD-Vi (ivhd12)"),
            (
                "smmu3.0x0000000009050000",
                "SMMUv3 (smmu3.0x0000000009050000)",
            ),
            ("smmu.0x0000000012c00000", "SMMU (smmu.0x0000000012c00000)"),
            (
                "riscv-iommu@0000:00:01.0",
                "RISC-V IOMMU (riscv-iommu@0000:00:01.0)",
            ),
            ("virtio3", "virtio-iommu (virtio3)"),
            ("dmar", "IOMMU (dmar)"),
            ("apple-dart.1", "IOMMU (apple-dart.1)"),
        ] {
            assert_eq!(instance(&FakeHost::new(), name).to_string(), shown);
        }
    }

    #[test]
    fn stage_1_tables_of_arm_have_no_write_only_pages() {
        let host = FakeHost::new();
        let found = instance(&host, "smmu3.0x0000000009050000");
        assert_eq!(found.write_only, WriteOnlyRights::Readable);
        assert!(
            found
                .write_only_note()
                .is_some_and(|it| it.contains("can also read"))
        );
        assert_eq!(instances(&host.root()), ["smmu3.0x0000000009050000"]);
    }

    #[test]
    fn vt_d_has_write_only_pages_without_first_stage_tables() {
        // The last two: both capabilities, and none that can be read.
        for (capabilities, rights) in [
            ("f0207a\n", WriteOnlyRights::Enforced),
            ("800000000000\n", WriteOnlyRights::Enforced),
            ("80000000000\n", WriteOnlyRights::Enforced),
            ("880000000000\n", WriteOnlyRights::Unknown),
            ("odd\n", WriteOnlyRights::Unknown),
        ] {
            let host = FakeHost::new();
            host.file("sys/class/iommu/dmar0/intel-iommu/ecap", capabilities);
            assert_eq!(
                instance(&host, "dmar0").write_only,
                rights,
                "{capabilities}"
            );
        }
    }

    #[test]
    fn amd_vi_has_write_only_pages_unless_the_kernel_was_asked_for_other_tables() {
        for (line, rights) in [
            (None, WriteOnlyRights::Unknown),
            (Some("root=/dev/sda1 quiet\n"), WriteOnlyRights::Enforced),
            (
                Some("iommu=pt amd_iommu=fullflush\n"),
                WriteOnlyRights::Enforced,
            ),
            (
                Some("amd_iommu=fullflush,pgtbl_v2 quiet\n"),
                WriteOnlyRights::Readable,
            ),
        ] {
            let host = FakeHost::new();
            if let Some(line) = line {
                host.file("proc/cmdline", line);
            }
            assert_eq!(instance(&host, "ivhd0").write_only, rights, "{line:?}");
        }
    }

    #[test]
    fn a_device_without_an_iommu_has_no_instance() {
        let host = FakeHost::new();
        host.function(&Function::ready(ADDRESS, 7));
        let folder = host.path(&format!("sys/bus/pci/devices/{ADDRESS}"));
        assert_eq!(IommuInstance::of_device(&host.root(), &folder), None);
        assert_eq!(instances(&host.root()), [""; 0]);
    }
}
