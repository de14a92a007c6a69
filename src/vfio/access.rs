//! An open device as its driver uses it: registers, interrupts, reset (`linux/vfio.h`).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID, VFIO_REGION_INFO_FLAG_CAPS, vfio_region_info,
};

use super::device_mark::{self, DeviceMark};
use super::ioctl::IrqData;
use super::{Attach, Cdev, DeviceMemory, ioctl};

/// The id of a device that is not open and that only this process can open (`linux/vfio.h`).
const VFIO_PCI_DEVID_OWNED: u32 = 0;

/// A device (`VFIO_DEVICE_GET_INFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// The number of regions.
    pub regions: u32,
    /// The number of kinds of interrupts.
    pub irqs: u32,
}

/// A region of a device (`VFIO_DEVICE_GET_REGION_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Its length in bytes.
    pub size: u64,
    /// Its first byte in the device's file.
    pub offset: u64,
    /// Its capabilities, in the kernel's order.
    pub capabilities: Vec<Capability>,
}

/// An element of the chain of capabilities (`vfio_info_cap_header`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// `VFIO_REGION_INFO_CAP_*`.
    pub id: u16,
    /// Its version.
    pub version: u16,
    /// The bytes after its header.
    pub data: Vec<u8>,
}

/// A kind of interrupt (`VFIO_DEVICE_GET_IRQ_INFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// The number of interrupts; 0 if the device has none of this kind.
    pub count: u32,
}

/// A change to interrupts of one kind (`VFIO_DEVICE_SET_IRQS`).
#[derive(Clone, Copy, Debug)]
pub struct IrqChange<'a> {
    /// One of `VFIO_IRQ_SET_ACTION_*`.
    pub action: u32,
    /// The kind of interrupt.
    pub index: u32,
    /// The first interrupt that changes.
    pub start: u32,
    /// The interrupts that change.
    pub selection: IrqSelection<'a>,
}

/// The interrupts of an [`IrqChange`], counted from its `start`.
#[derive(Clone, Copy, Debug)]
pub enum IrqSelection<'a> {
    /// This many. 0 with the action `TRIGGER` switches the kind off.
    All(u32),
    /// One byte for each: the interrupt changes if it is not 0.
    Chosen(&'a [u8]),
    /// One event for each. The action happens whenever the event is signalled; with the action `TRIGGER` the
    /// interrupt signals the event. `None` removes the interrupt's event.
    Events(&'a [Option<BorrowedFd<'a>>]),
}

/// A function of PCI on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostFunction {
    /// The PCI domain (segment).
    pub domain: u16,
    /// The bus.
    pub bus: u8,
    /// Device (upper five bits) and function (lower three bits).
    pub devfn: u8,
}

impl fmt::Display for HostFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, function) = (self.devfn >> 3, self.devfn & 7);
        write!(
            f,
            "{:04x}:{:02x}:{device:02x}.{function}",
            self.domain, self.bus
        )
    }
}

/// The devices that a hot reset resets (`VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotResetScope {
    /// All functions behind the bridge or slot, with the device itself.
    pub devices: Vec<AffectedDevice>,
}

/// A device that a hot reset resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffectedDevice {
    /// Its function.
    pub function: HostFunction,
    /// No process has it open, and none but this one can open it. False for a device of a group (type1).
    pub is_unused: bool,
    /// The number of its group; `None` if the kernel names devices bound to iommufd.
    pub group: Option<u32>,
}

/// An open group, for a hot reset.
pub type GroupFile = Arc<dyn AsFd + Send + Sync>;

/// The resets of an open device that concern other devices, too.
pub trait BusReset: Send + Sync {
    /// The open group of the device; `None` if the device is bound to an iommufd, or another process has opened it.
    fn group(&self) -> Option<GroupFile>;

