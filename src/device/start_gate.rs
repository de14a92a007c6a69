//! The gate before the requests of a driver that starts.
//!
//! 1. The worker finds that the request ring has started ([`StartGate::enter`]). It asks for a check and serves nothing.
//! 2. Another thread makes the check, and calls [`StartGate::open`] whatever the outcome. It must do so within a
//!    limited time.
//! 3. The worker wakes, passes the gate, and serves the ring. The next start of a ring meets a closed gate again.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{Device, Requests};
use crate::error_limited;
use crate::locks::MutexGuard;

const CLOSED: u8 = 0;
const ASKED: u8 = 1;
const OPEN: u8 = 2;

/// See the module's description.
pub(super) struct StartGate {
    state: AtomicU8,
    ask: Box<dyn Fn() + Send + Sync>,
}

impl StartGate {
    /// A closed gate. `ask` demands a check; it must take no lock and must not wait.
    pub fn new(ask: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            state: AtomicU8::new(CLOSED),
            ask: Box::new(ask),
        }
    }

    /// Passes the gate if it is open, and closes it behind the caller. Otherwise demands a check, once.
    pub fn enter(&self) -> bool {
        let ordering = (Ordering::AcqRel, Ordering::Acquire);
        let passed = self
            .state
            .compare_exchange(OPEN, CLOSED, ordering.0, ordering.1);
        if passed.is_ok() {
            return true;
        }
        let asked = self
            .state
            .compare_exchange(CLOSED, ASKED, ordering.0, ordering.1);
        if asked.is_ok() {
            (self.ask)();
        }
        false
    }

    /// The check is done. Returns whether a driver waits for it.
    pub fn open(&self) -> bool {
        self.state
            .compare_exchange(ASKED, OPEN, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The driver that has asked is gone.
    pub fn close(&self) {
        self.state.store(CLOSED, Ordering::Release);
    }
}

impl Device {
    /// Holds back the requests of each driver that starts, from now on, until [`Self::start_is_checked`]. `ask` demands the
    /// check; it must take no lock and must not wait. Call this once, before a VMM connects.
    pub fn check_starts(&self, ask: impl Fn() + Send + Sync + 'static) {
        // The first gate stays.
        let _ = self.start_gate.set(StartGate::new(ask));
    }

    /// The check that [`Self::check_starts`] demands is done, whatever its outcome: serves the driver that waits for it, if
    /// one does.
    pub fn start_is_checked(&self) {
        if let Some(gate) = self.start_gate.get()
            && gate.open()
            && let Err(cause) = self.wake.write(1)
        {
            error_limited!("cannot wake the worker: {cause}");
        }
    }

    /// The driver that may wait before the gate has gone. The caller holds `requests`, as the worker does while it looks
    /// whether the ring runs and then asks: otherwise it could ask for that driver after the gate has closed, and the
    /// answer would let the next driver pass.
    pub(super) fn close_start_gate(&self, _requests: &MutexGuard<'_, Requests>) {
        if let Some(gate) = self.start_gate.get() {
            gate.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn each_start_asks_once_and_waits_for_the_answer() {
        let asked = Arc::new(AtomicU32::new(0));
        let counted = asked.clone();
        let gate = StartGate::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        let asked = || asked.load(Ordering::Relaxed);
        assert!(!gate.open(), "nobody waits");
        for starts in 1..4 {
            assert!(!gate.enter() && !gate.enter());
            assert_eq!(asked(), starts);
            assert!(gate.open() && !gate.open());
            assert!(gate.enter());
        }
        // An answer for a driver that is gone opens nothing for the next one.
        assert!(!gate.enter());
        gate.close();
        assert!(!gate.open());
        assert!(!gate.enter());
        assert_eq!(asked(), 5);
        gate.open();
        gate.close();
        assert!(!gate.enter());
    }
}
