//! The kernel's checks of entries, commands and ranges, with its errnos: those of `arm-smmu-v3-iommufd.c`, and of VT-d's
//! `nested.c`.

use std::io;

use iommufd_bindings::{iommu_hwpt_invalidate, iommu_hwpt_vtd_s1_invalidate};

use super::{FakeIommu, FakeObject, NestingState};
use crate::vfio::fake::error;

pub fn unless(refused: bool, errno: i32) -> io::Result<()> {
    if refused { Err(error(errno)) } else { Ok(()) }
}

/// `arm_smmu_validate_vste`.
pub fn check_entry(words: [u64; 2]) -> io::Result<()> {
    const ALLOWED: [u64; 2] = [
        0xf80f_ffff_ffff_ffff,
        0b11 | 0b11 << 2 | 0b11 << 4 | 0b11 << 6 | 1 << 27 | 0b11 << 28,
    ];
    if words[0] & 1 == 0 {
        return Ok(());
    }
    unless(
        words[0] & !ALLOWED[0] != 0 || words[1] & !ALLOWED[1] != 0,
        libc::EIO,
    )?;
    unless(![0, 4, 5].contains(&(words[0] >> 1 & 7)), libc::EIO)?;
    unless(words[1] >> 28 & 3 > 1, libc::EIO)
}

impl NestingState {
    /// `arm_vsmmu_validate_user_cmd` of an SMMU without PASIDs and without ATS.
    pub(super) fn check_command(&self, viommu: u32, words: [u64; 2]) -> io::Result<()> {
        let FakeIommu::Smmu(hardware, _) = &self.iommu else {
            return Err(error(libc::EOPNOTSUPP));
        };
        let ranges = hardware.invalidates_ranges;
        let asid: u64 = ((1 << hardware.asid_bits) - 1) << 48;
        let (vmid, page) = (0xffff << 32, !0xfff);
        let allowed: [u64; 2] = match words[0] & 0xff {
            0x30 => [0, 0],
            0x10 => [vmid, 0],
            0x11 => [vmid | asid, 0],
            operation @ (0x12 | 0x13) => {
                let asid = if operation == 0x12 { asid } else { 0 };
                let (range, hint) = if ranges {
                    check_range(words)?;
                    (0x1f << 12 | 0x1f << 20, 0b11 << 8 | 0b11 << 10)
                } else {
                    (0, 0)
                };
                [asid | vmid | range, 1 | page | hint]
            }
            operation @ (0x05 | 0x06) => {
                let stream = words[0] >> 32;
                let is_known = self.objects.values().any(|object| {
                    matches!(object, FakeObject::Vdevice { viommu: of, stream: named, .. }
                        if *of == viommu && u64::from(*named) == stream)
                });
                unless(!is_known, libc::EIO)?;
                [0xffff_ffff << 32, u64::from(operation == 0x05)]
            }
            _ => return Err(error(libc::EIO)),
        };
        let is_wrong = words[0] & !(allowed[0] | 0xff) != 0 || words[1] & !allowed[1] != 0;
        unless(is_wrong, libc::EIO)
    }
}

/// `arm_vsmmu_validate_range`.
fn check_range(words: [u64; 2]) -> io::Result<()> {
    let is_range = words[0] & (0x1f << 12 | 0x3f << 20) != 0;
    let (level, granule) = (words[1] >> 8 & 3, words[1] >> 10 & 3);
    let is_reserved = match granule {
        0 => is_range || level != 0,
        2 if level == 1 => true,
        _ => !is_range && level == 0,
    };
    unless(is_reserved, libc::EIO)
}

/// The checks of one range in `intel_nested_cache_invalidate_user`.
pub fn check_vtd_range(entry: &iommu_hwpt_vtd_s1_invalidate) -> io::Result<()> {
    unless(
        entry.flags & !1 != 0 || entry.__reserved != 0,
        libc::EOPNOTSUPP,
    )?;
    let is_misaligned =
        !entry.addr.is_multiple_of(4096) || (entry.npages == u64::MAX && entry.addr != 0);
    unless(is_misaligned, libc::EINVAL)
}

/// The checks of `iommufd_hwpt_invalidate` itself.
pub fn check_invalidation(request: &iommu_hwpt_invalidate, count: usize) -> io::Result<()> {
    unless(request.size != 32, libc::EINVAL)?;
    unless(request.__reserved != 0, libc::EOPNOTSUPP)?;
    unless(count == 0 || count > 1 << 19, libc::EINVAL)
}
