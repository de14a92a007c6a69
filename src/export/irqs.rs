//! A device's interrupts, as a client asks for them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK,
};

use crate::vfio::{DeviceAccess, IrqChange, IrqInfo, IrqWhat};
use crate::vfio_user::message::IrqSetBody;
use crate::warn_limited;

/// What the client has set up.
#[derive(Debug, Default)]
pub(super) struct Irqs {
    /// The kinds it may have switched on.
    used: BTreeSet<u32>,
    /// The events of kinds that the kernel gives no more interrupts than it was first asked for.
    kept: BTreeMap<u32, Vec<Option<OwnedFd>>>,
}

impl Irqs {
    /// Does what a DEVICE_SET_IRQS asks for of a kind that the device has.
    ///
    /// A client sends the descriptors of many interrupts in several messages. Where the kernel
    /// fixes their number with the first one, all are set up again from the beginning: that loses
    /// what comes in between, as it does for whoever uses VFIO itself.
    ///
    /// # Errors
    /// The errno it is refused with; what was there before may be switched off then.
    pub(super) fn set(
        &mut self,
        device: &dyn DeviceAccess,
        info: IrqInfo,
        set: &IrqSetBody,
        data: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), i32> {
        let (flags, index) = (set.flags.get(), set.index.get());
        let (start, count) = (set.start.get(), set.count.get());
        let action = flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
        let known = VFIO_IRQ_SET_ACTION_TYPE_MASK | VFIO_IRQ_SET_DATA_TYPE_MASK;
        let inside = start
            .checked_add(count)
            .is_some_and(|end| end <= info.count);
        if flags & !known != 0 || action.count_ones() != 1 || !inside {
            return Err(libc::EINVAL);
        }
        let off = count == 0;
        if off && flags != VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER {
            return Err(libc::EINVAL);
        }
        let wanted = count as usize;
        let change = |what| IrqChange {
            action,
            index,
            start,
            what,
        };
        match flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE if off => {
                self.kept.remove(&index);
                self.used.remove(&index);
                errno(device.set_irqs(&change(IrqWhat::All(0))))
            }
            VFIO_IRQ_SET_DATA_NONE => errno(device.set_irqs(&change(IrqWhat::All(count)))),
            VFIO_IRQ_SET_DATA_BOOL => {
                let chosen = data.get(..wanted).ok_or(libc::EINVAL)?;
                errno(device.set_irqs(&change(IrqWhat::Chosen(chosen))))
            }
            VFIO_IRQ_SET_DATA_EVENTFD => {
                let events: Vec<Option<OwnedFd>> = match descriptors.len() {
                    0 => (0..wanted).map(|_| None).collect(),
                    n if n == wanted => descriptors.into_iter().map(Some).collect(),
                    _ => return Err(libc::EINVAL),
                };
                self.used.insert(index);
                let fixed = info.flags & VFIO_IRQ_INFO_NORESIZE != 0;
                if action == VFIO_IRQ_SET_ACTION_TRIGGER && fixed && info.count > 1 {
                    return self.set_fixed(device, index, start as usize, events);
                }
                errno(set_events(device, action, index, start, &events))
            }
            _ => Err(libc::EINVAL),
        }
    }

    /// Switches everything off.
    pub(super) fn release(&mut self, device: &dyn DeviceAccess, name: &str) {
        self.kept.clear();
        for index in std::mem::take(&mut self.used) {
            let off = IrqChange {
                action: VFIO_IRQ_SET_ACTION_TRIGGER,
                index,
                start: 0,
                what: IrqWhat::All(0),
            };
            // The kernel refuses what is off already: a client may have asked in vain.
            if let Err(cause) = device.set_irqs(&off)
                && cause.raw_os_error() != Some(libc::EINVAL)
            {
                warn_limited!("{name}: interrupts of kind {index} stay on: {cause}");
            }
        }
    }

    /// Sets events of a kind whose number of interrupts the kernel fixes.
    fn set_fixed(
        &mut self,
        device: &dyn DeviceAccess,
        index: u32,
        start: usize,
        events: Vec<Option<OwnedFd>>,
    ) -> Result<(), i32> {
        let kept = self.kept.entry(index).or_default();
        let (before, end) = (kept.len(), start + events.len());
        kept.resize_with(before.max(end), || None);
        for (slot, event) in kept.iter_mut().skip(start).zip(events) {
            *slot = event;
        }
        let action = VFIO_IRQ_SET_ACTION_TRIGGER;
        let again = before > 0 && end > before;
        let done = if again {
            let off = IrqChange {
                action,
                index,
                start: 0,
                what: IrqWhat::All(0),
            };
            device
                .set_irqs(&off)
                .and_then(|()| set_events(device, action, index, 0, kept))
        } else {
            let first = if before == 0 { 0 } else { start };
            let some = kept.get(first..end).unwrap_or_default();
            let start = u32::try_from(first).unwrap_or(u32::MAX);
            set_events(device, action, index, start, some)
        };
        if done.is_err() {
            kept.truncate(if again { 0 } else { before });
        }
        errno(done)
    }
}

fn set_events(
    device: &dyn DeviceAccess,
    action: u32,
    index: u32,
    start: u32,
    events: &[Option<OwnedFd>],
) -> io::Result<()> {
    let events: Vec<_> = events
        .iter()
        .map(|event| event.as_ref().map(AsFd::as_fd))
        .collect();
    device.set_irqs(&IrqChange {
        action,
        index,
        start,
        what: IrqWhat::Events(&events),
    })
}

/// What to refuse with.
pub(super) fn errno<T>(result: io::Result<T>) -> Result<T, i32> {
    result.map_err(|cause| cause.raw_os_error().unwrap_or(libc::EIO))
}
