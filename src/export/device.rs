//! A VFIO device in the terms of vfio-user.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_CAP_TYPE, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use zerocopy::IntoBytes;

use super::irqs::{Irqs, errno};
use crate::vfio::{Capability, DeviceAccess, DeviceInfo, IrqInfo, RegionInfo};
use crate::vfio_user::message::{
    DeviceInfoBody, IrqInfoBody, IrqSetBody, MAX_DATA, RegionAccessBody, RegionInfoBody,
};
use crate::warn_limited;

/// The most regions, and the most kinds of interrupts, that are offered: VFIO's devices have a dozen.
const MAX_PARTS: u32 = 64;
/// PCI Local Bus 3.0, 6.2.2: the command register, and its bits for I/O, memory and bus master.
const COMMAND: u64 = 0x04;
const COMMAND_ANSWERS: u16 = 0b111;
/// Bytes of a capability's header in a chain.
const CAP_HEADER: usize = 8;

/// A device that a client is offered. What the client asks for is held against what the device has
/// before it is done; refusals are errnos.
pub struct Offered {
    name: String,
    device: Box<dyn DeviceAccess>,
    info: DeviceInfo,
    regions: BTreeMap<u32, RegionInfo>,
    kinds: Vec<IrqInfo>,
    irqs: Irqs,
}

/// The reply to DEVICE_GET_REGION_INFO.
#[derive(Debug)]
pub struct RegionReply {
    /// Its body.
    pub body: Vec<u8>,
    /// What to map.
    pub descriptor: Option<OwnedFd>,
}

