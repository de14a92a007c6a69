//! Requests about nested translation. The crate makes all of them but `IOMMU_VEVENTQ_ALLOC`; the pointers in their
//! structures are made here.

use std::ffi::c_ulong;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use iommufd_bindings::{
    IOMMUFD_CMD_GET_HW_INFO, IOMMUFD_CMD_HWPT_ALLOC, IOMMUFD_CMD_HWPT_INVALIDATE,
    IOMMUFD_CMD_VDEVICE_ALLOC, IOMMUFD_CMD_VEVENTQ_ALLOC, IOMMUFD_CMD_VIOMMU_ALLOC, IOMMUFD_TYPE,
    iommu_hw_info, iommu_hwpt_alloc, iommu_hwpt_invalidate, iommu_vdevice_alloc,
    iommu_veventq_alloc, iommu_viommu_alloc,
};
use iommufd_ioctls::{IommuFd, IommufdError};
use vmm_sys_util::ioctl_io_nr;

use super::{size_of_u32, update};

ioctl_io_nr!(
    IOMMU_GET_HW_INFO,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_GET_HW_INFO
);
ioctl_io_nr!(
    IOMMU_HWPT_ALLOC,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_HWPT_ALLOC
);
ioctl_io_nr!(
    IOMMU_HWPT_INVALIDATE,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_HWPT_INVALIDATE
);
ioctl_io_nr!(
    IOMMU_VIOMMU_ALLOC,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_VIOMMU_ALLOC
);
ioctl_io_nr!(
    IOMMU_VDEVICE_ALLOC,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_VDEVICE_ALLOC
);
ioctl_io_nr!(
    IOMMU_VEVENTQ_ALLOC,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_VEVENTQ_ALLOC
);

/// The requests about nested translation, but for those of [`requests_of_backends`](super::requests_of_backends).
pub(in crate::vfio) fn requests_of_nesting() -> Vec<c_ulong> {
    vec![
        IOMMU_GET_HW_INFO(),
        IOMMU_HWPT_ALLOC(),
        IOMMU_HWPT_INVALIDATE(),
        IOMMU_VIOMMU_ALLOC(),
        IOMMU_VDEVICE_ALLOC(),
        IOMMU_VEVENTQ_ALLOC(),
    ]
}

/// A structure of plain numbers with the kernel's layout.
///
/// # Safety
/// All bit patterns must be values, and there must be no padding.
pub(in crate::vfio) unsafe trait Plain: Copy + Default {}

// SAFETY: no member, no byte.
unsafe impl Plain for () {}
// SAFETY: ten numbers of 32 bits.
unsafe impl Plain for iommufd_bindings::iommu_hw_info_arm_smmuv3 {}
// SAFETY: two numbers of 32 bits, then two of 64.
unsafe impl Plain for iommufd_bindings::iommu_hw_info_vtd {}
// SAFETY: two numbers of 64 bits.
unsafe impl Plain for iommufd_bindings::iommu_hwpt_arm_smmuv3 {}
// SAFETY: two numbers of 64 bits, then two of 32.
unsafe impl Plain for iommufd_bindings::iommu_hwpt_vtd_s1 {}
// SAFETY: two numbers of 64 bits.
unsafe impl Plain for iommufd_bindings::iommu_viommu_arm_smmuv3_invalidate {}
// SAFETY: two numbers of 64 bits, then two of 32.
unsafe impl Plain for iommufd_bindings::iommu_hwpt_vtd_s1_invalidate {}

/// The answer of `IOMMU_GET_HW_INFO`.
pub(in crate::vfio) struct HwInfoAnswer {
    /// `enum iommu_hw_info_type`.
    pub data_type: u32,
    pub capabilities: u64,
    pub pasid_bits: u8,
}

