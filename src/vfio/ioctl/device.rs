//! An open device: binding, address space, regions and features.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_BIND_FLAG_TOKEN, VFIO_TYPE, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt, vfio_device_feature,
    vfio_device_feature_bus_master, vfio_device_feature_dma_buf, vfio_device_info,
    vfio_region_dma_range, vfio_region_info,
};
use vm_memory::MmapRegion;
use vmm_sys_util::ioctl_io_nr;

use super::{size_of_u32, update};
use crate::ids::VfToken;

ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_FEATURE, VFIO_TYPE as u32, VFIO_BASE + 17);
ioctl_io_nr!(VFIO_DEVICE_BIND_IOMMUFD, VFIO_TYPE as u32, VFIO_BASE + 18);
ioctl_io_nr!(
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_TYPE as u32,
    VFIO_BASE + 19
);
ioctl_io_nr!(
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_TYPE as u32,
    VFIO_BASE + 20
);

/// The argument of `VFIO_DEVICE_BIND_IOMMUFD`. It points to the bytes of the token.
pub(in crate::vfio) fn bind_argument(
    iommufd: RawFd,
    token: Option<&VfToken>,
) -> vfio_device_bind_iommufd {
    let without = vfio_device_bind_iommufd {
        // Without the field for the token, which older kernels do not know.
        argsz: 16,
        iommufd,
        ..Default::default()
    };
    let Some(token) = token else {
        return without;
    };
    vfio_device_bind_iommufd {
        argsz: size_of_u32::<vfio_device_bind_iommufd>(),
        flags: VFIO_DEVICE_BIND_FLAG_TOKEN,
        token_uuid_ptr: token.as_bytes().as_ptr().expose_provenance() as u64,
        ..without
    }
}

/// Returns the device's ID in the iommufd.
pub(in crate::vfio) fn bind_iommufd(
    fd: BorrowedFd<'_>,
    iommufd: &impl AsRawFd,
    token: Option<&VfToken>,
) -> io::Result<u32> {
    let mut argument = bind_argument(iommufd.as_raw_fd(), token);
    // SAFETY: this is the request's structure, at least as long as its size says; it points to nothing, or to the 16
    // bytes of a UUID, which are borrowed for the whole call and only read.
    unsafe { update(&fd, VFIO_DEVICE_BIND_IOMMUFD(), &mut argument) }?;
    Ok(argument.out_devid)
}

/// The argument of `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
pub(in crate::vfio) fn attach_argument(pt_id: u32) -> vfio_device_attach_iommufd_pt {
    vfio_device_attach_iommufd_pt {
        // Without the PASID, which older kernels do not know.
        argsz: 12,
        pt_id,
        ..Default::default()
    }
}

pub(in crate::vfio) fn attach_iommufd_pt(fd: BorrowedFd<'_>, pt_id: u32) -> io::Result<()> {
    let mut argument = attach_argument(pt_id);
    // SAFETY: this is the request's structure, at least as long as its size says; it points to nothing.
    unsafe { update(&fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut argument) }?;
    Ok(())
}

/// The argument of `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
pub(in crate::vfio) fn detach_argument() -> vfio_device_detach_iommufd_pt {
    vfio_device_detach_iommufd_pt {
        // Without the PASID, which older kernels do not know.
        argsz: 8,
        ..Default::default()
    }
}

pub(in crate::vfio) fn detach_iommufd_pt(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut argument = detach_argument();
    // SAFETY: this is the request's structure, at least as long as its size says; it points to nothing.
    unsafe { update(&fd, VFIO_DEVICE_DETACH_IOMMUFD_PT(), &mut argument) }?;
    Ok(())
}

pub(in crate::vfio) fn device_info(fd: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut argument = vfio_device_info {
        argsz: size_of_u32::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(&fd, VFIO_DEVICE_GET_INFO(), &mut argument) }?;
    Ok(argument)
}

pub(in crate::vfio) fn region_info(fd: BorrowedFd<'_>, index: u32) -> io::Result<vfio_region_info> {
    let mut argument = vfio_region_info {
        argsz: size_of_u32::<vfio_region_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(&fd, VFIO_DEVICE_GET_REGION_INFO(), &mut argument) }?;
    Ok(argument)
}

#[repr(C)]
struct BusMaster {
    header: vfio_device_feature,
    control: vfio_device_feature_bus_master,
}

impl BusMaster {
    /// Makes the device a bus master, or no more.
    fn new(feature: u32, op: u32) -> Self {
        Self {
            header: feature_header::<Self>(feature),
            control: vfio_device_feature_bus_master { op },
        }
    }
}

/// The header and the operation of the request that [`set_bus_master`] makes.
#[cfg(test)]
pub(in crate::vfio) fn bus_master_argument(feature: u32, op: u32) -> (vfio_device_feature, u32) {
    let BusMaster { header, control } = BusMaster::new(feature, op);
    (header, control.op)
}

pub(in crate::vfio) fn set_bus_master(fd: BorrowedFd<'_>, feature: u32, op: u32) -> io::Result<()> {
    let mut argument = BusMaster::new(feature, op);
    // SAFETY: this is a `vfio_device_feature` with the feature's data behind it, and the size of both.
    unsafe { update(&fd, VFIO_DEVICE_FEATURE(), &mut argument) }?;
    Ok(())
}

#[repr(C)]
struct DmaBuf {
    header: vfio_device_feature,
    buffer: vfio_device_feature_dma_buf,
    range: vfio_region_dma_range,
}

// The kernel expects the data right behind the header.
const _: () = assert!(size_of::<BusMaster>() == 8 + 4);
const _: () = assert!(size_of::<DmaBuf>() == 8 + 16 + 16);

/// The header of a `T`, which consists of this header and the data of `feature`.
fn feature_header<T>(feature: u32) -> vfio_device_feature {
    vfio_device_feature {
        argsz: size_of_u32::<T>(),
        flags: feature,
        ..Default::default()
    }
}

/// Exports a range of a region as a DMA buffer. `feature` is the feature's number, with the flag GET.
pub(in crate::vfio) fn dma_buf(
    fd: BorrowedFd<'_>,
    feature: u32,
    region_index: u32,
    range: vfio_region_dma_range,
) -> io::Result<OwnedFd> {
    let mut argument = DmaBuf {
        header: feature_header::<DmaBuf>(feature),
        buffer: vfio_device_feature_dma_buf {
            region_index,
            open_flags: (libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned(),
            nr_ranges: 1,
            ..Default::default()
        },
        range,
    };
    // SAFETY: this is a `vfio_device_feature` with the feature's data behind it, and the size of both.
    let made = unsafe { update(&fd, VFIO_DEVICE_FEATURE(), &mut argument) }?;
    // SAFETY: the kernel has opened it for this call, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Maps `size` bytes of a device's memory, readable and writable. They are never unmapped.
pub(in crate::vfio) fn map_region(
    fd: BorrowedFd<'_>,
    offset: u64,
    size: u64,
) -> io::Result<MmapRegion> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let size = usize::try_from(size).map_err(invalid)?;
    let offset = libc::off_t::try_from(offset).map_err(invalid)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            prot,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            offset,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping was just made with this size, and is never unmapped.
    unsafe { MmapRegion::build_raw(address.cast(), size, prot, libc::MAP_SHARED) }
        .map_err(io::Error::other)
}