    /// `VFIO_DEVICE_PCI_HOT_RESET` of all devices in [`DeviceAccess::hot_reset_scope`]. `groups` holds the groups of all
    /// these devices; empty for a device that is bound to an iommufd.
    ///
    /// # Errors
    /// The kernel's; it refuses if this process does not have all of the devices.
    fn hot_reset(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// A further descriptor of the open device.
    ///
    /// # Errors
    /// The system has no descriptor left.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Closes the device and keeps its group open. Until [`Self::open_again`] every other call for the device fails.
    /// When the last open device of a bus is closed, VFIO resets the bus if VFIO drivers hold all its functions.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the device is not of an open group, or if its memory is mapped, which keeps it open.
    fn close(&self) -> io::Result<()>;

    /// Opens the device after [`Self::close`]. It does no DMA and its memory is switched off.
    ///
    /// # Errors
    /// The kernel's: the device's driver cannot start it.
    fn open_again(&self) -> io::Result<()>;

    /// Leaves a mark that stays as long as a process has the device open. `line` is a value for the interrupt line of a device
    /// that takes no other mark.
    ///
    /// # Errors
    /// The kernel's: the device does not answer. Or the processes that have the device open have left no room for a mark.
    fn mark(&self, line: u8) -> io::Result<DeviceMark>;

    /// Removes `mark`. Returns whether it was there: then the device was not closed since [`Self::mark`] by all processes that
    /// had it open. A mark of the interrupt line is there, too, if the hardware has this value.
    ///
    /// # Errors
    /// The kernel's: the device does not answer.
    fn has_mark(&self, mark: &DeviceMark) -> io::Result<bool>;
}

/// An open device as its driver uses it.
pub trait DeviceAccess: Send {
    /// `VFIO_DEVICE_GET_INFO`.
    ///
    /// # Errors
    /// The kernel's.
    fn info(&self) -> io::Result<DeviceInfo>;

    /// `VFIO_DEVICE_GET_REGION_INFO`.
    ///
    /// # Errors
    /// The kernel's, among them `EINVAL` if there is no such region.
    fn region(&self, index: u32) -> io::Result<RegionInfo>;

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    /// The kernel's, among them `EINVAL` if there is no such kind.
    fn irq(&self, index: u32) -> io::Result<IrqInfo>;

    /// `VFIO_DEVICE_SET_IRQS`.
    ///
    /// # Errors
    /// The kernel's; `ENOSPC` if the device has fewer vectors than asked for.
    fn set_irqs(&self, change: &IrqChange<'_>) -> io::Result<()>;

    /// Reads from byte `at` of a region. Returns the number of bytes, which is below the length of `into` if the rest
    /// cannot be read.
    ///
    /// # Errors
    /// The kernel's, among them `EIO` while the device does not decode the region.
    fn read(&self, region: &RegionInfo, at: u64, into: &mut [u8]) -> io::Result<usize>;

    /// Writes to byte `at` of a region. Returns the number of bytes.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write(&self, region: &RegionInfo, at: u64, from: &[u8]) -> io::Result<usize>;

    /// A file that holds the region from its byte 0 on and nothing else of the device, and that can be mapped;
    /// `None` if the kernel has no such file.
    fn region_file(&self, index: u32, region: &RegionInfo) -> Option<OwnedFd>;

    /// A further descriptor of the open device, in which each region begins at its [`RegionInfo::offset`]. It gives whoever
    /// has it all of the device: `docs/export.md` lists its ioctls.
    ///
    /// # Errors
    /// The system has no descriptor left.
    fn device_file(&self) -> io::Result<OwnedFd>;

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    /// The kernel's, among them `ENOTTY` if the device cannot be reset alone.
    fn reset(&self) -> io::Result<()>;

    /// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`. The thread that serves a client must not call it.
    ///
    /// # Errors
    /// The kernel's: `ENODEV` if the device's bus cannot be reset.
    fn hot_reset_scope(&self) -> io::Result<HotResetScope>;

    /// The resets of the device that concern others, too. The thread that serves a client must not make them.
    fn bus_reset(&self) -> Arc<dyn BusReset>;

    /// Ends the device's DMA at the device itself, until its driver enables bus mastering again.
    ///
    /// # Errors
    /// The kernel's.
    fn stop_dma(&self) -> io::Result<()>;
}

impl DeviceAccess for Cdev {
    fn info(&self) -> io::Result<DeviceInfo> {
        let info = ioctl::device_info(self.as_fd())?;
        Ok(DeviceInfo {
            flags: info.flags,
            regions: info.num_regions,
            irqs: info.num_irqs,
        })
    }

