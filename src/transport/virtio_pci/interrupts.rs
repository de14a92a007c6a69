//! The interrupts of the device: MSI-X vectors, the ISR status, and DEVICE_NEEDS_RESET.
//!
//! The VMM emulates the MSI-X table, and gives an eventfd for each vector. An interrupt for a vector that is masked or
//! has no eventfd yet is pending, and is sent when the VMM unmasks it or gives the eventfd.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::layout::{NO_VECTOR, VECTORS};
use crate::device::QUEUES;
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::vfio_user::server::ClientEvent;
use crate::warn_limited;

/// The ISR status: a queue interrupt.
const ISR_QUEUE: u8 = 1 << 0;
/// The ISR status: a configuration interrupt.
const ISR_CONFIG: u8 = 1 << 1;

/// The interrupts that the rings and the registers share.
///
/// Signals are sent with the lock held: a [`PeerEvent`] never waits, and so no interrupt comes after a reset, or
/// through an eventfd that the VMM has taken back.
pub(super) struct PciInterrupts {
    state: Mutex<InterruptState>,
    /// An interrupt may have been requested since the last [`Self::send`], which the worker calls after each pass. Only
    /// a thread that holds the lock of `state` writes it.
    is_requested: AtomicBool,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct InterruptState {
    vectors: [Vector; VECTORS as usize],
    /// The vector of configuration changes.
    config: Route,
    /// The vector of each queue.
    queues: [Route; QUEUES],
    isr: u8,
    /// The driver has enabled MSI-X, so the ISR status is not used.
    uses_msix: bool,
    driver_ok: bool,
    needs_reset: bool,
}

/// One MSI-X vector as the VMM has set it up.
#[derive(Default)]
struct Vector {
    event: Option<ClientEvent>,
    masked: bool,
    pending: bool,
}

/// The vector that the driver has mapped to a source of interrupts, and whether an interrupt waits to be sent.
struct Route {
    vector: u16,
    requested: bool,
}

/// The interrupts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InterruptsRecord {
    pub(super) vectors: Vec<VectorRecord>,
    pub(super) config: u16,
    pub(super) queues: Vec<u16>,
    pub(super) driver_ok: bool,
    pub(super) needs_reset: bool,
}

/// An MSI-X vector as the VMM has set it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VectorRecord {
    /// The name of its eventfd at the keeper.
    pub(super) event: Option<String>,
    pub(super) masked: bool,
    pub(super) pending: bool,
}

impl Default for Route {
    fn default() -> Self {
        Self {
            vector: NO_VECTOR,
            requested: false,
        }
    }
}

