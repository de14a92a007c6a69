//! The only system calls of this module: ioctls of `linux/vfio.h` and `linux/iommufd.h`, and mmap of
//! a device's memory.
#![expect(
    unsafe_code,
    reason = "system calls, each with the structure its number stands for"
)]

mod device;

use std::ffi::{CStr, c_int, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use iommufd_bindings::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_COPY,
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_MAP_FILE,
    IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE, iommu_destroy, iommu_ioas_alloc, iommu_ioas_copy,
    iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap,
    iommu_iova_range,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd,
    vfio_device_detach_iommufd_pt, vfio_device_feature, vfio_device_feature_bus_master,
    vfio_device_feature_dma_buf, vfio_device_info, vfio_group_status, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, vfio_region_dma_range, vfio_region_info,
};
use vm_memory::MmapRegion;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

pub(super) use self::device::{
    IrqData, if_mappable, irq_info, region_info_whole, requests_of_exports, reset, set_irqs,
};

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);
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
    ]
}

/// The requests by which mappings are made and unmade and devices are moved between address spaces:
/// all but those that open devices and groups.
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

/// A structure's size as its first field has it.
pub(super) fn size_of_u32<T>() -> u32 {
    // The largest of them has a few dozen bytes.
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

fn checked(done: c_int) -> io::Result<c_int> {
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(done)
    }
}

/// # Safety
/// `request` takes a pointer to a `T`, whose size field, where it has one, says `size_of::<T>()`;
/// what the `T` points to or maps is sound to hand to the kernel.
unsafe fn update<T>(fd: BorrowedFd<'_>, request: c_ulong, argument: &mut T) -> io::Result<c_int> {
    // SAFETY:
    // - the descriptor is open: it is borrowed
    // - argument: valid for reads and writes of all its bytes, and the rest is the caller's promise
    checked(unsafe { ioctl_with_mut_ref(&fd, request, argument) })
}

pub(super) fn ioas_alloc(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut argument = iommu_ioas_alloc {
        size: size_of_u32::<iommu_ioas_alloc>(),
        ..Default::default()
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_IOAS_ALLOC(), &mut argument) }?;
    Ok(argument.out_ioas_id)
}

pub(super) fn destroy(fd: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    let mut argument = iommu_destroy {
        size: size_of_u32::<iommu_destroy>(),
        id,
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_DESTROY(), &mut argument) }?;
    Ok(())
}

/// `argument.fd` is set here.
pub(super) fn ioas_map_file(
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
pub(super) fn ioas_map(
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

pub(super) fn ioas_copy(fd: BorrowedFd<'_>, mut argument: iommu_ioas_copy) -> io::Result<()> {
    argument.size = size_of_u32::<iommu_ioas_copy>();
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_IOAS_COPY(), &mut argument) }?;
    Ok(())
}

/// Answers the bytes that were mapped.
pub(super) fn ioas_unmap(fd: BorrowedFd<'_>, mut argument: iommu_ioas_unmap) -> io::Result<u64> {
    argument.size = size_of_u32::<iommu_ioas_unmap>();
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, IOMMU_IOAS_UNMAP(), &mut argument) }?;
    Ok(argument.length)
}

