//! The request queue's split ring: takes chains off it and returns them.
//!
//! Not `virtio_queue`'s iterator: it looks up the memory region for each field it reads, and publishes each answer
//! alone. The same accesses through [`GuestView`], with one publication for many answers, cost less than a third.
//! The indices stay in the library's [`Queue`].

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};

use super::resume::UsedEntry;
use super::view::GuestView;

const FLAGS: u64 = 0;
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
const AVAIL_ENTRY_LEN: u64 = 2;
const USED_ENTRY_LEN: u64 = 8;

/// Why the device cannot take chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The ring is not in guest memory.
    OutOfReach,
    /// The driver claims more chains than the ring has entries.
    TooMany,
}

/// How many chains the driver has made available and the device has not taken yet.
///
/// # Errors
/// See [`RingError`].
pub fn available(queue: &Queue, view: &GuestView<'_>) -> Result<u16, RingError> {
    // The library has 0 for an address that the VMM has not set.
    if queue.avail_ring() == 0 {
        return Err(RingError::OutOfReach);
    }
    let index = at(queue.avail_ring(), INDEX)
        .and_then(|at| view.load(at))
        .ok_or(RingError::OutOfReach)?;
    let count = index.wrapping_sub(queue.next_avail());
    if count > queue.size() {
        return Err(RingError::TooMany);
    }
    Ok(count)
}

/// Where the driver will make the next chain available, and the ring entries that the device will access then.
#[derive(Clone, Copy, Debug)]
pub struct NextChain {
    index: u64,
    taken: u16,
    avail_entry: u64,
    used_entry: u64,
}

impl NextChain {
    /// The next chain of a ring from which all chains have been taken.
    pub fn of(queue: &Queue) -> Self {
        let slot = |next: u16| u64::from(next.checked_rem(queue.size()).unwrap_or(0));
        let avail = ENTRIES + AVAIL_ENTRY_LEN * slot(queue.next_avail());
        let used = ENTRIES + USED_ENTRY_LEN * slot(queue.next_used());
        Self {
            index: queue.avail_ring().saturating_add(INDEX),
            taken: queue.next_avail(),
            avail_entry: queue.avail_ring().saturating_add(avail),
            used_entry: queue.used_ring().saturating_add(used),
        }
    }

    /// Whether the worker must inspect the ring: it has a chain, or is not in guest memory any more.
    pub fn is_due(&self, view: &GuestView<'_>) -> bool {
        view.load(self.index) != Some(self.taken)
    }

    /// Tells the processor to fetch the ring entries.
    pub fn prefetch(&self, view: &GuestView<'_>) {
        view.prefetch(self.avail_entry);
        view.prefetch(self.used_entry);
    }
}

/// Takes one of the [`available`] chains. Returns the index of its first descriptor, or `None` if the ring is not in
/// guest memory.
pub fn take(queue: &mut Queue, view: &GuestView<'_>) -> Option<u16> {
    let slot = u64::from(queue.next_avail().checked_rem(queue.size())?);
    let head = view.load(at(queue.avail_ring(), ENTRIES + AVAIL_ENTRY_LEN * slot)?)?;
    queue.set_next_avail(queue.next_avail().wrapping_add(1));
    Some(head)
}

/// Returns chains to the driver, each with its used length. The driver sees all of them at once. A chain whose used
/// entry is not in guest memory is lost, and so are the chains after it.
///
/// Returns how many chains the driver sees.
pub fn publish(queue: &mut Queue, view: &GuestView<'_>, done: &[(u16, u32)]) -> usize {
    let first = queue.next_used();
    let mut next = first;
    let mut written = 0;
    for &(head, len) in done {
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&len.to_le_bytes());
        let slot = u64::from(next.checked_rem(queue.size()).unwrap_or(0));
        let address = at(queue.used_ring(), ENTRIES + USED_ENTRY_LEN * slot);
        if !address.is_some_and(|address| view.write(address, &entry)) {
            break;
        }
        next = next.wrapping_add(1);
        written += 1;
    }
    let address = at(queue.used_ring(), INDEX);
    if !address.is_some_and(|address| view.store(address, next)) {
        return 0;
    }
    queue.set_next_used(next);
    written
}

/// The used index that the driver sees; `None` if the used ring is not in guest memory.
pub fn used_index(queue: &Queue, view: &GuestView<'_>) -> Option<u16> {
    view.load(at(queue.used_ring(), INDEX)?)
}

/// The last entry of the used ring that is not all zero, of a ring whose driver has not been new for a while.
pub fn last_used(queue: &Queue, view: &GuestView<'_>) -> Option<UsedEntry> {
    (1..=queue.size()).find_map(|back| {
        let slot = queue.next_used().wrapping_sub(back);
        let slot = slot.checked_rem(queue.size())?;
        let offset = ENTRIES + USED_ENTRY_LEN * u64::from(slot);
        let mut entry = [0; 8];
        view.read(at(queue.used_ring(), offset)?, &mut entry)
            .then_some(())?;
        let [a, b, _, _, len @ ..] = entry;
        let (head, len) = (u16::from_le_bytes([a, b]), u32::from_le_bytes(len));
        ((head, len) != (0, 0)).then_some(UsedEntry { slot, head, len })
    })
}

/// Whether the driver wants a notification for the used entries since `next_used` was `before`. If the driver's
/// field for this is not in guest memory, the driver gets a notification.
pub fn wants_notification(queue: &Queue, view: &GuestView<'_>, before: u16) -> bool {
    // The device must publish the entries before it reads whether the driver wants a notification. Otherwise the device
    // and the driver could wait for each other.
    fence(Ordering::SeqCst);
    let event_idx = queue.event_idx_enabled();
    let offset = if event_idx {
        ENTRIES + AVAIL_ENTRY_LEN * u64::from(queue.size())
    } else {
        FLAGS
    };
    let Some(wanted) = at(queue.avail_ring(), offset).and_then(|at| view.load(at)) else {
        return true;
    };
    if !event_idx {
        return u32::from(wanted) & VRING_AVAIL_F_NO_INTERRUPT == 0;
    }
    let now = queue.next_used();
    now.wrapping_sub(wanted).wrapping_sub(1) < now.wrapping_sub(before)
}

fn at(area: u64, offset: u64) -> Option<u64> {
    area.checked_add(offset)
}
