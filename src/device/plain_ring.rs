//! A ring without a transport, for unit tests: a queue, and a count of the interrupts it has sent.

use std::cell::Cell;
use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::ring::{LockedRing, Ring};
use crate::locks::{Mutex, MutexGuard, Rank};

/// Offset of the available ring from the descriptor table.
pub(crate) const AVAIL_AT: u64 = 0x400;
/// Offset of the used ring from the descriptor table.
pub(crate) const USED_AT: u64 = 0x800;

/// A ring that runs until a test stops it.
#[derive(Clone)]
pub(crate) struct PlainRing(Arc<Mutex<PlainRingState>>);

/// The state of a [`PlainRing`], which its lock guards.
pub(crate) struct PlainRingState {
    /// The queue.
    pub queue: Queue,
    /// Whether the device may use the ring.
    pub running: bool,
    requested: Cell<bool>,
    interrupts: Cell<u64>,
}

impl PlainRing {
    /// A ring of `size` entries with its descriptor table at guest-physical `base`.
    pub(crate) fn new(size: u16, base: u64) -> Self {
        let mut queue = Queue::new(size).expect("a power of two");
        let addresses = [base, base + AVAIL_AT, base + USED_AT].map(GuestAddress);
        queue
            .try_set_desc_table_address(addresses[0])
            .expect("aligned");
        queue
            .try_set_avail_ring_address(addresses[1])
            .expect("aligned");
        queue
            .try_set_used_ring_address(addresses[2])
            .expect("aligned");
        queue.set_ready(true);
        Self(Arc::new(Mutex::new(
            Rank::Ring,
            PlainRingState {
                queue,
                running: true,
                requested: Cell::new(false),
                interrupts: Cell::new(0),
            },
        )))
    }

    /// How many interrupts the driver has got since the last call.
    pub(crate) fn take_interrupts(&self) -> u64 {
        self.lock().interrupts.take()
    }
}

impl Ring for PlainRing {
    type Locked<'a> = MutexGuard<'a, PlainRingState>;

    fn lock(&self) -> Self::Locked<'_> {
        self.0.lock()
    }

    fn send_interrupts(&self) -> io::Result<()> {
        // Panics if the caller holds a lock of this rank or a higher one: that of a queue, of the core or of a ring.
        drop(Mutex::new(Rank::RequestQueue, ()).lock());
        let ring = self.lock();
        if ring.requested.replace(false) {
            ring.interrupts.set(ring.interrupts.get() + 1);
        }
        Ok(())
    }
}

impl LockedRing for MutexGuard<'_, PlainRingState> {
    fn is_running(&self) -> bool {
        self.running
    }

    fn queue(&self) -> &Queue {
        &self.queue
    }

    fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    fn request_interrupt(&self) {
        self.requested.set(true);
    }
}