/// As many ranges as there is room for in `ranges`; answers how many there are, and the alignment.
pub(super) fn ioas_iova_ranges(
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

pub(super) fn bind_iommufd(fd: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<()> {
    let mut argument = vfio_device_bind_iommufd {
        // Without the token, which older kernels do not know.
        argsz: 16,
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the number's structure, which is longer than the size it gives; it points to nothing.
    unsafe { update(fd, VFIO_DEVICE_BIND_IOMMUFD(), &mut argument) }?;
    Ok(())
}

pub(super) fn attach_iommufd_pt(fd: BorrowedFd<'_>, pt_id: u32) -> io::Result<()> {
    let mut argument = vfio_device_attach_iommufd_pt {
        // Without the PASID, which older kernels do not know.
        argsz: 12,
        pt_id,
        ..Default::default()
    };
    // SAFETY: the number's structure, which is longer than the size it gives; it points to nothing.
    unsafe { update(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut argument) }?;
    Ok(())
}

pub(super) fn detach_iommufd_pt(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut argument = vfio_device_detach_iommufd_pt {
        // Without the PASID, which older kernels do not know.
        argsz: 8,
        ..Default::default()
    };
    // SAFETY: the number's structure, which is longer than the size it gives; it points to nothing.
    unsafe { update(fd, VFIO_DEVICE_DETACH_IOMMUFD_PT(), &mut argument) }?;
    Ok(())
}

pub(super) fn device_info(fd: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut argument = vfio_device_info {
        argsz: size_of_u32::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, VFIO_DEVICE_GET_INFO(), &mut argument) }?;
    Ok(argument)
}

pub(super) fn region_info(fd: BorrowedFd<'_>, index: u32) -> io::Result<vfio_region_info> {
    let mut argument = vfio_region_info {
        argsz: size_of_u32::<vfio_region_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, VFIO_DEVICE_GET_REGION_INFO(), &mut argument) }?;
    Ok(argument)
}

#[repr(C)]
struct BusMaster {
    header: [u32; 2],
    control: vfio_device_feature_bus_master,
}

pub(super) fn set_bus_master(fd: BorrowedFd<'_>, feature: u32, op: u32) -> io::Result<()> {
    let mut argument = BusMaster {
        header: [size_of_u32::<BusMaster>(), feature],
        control: vfio_device_feature_bus_master { op },
    };
    const _: () = assert!(size_of::<vfio_device_feature>() == 8);
    // SAFETY: a `vfio_device_feature` and its data behind it, with the size of both.
    unsafe { update(fd, VFIO_DEVICE_FEATURE(), &mut argument) }?;
    Ok(())
}

#[repr(C)]
struct DmaBuf {
    header: [u32; 2],
    region_index: u32,
    open_flags: u32,
    flags: u32,
    nr_ranges: u32,
    range: vfio_region_dma_range,
}

/// A DMA buffer of one piece of a region. `feature` is the feature's number and GET.
pub(super) fn dma_buf(
    fd: BorrowedFd<'_>,
    feature: u32,
    region_index: u32,
    range: vfio_region_dma_range,
) -> io::Result<OwnedFd> {
    let mut argument = DmaBuf {
        header: [size_of_u32::<DmaBuf>(), feature],
        region_index,
        open_flags: (libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned(),
        flags: 0,
        nr_ranges: 1,
        range,
    };
    const _: () = assert!(size_of::<vfio_device_feature_dma_buf>() == 16);
    // SAFETY: a `vfio_device_feature` and its data behind it, with the size of both.
    let made = unsafe { update(fd, VFIO_DEVICE_FEATURE(), &mut argument) }?;
    // SAFETY: the kernel made it for this call and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

pub(super) fn api_version(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    // SAFETY: takes no argument; the descriptor is open.
    checked(unsafe { ioctl(&fd, VFIO_GET_API_VERSION()) })
}

pub(super) fn check_extension(fd: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    // SAFETY: takes a number; the descriptor is open.
    let answer = unsafe { ioctl_with_val(&fd, VFIO_CHECK_EXTENSION(), extension.into()) };
    checked(answer).map(|answer| answer > 0)
}

pub(super) fn set_iommu(fd: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: takes a number; the descriptor is open.
    checked(unsafe { ioctl_with_val(&fd, VFIO_SET_IOMMU(), kind.into()) })?;
    Ok(())
}

pub(super) fn group_status(fd: BorrowedFd<'_>) -> io::Result<vfio_group_status> {
    let mut argument = vfio_group_status {
        argsz: size_of_u32::<vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: the number's structure, with its size; it points to nothing.
    unsafe { update(fd, VFIO_GROUP_GET_STATUS(), &mut argument) }?;
    Ok(argument)
}

pub(super) fn group_set_container(fd: BorrowedFd<'_>, container: RawFd) -> io::Result<()> {
    // SAFETY: takes a pointer to a descriptor's number, and only reads it.
    checked(unsafe { ioctl_with_ref(&fd, VFIO_GROUP_SET_CONTAINER(), &container) })?;
    Ok(())
}

pub(super) fn group_device(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: takes a pointer to a text that ends with a zero, and only reads it.
    let made = checked(unsafe { ioctl_with_ptr(&fd, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) })?;
    // SAFETY: the kernel made it for this call and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// The longest answer that is read, in words of 8 bytes.
const MAX_INFO_WORDS: usize = 8192;

/// The answer in whole words: a `vfio_iommu_type1_info`, and its capabilities behind it.
pub(super) fn type1_info(fd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut words = size_of::<vfio_iommu_type1_info>().div_ceil(8);
    loop {
        let mut answer = vec![0u64; words];
        let argsz = u32::try_from(words * 8).unwrap_or(u32::MAX);
        answer[0] = u64::from_ne_bytes(first_word(argsz));
        // SAFETY: `answer` has as many bytes as its first field says, is aligned as the structure
        // wants, and is borrowed mutably for the whole call.
        checked(unsafe { ioctl_with_mut_ptr(&fd, VFIO_IOMMU_GET_INFO(), answer.as_mut_ptr()) })?;
        let wanted = (low_half(answer[0]) as usize).div_ceil(8);
        if wanted <= words {
            return Ok(answer);
        }
        // The kernel's lists of ranges are short.
        if wanted > MAX_INFO_WORDS {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        words = wanted;
    }
}

fn first_word(argsz: u32) -> [u8; 8] {
    let [a, b, c, d] = argsz.to_ne_bytes();
    [a, b, c, d, 0, 0, 0, 0]
}

fn low_half(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// `argument.vaddr` is set here, and `argument.size` bytes from `offset` must be in `memory`.
pub(super) fn map_dma(
    fd: BorrowedFd<'_>,
    memory: &MmapRegion,
    offset: u64,
    mut argument: vfio_iommu_type1_dma_map,
) -> io::Result<()> {
    argument.argsz = size_of_u32::<vfio_iommu_type1_dma_map>();
    argument.vaddr = address_in(memory, offset, argument.size)?;
    // SAFETY: the number's structure, with its size. The addresses lie in a mapping of memory that
    // is shared with others and never borrowed as Rust memory, so that a device may write there;
    // the kernel takes references to its pages.
    unsafe { update(fd, VFIO_IOMMU_MAP_DMA(), &mut argument) }?;
    Ok(())
}

/// Answers the bytes that were mapped.
pub(super) fn unmap_dma(fd: BorrowedFd<'_>, flags: u32, iova: u64, size: u64) -> io::Result<u64> {
    let mut argument = vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio_iommu_type1_dma_unmap>(),
        flags,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the number's structure, with its size; without the bitmap flag there is no data.
    unsafe { update(fd, VFIO_IOMMU_UNMAP_DMA(), &mut argument) }?;
    Ok(argument.size)
}

/// Maps `size` bytes of a device's memory, readable and writable. They stay mapped.
pub(super) fn map_region(fd: BorrowedFd<'_>, offset: u64, size: u64) -> io::Result<MmapRegion> {
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
    // SAFETY: the mapping was made just now with this size, and is never unmapped.
    unsafe { MmapRegion::build_raw(address.cast(), size, prot, libc::MAP_SHARED) }
        .map_err(io::Error::other)
}

/// The address of `offset` in `memory`, where `len` bytes follow.
fn address_in(memory: &MmapRegion, offset: u64, len: u64) -> io::Result<u64> {
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= memory.size() as u64);
    if !inside {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    Ok(memory.as_ptr().expose_provenance() as u64 + offset)
}
