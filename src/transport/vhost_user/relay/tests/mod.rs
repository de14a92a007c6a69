//! A VMM, a keeper, and one server after the other between them.

mod bed;
mod deaths;
mod guest;
mod replay;
mod transparent;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Counts the steps of relays, and ends the relay at one of them, as a death of the process would.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Steps(Arc<StepCount>);

#[derive(Debug, Default)]
struct StepCount {
    /// Steps left to the death; 0 for none.
    left: AtomicUsize,
    has_died: AtomicBool,
}

impl Steps {
    /// Ends the relay at this step, counted from 1.
    pub(super) fn until(step: usize) -> Self {
        let steps = Self::default();
        steps.0.left.store(step, Ordering::Relaxed);
        steps
    }

    /// Whether the relay ends here.
    pub(super) fn dies(&self) -> bool {
        if self.0.left.load(Ordering::Relaxed) == 0
            || self.0.left.fetch_sub(1, Ordering::Relaxed) > 1
        {
            return false;
        }
        self.0.has_died.store(true, Ordering::Release);
        true
    }

    fn has_died(&self) -> bool {
        self.0.has_died.load(Ordering::Acquire)
    }
}
