//! What `IOMMU_GET_HW_INFO` tells about the IOMMU above a device, decoded as far as nesting needs it.

use iommufd_bindings::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd,
    iommu_hw_info_vtd_flags_IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 as ERRATUM_READ_ONLY,
};

/// `IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI`, which `iommufd-bindings` lacks.
const ERRATUM_REPEAT: u32 = 1;

/// The IOMMU above a device, and what it can do for this device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardwareInfo {
    /// The kind of the IOMMU, with its registers.
    pub kind: HardwareKind,
    /// Whether the IOMMU can note which pages a device has written.
    pub tracks_dirty_pages: bool,
    /// Whether the device may cache translations (ATS). A cache in the device needs invalidations of its own.
    pub may_use_ats: bool,
    /// The width of the device's PASIDs in bits; 0 if it has none.
    pub pasid_bits: u8,
}

/// A kind of IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HardwareKind {
    /// Arm's SMMUv3.
    Smmu(SmmuHardware),
    /// Intel's VT-d.
    Vtd(VtdHardware),
    /// Another kind, by its number in `enum iommu_hw_info_type`. This crate knows no nested tables for it.
    Other(u32),
}

/// An SMMUv3, from its registers `SMMU_IDR0` to `SMMU_IDR5`.
///
/// The kernel supports devices only below SMMUs that walk tables coherently, so no bit says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmmuHardware {
    /// Whether it walks tables in AArch64's format (`IDR0.TTF`).
    pub walks_aarch64: bool,
    /// Whether it walks little-endian tables (`IDR0.TTENDIAN`).
    pub walks_little_endian: bool,
    /// The width of an ASID in bits: 8 or 16 (`IDR0.ASID16`).
    pub asid_bits: u8,
    /// The width of a stream ID in bits (`IDR1.SIDSIZE`).
    pub stream_bits: u8,
    /// Whether one command invalidates a range of pages (`IDR3.RIL`).
    pub invalidates_ranges: bool,
    /// How a block and a table may replace each other while a device uses them, 0 to 2 (`IDR3.BBML`). At 0 the entry must
    /// be invalid in between.
    pub break_before_make_level: u8,
    /// Whether tables may have granules of 4 KiB, 16 KiB and 64 KiB (`IDR5.GRAN*`).
    pub granules: Granules,
    /// The width of an input address in bits: 48, or 52 (`IDR5.VAX`).
    pub input_bits: u8,
    /// The width of an output address in bits, 32 to 52 (`IDR5.OAS`).
    pub output_bits: u8,
    /// Whether an erratum demands each invalidation twice, with a SYNC after each.
    pub repeats_invalidations: bool,
}

/// The sizes of a table's smallest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granules {
    /// 4 KiB.
    pub has_4k: bool,
    /// 16 KiB.
    pub has_16k: bool,
    /// 64 KiB.
    pub has_64k: bool,
}

/// A VT-d unit, from its capability registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdHardware {
    /// Whether it translates a first stage below a second stage (`ECAP.SMTS`, `FLTS`, `SLTS` and `NEST`).
    pub nests: bool,
    /// Whether a first stage may have five levels (`CAP.FL5LP`); four it may always have.
    pub has_five_levels: bool,
    /// Whether a first stage may have pages of 1 GiB (`CAP.FL1GP`).
    pub has_gigabyte_pages: bool,
    /// Whether it walks tables coherently (`ECAP.SMPWC`). If not, each change of a table must be flushed from the caches.
    pub walks_coherently: bool,
    /// The width of a second stage's input address in bits (`CAP.MGAW`).
    pub second_stage_bits: u8,
    /// Whether the kernel refuses read-only mappings in the parent of a nested table (erratum 772415).
    pub parent_is_writable_only: bool,
}

impl SmmuHardware {
    pub(super) fn decode(raw: &iommu_hw_info_arm_smmuv3) -> Self {
        let [idr0, idr1, _, idr3, _, idr5] = raw.idr;
        let bit = |register: u32, at: u32| register & (1 << at) != 0;
        Self {
            walks_aarch64: bit(idr0, 3),
            // 0: both byte orders; 2: little-endian.
            walks_little_endian: matches!(field(idr0, 21, 2), 0 | 2),
            asid_bits: if bit(idr0, 12) { 16 } else { 8 },
            stream_bits: field(idr1, 0, 6),
            invalidates_ranges: bit(idr3, 10),
            break_before_make_level: field(idr3, 11, 2).min(2),
            granules: Granules {
                has_4k: bit(idr5, 4),
                has_16k: bit(idr5, 5),
                has_64k: bit(idr5, 6),
            },
            input_bits: if field(idr5, 10, 2) == 1 { 52 } else { 48 },
            output_bits: match field(idr5, 0, 3) {
                0 => 32,
                1 => 36,
                2 => 40,
                3 => 42,
                4 => 44,
                5 => 48,
                // 7 is reserved for wider addresses.
                _ => 52,
            },
            repeats_invalidations: raw.flags & ERRATUM_REPEAT != 0,
        }
    }
}

