//! A VFIO device's interrupts as a vfio-user client sets them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK,
};

use crate::process::peer_event::PeerEvent;
use crate::vfio::{DeviceAccess, IrqChange, IrqSelection};
use crate::vfio_user::server::{
    ClientEvent, ClientFiles, DescriptorKeeping, IrqAction, IrqKind, IrqSet, IrqSetData,
};
use crate::warn_limited;

/// What a later process must know of a client's interrupts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IrqsRecord {
    /// The kinds that the client may have enabled.
    used: Vec<u32>,
    /// The names of the eventfds of the kinds with a fixed number of interrupts.
    pub(super) fixed: Vec<(u32, Vec<Option<String>>)>,
}

/// The interrupts that the client has set.
#[derive(Debug, Default)]
pub(super) struct ExportedIrqs {
    /// The kinds that the client may have enabled.
    used: BTreeSet<u32>,
    /// The client's eventfds, for the kinds with a fixed number of interrupts: the kernel fixes the number when the
    /// client first enables interrupts of the kind.
    kept: BTreeMap<u32, Vec<Option<ClientEvent>>>,
}

impl ExportedIrqs {
    /// Executes a DEVICE_SET_IRQS of a kind that the device has.
    ///
    /// A client sends the eventfds of many interrupts in several messages. If the kernel fixes the
    /// number of interrupts with the first message, all are disabled and enabled anew. An interrupt
    /// in between is lost, as it is for a VMM that uses VFIO itself.
    ///
    /// # Errors
    /// The kernel's errno. The interrupts of the kind may then be disabled.
    pub(super) fn set(
        &mut self,
        device: &dyn DeviceAccess,
        kind: IrqKind,
        set: IrqSet<'_>,
        keeping: &DescriptorKeeping,
    ) -> Result<(), i32> {
        let IrqSet { index, start, .. } = set;
        let action = match set.action {
            IrqAction::Mask => VFIO_IRQ_SET_ACTION_MASK,
            IrqAction::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            IrqAction::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        let change = |selection| IrqChange {
            action,
            index,
            start,
            selection,
        };
        match set.data {
            IrqSetData::Disable => {
                self.kept.remove(&index);
                self.used.remove(&index);
                errno_of(device.set_irqs(&change(IrqSelection::All(0))))
            }
            IrqSetData::All(count) => errno_of(device.set_irqs(&change(IrqSelection::All(count)))),
            IrqSetData::Chosen(chosen) => {
                errno_of(device.set_irqs(&change(IrqSelection::Chosen(chosen))))
            }
            IrqSetData::Eventfds(events) => {
                self.used.insert(index);
                let fixed = kind.flags & VFIO_IRQ_INFO_NORESIZE != 0;
                if set.action == IrqAction::Trigger && fixed && kind.count > 1 {
                    let keep = |event: Option<PeerEvent>| {
                        event.map(|event| ClientEvent::new(event, keeping))
                    };
                    let events = events.into_iter().map(keep).collect();
                    return self.set_fixed(device, index, start as usize, events);
                }
                let events: Vec<_> = events.iter().map(Option::as_ref).collect();
                errno_of(set_events(device, action, index, start, &events))
            }
        }
    }

    /// What a later process must know. The kernel has the eventfds themselves.
    pub(super) fn record(&self) -> IrqsRecord {
        let name = |event: &Option<ClientEvent>| {
            let event = event.as_ref()?;
            // Without a keeper nobody reads it.
            Some(event.name.clone().unwrap_or_default())
        };
        let kept = self.kept.iter();
        IrqsRecord {
            used: self.used.iter().copied().collect(),
            fixed: kept
                .map(|(index, events)| (*index, events.iter().map(name).collect()))
                .collect(),
        }
    }

    /// The interrupts that a client of an earlier process has set, of a device with these `kinds`.
    ///
    /// # Errors
    /// They are none that the device has, or an eventfd is missing.
    pub(super) fn resumed(
        record: &IrqsRecord,
        kinds: &[IrqKind],
        files: &ClientFiles,
    ) -> io::Result<Self> {
        let count = |index: u32| {
            kinds
                .get(index as usize)
                .map_or(0, |kind| kind.count as usize)
        };
        let is_sound = record.used.iter().all(|index| count(*index) > 0)
            && record
                .fixed
                .iter()
                .all(|(index, events)| events.len() <= count(*index));
        if !is_sound {
            return Err(io::Error::other("it has interrupts that the device lacks"));
        }
        let event = |name: &Option<String>| {
            let event = name.as_ref();
            event
                .map(|name| ClientEvent::resumed(name, files))
                .transpose()
        };
        let mut kept = BTreeMap::new();
        for (index, events) in &record.fixed {
            let events: io::Result<Vec<_>> = events.iter().map(event).collect();
            kept.insert(*index, events?);
        }
        Ok(Self {
            used: record.used.iter().copied().collect(),
            kept,
        })
    }

    /// The client may have enabled any of `kinds` without the daemon.
    pub(super) fn use_all(&mut self, kinds: &[IrqKind]) {
        let present = (0u32..).zip(kinds).filter(|(_, kind)| kind.count > 0);
        self.used.extend(present.map(|(index, _)| index));
    }

    /// Disables all interrupts that the client may have enabled.
    pub(super) fn release(&mut self, device: &dyn DeviceAccess, name: &str) {
        self.kept.clear();
        for index in std::mem::take(&mut self.used) {
            // EINVAL: the interrupts are not enabled, for example because the client's request failed.
            if let Err(cause) = device.set_irqs(&disable_all(index))
                && cause.raw_os_error() != Some(libc::EINVAL)
            {
                warn_limited!("{name}: cannot disable interrupts of kind {index}: {cause}");
            }
        }
    }

    /// Sets eventfds of a kind whose number of interrupts the kernel fixes.
    fn set_fixed(
        &mut self,
        device: &dyn DeviceAccess,
        index: u32,
        start: usize,
        events: Vec<Option<ClientEvent>>,
    ) -> Result<(), i32> {
        let kept = self.kept.entry(index).or_default();
        let (before, end) = (kept.len(), start + events.len());
        kept.resize_with(before.max(end), || None);
        for (slot, event) in kept.iter_mut().skip(start).zip(events) {
            *slot = event;
        }
        let action = VFIO_IRQ_SET_ACTION_TRIGGER;
        let grows = before > 0 && end > before;
        let outcome = if grows {
            device
                .set_irqs(&disable_all(index))
                .and_then(|()| set_events(device, action, index, 0, &peer_events(kept)))
        } else {
            let first = if before == 0 { 0 } else { start };
            let events = kept.get(first..end).unwrap_or_default();
            let start = u32::try_from(first).unwrap_or(u32::MAX);
            set_events(device, action, index, start, &peer_events(events))
        };
        if outcome.is_err() {
            kept.truncate(if grows { 0 } else { before });
        }
        errno_of(outcome)
    }
}

fn peer_events(events: &[Option<ClientEvent>]) -> Vec<Option<&PeerEvent>> {
    let events = events.iter();
    events
        .map(|event| event.as_ref().map(|event| &event.event))
        .collect()
}

fn disable_all(index: u32) -> IrqChange<'static> {
    IrqChange {
        action: VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        start: 0,
        selection: IrqSelection::All(0),
    }
}

fn set_events(
    device: &dyn DeviceAccess,
    action: u32,
    index: u32,
    start: u32,
    events: &[Option<&PeerEvent>],
) -> io::Result<()> {
    let events: Vec<_> = events.iter().map(|event| event.map(AsFd::as_fd)).collect();
    device.set_irqs(&IrqChange {
        action,
        index,
        start,
        selection: IrqSelection::Events(&events),
    })
}

/// The errno of a failed system call; `EIO` if the failure has none.
pub(super) fn errno_of<T>(result: io::Result<T>) -> Result<T, i32> {
    result.map_err(|cause| cause.raw_os_error().unwrap_or(libc::EIO))
}
