//! The system calls that `iommufd-ioctls` does not make: ioctls of `linux/vfio.h` and `linux/iommufd.h`, and mmap of
//! a device's memory. `docs/architecture.md` has the reason for each.
#![expect(
    unsafe_code,
    reason = "system calls, each with the structure its number stands for"
)]

mod device;
mod export;
mod iommufd;
mod nesting;
mod type1;

use std::ffi::{c_int, c_ulong};
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::MmapRegion;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use self::device::{
    VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_FEATURE, VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_REGION_INFO,
};
use self::iommufd::{
    IOMMU_DESTROY, IOMMU_IOAS_ALLOC, IOMMU_IOAS_COPY, IOMMU_IOAS_IOVA_RANGES, IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FILE, IOMMU_IOAS_UNMAP, IOMMU_VFIO_IOAS,
};
use self::type1::{
    VFIO_CHECK_EXTENSION, VFIO_GET_API_VERSION, VFIO_GROUP_GET_DEVICE_FD, VFIO_GROUP_GET_STATUS,
    VFIO_GROUP_SET_CONTAINER, VFIO_IOMMU_GET_INFO, VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA,
    VFIO_SET_IOMMU,
};

#[cfg(test)]
pub(super) use self::device::{
    attach_argument, bind_argument, bus_master_argument, detach_argument,
};
pub(super) use self::device::{
    attach_iommufd_pt, bind_iommufd, detach_iommufd_pt, device_info, dma_buf, map_region,
    region_info, set_bus_master,
};
pub(super) use self::export::{
    IrqData, hot_reset, hot_reset_info, if_mappable, irq_info, region_info_whole, replace_file,
    requests_of_bus_resets, requests_of_exports, reset, set_irqs, set_register_event,
};
pub(super) use self::iommufd::{ioas_copy, ioas_iova_ranges, set_compatibility_ioas};
pub(super) use self::nesting::{
    hw_info, hwpt_alloc, hwpt_invalidate, requests_of_nesting, vdevice_alloc, veventq_alloc,
    viommu_alloc,
};
pub(super) use self::type1::{
    api_version, check_extension, group_device, group_set_container, group_status, map_dma,
    set_iommu, type1_info, unmap_dma,
};

/// The requests that open devices and groups.
pub(super) fn requests_of_opening() -> Vec<c_ulong> {
    vec![
        VFIO_GET_API_VERSION(),
        VFIO_CHECK_EXTENSION(),
        VFIO_SET_IOMMU(),
        VFIO_GROUP_GET_STATUS(),
        VFIO_GROUP_SET_CONTAINER(),
        VFIO_GROUP_GET_DEVICE_FD(),
        VFIO_DEVICE_BIND_IOMMUFD(),
        IOMMU_VFIO_IOAS(),
    ]
}

/// The requests that map, unmap, and move devices between address spaces, once devices and groups are open.
pub(super) fn requests_of_backends() -> Vec<c_ulong> {
    vec![
        VFIO_DEVICE_GET_INFO(),
        VFIO_DEVICE_GET_REGION_INFO(),
        VFIO_DEVICE_FEATURE(),
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(),
        VFIO_DEVICE_DETACH_IOMMUFD_PT(),
        VFIO_IOMMU_GET_INFO(),
        VFIO_IOMMU_MAP_DMA(),
        VFIO_IOMMU_UNMAP_DMA(),
        IOMMU_DESTROY(),
        IOMMU_IOAS_ALLOC(),
        IOMMU_IOAS_COPY(),
        IOMMU_IOAS_IOVA_RANGES(),
        IOMMU_IOAS_MAP(),
        IOMMU_IOAS_MAP_FILE(),
        IOMMU_IOAS_UNMAP(),
    ]
}

/// The size of a structure, as the structure's first field holds it.
pub(super) fn size_of_u32<T>() -> u32 {
    // The largest structure has a few dozen bytes.
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// Refuses a structure whose size field is not the size of the structure.
fn check_size<T>(field: u32) -> io::Result<()> {
    if field == size_of_u32::<T>() {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

fn checked(done: c_int) -> io::Result<c_int> {
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(done)
    }
}

/// # Safety
/// - `request` must take a pointer to a `T`.
/// - The size field of `argument`, if it has one, must be at most `size_of::<T>()`.
/// - Memory that `argument` points to or maps must be sound to hand to the kernel.
unsafe fn update<T>(fd: &impl AsRawFd, request: c_ulong, argument: &mut T) -> io::Result<c_int> {
    // SAFETY:
    // - the descriptor is open: its owner is borrowed
    // - argument: valid for reads and writes of all its bytes, and the rest is the caller's promise
    checked(unsafe { ioctl_with_mut_ref(fd, request, argument) })
}

/// The longest answer that is read, in words of 8 bytes. The kernel's lists of ranges and areas are far shorter.
const MAX_INFO_WORDS: usize = 8192;

fn first_word(argsz: u32) -> [u8; 8] {
    let [a, b, c, d] = argsz.to_ne_bytes();
    [a, b, c, d, 0, 0, 0, 0]
}

fn low_half(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// The address of the `len` bytes from `offset` on in `memory`.
///
/// # Errors
/// `EFAULT` if some of them lie outside of `memory`.
pub(super) fn address_in(memory: &MmapRegion, offset: u64, len: u64) -> io::Result<u64> {
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= memory.size() as u64);
    if !inside {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    Ok(memory.as_ptr().expose_provenance() as u64 + offset)
}