impl VtdHardware {
    pub(super) fn decode(raw: &iommu_hw_info_vtd) -> Self {
        let cap = |at: u32| raw.cap_reg & (1 << at) != 0;
        let ecap = |at: u32| raw.ecap_reg & (1 << at) != 0;
        let [_, _, width, ..] = raw.cap_reg.to_le_bytes();
        Self {
            nests: [43, 47, 46, 26].into_iter().all(ecap),
            has_five_levels: cap(60),
            has_gigabyte_pages: cap(56),
            walks_coherently: ecap(48),
            second_stage_bits: (width & 0x3f) + 1,
            parent_is_writable_only: raw.flags & ERRATUM_READ_ONLY != 0,
        }
    }
}

/// `bits` bits of a register, at most 8, from bit `at` on.
fn field(register: u32, at: u32, bits: u32) -> u8 {
    let [low, ..] = (register >> at).to_le_bytes();
    low & u8::MAX >> (8 - bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_of_an_emulated_smmu_are_decoded() {
        // As QEMU's SMMUv3 with both stages reports them.
        let raw = iommu_hw_info_arm_smmuv3 {
            idr: [0x0d40_101f, 0x1000_0210, 0, 0x1414, 0, 0x74],
            ..Default::default()
        };
        let found = SmmuHardware::decode(&raw);
        let all = Granules {
            has_4k: true,
            has_16k: true,
            has_64k: true,
        };
        let expected = SmmuHardware {
            walks_aarch64: true,
            walks_little_endian: true,
            asid_bits: 16,
            stream_bits: 16,
            invalidates_ranges: true,
            break_before_make_level: 2,
            granules: all,
            input_bits: 48,
            output_bits: 44,
            repeats_invalidations: false,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn each_field_of_an_smmu_has_its_own_bits() {
        let with = |register: usize, value: u32| {
            let mut raw = iommu_hw_info_arm_smmuv3::default();
            raw.idr[register] = value;
            SmmuHardware::decode(&raw)
        };
        let none = SmmuHardware::decode(&iommu_hw_info_arm_smmuv3::default());
        assert!(!none.walks_aarch64 && none.walks_little_endian && !none.invalidates_ranges);
        assert_eq!(
            (none.asid_bits, none.input_bits, none.output_bits),
            (8, 48, 32)
        );
        assert!(with(0, 2 << 21).walks_little_endian);
        assert!(!with(0, 1 << 21).walks_little_endian);
        assert!(!with(0, 3 << 21).walks_little_endian);
        assert_eq!(with(1, 0x3f | 0x7c0).stream_bits, 63);
        assert_eq!(with(3, 1 << 11).break_before_make_level, 1);
        assert_eq!(with(5, 1 << 10).input_bits, 52);
        let widths = [32, 36, 40, 42, 44, 48, 52];
        for (value, bits) in (0..).zip(widths) {
            assert_eq!(with(5, value).output_bits, bits);
        }
        let only_16k = with(5, 1 << 5).granules;
        assert!(!only_16k.has_4k && only_16k.has_16k && !only_16k.has_64k);
        let erratum = iommu_hw_info_arm_smmuv3 {
            flags: 1,
            ..Default::default()
        };
        assert!(SmmuHardware::decode(&erratum).repeats_invalidations);
    }

    #[test]
    fn a_vtd_unit_nests_only_with_all_four_capabilities() {
        let nesting = 1 << 43 | 1 << 47 | 1 << 46 | 1 << 26;
        let with = |cap_reg: u64, ecap_reg: u64| {
            VtdHardware::decode(&iommu_hw_info_vtd {
                flags: 1,
                cap_reg,
                ecap_reg,
                ..Default::default()
            })
        };
        let all = with(1 << 60 | 1 << 56 | 47 << 16, nesting | 1 << 48);
        let expected = VtdHardware {
            nests: true,
            has_five_levels: true,
            has_gigabyte_pages: true,
            walks_coherently: true,
            second_stage_bits: 48,
            parent_is_writable_only: true,
        };
        assert_eq!(all, expected);
        for missing in [43, 47, 46, 26] {
            assert!(!with(0, nesting & !(1 << missing)).nests, "{missing}");
        }
    }
}
