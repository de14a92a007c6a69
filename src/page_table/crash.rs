//! The death of this process at a chosen point, for tests.
//!
//! [`run`] executes a function that dies at its Nth point. Points are the stores to memory that outlives the process, the
//! effects in the tests' backends, and the writes to guest memory. At the point the thread unwinds, and until [`run`]
//! returns, nothing changes any more: what the process has left is exactly what it would have left at that point.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static PASSED: Cell<u64> = const { Cell::new(0) };
    static DEAD: Cell<bool> = const { Cell::new(false) };
}

/// The payload with which the thread unwinds.
struct Death;

/// Whether the process has died: nothing may have an effect.
pub(crate) fn is_dead() -> bool {
    DEAD.get()
}

/// A point at which the process can die.
pub(crate) fn point() {
    if DEAD.get() {
        return;
    }
    PASSED.set(PASSED.get() + 1);
    let left = LEFT.get();
    if left == u64::MAX {
        return;
    }
    if left == 0 {
        DEAD.set(true);
        // Not `panic!`: this calls no panic hook.
        resume_unwind(Box::new(Death));
    }
    LEFT.set(left - 1);
}

/// Executes `act`, which dies at point `at`, counted from 0. Returns `None` if it has died, and the number of points
/// that it has passed.
pub(crate) fn run<T>(at: u64, act: impl FnOnce() -> T) -> (Option<T>, u64) {
    LEFT.set(at);
    PASSED.set(0);
    let outcome = catch_unwind(AssertUnwindSafe(act));
    LEFT.set(u64::MAX);
    let passed = PASSED.get();
    let has_died = DEAD.replace(false);
    match outcome {
        Ok(value) => (Some(value), passed),
        Err(payload) if has_died && payload.is::<Death>() => (None, passed),
        Err(payload) => resume_unwind(payload),
    }
}
