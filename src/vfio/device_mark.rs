//! A mark in an open device, which tells later whether the device was closed meanwhile.
//!
//! VFIO lets a driver register events that write a value to a register (`VFIO_DEVICE_IOEVENTFD`), and removes them when the
//! last descriptor of the device is closed. The mark consists of such events, which never occur. Only who knows an event's
//! address and value can remove it, and the kernel shows them to nobody. So a process that has the device open cannot hide.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::rand::{GetRandomFlags, getrandom};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR5_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};

use super::{ioctl, regions};

/// The number of events. Each has a secret of 32 bits and an address. VFIO refuses secrets of 64 bits.
const EVENTS: usize = 4;
/// How many addresses of a BAR are tried for an event: VFIO allows none in the MSI-X table.
const TRIES: usize = 16;
/// The size in bytes of the register that an event writes.
const REGISTER: u64 = 4;

/// What [`BusReset::mark`](super::BusReset::mark) has left in a device.
#[derive(Debug)]
pub enum DeviceMark {
    /// Secret events, which a process that has the device open cannot remove.
    Events(MarkEvents),
    /// A value of the interrupt line, for devices without a BAR for events. Whoever has the device open can write it.
    Line(u8),
}

/// Events that would write registers.
#[derive(Debug)]
pub struct MarkEvents {
    /// Never signalled. It stays open, because VFIO notices when it is closed.
    _event: OwnedFd,
    writes: Vec<RegisterWrite>,
}

/// What an event would write, and where in the device's file.
#[derive(Debug)]
struct RegisterWrite {
    offset: u64,
    value: u32,
}

/// See [`BusReset::mark`](super::BusReset::mark).
pub(super) fn mark(device: &File, line: u8) -> io::Result<DeviceMark> {
    if let Some(events) = add_events(device)? {
        return Ok(DeviceMark::Events(events));
    }
    regions::set_interrupt_line(device, line)?;
    Ok(DeviceMark::Line(line))
}

/// See [`BusReset::has_mark`](super::BusReset::has_mark).
pub(super) fn has_mark(device: &File, mark: &DeviceMark) -> io::Result<bool> {
    let events = match mark {
        DeviceMark::Events(events) => events,
        DeviceMark::Line(line) => return Ok(regions::interrupt_line(device)? == *line),
    };
    let mut is_there = false;
    for RegisterWrite { offset, value } in &events.writes {
        let removed = ioctl::set_register_event(device.as_fd(), *offset, *value, None);
        match removed.map_err(|cause| (cause.raw_os_error(), cause)) {
            Ok(()) => is_there = true,
            Err((Some(libc::ENODEV), _)) => {}
            Err((_, cause)) => return Err(cause),
        }
    }
    Ok(is_there)
}

/// Registers the events of a mark. `None` if the kernel takes none for any BAR of the device.
fn add_events(device: &File) -> io::Result<Option<MarkEvents>> {
    let event = eventfd(0, EventfdFlags::CLOEXEC)?;
    for region in bars(device) {
        let mut writes = Vec::new();
        while writes.len() < EVENTS {
            match add_event(device, &region, &event)? {
                Some(write) => writes.push(write),
                None => break,
            }
        }
        if writes.len() == EVENTS {
            return Ok(Some(MarkEvents {
                _event: event,
                writes,
            }));
        }
    }
    Ok(None)
}

/// Registers one event. `None` if the kernel takes none for this BAR.
fn add_event(
    device: &File,
    region: &vfio_region_info,
    event: &OwnedFd,
) -> io::Result<Option<RegisterWrite>> {
    for _ in 0..TRIES {
        let (place, value) = (random()?, random()?);
        let offset = region.offset + u64::from(place) % (region.size / REGISTER) * REGISTER;
        let added = ioctl::set_register_event(device.as_fd(), offset, value, Some(event.as_fd()));
        match added.map_err(|cause| (cause.raw_os_error(), cause)) {
            Ok(()) => return Ok(Some(RegisterWrite { offset, value })),
            // A place in the MSI-X table, or the same event as another one.
            Err((Some(libc::EINVAL | libc::EEXIST), _)) => {}
            Err((Some(libc::ENOTTY), _)) => return Ok(None),
            Err((Some(libc::ENOSPC), _)) => {
                return Err(io::Error::other(
                    "it has all the events that VFIO allows (VFIO_DEVICE_IOEVENTFD)",
                ));
            }
            Err((_, cause)) => return Err(cause),
        }
    }
    Ok(None)
}

/// The BARs with room for a register. Memory comes before I/O ports, and small BARs before large ones, since the kernel maps
/// the whole BAR.
fn bars(device: &File) -> Vec<vfio_region_info> {
    let indices = VFIO_PCI_BAR0_REGION_INDEX..=VFIO_PCI_BAR5_REGION_INDEX;
    let infos = indices.filter_map(|index| ioctl::region_info(device.as_fd(), index).ok());
    let mut bars: Vec<_> = infos
        .filter(|info| info.flags & VFIO_REGION_INFO_FLAG_WRITE != 0 && info.size >= REGISTER)
        .collect();
    bars.sort_by_key(|info| (info.flags & VFIO_REGION_INFO_FLAG_MMAP == 0, info.size));
    bars
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // At most 256 bytes are never cut short.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(bytes))
}
