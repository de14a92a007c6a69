//! How a client wants to hear of interrupts, to be told again to a server that comes back.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::message::{Command, IRQ_ACTIONS, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqSetBody, take};
use super::socket::OutgoingFd;

/// The most event descriptors kept for one device: MSI-X has 2048 interrupts.
const MAX_KEPT: usize = 4096;

/// The descriptors by kind of interrupt, what they are for, and number.
#[derive(Debug, Default)]
pub(super) struct IrqReplay {
    kept: BTreeMap<(u32, u32, u32), Arc<File>>,
}

impl IrqReplay {
    /// Takes note of a DEVICE_SET_IRQS, which is well-formed.
    pub(super) fn note(&mut self, body: &[u8], descriptors: &[Arc<File>]) {
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

    /// The messages that say all of it, with no more than `most` descriptors each.
    pub(super) fn messages(&self, most: usize) -> Vec<(Command, Vec<u8>, Vec<OutgoingFd>)> {
        let mut messages = Vec::new();
        let mut run: Vec<Arc<File>> = Vec::new();
        let mut from = (0, 0, 0);
        for (&(index, action, number), file) in &self.kept {
            let follows = (index, action) == (from.0, from.1)
                && u64::from(from.2) + run.len() as u64 == u64::from(number)
                && run.len() < most.max(1);
            if !follows {
                messages.extend(message(from, &std::mem::take(&mut run)));
                from = (index, action, number);
            }
            run.push(file.clone());
        }
        messages.extend(message(from, &run));
        messages
    }
}

fn message(
    (index, action, start): (u32, u32, u32),
    run: &[Arc<File>],
) -> Option<(Command, Vec<u8>, Vec<OutgoingFd>)> {
    let count = u32::try_from(run.len()).ok().filter(|n| *n > 0)?;
    let body = IrqSetBody {
        argsz: 20.into(),
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
        irqs.note(body.as_bytes(), &vec![null; files]);
    }

    /// Kind, first number and descriptors of every message.
    fn told(irqs: &IrqReplay, most: usize) -> Vec<(u32, u32, usize)> {
        let messages = irqs.messages(most);
        let parts = messages.iter().map(|(command, body, descriptors)| {
            let (set, _) = take::<IrqSetBody>(*command, body).expect("whole");
            assert_eq!(set.count.get() as usize, descriptors.len());
            (set.index.get(), set.start.get(), descriptors.len())
        });
        parts.collect()
    }

    #[test]
    fn the_last_word_on_each_interrupt_is_told_again() {
        let mut irqs = IrqReplay::default();
        assert_eq!(told(&irqs, 8), []);
        set(&mut irqs, IRQ_DATA_EVENTFD, 2, 0, 5, 5);
        set(&mut irqs, IRQ_DATA_EVENTFD, 1, 0, 1, 1);
        assert_eq!(told(&irqs, 8), [(1, 0, 1), (2, 0, 5)]);
        assert_eq!(told(&irqs, 2), [(1, 0, 1), (2, 0, 2), (2, 2, 2), (2, 4, 1)]);
        // One is taken back.
        set(&mut irqs, IRQ_DATA_EVENTFD, 2, 2, 1, 0);
        assert_eq!(told(&irqs, 8), [(1, 0, 1), (2, 0, 2), (2, 3, 2)]);
        set(&mut irqs, IRQ_DATA_NONE, 2, 0, 0, 0);
        assert_eq!(told(&irqs, 8), [(1, 0, 1)]);
        set(&mut irqs, IRQ_DATA_EVENTFD, 2, u32::MAX, u32::MAX, 3);
        assert_eq!(told(&irqs, 8), [(1, 0, 1), (2, u32::MAX, 1)]);
    }
}
