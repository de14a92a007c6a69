//! The rings as the driver sets them up in the common configuration.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::interrupts::PciInterrupts;
use crate::device::MAX_QUEUE_SIZE;
use crate::device::ring::{LockedRing, Ring};
use crate::locks::{Mutex, MutexGuard, Rank};

/// Where a ring is, as the driver has written it to the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RingPlace {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A ring of the device. Clones name the same ring.
#[derive(Clone)]
pub(super) struct PciRing(Arc<PciRingParts>);

struct PciRingParts {
    index: usize,
    state: Mutex<PciRingState>,
    interrupts: Arc<PciInterrupts>,
}

/// The state of a [`PciRing`], which its lock guards.
pub(super) struct PciRingState {
    /// Ready once the driver has enabled the queue.
    queue: Queue,
    /// The driver has set DRIVER_OK, and the device may reach memory.
    is_live: bool,
    /// The driver has made the ring unusable.
    is_broken: bool,
}

impl PciRing {
    /// The ring of queue `index`, which the driver has not set up.
    ///
    /// # Errors
    /// The library does not support the largest size.
    pub(super) fn new(index: usize, interrupts: Arc<PciInterrupts>) -> Result<Self, QueueError> {
        let longest = u16::try_from(MAX_QUEUE_SIZE).unwrap_or(u16::MAX);
        Ok(Self(Arc::new(PciRingParts {
            index,
            state: Mutex::new(
                Rank::Ring,
                PciRingState {
                    queue: Queue::new(longest)?,
                    is_live: false,
                    is_broken: false,
                },
            ),
            interrupts,
        })))
    }

    /// The driver enables the queue, with its ring at `place`.
    ///
    /// # Errors
    /// A part of the ring is not aligned as the specification demands. The ring never runs.
    pub(super) fn enable(&self, place: &RingPlace) -> Result<(), QueueError> {
        let queue = &mut self.0.state.lock().queue;
        queue.try_set_size(place.size)?;
        queue.try_set_desc_table_address(GuestAddress(place.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(place.available))?;
        queue.try_set_used_ring_address(GuestAddress(place.used))?;
        queue.set_ready(true);
        Ok(())
    }

    /// The ring of a driver that an earlier process has served goes on: the device has returned the chains before `index`,
    /// and has taken no other one. For the request ring, the journal has the index.
    pub(super) fn go_on_at(&self, index: u16) {
        let queue = &mut self.0.state.lock().queue;
        queue.set_next_avail(index);
        queue.set_next_used(index);
    }

    /// Lets the device use the ring, or not, once it is enabled.
    pub(super) fn set_live(&self, is_live: bool, event_idx: bool) {
        let mut state = self.0.state.lock();
        state.is_live = is_live;
        state.queue.set_event_idx(event_idx);
    }

    /// The device must not use the ring any more. [`Self::clear`] must follow once no request is in progress.
    pub(super) fn stop(&self) {
        let mut state = self.0.state.lock();
        state.is_live = false;
        state.queue.set_ready(false);
    }

    /// The ring is as if the driver had never set it up.
    pub(super) fn clear(&self) {
        let mut state = self.0.state.lock();
        state.is_live = false;
        state.is_broken = false;
        state.queue.reset();
    }

    /// Whether the driver has enabled the ring, and a part of it is not in `memory`.
    pub(super) fn is_out_of_reach(&self, memory: Option<&GuestMemoryMmap>) -> bool {
        let state = self.0.state.lock();
        let queue = &state.queue;
        if !queue.ready() {
            return false;
        }
        let size = usize::from(queue.size());
        let parts = [
            (queue.desc_table(), 16 * size),
            (queue.avail_ring(), 6 + 2 * size),
            (queue.used_ring(), 6 + 8 * size),
        ];
        // The library has 0 for an address that was never set.
        parts.iter().any(|&(at, len)| {
            at == 0 || !memory.is_some_and(|memory| memory.check_range(GuestAddress(at), len))
        })
    }
}

impl Ring for PciRing {
    type Locked<'a> = LockedPciRing<'a>;

    fn lock(&self) -> Self::Locked<'_> {
        LockedPciRing {
            state: self.0.state.lock(),
            parts: &self.0,
        }
    }

    fn send_interrupts(&self) -> io::Result<()> {
        self.0.interrupts.send();
        Ok(())
    }
}

/// A [`PciRing`] whose lock is held.
pub(super) struct LockedPciRing<'a> {
    state: MutexGuard<'a, PciRingState>,
    parts: &'a PciRingParts,
}

impl LockedRing for LockedPciRing<'_> {
    fn is_running(&self) -> bool {
        self.state.is_live && self.state.queue.ready() && !self.state.is_broken
    }

    fn queue(&self) -> &Queue {
        &self.state.queue
    }

    fn queue_mut(&mut self) -> &mut Queue {
        &mut self.state.queue
    }

    fn request_interrupt(&self) {
        self.parts.interrupts.request_queue(self.parts.index);
    }

    fn report_broken(&mut self) {
        self.state.is_broken = true;
        self.parts.interrupts.request_reset();
    }
}
