//! What both queues do with their rings.

use vhost_user_backend::VringState;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use crate::warn_limited;

/// Whether the frontend lets the ring run: started, and enabled.
pub fn is_running(ring: &VringState) -> bool {
    ring.is_enabled() && ring.get_queue().ready()
}

/// Notifies the driver of returned buffers, if it wants to be.
pub fn notify(ring: &mut VringState, memory: &GuestMemoryMmap) {
    let wanted = ring.get_queue_mut().needs_notification(memory);
    if wanted.unwrap_or(true) {
        signal(ring);
    }
}

/// Notifies the driver.
pub fn signal(ring: &VringState) {
    if let Err(cause) = ring.signal_used_queue() {
        warn_limited!("cannot notify the driver: {cause}");
    }
}
