//! Requests of a device's driver: regions, interrupts, reset.

use std::ffi::c_ulong;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_IOEVENTFD_32, VFIO_TYPE, vfio_device_ioeventfd, vfio_irq_info,
    vfio_irq_set, vfio_pci_dependent_device, vfio_pci_hot_reset, vfio_pci_hot_reset_info,
    vfio_region_info,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use super::device::{VFIO_DEVICE_FEATURE, VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_REGION_INFO};
use super::type1::VFIO_GROUP_GET_DEVICE_FD;
use super::{MAX_INFO_WORDS, checked, first_word, low_half, size_of_u32, update};

ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE as u32, VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
// The numbers of VFIO_IOMMU_GET_INFO and VFIO_IOMMU_MAP_DMA, which are requests of a container.
ioctl_io_nr!(
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_TYPE as u32,
    VFIO_BASE + 12
);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_DEVICE_IOEVENTFD, VFIO_TYPE as u32, VFIO_BASE + 16);

/// The requests of a server that passes a device's registers and interrupts on to a VMM.
pub(in crate::vfio) fn requests_of_exports() -> Vec<c_ulong> {
    vec![
        VFIO_DEVICE_GET_INFO(),
        VFIO_DEVICE_GET_REGION_INFO(),
        VFIO_DEVICE_GET_IRQ_INFO(),
        VFIO_DEVICE_SET_IRQS(),
        VFIO_DEVICE_RESET(),
        VFIO_DEVICE_FEATURE(),
    ]
}

/// The requests of the thread that resets buses.
pub(in crate::vfio) fn requests_of_bus_resets() -> Vec<c_ulong> {
    vec![
        VFIO_DEVICE_PCI_HOT_RESET(),
        VFIO_GROUP_GET_DEVICE_FD(),
        VFIO_DEVICE_GET_REGION_INFO(),
        VFIO_DEVICE_IOEVENTFD(),
    ]
}

/// A `vfio_pci_dependent_device`.
pub(in crate::vfio) struct DependentDevice {
    /// The id of the device in the iommufd, or the number of its group.
    pub id: u32,
    pub domain: u16,
    pub bus: u8,
    pub devfn: u8,
}

/// The most devices that share a bus: 256 functions.
const MAX_DEPENDENT: usize = 256;
/// Words of a `vfio_pci_hot_reset_info` and of an element of its array.
const HOT_RESET_HEADER: usize = 3;
const DEPENDENT_WORDS: usize = 2;
const _: () = assert!(size_of::<vfio_pci_hot_reset_info>() == 4 * HOT_RESET_HEADER);
const _: () = assert!(size_of::<vfio_pci_dependent_device>() == 4 * DEPENDENT_WORDS);
const _: () = assert!(size_of::<vfio_pci_hot_reset>() == 4 * HOT_RESET_HEADER);

/// Returns the flags of a `vfio_pci_hot_reset_info` and its devices.
pub(in crate::vfio) fn hot_reset_info(
    fd: BorrowedFd<'_>,
) -> io::Result<(u32, Vec<DependentDevice>)> {
    let mut words = vec![0u32; HOT_RESET_HEADER + DEPENDENT_WORDS * MAX_DEPENDENT];
    words[0] = u32::try_from(words.len() * 4).unwrap_or(u32::MAX);
    // SAFETY: `words` has as many bytes as its first field says, has the structure's alignment, and is borrowed mutably
    // for the whole call.
    let done = unsafe {
        ioctl_with_mut_ptr(
            &fd,
            VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(),
            words.as_mut_ptr(),
        )
    };
    checked(done)?;
    let (flags, count) = (words[1], words[2] as usize);
    let devices = words[HOT_RESET_HEADER..]
        .chunks_exact(DEPENDENT_WORDS)
        .take(count)
        .map(|device| {
            let [low, high, bus, devfn] = device[1].to_ne_bytes();
            DependentDevice {
                id: device[0],
                domain: u16::from_ne_bytes([low, high]),
                bus,
                devfn,
            }
        });
    Ok((flags, devices.collect()))
}

/// Makes a hot reset of a device. The kernel checks that all affected devices belong to `groups`, or, for a device that
/// is bound to an iommufd and has no groups, that all are bound to the same one.
pub(in crate::vfio) fn hot_reset(fd: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = u32::try_from(groups.len()).map_err(io::Error::other)?;
    let argsz = size_of_u32::<vfio_pci_hot_reset>() + 4 * count;
    // No flags. The descriptors follow the structure.
    let mut argument = vec![argsz, 0, count];
    argument.extend(groups.iter().map(|fd| fd.as_raw_fd().cast_unsigned()));
    // SAFETY:
    // - `argument` has as many bytes as its first field says, has the structure's alignment, and is only read
    // - descriptors in it are plain numbers: the kernel refuses one that is not an open group
    checked(unsafe { ioctl_with_ptr(&fd, VFIO_DEVICE_PCI_HOT_RESET(), argument.as_ptr()) })
        .map(drop)
}

