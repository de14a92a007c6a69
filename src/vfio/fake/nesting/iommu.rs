//! The IOMMUs that the fake kernel can have.

use crate::vfio::nesting::{Granules, SmmuHardware, VtdHardware};

/// The IOMMU of the fake kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum FakeIommu {
    /// One that nests nothing.
    #[default]
    OneStage,
    /// An SMMUv3, and whether the firmware promises CANWBS.
    Smmu(SmmuHardware, bool),
    /// A VT-d unit with the erratum of read-only mappings.
    Vtd(VtdHardware),
}

impl FakeIommu {
    /// QEMU's SMMUv3, with the firmware's promise.
    pub fn smmu() -> Self {
        let hardware = SmmuHardware {
            walks_aarch64: true,
            walks_little_endian: true,
            asid_bits: 16,
            stream_bits: 16,
            invalidates_ranges: true,
            break_before_make_level: 2,
            granules: Granules {
                has_4k: true,
                has_16k: true,
                has_64k: true,
            },
            input_bits: 48,
            output_bits: 44,
            repeats_invalidations: false,
        };
        Self::Smmu(hardware, true)
    }

    /// A VT-d unit of a recent processor.
    pub fn vtd() -> Self {
        Self::Vtd(VtdHardware {
            nests: true,
            has_five_levels: false,
            has_gigabyte_pages: true,
            walks_coherently: true,
            second_stage_bits: 48,
            parent_is_writable_only: true,
        })
    }

    pub fn nests(&self) -> bool {
        match self {
            Self::OneStage => false,
            Self::Smmu(..) => true,
            Self::Vtd(hardware) => hardware.nests,
        }
    }
}