impl Offered {
    /// The device, with its name for messages.
    ///
    /// # Errors
    /// Where it is no PCI device, or does not tell what it has.
    pub fn new(name: String, device: Box<dyn DeviceAccess>) -> io::Result<Self> {
        let mut info = device.info()?;
        info.flags &= VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
        info.regions = info.regions.min(MAX_PARTS);
        info.irqs = info.irqs.min(MAX_PARTS);
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::other("it is no PCI device"));
        }
        // Devices do not have all that the kernel has numbers for.
        let regions = (0..info.regions)
            .filter_map(|index| Some((index, device.region(index).ok()?)))
            .collect();
        let none = IrqInfo { flags: 0, count: 0 };
        let kinds = (0..info.irqs)
            .map(|index| device.irq(index).unwrap_or(none))
            .collect();
        Ok(Self {
            name,
            device,
            info,
            regions,
            kinds,
            irqs: Irqs::default(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The reply to DEVICE_GET_INFO.
    pub fn info(&self) -> DeviceInfoBody {
        DeviceInfoBody {
            argsz: size_of_u32::<DeviceInfoBody>().into(),
            flags: self.info.flags.into(),
            regions: self.info.regions.into(),
            irqs: self.info.irqs.into(),
        }
    }

    /// The reply to DEVICE_GET_REGION_INFO, without capabilities where the client has no room for
    /// them: `argsz` tells it then how much it needs.
    ///
    /// # Errors
    /// `EINVAL` where there is no such region.
    pub fn region(&self, asked: &RegionInfoBody) -> Result<RegionReply, i32> {
        let index = asked.index.get();
        if index >= self.info.regions {
            return Err(libc::EINVAL);
        }
        // What the kernel has a number for and the device has not got: no bytes.
        let absent = RegionInfo {
            flags: 0,
            size: 0,
            offset: 0,
            capabilities: Vec::new(),
        };
        let region = self.regions.get(&index).unwrap_or(&absent);
        let may_map = region.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        let file = may_map
            .then(|| self.device.region_file(index, region))
            .flatten();
        let mut flags = region.flags & (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE);
        if file.is_some() {
            flags |= VFIO_REGION_INFO_FLAG_MMAP;
        }
        let offered = region
            .capabilities
            .iter()
            .filter(|c| is_offered(c, file.is_some()));
        let chain = chain(offered, size_of::<RegionInfoBody>());
        let mut cap_offset = 0;
        if !chain.is_empty() {
            flags |= VFIO_REGION_INFO_FLAG_CAPS;
            cap_offset = size_of_u32::<RegionInfoBody>();
        }
        let whole = size_of::<RegionInfoBody>() + chain.len();
        let has_room = asked.argsz.get() as usize >= whole;
        let head = RegionInfoBody {
            argsz: u32::try_from(whole).unwrap_or(u32::MAX).into(),
            flags: flags.into(),
            index: index.into(),
            cap_offset: cap_offset.into(),
            size: region.size.into(),
            offset: 0.into(),
        };
        let mut body = head.as_bytes().to_vec();
        if has_room {
            body.extend(chain);
        }
        Ok(RegionReply {
            body,
            descriptor: file.filter(|_| has_room),
        })
    }

    /// The reply to DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// `EINVAL` where there is no such kind.
    pub fn irq(&self, asked: &IrqInfoBody) -> Result<IrqInfoBody, i32> {
        let kind = self.kind(asked.index.get())?;
        Ok(IrqInfoBody {
            argsz: size_of_u32::<IrqInfoBody>().into(),
            flags: kind.flags.into(),
            index: asked.index,
            count: kind.count.into(),
        })
    }

    /// Does what DEVICE_SET_IRQS asks for; `data` and `descriptors` came with it.
    ///
    /// # Errors
    /// `EINVAL` where it is not possible for this device; else the kernel's.
    pub fn set_irqs(
        &mut self,
        set: &IrqSetBody,
        data: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), i32> {
        let kind = self.kind(set.index.get())?;
        self.irqs.set(&*self.device, kind, set, data, descriptors)
    }

    /// Reads from a region: the bytes, fewer than wanted where the rest cannot be read.
    ///
    /// # Errors
    /// `EINVAL` for what is not in a region, `E2BIG` for more than a message holds, `EPERM` where it
    /// cannot be read at all; else the kernel's.
    pub fn read(&self, access: &RegionAccessBody) -> Result<Vec<u8>, i32> {
        let region = self.place(access, VFIO_REGION_INFO_FLAG_READ)?;
        let mut data = vec![0; access.count.get() as usize];
        let read = errno(
            self.device
                .read(region, access.offset.get(), data.as_mut_slice()),
        )?;
        data.truncate(read);
        Ok(data)
    }

    /// Writes to a region as many bytes of `data` as `access` says: how many were written.
    ///
    /// # Errors
    /// As for [`Offered::read`].
    pub fn write(&self, access: &RegionAccessBody, data: &[u8]) -> Result<u32, i32> {
        let region = self.place(access, VFIO_REGION_INFO_FLAG_WRITE)?;
        let data = data
            .get(..access.count.get() as usize)
            .ok_or(libc::EINVAL)?;
        let written = errno(self.device.write(region, access.offset.get(), data))?;
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Resets the device.
    ///
    /// # Errors
    /// `ENOTTY` where it cannot be; else the kernel's.
    pub fn reset(&self) -> Result<(), i32> {
        if self.info.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(libc::ENOTTY);
        }
        errno(self.device.reset())
    }

    /// Nobody drives the device any more: its interrupts are switched off, it answers to nothing and
    /// does no DMA until the next client lets it, and it forgets what it can be made to forget.
    pub fn release(&mut self) {
        self.irqs.release(&*self.device, &self.name);
        if let Err(cause) = self.silence() {
            warn_limited!("{}: the device may go on with its DMA: {cause}", self.name);
        }
        match self.reset() {
            Ok(()) | Err(libc::ENOTTY) => {}
            Err(error) => warn_limited!(
                "{}: the device cannot be reset and remembers what its last client did: {}",
                self.name,
                io::Error::from_raw_os_error(error)
            ),
        }
    }

    /// Clears the bits of the command register that make a device answer and do DMA.
    fn silence(&self) -> io::Result<()> {
        let Some(config) = self.regions.get(&VFIO_PCI_CONFIG_REGION_INDEX) else {
            return self.device.stop_dma();
        };
        let mut command = [0; 2];
        self.device.read(config, COMMAND, &mut command)?;
        let silent = u16::from_le_bytes(command) & !COMMAND_ANSWERS;
        let written = self.device.write(config, COMMAND, &silent.to_le_bytes())?;
        if written != command.len() {
            return self.device.stop_dma();
        }
        Ok(())
    }

    fn kind(&self, index: u32) -> Result<IrqInfo, i32> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        self.kinds.get(at).copied().ok_or(libc::EINVAL)
    }

    /// The region of an access that is inside of it and may be made.
    fn place(&self, access: &RegionAccessBody, right: u32) -> Result<&RegionInfo, i32> {
        let region = self.regions.get(&access.region.get()).ok_or(libc::EINVAL)?;
        let count = access.count.get();
        if count > MAX_DATA {
            return Err(libc::E2BIG);
        }
        let end = access.offset.get().checked_add(count.into());
        if end.is_none_or(|end| end > region.size) {
            return Err(libc::EINVAL);
        }
        if region.flags & right == 0 {
            return Err(libc::EPERM);
        }
        Ok(region)
    }
}

/// Whether a client can do something with a capability: those on mapping only where it can map.
fn is_offered(capability: &Capability, mapped: bool) -> bool {
    match u32::from(capability.id) {
        VFIO_REGION_INFO_CAP_TYPE => true,
        VFIO_REGION_INFO_CAP_SPARSE_MMAP | VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => mapped,
        _ => false,
    }
}

/// The chain of capabilities as it stands behind a structure of `first` bytes.
fn chain<'a>(capabilities: impl Iterator<Item = &'a Capability>, first: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut previous = None;
    for capability in capabilities {
        let at = bytes.len();
        if let Some(previous) = previous {
            let next = u32::try_from(first + at).unwrap_or(0).to_ne_bytes();
            bytes[previous + 4..previous + CAP_HEADER].copy_from_slice(&next);
        }
        bytes.extend(capability.id.to_ne_bytes());
        bytes.extend(capability.version.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&capability.data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        previous = Some(at);
    }
    bytes
}

fn size_of_u32<T>() -> u32 {
    // The largest of them has a few dozen bytes.
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}