/// The data behind a `vfio_irq_set`.
pub(in crate::vfio) enum IrqData<'a> {
    None,
    Bools(&'a [u8]),
    /// Descriptors; -1 for no event.
    Events(&'a [RawFd]),
}

/// Returns a `vfio_region_info` with its capabilities behind it, in bytes.
pub(in crate::vfio) fn region_info_whole(fd: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    let mut words = size_of::<vfio_region_info>().div_ceil(8);
    loop {
        let mut answer = vec![0u64; words];
        let argsz = u32::try_from(words * 8).unwrap_or(u32::MAX);
        answer[0] = u64::from_ne_bytes(first_word(argsz));
        answer[1] = u64::from_ne_bytes(first_word(index));
        // SAFETY: `answer` has as many bytes as its first field says, has the structure's alignment, and is borrowed
        // mutably for the whole call.
        let done =
            unsafe { ioctl_with_mut_ptr(&fd, VFIO_DEVICE_GET_REGION_INFO(), answer.as_mut_ptr()) };
        checked(done)?;
        let wanted = (low_half(answer[0]) as usize).div_ceil(8);
        if wanted <= words {
            return Ok(answer.iter().flat_map(|w| w.to_ne_bytes()).collect());
        }
        if wanted > MAX_INFO_WORDS {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        words = wanted;
    }
}

pub(in crate::vfio) fn irq_info(fd: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut argument = vfio_irq_info {
        argsz: size_of_u32::<vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: this is the request's structure, with its size; it points to nothing.
    unsafe { update(&fd, VFIO_DEVICE_GET_IRQ_INFO(), &mut argument) }?;
    Ok(argument)
}

/// Changes `count` interrupts from `start` on; `data`, unless it is `None`, has one element for each. Returns 0, or the
/// number of vectors that the device has if those are fewer than asked for.
pub(in crate::vfio) fn set_irqs(
    fd: BorrowedFd<'_>,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    data: &IrqData<'_>,
) -> io::Result<i32> {
    let bytes: Vec<u8> = match data {
        IrqData::None => Vec::new(),
        IrqData::Bools(bools) => bools.to_vec(),
        IrqData::Events(fds) => fds.iter().flat_map(|fd| fd.to_ne_bytes()).collect(),
    };
    let len = size_of::<vfio_irq_set>() + bytes.len();
    let argsz = u32::try_from(len).map_err(io::Error::other)?;
    let mut argument: Vec<u8> = [argsz, flags, index, start, count]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    argument.extend(bytes);
    // The structure has the alignment of words.
    let mut words = vec![0u32; argument.len().div_ceil(4)];
    for (word, bytes) in words.iter_mut().zip(argument.chunks(4)) {
        let mut whole = [0; 4];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(whole);
    }
    // SAFETY:
    // - `words` has at least as many bytes as its first field says, has the structure's alignment, and is only read
    // - descriptors in it are plain numbers: the kernel refuses one that is not open or not an event
    checked(unsafe { ioctl_with_ptr(&fd, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) })
}

/// Has `event` write `value` to the register at `offset` of the device's file; without an event, ends this again.
///
/// Fails with `ENODEV` if there is no such event to end, `EEXIST` if there is one already, `ENOSPC` if the device has as many
/// as VFIO allows, and `EINVAL` where VFIO allows none.
pub(in crate::vfio) fn set_register_event(
    fd: BorrowedFd<'_>,
    offset: u64,
    value: u32,
    event: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut argument = vfio_device_ioeventfd {
        argsz: size_of_u32::<vfio_device_ioeventfd>(),
        flags: VFIO_DEVICE_IOEVENTFD_32,
        offset,
        data: value.into(),
        fd: event.map_or(-1, |event| event.as_raw_fd()),
        reserved: 0,
    };
    // SAFETY: this is the request's structure, with its size; it points to nothing. The kernel refuses a descriptor that is
    // not an event.
    unsafe { update(&fd, VFIO_DEVICE_IOEVENTFD(), &mut argument) }.map(drop)
}

pub(in crate::vfio) fn reset(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument; the descriptor is open.
    checked(unsafe { ioctl(&fd, VFIO_DEVICE_RESET()) }).map(drop)
}

/// Makes the descriptor `fd` name the file of `other`, and closes the file that it named. No other thread can open a file
/// under the number in between.
pub(in crate::vfio) fn replace_file(fd: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `fd` is open before and after the call. A `Cdev` owns it, and relies on no property of its file: every use
    // of it is a system call whose error is handled.
    checked(unsafe { libc::dup3(other.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) }).map(drop)
}

/// Returns `file` if its first page can be mapped.
pub(in crate::vfio) fn if_mappable(file: OwnedFd) -> io::Result<OwnedFd> {
    const PAGE: usize = 4096;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            prot,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping was just made with this size, and no reference to it exists.
    unsafe { libc::munmap(address, PAGE) };
    Ok(file)
}
