//! The kernel's checks of the arguments of its requests, with its errnos (Linux 7.3: `vfio_iommu_type1.c`, `ioas.c`
//! and `io_pagetable.c` of iommufd, and `device_cdev.c`, `vfio_main.c` and `pci/vfio_pci_core.c` of VFIO).

use std::io;

use iommufd_bindings::{
    iommu_ioas_copy, iommu_ioas_unmap, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_BUS_MASTER, VFIO_DEVICE_FEATURE_CLEAR_MASTER, VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET,
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
    vfio_device_attach_iommufd_pt, vfio_device_detach_iommufd_pt, vfio_device_feature,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use super::error;
use crate::address::{Iova, IovaRange};
use crate::vfio::iommufd::MapArgument;

/// The smallest page of the host's IOMMU.
pub const PAGE: u64 = 4096;

fn unless(refused: bool, errno: i32) -> io::Result<()> {
    if refused { Err(error(errno)) } else { Ok(()) }
}

/// The range of `len` bytes from `first` on.
fn range(first: u64, len: u64) -> io::Result<IovaRange> {
    unless(len == 0, libc::EINVAL)?;
    IovaRange::from_len(Iova(first), len).ok_or_else(|| error(libc::EOVERFLOW))
}

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`. Returns the id of the address space.
pub fn attach(argument: &vfio_device_attach_iommufd_pt) -> io::Result<u32> {
    unless(argument.argsz < 12, libc::EINVAL)?;
    // The fake devices have no PASIDs.
    unless(argument.flags != 0, libc::EINVAL)?;
    Ok(argument.pt_id)
}

/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
pub fn detach(argument: &vfio_device_detach_iommufd_pt) -> io::Result<()> {
    unless(argument.argsz < 8, libc::EINVAL)?;
    unless(argument.flags != 0, libc::EINVAL)
}

/// `VFIO_DEVICE_FEATURE` with the feature that clears the bus-master bit.
pub fn clear_bus_master(header: &vfio_device_feature, op: u32) -> io::Result<()> {
    let masks = VFIO_DEVICE_FEATURE_MASK
        | VFIO_DEVICE_FEATURE_SET
        | VFIO_DEVICE_FEATURE_GET
        | VFIO_DEVICE_FEATURE_PROBE;
    unless(header.argsz < 8, libc::EINVAL)?;
    unless(header.flags & !masks != 0, libc::EINVAL)?;
    let verbs = header.flags & (VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_GET);
    unless(verbs != VFIO_DEVICE_FEATURE_SET, libc::EINVAL)?;
    let feature = header.flags & VFIO_DEVICE_FEATURE_MASK;
    unless(feature != VFIO_DEVICE_FEATURE_BUS_MASTER, libc::ENOTTY)?;
    unless(header.argsz < 8 + 4, libc::EINVAL)?;
    unless(op != VFIO_DEVICE_FEATURE_CLEAR_MASTER, libc::EINVAL)
}

/// `VFIO_IOMMU_MAP_DMA` of the memory at `vaddr`.
pub fn type1_map(argument: &vfio_iommu_type1_dma_map, vaddr: u64) -> io::Result<IovaRange> {
    let rights = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    unless(argument.argsz < 32, libc::EINVAL)?;
    unless(argument.flags & !rights != 0, libc::EINVAL)?;
    let range = range(argument.iova, argument.size)?;
    unless(argument.flags & rights == 0, libc::EINVAL)?;
    let ends = argument.size | argument.iova | vaddr;
    unless(ends & (PAGE - 1) != 0, libc::EINVAL)?;
    Ok(range)
}

/// `VFIO_IOMMU_UNMAP_DMA`; `None` stands for everything.
pub fn type1_unmap(argument: &vfio_iommu_type1_dma_unmap) -> io::Result<Option<IovaRange>> {
    let (iova, size) = (argument.iova, argument.size);
    unless(argument.argsz < 24, libc::EINVAL)?;
    unless(argument.flags & !VFIO_DMA_UNMAP_FLAG_ALL != 0, libc::EINVAL)?;
    unless(iova & (PAGE - 1) != 0, libc::EINVAL)?;
    if argument.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0 {
        unless(iova != 0 || size != 0, libc::EINVAL)?;
        return Ok(None);
    }
    unless(size & (PAGE - 1) != 0, libc::EINVAL)?;
    range(iova, size).map(Some)
}

/// The common checks of the requests that map into an address space of iommufd.
fn ioas_flags(flags: u32, numbers: &[u64]) -> io::Result<()> {
    let rights = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
        | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    let fixed = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    unless(flags & !(rights | fixed) != 0, libc::EOPNOTSUPP)?;
    unless(numbers.contains(&u64::MAX), libc::EOVERFLOW)?;
    unless(flags & rights == 0, libc::EINVAL)?;
    // Without the flag the kernel chooses the addresses, which no backend wants.
    unless(flags & fixed == 0, libc::EINVAL)
}

/// `IOMMU_IOAS_MAP` or `IOMMU_IOAS_MAP_FILE`. Returns the range and the first byte of the memory.
pub fn ioas_map(argument: &MapArgument) -> io::Result<(IovaRange, u64)> {
    let (size, flags, iova, length, memory) = match argument {
        MapArgument::File(a) => (a.size, a.flags, a.iova, a.length, a.start),
        MapArgument::Host(a) => (a.size, a.flags, a.iova, a.length, a.user_va),
    };
    unless(size != 40, libc::EINVAL)?;
    ioas_flags(flags, &[iova, length])?;
    Ok((range(iova, length)?, memory))
}

/// `IOMMU_IOAS_COPY`. Returns the range of the copy and that of the source.
pub fn ioas_copy(argument: &iommu_ioas_copy) -> io::Result<(IovaRange, IovaRange)> {
    let (length, dst, src) = (argument.length, argument.dst_iova, argument.src_iova);
    unless(argument.size != 40, libc::EINVAL)?;
    ioas_flags(argument.flags, &[length, dst, src])?;
    Ok((range(dst, length)?, range(src, length)?))
}

/// `IOMMU_IOAS_UNMAP`; `None` stands for everything.
pub fn ioas_unmap(argument: &iommu_ioas_unmap) -> io::Result<Option<IovaRange>> {
    let (iova, length) = (argument.iova, argument.length);
    unless(argument.size != 24, libc::EINVAL)?;
    if iova == 0 && length == u64::MAX {
        return Ok(None);
    }
    unless(iova == u64::MAX || length == u64::MAX, libc::EOVERFLOW)?;
    range(iova, length).map(Some)
}

#[test]
fn arguments_of_devices_are_checked_as_linux_does() {
    use crate::vfio::{cdev, ioctl};

    let refuses = |done: io::Result<()>| done.err().and_then(|e| e.raw_os_error());
    let attach_with = |argsz, flags| {
        let argument = vfio_device_attach_iommufd_pt {
            argsz,
            flags,
            ..ioctl::attach_argument(5)
        };
        refuses(attach(&argument).map(drop))
    };
    assert_eq!(attach(&ioctl::attach_argument(5)).expect("taken"), 5);
    assert_eq!(attach_with(11, 0), Some(libc::EINVAL));
    assert_eq!(attach_with(12, 1 << 1), Some(libc::EINVAL));
    let detach_with = |argsz, flags| {
        let argument = vfio_device_detach_iommufd_pt {
            argsz,
            flags,
            ..ioctl::detach_argument()
        };
        refuses(detach(&argument))
    };
    assert_eq!(detach_with(8, 0), None);
    assert_eq!(detach_with(7, 0), Some(libc::EINVAL));
    assert_eq!(detach_with(8, 1 << 1), Some(libc::EINVAL));
    let clear_with = |argsz: u32, flags, operation| {
        let (mut header, op) = ioctl::bus_master_argument(cdev::CLEAR_MASTER, operation);
        header.argsz = header.argsz.min(argsz);
        header.flags ^= flags;
        refuses(clear_bus_master(&header, op))
    };
    let clear = VFIO_DEVICE_FEATURE_CLEAR_MASTER;
    assert_eq!(clear_with(u32::MAX, 0, clear), None);
    assert_eq!(clear_with(11, 0, clear), Some(libc::EINVAL));
    assert_eq!(clear_with(u32::MAX, 0, clear + 1), Some(libc::EINVAL));
    assert_eq!(
        clear_with(u32::MAX, VFIO_DEVICE_FEATURE_GET, clear),
        Some(libc::EINVAL)
    );
    assert_eq!(
        clear_with(u32::MAX, VFIO_DEVICE_FEATURE_SET, clear),
        Some(libc::EINVAL)
    );
    assert_eq!(clear_with(u32::MAX, 1 << 31, clear), Some(libc::EINVAL));
    assert_eq!(clear_with(u32::MAX, 1, clear), Some(libc::ENOTTY));
}
