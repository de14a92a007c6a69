//! Rings that the device keeps from one event to the next.

use std::io;

use vm_memory::GuestMemoryMmap;

use super::event_queue;
use super::resume::{RingState, UsedEntry};
use super::ring::{LockedRing, Ring};
use crate::faults::Fault;

/// A ring of any transport, as a trait object. Only stops and faults go through it, never a request. With it,
/// [`Device`](super::Device) needs no type parameter, and the code around the device does not depend on the transport.
pub trait StoredRing: Send + Sync {
    /// See [`RingState::of`].
    fn state(&self, features: u64, last_used: Option<UsedEntry>) -> RingState;

    /// See [`LockedRing::is_running`].
    fn is_running(&self) -> bool;

    /// See [`event_queue::deliver`].
    fn deliver(&self, memory: &GuestMemoryMmap, fault: &Fault) -> bool;

    /// See [`Ring::send_interrupts`].
    fn send_interrupts(&self) -> io::Result<()>;
}

impl<R: Ring> StoredRing for R {
    fn state(&self, features: u64, last_used: Option<UsedEntry>) -> RingState {
        RingState::of(self, features, last_used)
    }

    fn is_running(&self) -> bool {
        self.lock().is_running()
    }

    fn deliver(&self, memory: &GuestMemoryMmap, fault: &Fault) -> bool {
        event_queue::deliver(self, memory, fault)
    }

    fn send_interrupts(&self) -> io::Result<()> {
        Ring::send_interrupts(self)
    }
}
