//! I/O address spaces of an iommufd.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use iommufd_bindings::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_COPY,
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_MAP_FILE,
    IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE, iommu_destroy, iommu_ioas_alloc, iommu_ioas_copy,
    iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap,
    iommu_iova_range,
};
use vm_memory::MmapRegion;
use vmm_sys_util::ioctl_io_nr;

use super::{address_in, size_of_u32, update};

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
ioctl_io_nr!(
    IOMMU_IOAS_UNMAP,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_IOAS_UNMAP
);

pub(in crate::vfio) fn ioas_alloc(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut argument = iommu_ioas_alloc {
        size: size_of_u32::<iommu_ioas_alloc>(),
        ..Default::default()
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_IOAS_ALLOC(), &mut argument) }?;
    Ok(argument.out_ioas_id)
}

pub(in crate::vfio) fn destroy(fd: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    let mut argument = iommu_destroy {
        size: size_of_u32::<iommu_destroy>(),
        id,
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_DESTROY(), &mut argument) }?;
    Ok(())
}

/// `argument.fd` is set here.
pub(in crate::vfio) fn ioas_map_file(
    fd: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    mut argument: iommu_ioas_map_file,
) -> io::Result<()> {
    argument.size = size_of_u32::<iommu_ioas_map_file>();
    argument.fd = file.as_raw_fd();
    // SAFETY: the number's structure, with its size; what is mapped is a file's pages, not this
    // process's memory, and the kernel takes a reference to the file, which is open.
    unsafe { update(fd, IOMMU_IOAS_MAP_FILE(), &mut argument) }?;
    Ok(())
}

/// `argument.user_va` is set here, and `argument.length` bytes from `offset` must be in `memory`.
pub(in crate::vfio) fn ioas_map(
    fd: BorrowedFd<'_>,
    memory: &MmapRegion,
    offset: u64,
    mut argument: iommu_ioas_map,
) -> io::Result<()> {
    argument.size = size_of_u32::<iommu_ioas_map>();
    argument.user_va = address_in(memory, offset, argument.length)?;
    // SAFETY: the number's structure, with its size. The addresses lie in a mapping of memory that
    // is shared with others and never borrowed as Rust memory, so that a device may write there.
    // Whoever owns `memory` keeps it until this range is unmapped (see `backends::MemorySlot`).
    unsafe { update(fd, IOMMU_IOAS_MAP(), &mut argument) }?;
    Ok(())
}

pub(in crate::vfio) fn ioas_copy(
    fd: BorrowedFd<'_>,
    mut argument: iommu_ioas_copy,
) -> io::Result<()> {
    argument.size = size_of_u32::<iommu_ioas_copy>();
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_IOAS_COPY(), &mut argument) }?;
    Ok(())
}

/// Answers the bytes that were mapped.
pub(in crate::vfio) fn ioas_unmap(
    fd: BorrowedFd<'_>,
    mut argument: iommu_ioas_unmap,
) -> io::Result<u64> {
    argument.size = size_of_u32::<iommu_ioas_unmap>();
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_IOAS_UNMAP(), &mut argument) }?;
    Ok(argument.length)
}

/// As many ranges as there is room for in `ranges`; answers how many there are, and the alignment.
pub(in crate::vfio) fn ioas_iova_ranges(
    fd: BorrowedFd<'_>,
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
    // SAFETY: the number's structure, with its size; it points to `num_iovas` elements that are
    // borrowed mutably for the whole call.
    let done = unsafe { update(fd, IOMMU_IOAS_IOVA_RANGES(), &mut argument) };
    match done {
        // The number that is needed comes with it.
        Err(cause) if cause.raw_os_error() != Some(libc::EMSGSIZE) => Err(cause),
        Ok(_) | Err(_) => Ok((argument.num_iovas as usize, argument.out_iova_alignment)),
    }
}