    fn region(&self, index: u32) -> io::Result<RegionInfo> {
        let info = ioctl::region_info_whole(self.as_fd(), index)?;
        parse_region(&info).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    }

    fn irq(&self, index: u32) -> io::Result<IrqInfo> {
        let info = ioctl::irq_info(self.as_fd(), index)?;
        Ok(IrqInfo {
            flags: info.flags,
            count: info.count,
        })
    }

    fn set_irqs(&self, change: &IrqChange<'_>) -> io::Result<()> {
        let fds: Vec<RawFd>;
        let (kind, count, data) = match change.selection {
            IrqSelection::All(count) => (VFIO_IRQ_SET_DATA_NONE, count as usize, IrqData::None),
            IrqSelection::Chosen(bools) => {
                (VFIO_IRQ_SET_DATA_BOOL, bools.len(), IrqData::Bools(bools))
            }
            IrqSelection::Events(events) => {
                fds = events
                    .iter()
                    .map(|event| event.map_or(-1, |fd| fd.as_raw_fd()))
                    .collect();
                (VFIO_IRQ_SET_DATA_EVENTFD, fds.len(), IrqData::Events(&fds))
            }
        };
        let count = u32::try_from(count).map_err(io::Error::other)?;
        let flags = kind | change.action;
        let fd = self.as_fd();
        match ioctl::set_irqs(fd, flags, change.index, change.start, count, &data)? {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    fn read(&self, region: &RegionInfo, at: u64, into: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(into, file_offset(region, at)?)
    }

    fn write(&self, region: &RegionInfo, at: u64, from: &[u8]) -> io::Result<usize> {
        self.file.write_at(from, file_offset(region, at)?)
    }

    fn region_file(&self, index: u32, region: &RegionInfo) -> Option<OwnedFd> {
        // Kernels up to at least 7.3 export BARs as DMA buffers that cannot be mapped.
        let buffer = self.export(index, 0, region.size).ok()?;
        ioctl::if_mappable(buffer).ok()
    }

    fn device_file(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }

    fn reset(&self) -> io::Result<()> {
        ioctl::reset(self.as_fd())
    }

    fn hot_reset_scope(&self) -> io::Result<HotResetScope> {
        let (flags, devices) = ioctl::hot_reset_info(self.as_fd())?;
        let has_ids = flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
        let devices = devices.into_iter().map(|device| AffectedDevice {
            function: HostFunction {
                domain: device.domain,
                bus: device.bus,
                devfn: device.devfn,
            },
            is_unused: has_ids && device.id == VFIO_PCI_DEVID_OWNED,
            group: (!has_ids).then_some(device.id),
        });
        Ok(HotResetScope {
            devices: devices.collect(),
        })
    }

    fn bus_reset(&self) -> Arc<dyn BusReset> {
        Arc::new(self.clone())
    }

    fn stop_dma(&self) -> io::Result<()> {
        self.clear_bus_master()
    }
}

impl BusReset for Cdev {
    fn group(&self) -> Option<GroupFile> {
        let group: GroupFile = self.source.as_ref()?.group.clone();
        Some(group)
    }

    fn hot_reset(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
        ioctl::hot_reset(self.as_fd(), groups)
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.device_file()
    }

    fn close(&self) -> io::Result<()> {
        self.close_file()
    }

    fn open_again(&self) -> io::Result<()> {
        self.open_file_again()
    }

    fn mark(&self, line: u8) -> io::Result<DeviceMark> {
        device_mark::mark(&self.file, line)
    }

    fn has_mark(&self, mark: &DeviceMark) -> io::Result<bool> {
        device_mark::has_mark(&self.file, mark)
    }
}

/// The offset of byte `at` of a region in the device's file.
fn file_offset(region: &RegionInfo, at: u64) -> io::Result<u64> {
    region
        .offset
        .checked_add(at)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Parses a `vfio_region_info` and its chain of capabilities. The chain ends at the first capability that lies
/// outside of `bytes`; `None` if `bytes` is shorter than the structure.
fn parse_region(bytes: &[u8]) -> Option<RegionInfo> {
    const CAP_HEADER: usize = 8;
    let u16_at = |at: usize| -> Option<u16> {
        let field = bytes.get(at..at.checked_add(2)?)?;
        Some(u16::from_ne_bytes(field.try_into().ok()?))
    };
    let u32_at = |at: usize| -> Option<u32> {
        let field = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(field.try_into().ok()?))
    };
    let u64_at = |at: usize| -> Option<u64> {
        let field = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_ne_bytes(field.try_into().ok()?))
    };
    let mut info = RegionInfo {
        flags: u32_at(4)?,
        size: u64_at(16)?,
        offset: u64_at(24)?,
        capabilities: Vec::new(),
    };
    let end = bytes.len().min(u32_at(0)? as usize);
    let mut at = if info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
        u32_at(12)? as usize
    } else {
        0
    };
    // Each capability must lie behind the one before, so the chain ends.
    let mut passed = size_of::<vfio_region_info>() - 1;
    while at > passed {
        let (Some(id), Some(version), Some(next)) = (
            u16_at(at),
            u16_at(at.saturating_add(2)),
            u32_at(at.saturating_add(4)),
        ) else {
            break;
        };
        let next = next as usize;
        let last = if next > at { next.min(end) } else { end };
        let data = bytes.get(at + CAP_HEADER..last).unwrap_or_default();
        info.capabilities.push(Capability {
            id,
            version,
            data: data.to_vec(),
        });
        passed = at;
        at = next;
    }
    Some(info)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vfio_bindings::bindings::vfio::{
        VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    };

    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = Vec::new();
        let words = |bytes: &mut Vec<u8>, words: &[u32]| {
            bytes.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
        };
        // 80 bytes in all: flags 0xf, index 2, capabilities from byte 32 on.
        words(&mut bytes, &[80, 0xf, 2, 32]);
        bytes.extend(0x10_0000u64.to_ne_bytes());
        bytes.extend((2u64 << 40).to_ne_bytes());
        // A sparse mapping with one area, then the capability that the MSI-X table can be mapped.
        words(&mut bytes, &[1 | 1 << 16, 64, 1, 0, 0x2000, 0, 0x1000, 0]);
        words(&mut bytes, &[3 | 1 << 16, 0, 0, 0]);
        bytes
    }

    #[test]
    fn capabilities_of_regions_are_found() {
        let info = parse_region(&sample()).expect("whole");
        assert_eq!((info.size, info.offset), (0x10_0000, 2 << 40));
        let found: Vec<_> = info
            .capabilities
            .iter()
            .map(|c| (u32::from(c.id), c.version, c.data.len()))
            .collect();
        let expected = [
            (VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1, 24),
            (VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 1, 8),
        ];
        assert_eq!(found, expected);
        assert_eq!(info.capabilities[0].data[8..16], 0x2000u64.to_ne_bytes());
        assert_eq!(parse_region(&sample()[..31]), None);
    }

    proptest! {
        #[test]
        fn any_capability_chain_ends(
            changes in proptest::collection::vec((0usize..80, any::<u8>()), 0..12),
            cut in 32usize..=80,
        ) {
            let mut bytes = sample();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(cut);
            let info = parse_region(&bytes).expect("whole");
            prop_assert!(info.capabilities.len() <= 80 - 32);
        }
    }
}
