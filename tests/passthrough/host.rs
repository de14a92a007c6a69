//! The IOMMU of the emulated host, and where its kind changes what a test expects.

use std::sync::LazyLock;

/// A kind of IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostIommu {
    /// Intel's.
    Vtd,
    /// AMD's.
    Amd,
    /// Arm's SMMUv3, with Linux's tables for its first stage. There may be another one, with the second stage, for the
    /// second `iommu-testdev`.
    Smmu,
    /// Arm's SMMUv3, with tables for its second stage.
    SmmuStage2,
}

/// The IOMMU that `l1.sh` has given the machine. On any other host, which only a bench uses: the usual one.
pub fn host_iommu() -> HostIommu {
    static FOUND: LazyLock<HostIommu> =
        LazyLock::new(|| match std::env::var("VIOMMU_L1").as_deref() {
            Err(_) if cfg!(target_arch = "aarch64") => HostIommu::Smmu,
            Err(_) | Ok("vtd" | "vtd-scalable" | "vtd-no-snoop") => HostIommu::Vtd,
            Ok("amd") => HostIommu::Amd,
            Ok("smmuv3" | "smmuv3-two" | "smmuv3-nested") => HostIommu::Smmu,
            Ok("smmuv3-stage2") => HostIommu::SmmuStage2,
            Ok(other) => panic!("VIOMMU_L1 is `{other}`, an IOMMU that no test knows"),
        });
    *FOUND
}

impl HostIommu {
    pub fn is_amd(self) -> bool {
        self == Self::Amd
    }

    pub fn is_smmu(self) -> bool {
        matches!(self, Self::Smmu | Self::SmmuStage2)
    }

    /// The key `machine` of a VM's configuration: a host emulates guests of its own architecture.
    pub fn machine_key(self) -> &'static str {
        if self.is_smmu() {
            "machine = \"virt\"\n"
        } else {
            ""
        }
    }

    /// The first and last address of the region that the host reserves for interrupts. On Arm the kernel maps the
    /// doorbell there when it sets up an interrupt.
    pub fn msi(self) -> (u64, u64) {
        if self.is_smmu() {
            (0x800_0000, 0x80f_ffff)
        } else {
            (0xfee0_0000, 0xfeef_ffff)
        }
    }

    /// The regions within [`Self::msi`] that PROBE reports: first and last address, and whether it is the guest's doorbell.
    /// That of QEMU's `virt` lies within an SMMU's window, whose other addresses are reserved.
    pub fn reported_around_msi(self) -> Vec<(u64, u64, u8)> {
        if self.is_smmu() {
            vec![
                (0x800_0000, 0x808_ffff, 0),
                (0x809_0000, 0x809_ffff, 1),
                (0x80a_0000, 0x80f_ffff, 0),
            ]
        } else {
            let (first, last) = self.msi();
            vec![(first, last, 1)]
        }
    }

    /// The first and last address of what the IOMMU cannot translate beside [`Self::msi`]: AMD's addresses of
    /// HyperTransport, and what exceeds the width of a second stage, in QEMU's SMMU 44 bits.
    pub fn untranslated(self) -> Option<(u64, u64)> {
        match self {
            Self::Amd => Some((0xfd_0000_0000, 0xff_ffff_ffff)),
            Self::SmmuStage2 => Some((1 << 44, (1 << 48) - 1)),
            Self::Vtd | Self::Smmu => None,
        }
    }

    /// Whether a device can be kept from reading memory that it may write. Linux's tables for the SMMU's first stage
    /// cannot say so.
    pub fn has_write_only(self) -> bool {
        self != Self::Smmu
    }

    /// Whether the host's kernel logs a write to a read-only page. The emulations of AMD's IOMMU and of the SMMU's second
    /// stage report only missing pages.
    pub fn logs_rights(self) -> bool {
        !matches!(self, Self::Amd | Self::SmmuStage2)
    }

    /// The words in the kernel's log for a fault.
    pub fn is_fault(line: &str) -> bool {
        ["fault addr", "IO_PAGE_FAULT", "event: F_"]
            .iter()
            .any(|words| line.contains(words))
    }

    /// An eighth of `count` on AMD, where the emulated IOMMU is slow at each change.
    pub fn fewer_on_amd(self, count: u64) -> u64 {
        if self.is_amd() { count / 8 } else { count }
    }
}