impl PciInterrupts {
    /// The interrupts after a reset.
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            state: Mutex::new(Rank::PciInterrupts, InterruptState::default()),
            is_requested: AtomicBool::new(false),
            metrics,
        }
    }

    /// The driver resets the device. The VMM keeps its eventfds.
    pub(super) fn reset(&self) {
        let mut state = self.state.lock();
        let vectors = std::mem::take(&mut state.vectors);
        let uses_msix = state.uses_msix;
        *state = InterruptState {
            vectors,
            uses_msix,
            ..InterruptState::default()
        };
        for vector in &mut state.vectors {
            vector.pending = false;
        }
    }

    /// The VMM has gone, and its eventfds with it.
    pub(super) fn clear(&self) {
        *self.state.lock() = InterruptState::default();
    }

    pub(super) fn set_driver_ok(&self) {
        let mut state = self.state.lock();
        state.driver_ok = true;
        if state.needs_reset {
            state.config.requested = true;
        }
        state.send();
    }

    pub(super) fn set_uses_msix(&self, uses_msix: bool) {
        self.state.lock().uses_msix = uses_msix;
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.state.lock().needs_reset
    }

    /// The device cannot go on until the driver resets it. The driver is told by [`Self::send`].
    // STATUS-2: with DRIVER_OK, a configuration change notification follows DEVICE_NEEDS_RESET.
    pub(super) fn request_reset(&self) {
        let mut state = self.state.lock();
        if !state.needs_reset {
            state.needs_reset = true;
            self.metrics.needs_reset.inc();
            state.config.requested = state.driver_ok;
            self.is_requested.store(true, Ordering::Release);
        }
    }

    /// Notes that the driver wants an interrupt for the queue.
    pub(super) fn request_queue(&self, index: usize) {
        let mut state = self.state.lock();
        if let Some(route) = state.queues.get_mut(index) {
            route.requested = true;
            self.is_requested.store(true, Ordering::Release);
        }
    }

    /// Sends the interrupts that were requested. Takes no lock if none was.
    pub(super) fn send(&self) {
        if self.is_requested.load(Ordering::Acquire) {
            let mut state = self.state.lock();
            self.is_requested.store(false, Ordering::Relaxed);
            state.send();
        }
    }

    /// Maps configuration changes to `vector`.
    // PCI-26, PCI-27: the driver reads a mapped vector back, and NO_VECTOR for one that the device does not have.
    pub(super) fn map_config(&self, vector: u16) {
        self.state.lock().config.vector = mappable(vector);
    }

    /// Maps a queue to `vector`.
    pub(super) fn map_queue(&self, index: usize, vector: u16) {
        if let Some(route) = self.state.lock().queues.get_mut(index) {
            route.vector = mappable(vector);
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.state.lock().config.vector
    }

    pub(super) fn queue_vector(&self, index: usize) -> u16 {
        let state = self.state.lock();
        state
            .queues
            .get(index)
            .map_or(NO_VECTOR, |route| route.vector)
    }

    /// Whether the ISR status has a bit, for the PCI status register.
    pub(super) fn has_isr(&self) -> bool {
        let state = self.state.lock();
        // PCI-18: without MSI-X.
        state.isr != 0 && !state.uses_msix
    }

    /// The driver reads the ISR status, which clears it.
    // PCI-19
    pub(super) fn take_isr(&self) -> u8 {
        std::mem::take(&mut self.state.lock().isr)
    }

    /// The bits of the vectors whose interrupt is pending.
    pub(super) fn pending_bits(&self) -> u64 {
        let state = self.state.lock();
        let bits = state.vectors.iter().enumerate();
        bits.fold(0, |bits, (n, vector)| bits | u64::from(vector.pending) << n)
    }

    /// The VMM gives the eventfds of vectors from `first` on, or takes them back.
    pub(super) fn set_events(&self, first: usize, events: Vec<Option<ClientEvent>>) {
        let mut state = self.state.lock();
        for (vector, event) in state.vectors.iter_mut().skip(first).zip(events) {
            vector.event = event;
            if vector.pending {
                vector.signal();
            }
        }
    }

    /// The state for a later process. Interrupts that wait to be sent are not in it: [`Self::resume`] sends more than are
    /// needed.
    pub(super) fn record(&self) -> InterruptsRecord {
        let state = self.state.lock();
        let vector = |vector: &Vector| VectorRecord {
            event: vector.event.as_ref().map(|event| {
                // Without a keeper nobody reads it.
                event.name.clone().unwrap_or_default()
            }),
            masked: vector.masked,
            pending: vector.pending,
        };
        InterruptsRecord {
            vectors: state.vectors.iter().map(vector).collect(),
            config: state.config.vector,
            queues: state.queues.iter().map(|route| route.vector).collect(),
            driver_ok: state.driver_ok,
            needs_reset: state.needs_reset,
        }
    }

    /// Goes on with the interrupts of an earlier process. The driver gets an interrupt of each queue: that process may
    /// have died before it sent one.
    pub(super) fn resume(&self, record: &InterruptsRecord, events: Vec<Option<ClientEvent>>) {
        let mut state = self.state.lock();
        let vectors = state.vectors.iter_mut().zip(&record.vectors).zip(events);
        for ((vector, record), event) in vectors {
            *vector = Vector {
                event,
                masked: record.masked,
                pending: record.pending,
            };
        }
        state.config.vector = mappable(record.config);
        for (route, vector) in state.queues.iter_mut().zip(&record.queues) {
            route.vector = mappable(*vector);
            route.requested = record.driver_ok;
        }
        state.driver_ok = record.driver_ok;
        state.needs_reset = record.needs_reset;
        state.config.requested = record.driver_ok && record.needs_reset;
        self.is_requested.store(true, Ordering::Release);
    }

    /// The VMM takes all eventfds back.
    pub(super) fn disable(&self) {
        for vector in &mut self.state.lock().vectors {
            *vector = Vector::default();
        }
    }

    /// The VMM masks or unmasks a vector.
    pub(super) fn mask(&self, vector: usize, masked: bool) {
        if let Some(vector) = self.state.lock().vectors.get_mut(vector) {
            vector.masked = masked;
            if vector.pending {
                vector.signal();
            }
        }
    }

    /// The VMM asks for a signal, which is a test of the eventfd.
    pub(super) fn trigger(&self, vector: usize) {
        if let Some(vector) = self.state.lock().vectors.get_mut(vector) {
            vector.signal();
        }
    }
}

impl InterruptState {
    fn send(&mut self) {
        let config = (&mut self.config, ISR_CONFIG);
        let queues = self.queues.iter_mut().map(|route| (route, ISR_QUEUE));
        for (route, isr) in std::iter::once(config).chain(queues) {
            if !std::mem::take(&mut route.requested) {
                continue;
            }
            // PCI-16, PCI-17: before the notification; that of a queue only without MSI-X.
            if isr == ISR_CONFIG || !self.uses_msix {
                self.isr |= isr;
            }
            // PCI-28, PCI-29: no vector has the number NO_VECTOR.
            if let Some(vector) = self.vectors.get_mut(usize::from(route.vector)) {
                vector.signal();
            }
        }
    }
}

impl Vector {
    fn signal(&mut self) {
        self.pending = true;
        if self.masked {
            return;
        }
        if let Some(event) = &self.event {
            self.pending = false;
            if let Err(cause) = event.event.signal() {
                warn_limited!("cannot notify the driver: {cause}");
            }
        }
    }
}

fn mappable(vector: u16) -> u16 {
    if vector < VECTORS { vector } else { NO_VECTOR }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_without_interrupts_takes_no_lock() {
        let interrupts = PciInterrupts::new(Arc::default());
        interrupts.request_queue(0);
        interrupts.send();
        // A second lock in this thread panics.
        let held = interrupts.state.lock();
        interrupts.send();
        assert!(held.queues.iter().all(|route| !route.requested));
    }
}
