//! The device's interface to a ring, whatever transport has set the ring up.
//!
//! [`Ring`] is a handle to a ring, [`LockedRing`] is the ring while its lock is held. The request path calls both
//! directly: the compiler makes one copy of it for each transport, not a trait object.

use std::io;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::warn_limited;

/// A handle to a ring that a transport has set up. Clones name the same ring.
pub trait Ring: Clone + Send + Sync + 'static {
    /// The ring while its lock is held.
    type Locked<'a>: LockedRing
    where
        Self: 'a;

    /// Takes the ring's lock. It is the last one in the lock order.
    fn lock(&self) -> Self::Locked<'_>;

    /// Sends the driver one interrupt if one was requested since the last. The caller must hold no lock that
    /// another thread takes: the interrupt goes through a descriptor of another process.
    ///
    /// # Errors
    /// The transport cannot send it.
    fn send_interrupts(&self) -> io::Result<()>;
}

/// A ring whose lock is held.
pub trait LockedRing {
    /// Whether the VMM lets the device use the ring: it is started and enabled.
    fn is_running(&self) -> bool;

    /// Addresses, size, indices and features of the ring.
    fn queue(&self) -> &Queue;

    /// The same, to advance the indices.
    fn queue_mut(&mut self) -> &mut Queue;

    /// Notes that the driver wants an interrupt. [`Ring::send_interrupts`] sends it, once all locks are released.
    fn request_interrupt(&self);

    /// The driver has made the ring unusable. A transport that can report it requests that report, which
    /// [`Ring::send_interrupts`] sends; with any other the driver waits until it starts the ring anew.
    fn report_broken(&mut self) {}
}

/// Requests an interrupt for returned buffers, unless the driver has suppressed notifications.
pub fn notify(ring: &mut impl LockedRing, memory: &GuestMemoryMmap) {
    let wanted = ring.queue_mut().needs_notification(memory);
    if wanted.unwrap_or(true) {
        ring.request_interrupt();
    }
}

/// Sends the interrupts of a ring, and logs a failure.
pub(super) fn send_interrupts(send: impl FnOnce() -> io::Result<()>) {
    if let Err(cause) = send() {
        warn_limited!("cannot notify the driver: {cause}");
    }
}