/// Asks for the IOMMU of a device. `data` gets as much as fits; the answer has the type of it.
pub(in crate::vfio) fn hw_info<T: Plain>(
    iommufd: &IommuFd,
    device: u32,
    data: &mut T,
) -> io::Result<HwInfoAnswer> {
    let data: *mut T = data;
    let mut argument = iommu_hw_info {
        size: size_of_u32::<iommu_hw_info>(),
        dev_id: device,
        data_len: size_of_u32::<T>(),
        // The bytes are borrowed mutably for the whole call, and the kernel may write any value (`Plain`).
        data_uptr: data.expose_provenance() as u64,
        ..Default::default()
    };
    iommufd.get_hw_info(&mut argument).map_err(nesting_errno)?;
    Ok(HwInfoAnswer {
        // SAFETY: both members are the same number of 32 bits.
        data_type: unsafe { argument.__bindgen_anon_1.out_data_type },
        capabilities: argument.out_capabilities,
        pasid_bits: argument.out_max_pasid_log2,
    })
}

/// Allocates a page table. `data` describes a nested one; `()` is that of a table that the kernel fills.
pub(in crate::vfio) fn hwpt_alloc<T: Plain>(
    iommufd: &IommuFd,
    mut argument: iommu_hwpt_alloc,
    data: &T,
) -> io::Result<u32> {
    let data: *const T = data;
    argument.data_len = size_of_u32::<T>();
    // The bytes are borrowed for the whole call.
    argument.data_uptr = if size_of::<T>() == 0 {
        0
    } else {
        data.expose_provenance() as u64
    };
    let made = iommufd.alloc_iommu_hwpt(&mut argument);
    made.map_err(nesting_errno)?;
    Ok(argument.out_hwpt_id)
}

pub(in crate::vfio) fn viommu_alloc(
    iommufd: &IommuFd,
    mut argument: iommu_viommu_alloc,
) -> io::Result<u32> {
    let made = iommufd.alloc_iommu_viommu(&mut argument);
    made.map_err(nesting_errno)?;
    Ok(argument.out_viommu_id)
}

pub(in crate::vfio) fn vdevice_alloc(
    iommufd: &IommuFd,
    mut argument: iommu_vdevice_alloc,
) -> io::Result<u32> {
    let made = iommufd.alloc_iommu_vdevice(&mut argument);
    made.map_err(nesting_errno)?;
    Ok(argument.out_vdevice_id)
}

/// Invalidates by `entries`. Returns the result and the number of entries that were done, also after an error.
pub(in crate::vfio) fn hwpt_invalidate<T: Plain>(
    iommufd: &IommuFd,
    mut argument: iommu_hwpt_invalidate,
    entries: &[T],
) -> (io::Result<()>, usize) {
    // The entries are borrowed for the whole call.
    argument.data_uptr = entries.as_ptr().expose_provenance() as u64;
    argument.entry_len = size_of_u32::<T>();
    argument.entry_num = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    let done = iommufd.invalidate_hwpt(&mut argument);
    (done.map_err(nesting_errno), argument.entry_num as usize)
}

/// Makes a vEVENTQ. Returns its ID and its open file.
///
/// The crate's call then makes the file non-blocking by `fcntl`. A read of it never blocks, so the call would only need one
/// more right in the sandbox.
pub(in crate::vfio) fn veventq_alloc(
    iommufd: &IommuFd,
    mut argument: iommu_veventq_alloc,
) -> io::Result<(u32, OwnedFd)> {
    argument.size = size_of_u32::<iommu_veventq_alloc>();
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(iommufd, IOMMU_VEVENTQ_ALLOC(), &mut argument) }?;
    // SAFETY: the kernel has opened it for this call, and nothing else owns it.
    let file = unsafe { OwnedFd::from_raw_fd(argument.out_veventq_fd.cast_signed()) };
    Ok((argument.out_veventq_id, file))
}

/// The system's error behind the crate's.
fn nesting_errno(error: IommufdError) -> io::Error {
    match error {
        IommufdError::IommuGetHwInfo(cause)
        | IommufdError::IommuHwptAlloc(cause)
        | IommufdError::IommuHwptInvalidate(cause)
        | IommufdError::IommuViommuAlloc(cause)
        | IommufdError::IommuVdeviceAlloc(cause) => io::Error::from_raw_os_error(cause.errno()),
        // Errors of requests that this module does not make.
        other => io::Error::other(other),
    }
}
