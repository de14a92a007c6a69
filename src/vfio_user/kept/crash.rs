//! The death of the process at a chosen step, for tests. A step is a store that counts, or a system call that changes what
//! outlives the process. From the chosen step on, nothing has an effect.

#[cfg(test)]
use std::cell::Cell;

#[cfg(test)]
thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// Takes a step. Returns false if the process has died.
#[inline]
pub(super) fn step() -> bool {
    #[cfg(test)]
    {
        let left = LEFT.get();
        if left != u64::MAX {
            LEFT.set(left.saturating_sub(1));
        }
        left > 0
    }
    #[cfg(not(test))]
    true
}

/// Whether the process has died.
#[inline]
pub(super) fn is_dead() -> bool {
    #[cfg(test)]
    {
        LEFT.get() == 0
    }
    #[cfg(not(test))]
    false
}

/// Takes no step.
///
/// # Errors
/// The process has died.
#[inline]
pub(super) fn check() -> std::io::Result<()> {
    if is_dead() {
        return Err(std::io::Error::other("the process is dead"));
    }
    Ok(())
}

/// Takes the step of a system call.
///
/// # Errors
/// The process has died.
#[inline]
pub(super) fn call() -> std::io::Result<()> {
    if step() {
        Ok(())
    } else {
        Err(std::io::Error::other("the process is dead"))
    }
}

/// Lets the process die after `steps` more; `None`: a new process lives.
#[cfg(test)]
pub(super) fn die_after(steps: Option<u64>) {
    LEFT.set(steps.unwrap_or(u64::MAX));
}
