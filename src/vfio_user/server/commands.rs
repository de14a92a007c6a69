//! Commands of a client: the server checks each against the device's regions and interrupts, and executes it.

use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use super::device::{IrqAction, IrqSet, IrqSetData, ServedDevice};
use super::region::region_info;
use crate::process::peer_event::PeerEvent;
use crate::vfio_user::message::{
    Command, DeviceInfoBody, DmaMapBody, DmaUnmapBody, IRQ_ACTION_MASK, IRQ_ACTION_TRIGGER,
    IRQ_ACTION_UNMASK, IRQ_ACTIONS, IRQ_DATA, IRQ_DATA_BOOL, IRQ_DATA_EVENTFD, IRQ_DATA_NONE,
    IrqInfoBody, IrqSetBody, MAX_DATA, Malformed, REGION_READ, REGION_WRITE, RegionAccessBody,
    RegionInfoBody, WriteMultiBody, WriteOneBody, take,
};
use crate::vfio_user::socket::Message;

/// The reply to a command that succeeded.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) body: Vec<u8>,
    pub(super) descriptor: Option<OwnedFd>,
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self {
            body,
            descriptor: None,
        }
    }
}

/// Executes a command other than VERSION. Returns the reply, or the errno of the refusal.
///
/// # Errors
/// The message is malformed, although `check_command` accepted it.
pub(super) fn execute(
    device: &mut dyn ServedDevice,
    command: Command,
    message: Message,
) -> Result<Result<Reply, i32>, Malformed> {
    let body = &message.body[..];
    Ok(match command {
        Command::DmaMap => {
            let (window, _) = take::<DmaMapBody>(command, body)?;
            let file = message.descriptors.into_iter().next();
            device.dma_map(&window, file).map(|()| Vec::new().into())
        }
        Command::DmaUnmap => {
            let (window, _) = take::<DmaUnmapBody>(command, body)?;
            let unmapped = device.dma_unmap(&window);
            unmapped.map(|()| window.as_bytes().to_vec().into())
        }
        Command::DeviceGetInfo => Ok(device_info(device).as_bytes().to_vec().into()),
        Command::DeviceGetRegionInfo => {
            let (request, _) = take::<RegionInfoBody>(command, body)?;
            region_info(device, &request).map(|(body, descriptor)| Reply { body, descriptor })
        }
        Command::DeviceGetIrqInfo => {
            let (request, _) = take::<IrqInfoBody>(command, body)?;
            irq_info(device, &request).map(|info| info.as_bytes().to_vec().into())
        }
        Command::DeviceSetIrqs => {
            let (set, data) = take::<IrqSetBody>(command, body)?;
            let outcome = irq_set(device, &set, data, message.descriptors)
                .and_then(|set| device.set_irqs(set));
            outcome.map(|()| Vec::new().into())
        }
        Command::RegionRead => {
            let (access, _) = take::<RegionAccessBody>(command, body)?;
            read_region(device, &access).map(Reply::from)
        }
        Command::RegionWrite => {
            let (access, data) = take::<RegionAccessBody>(command, body)?;
            write_region(device, &access, data).map(|count| {
                let reply = RegionAccessBody {
                    count: count.into(),
                    ..access
                };
                reply.as_bytes().to_vec().into()
            })
        }
        Command::RegionWriteMulti => {
            let (multi, entries) = take::<WriteMultiBody>(command, body)?;
            write_multi(device, &multi, entries)?.map(|reply| reply.as_bytes().to_vec().into())
        }
        Command::DeviceReset => device.reset().map(|()| Vec::new().into()),
        Command::Version
        | Command::DmaRead
        | Command::DmaWrite
        | Command::DeviceGetRegionIoFds
        | Command::DirtyPages
        | Command::DeviceFeature
        | Command::MigDataRead
        | Command::MigDataWrite => Err(libc::ENOTSUP),
    })
}

fn device_info(device: &dyn ServedDevice) -> DeviceInfoBody {
    let info = device.info();
    DeviceInfoBody {
        argsz: DeviceInfoBody::BYTES.into(),
        flags: info.flags.into(),
        regions: info.regions.into(),
        irqs: info.irqs.into(),
    }
}

fn irq_info(device: &dyn ServedDevice, request: &IrqInfoBody) -> Result<IrqInfoBody, i32> {
    let kind = device.irq(request.index.get()).ok_or(libc::EINVAL)?;
    Ok(IrqInfoBody {
        argsz: IrqInfoBody::BYTES.into(),
        flags: kind.flags.into(),
        index: request.index,
        count: kind.count.into(),
    })
}

