//! Containers with a type1 IOMMU, and their groups.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_TYPE, vfio_group_status,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
};
use vm_memory::MmapRegion;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

use super::{
    MAX_INFO_WORDS, address_in, check_size, checked, first_word, low_half, size_of_u32, update,
};

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);

pub(in crate::vfio) fn api_version(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    // SAFETY: the request takes no argument; the descriptor is open.
    checked(unsafe { ioctl(&fd, VFIO_GET_API_VERSION()) })
}

pub(in crate::vfio) fn check_extension(fd: &impl AsRawFd, extension: u32) -> io::Result<bool> {
    // SAFETY: the request takes a number; the descriptor is open.
    let answer = unsafe { ioctl_with_val(fd, VFIO_CHECK_EXTENSION(), extension.into()) };
    checked(answer).map(|answer| answer > 0)
}

pub(in crate::vfio) fn set_iommu(fd: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: the request takes a number; the descriptor is open.
    checked(unsafe { ioctl_with_val(&fd, VFIO_SET_IOMMU(), kind.into()) })?;
    Ok(())
}

pub(in crate::vfio) fn group_status(fd: BorrowedFd<'_>) -> io::Result<vfio_group_status> {
    let mut argument = vfio_group_status {
        argsz: size_of_u32::<vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(&fd, VFIO_GROUP_GET_STATUS(), &mut argument) }?;
    Ok(argument)
}

pub(in crate::vfio) fn group_set_container(fd: BorrowedFd<'_>, container: RawFd) -> io::Result<()> {
    // SAFETY: the request takes a pointer to a descriptor's number, and only reads it.
    checked(unsafe { ioctl_with_ref(&fd, VFIO_GROUP_SET_CONTAINER(), &container) })?;
    Ok(())
}

pub(in crate::vfio) fn group_device(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the request takes a pointer to a string that ends with a zero, and only reads it.
    let made = checked(unsafe { ioctl_with_ptr(&fd, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) })?;
    // SAFETY: the kernel has opened it for this call, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Returns a `vfio_iommu_type1_info` with its capabilities behind it, in words of 8 bytes.
pub(in crate::vfio) fn type1_info(fd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut words = size_of::<vfio_iommu_type1_info>().div_ceil(8);
    loop {
        let mut answer = vec![0u64; words];
        let argsz = u32::try_from(words * 8).unwrap_or(u32::MAX);
        answer[0] = u64::from_ne_bytes(first_word(argsz));
        // SAFETY: `answer` has as many bytes as its first field says, has the structure's alignment, and is borrowed
        // mutably for the whole call.
        checked(unsafe { ioctl_with_mut_ptr(&fd, VFIO_IOMMU_GET_INFO(), answer.as_mut_ptr()) })?;
        let wanted = (low_half(answer[0]) as usize).div_ceil(8);
        if wanted <= words {
            return Ok(answer);
        }
        if wanted > MAX_INFO_WORDS {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        words = wanted;
    }
}

/// Maps `argument.size` bytes from `offset` of `memory`; `argument.vaddr` is filled in here.
///
/// # Errors
/// The kernel's, and `EINVAL` if `argument.argsz` is not the size of the structure.
pub(in crate::vfio) fn map_dma(
    fd: BorrowedFd<'_>,
    memory: &MmapRegion,
    offset: u64,
    mut argument: vfio_iommu_type1_dma_map,
) -> io::Result<()> {
    check_size::<vfio_iommu_type1_dma_map>(argument.argsz)?;
    argument.vaddr = address_in(memory, offset, argument.size)?;
    // SAFETY:
    // - this is the request's structure, with its size
    // - its addresses lie in `memory`, which is shared with other processes and never borrowed as Rust memory, so a
    //   device may write there
    // - the kernel takes references to the pages
    unsafe { update(&fd, VFIO_IOMMU_MAP_DMA(), &mut argument) }?;
    Ok(())
}

/// Returns the number of bytes that were mapped. `argument.flags` must not ask for the dirty bitmap.
///
/// # Errors
/// The kernel's, and `EINVAL` for the dirty bitmap or if `argument.argsz` is not the size of the structure.
pub(in crate::vfio) fn unmap_dma(
    fd: BorrowedFd<'_>,
    mut argument: vfio_iommu_type1_dma_unmap,
) -> io::Result<u64> {
    check_size::<vfio_iommu_type1_dma_unmap>(argument.argsz)?;
    if argument.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: this is the request's structure, with its size; without the bitmap flag no data follows.
    unsafe { update(&fd, VFIO_IOMMU_UNMAP_DMA(), &mut argument) }?;
    Ok(argument.size)
}
