//! Requests about the I/O address spaces of an iommufd that `iommufd-ioctls` does not have, and the numbers of all
//! requests.

use std::io;

use iommufd_bindings::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_COPY,
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_MAP_FILE,
    IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_CMD_VFIO_IOAS, IOMMUFD_TYPE, iommu_ioas_copy,
    iommu_ioas_iova_ranges, iommu_iova_range, iommu_vfio_ioas,
    iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR, iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET,
};
use iommufd_ioctls::IommuFd;
use vmm_sys_util::ioctl_io_nr;

use super::{check_size, size_of_u32, update};

// The sandbox allows each request by its number, and the crate does not export its numbers.
ioctl_io_nr!(IOMMU_DESTROY, IOMMUFD_TYPE as u32, IOMMUFD_CMD_DESTROY);
ioctl_io_nr!(
    IOMMU_IOAS_ALLOC,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_IOAS_ALLOC
);
ioctl_io_nr!(IOMMU_IOAS_COPY, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_COPY);
ioctl_io_nr!(
    IOMMU_IOAS_IOVA_RANGES,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_IOAS_IOVA_RANGES
);
ioctl_io_nr!(IOMMU_IOAS_MAP, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_MAP);
ioctl_io_nr!(
    IOMMU_IOAS_MAP_FILE,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_IOAS_MAP_FILE
);
ioctl_io_nr!(IOMMU_VFIO_IOAS, IOMMUFD_TYPE as u32, IOMMUFD_CMD_VFIO_IOAS);
ioctl_io_nr!(
    IOMMU_IOAS_UNMAP,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_IOAS_UNMAP
);

/// # Errors
/// The kernel's, and `EINVAL` if `argument.size` is not the size of the structure.
pub(in crate::vfio) fn ioas_copy(
    iommufd: &IommuFd,
    mut argument: iommu_ioas_copy,
) -> io::Result<()> {
    check_size::<iommu_ioas_copy>(argument.size)?;
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(iommufd, IOMMU_IOAS_COPY(), &mut argument) }?;
    Ok(())
}

/// Makes an address space the one that requests for VFIO containers act on; `None` takes it back.
pub(in crate::vfio) fn set_compatibility_ioas(
    iommufd: &IommuFd,
    ioas: Option<u32>,
) -> io::Result<()> {
    let op = match ioas {
        Some(_) => iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET,
        None => iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR,
    };
    let mut argument = iommu_vfio_ioas {
        size: size_of_u32::<iommu_vfio_ioas>(),
        ioas_id: ioas.unwrap_or(0),
        op: u16::try_from(op).map_err(io::Error::other)?,
        ..Default::default()
    };
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(iommufd, IOMMU_VFIO_IOAS(), &mut argument) }?;
    Ok(())
}

/// Stores the allowed ranges in `ranges`, as many as fit. Returns the number of ranges that the kernel has, and the alignment
/// in bytes.
pub(in crate::vfio) fn ioas_iova_ranges(
    iommufd: &IommuFd,
    ioas: u32,
    ranges: &mut [iommu_iova_range],
) -> io::Result<(usize, u64)> {
    let mut argument = iommu_ioas_iova_ranges {
        size: size_of_u32::<iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        num_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
        allowed_iovas: ranges.as_mut_ptr().addr() as u64,
        ..Default::default()
    };
    ranges.as_mut_ptr().expose_provenance();
    // SAFETY: this is the request's structure, with its size; it points to `num_iovas` elements, which are borrowed
    // mutably for the whole call.
    let done = unsafe { update(iommufd, IOMMU_IOAS_IOVA_RANGES(), &mut argument) };
    match done {
        // EMSGSIZE: there are more ranges than elements, and `num_iovas` is their number.
        Err(cause) if cause.raw_os_error() != Some(libc::EMSGSIZE) => Err(cause),
        Ok(_) | Err(_) => Ok((argument.num_iovas as usize, argument.out_iova_alignment)),
    }
}