/// Decodes a DEVICE_SET_IRQS.
///
/// # Errors
/// `EINVAL`: the device lacks the interrupts, the flags contradict each other, the number of
/// descriptors is neither 0 nor that of the interrupts, or a descriptor is not an eventfd.
fn irq_set<'a>(
    device: &dyn ServedDevice,
    set: &IrqSetBody,
    data: &'a [u8],
    descriptors: Vec<OwnedFd>,
) -> Result<IrqSet<'a>, i32> {
    let (flags, index) = (set.flags.get(), set.index.get());
    let (start, count) = (set.start.get(), set.count.get());
    let kind = device.irq(index).ok_or(libc::EINVAL)?;
    let end = start.checked_add(count);
    if flags & !(IRQ_ACTIONS | IRQ_DATA) != 0 || end.is_none_or(|end| end > kind.count) {
        return Err(libc::EINVAL);
    }
    let action = match flags & IRQ_ACTIONS {
        IRQ_ACTION_MASK => IrqAction::Mask,
        IRQ_ACTION_UNMASK => IrqAction::Unmask,
        IRQ_ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(libc::EINVAL),
    };
    let wanted = count as usize;
    let data = match flags & IRQ_DATA {
        IRQ_DATA_NONE if count == 0 && action == IrqAction::Trigger => IrqSetData::Disable,
        _ if count == 0 => return Err(libc::EINVAL),
        IRQ_DATA_NONE => IrqSetData::All(count),
        IRQ_DATA_BOOL => IrqSetData::Chosen(data.get(..wanted).ok_or(libc::EINVAL)?),
        IRQ_DATA_EVENTFD if descriptors.is_empty() => {
            IrqSetData::Eventfds((0..wanted).map(|_| None).collect())
        }
        IRQ_DATA_EVENTFD if descriptors.len() == wanted => {
            let events = descriptors.into_iter().map(|fd| event(fd).map(Some));
            IrqSetData::Eventfds(events.collect::<Result<_, _>>()?)
        }
        _ => return Err(libc::EINVAL),
    };
    Ok(IrqSet {
        index,
        action,
        start,
        data,
    })
}

fn event(fd: OwnedFd) -> Result<PeerEvent, i32> {
    PeerEvent::new(fd).map_err(|cause| cause.raw_os_error().unwrap_or(libc::EINVAL))
}

fn read_region(device: &mut dyn ServedDevice, access: &RegionAccessBody) -> Result<Vec<u8>, i32> {
    let checked = check_access(device, access, REGION_READ);
    let mut body = access.as_bytes().to_vec();
    let head = body.len();
    let len = match checked {
        Ok(len) => len,
        Err(_) if is_unclaimed(device, access) => {
            body.resize(head + access.count.get() as usize, 0xff);
            return Ok(body);
        }
        Err(errno) => return Err(errno),
    };
    body.resize(head + len, 0);
    let read = device.read_region(access.region.get(), access.offset.get(), &mut body[head..])?;
    let read = read.min(len);
    body.truncate(head + read);
    let reply = RegionAccessBody {
        count: u32::try_from(read).unwrap_or(u32::MAX).into(),
        ..*access
    };
    body[..head].copy_from_slice(reply.as_bytes());
    Ok(body)
}

/// Writes the first bytes of `data`, as many as `access` counts. Returns how many were written.
fn write_region(
    device: &mut dyn ServedDevice,
    access: &RegionAccessBody,
    data: &[u8],
) -> Result<u32, i32> {
    let len = match check_access(device, access, REGION_WRITE) {
        Ok(len) => len,
        Err(_) if is_unclaimed(device, access) => return Ok(access.count.get()),
        Err(errno) => return Err(errno),
    };
    let data = data.get(..len).ok_or(libc::EINVAL)?;
    let written = device.write_region(access.region.get(), access.offset.get(), data)?;
    Ok(u32::try_from(written).unwrap_or(u32::MAX))
}

/// Writes entry after entry up to the first that fails. Returns how many succeeded, or the errno of
/// the first entry if that failed.
fn write_multi(
    device: &mut dyn ServedDevice,
    multi: &WriteMultiBody,
    mut entries: &[u8],
) -> Result<Result<WriteMultiBody, i32>, Malformed> {
    let mut done = 0u64;
    while done < multi.count.get() {
        let (entry, rest) = take::<WriteOneBody>(Command::RegionWriteMulti, entries)?;
        entries = rest;
        let access = RegionAccessBody {
            offset: entry.offset,
            region: entry.region,
            count: entry.count,
        };
        match write_region(device, &access, &entry.data) {
            Ok(_) => done += 1,
            Err(errno) if done == 0 => return Ok(Err(errno)),
            Err(_) => break,
        }
    }
    Ok(Ok(WriteMultiBody { count: done.into() }))
}

/// Whether an access outside of the device's regions gets an answer all the same: one that a message can have.
fn is_unclaimed(device: &dyn ServedDevice, access: &RegionAccessBody) -> bool {
    device.answers_all_accesses() && access.count.get() <= MAX_DATA
}

/// The number of bytes of an access that the device can be asked for.
///
/// # Errors
/// `EINVAL`: it is not within a region; `E2BIG`: it has more bytes than a message; `EPERM`: the
/// region does not grant `right`.
fn check_access(
    device: &dyn ServedDevice,
    access: &RegionAccessBody,
    right: u32,
) -> Result<usize, i32> {
    let region = device.region(access.region.get());
    let region = region.filter(|r| r.size > 0).ok_or(libc::EINVAL)?;
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
    Ok(count as usize)
}
