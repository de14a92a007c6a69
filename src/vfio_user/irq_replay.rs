//! The interrupts that a client has set, to be set again in a server that reconnects.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::message::{Command, IRQ_ACTIONS, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqSetBody, take};
use super::socket::OutgoingFd;

/// At most this many eventfds are kept for one device: MSI-X has 2048 interrupts.
const MAX_KEPT: usize = 4096;

/// The eventfds of one client.
#[derive(Debug, Default)]
pub(super) struct IrqReplay {
    /// By kind of interrupt, action and number.
    kept: BTreeMap<(u32, u32, u32), Arc<File>>,
    /// An earlier process had others, which are gone.
    is_incomplete: bool,
}

impl IrqReplay {
    /// Those of a client of an earlier process: their descriptors have died with it.
    pub(super) fn lost() -> Self {
        Self {
            is_incomplete: true,
            ..Self::default()
        }
    }

    /// Whether not all of them can be set again.
    pub(super) fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    /// Whether there are any.
    pub(super) fn has_any(&self) -> bool {
        self.is_incomplete || !self.kept.is_empty()
    }

    /// Records a DEVICE_SET_IRQS, which the caller has checked.
    pub(super) fn record(&mut self, body: &[u8], descriptors: &[Arc<File>]) {
        let Ok((set, _)) = take::<IrqSetBody>(Command::DeviceSetIrqs, body) else {
            return;
        };
        let (flags, index) = (set.flags.get(), set.index.get());
        let (start, count) = (set.start.get(), set.count.get());
        let action = flags & IRQ_ACTIONS;
        if flags & IRQ_DATA_NONE != 0 && count == 0 {
            self.kept.retain(|(i, _, _), _| *i != index);
            return;
        }
        if flags & IRQ_DATA_EVENTFD == 0 || count == 0 {
            return;
        }
        let last = start.saturating_add(count - 1);
        self.kept.retain(|(i, a, number), _| {
            *i != index || *a != action || !(start..=last).contains(number)
        });
        for (number, file) in (start..=last).zip(descriptors) {
            if self.kept.len() < MAX_KEPT {
                self.kept.insert((index, action, number), file.clone());
            }
        }
    }

    /// The messages that set all interrupts again, with at most `max_fds` descriptors each.
    pub(super) fn messages(&self, max_fds: usize) -> Vec<(Command, Vec<u8>, Vec<OutgoingFd>)> {
        let mut messages = Vec::new();
        let mut run: Vec<Arc<File>> = Vec::new();
        let mut first = (0, 0, 0);
        for (&(index, action, number), file) in &self.kept {
            let follows = (index, action) == (first.0, first.1)
                && u64::from(first.2) + run.len() as u64 == u64::from(number)
                && run.len() < max_fds.max(1);
            if !follows {
                messages.extend(message(first, &std::mem::take(&mut run)));
                first = (index, action, number);
            }
            run.push(file.clone());
        }
        messages.extend(message(first, &run));
        messages
    }
}

/// The message for a run of eventfds; `None` for an empty run.
fn message(
    (index, action, start): (u32, u32, u32),
    run: &[Arc<File>],
) -> Option<(Command, Vec<u8>, Vec<OutgoingFd>)> {
    let count = u32::try_from(run.len()).ok().filter(|n| *n > 0)?;
    let body = IrqSetBody {
        argsz: IrqSetBody::BYTES.into(),
        flags: (IRQ_DATA_EVENTFD | action).into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    let descriptors = run.iter().cloned().map(OutgoingFd::Shared).collect();
    Some((
        Command::DeviceSetIrqs,
        body.as_bytes().to_vec(),
        descriptors,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio_user::message::IRQ_ACTION_TRIGGER;

    fn set(irqs: &mut IrqReplay, flags: u32, index: u32, start: u32, count: u32, files: usize) {
        let body = IrqSetBody {
            argsz: 20.into(),
            flags: (flags | IRQ_ACTION_TRIGGER).into(),
            index: index.into(),
            start: start.into(),
            count: count.into(),
        };
        let null = Arc::new(File::open("/dev/null").expect("open"));
        irqs.record(body.as_bytes(), &vec![null; files]);
    }

    /// Kind, first number and number of descriptors of each message.
    fn replayed(irqs: &IrqReplay, max_fds: usize) -> Vec<(u32, u32, usize)> {
        let messages = irqs.messages(max_fds);
        let parts = messages.iter().map(|(command, body, descriptors)| {
            let (set, _) = take::<IrqSetBody>(*command, body).expect("whole");
            assert_eq!(set.count.get() as usize, descriptors.len());
            (set.index.get(), set.start.get(), descriptors.len())
        });
        parts.collect()
    }

    #[test]
    fn the_last_setting_of_each_interrupt_is_replayed() {
        let mut irqs = IrqReplay::default();
        assert_eq!(replayed(&irqs, 8), []);
        set(&mut irqs, IRQ_DATA_EVENTFD, 2, 0, 5, 5);
        set(&mut irqs, IRQ_DATA_EVENTFD, 1, 0, 1, 1);
        assert_eq!(replayed(&irqs, 8), [(1, 0, 1), (2, 0, 5)]);
        assert_eq!(
            replayed(&irqs, 2),
            [(1, 0, 1), (2, 0, 2), (2, 2, 2), (2, 4, 1)]
        );
        // The client disables one interrupt.
        set(&mut irqs, IRQ_DATA_EVENTFD, 2, 2, 1, 0);
        assert_eq!(replayed(&irqs, 8), [(1, 0, 1), (2, 0, 2), (2, 3, 2)]);
        set(&mut irqs, IRQ_DATA_NONE, 2, 0, 0, 0);
        assert_eq!(replayed(&irqs, 8), [(1, 0, 1)]);
        set(&mut irqs, IRQ_DATA_EVENTFD, 2, u32::MAX, u32::MAX, 3);
        assert_eq!(replayed(&irqs, 8), [(1, 0, 1), (2, u32::MAX, 1)]);
    }
}
