//! Locks with a rank. In builds with debug assertions, such as tests, a thread that takes a lock out of order
//! panics with the names of both locks, even if no other thread contends for them. In other builds these are
//! the plain locks of `parking_lot`.
//!
//! Not `tracing-mutex`: it learns the order from the locks that a run happens to take, names no lock, and has
//! no condition variable for `parking_lot`. Not `lock_ordering`: it requires a token in the arguments of
//! every function.

mod held;
mod rank;

use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use self::held::{Held, Ranked};
pub use self::rank::Rank;

/// A mutual exclusion lock with a rank.
#[derive(Debug)]
pub struct Mutex<T> {
    ranked: Ranked,
    inner: parking_lot::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A lock of this rank around `value`.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            ranked: Ranked::new(rank),
            inner: parking_lot::Mutex::new(value),
        }
    }

    /// Waits for the lock.
    ///
    /// # Panics
    /// With debug assertions, if this thread holds a lock of the same or of a higher rank.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.ranked.take();
        MutexGuard {
            inner: self.inner.lock(),
            _held: held,
        }
    }

    /// Takes the lock if no thread holds it.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let inner = self.inner.try_lock()?;
        Some(MutexGuard {
            inner,
            _held: self.ranked.note(),
        })
    }

    /// Waits for the lock, up to `patience`.
    ///
    /// # Panics
    /// As [`Self::lock`].
    pub fn lock_within(&self, patience: Duration) -> Option<MutexGuard<'_, T>> {
        let held = self.ranked.take();
        Some(MutexGuard {
            inner: self.inner.try_lock_for(patience)?,
            _held: held,
        })
    }

    /// Waits for the lock, up to `patience`, and never releases it. Returns whether that succeeded. For the end of a
    /// process.
    pub fn hold(&self, patience: Duration) -> bool {
        let guard = self.inner.try_lock_for(patience);
        guard.map(std::mem::forget).is_some()
    }
}

/// Access to the value of a [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    // Field order is drop order: releases the lock first, then removes its record.
    inner: parking_lot::MutexGuard<'a, T>,
    _held: Held,
}

impl<T> MutexGuard<'_, T> {
    /// Releases the lock. If threads wait for it, hands it to the one that has waited longest.
    #[inline]
    pub fn unlock_fair(guard: Self) {
        parking_lot::MutexGuard::unlock_fair(guard.inner);
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// A lock for many readers or one writer, with a rank.
#[derive(Debug)]
pub struct RwLock<T> {
    ranked: Ranked,
    inner: parking_lot::RwLock<T>,
}

impl<T> RwLock<T> {
    /// A lock of this rank around `value`.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            ranked: Ranked::new(rank),
            inner: parking_lot::RwLock::new(value),
        }
    }

    /// Waits until no writer holds or wants the lock.
    ///
    /// # Panics
    /// With debug assertions, if this thread holds a lock of the same or of a higher rank.
    #[inline]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        let held = self.ranked.take();
        RwLockReadGuard {
            inner: self.inner.read(),
            _held: held,
        }
    }

    /// Waits until no other thread holds the lock.
    ///
    /// # Panics
    /// With debug assertions, if this thread holds a lock of the same or of a higher rank.
    #[inline]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        let held = self.ranked.take();
        RwLockWriteGuard {
            inner: self.inner.write(),
            _held: held,
        }
    }
}

/// Read access to the value of a [`RwLock`].
#[derive(Debug)]
pub struct RwLockReadGuard<'a, T> {
    inner: parking_lot::RwLockReadGuard<'a, T>,
    _held: Held,
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

/// Write access to the value of a [`RwLock`].
#[derive(Debug)]
pub struct RwLockWriteGuard<'a, T> {
    inner: parking_lot::RwLockWriteGuard<'a, T>,
    _held: Held,
}

impl<T> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for RwLockWriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// A condition variable for [`Mutex`]. The lock counts as held while its thread waits.
#[derive(Debug, Default)]
pub struct Condvar {
    inner: parking_lot::Condvar,
}

impl Condvar {
    /// A condition variable without waiting threads.
    pub const fn new() -> Self {
        Self {
            inner: parking_lot::Condvar::new(),
        }
    }

    /// Waits for a notification.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        self.inner.wait(&mut guard.inner);
    }

    /// Waits for a notification, but no longer than `patience`. Returns whether the time ran out.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, patience: Duration) -> bool {
        self.inner.wait_for(&mut guard.inner, patience).timed_out()
    }

    /// Waits for a notification, but not beyond `until`. Returns whether the time ran out.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) -> bool {
        self.inner.wait_until(&mut guard.inner, until).timed_out()
    }

    /// Wakes every thread that waits.
    pub fn notify_all(&self) {
        self.inner.notify_all();
    }

    /// Wakes one thread that waits.
    pub fn notify_one(&self) {
        self.inner.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_taken_in_the_order_of_their_ranks() {
        let requests = Mutex::new(Rank::RequestQueue, 1);
        let core = Mutex::new(Rank::Core, 2);
        let windows = RwLock::new(Rank::Windows, 3);
        let first = requests.lock();
        let second = core.lock();
        let third = windows.read();
        assert_eq!(*first + *second + *third, 6);
        // Released in another order, and taken again.
        drop(second);
        drop(third);
        let second = core.lock();
        assert_eq!(*first + *second, 3);
        MutexGuard::unlock_fair(second);
        drop(first);
        assert_eq!(*requests.lock(), 1);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "RequestQueue is taken while Core is held")]
    fn a_lock_taken_out_of_order_panics_with_both_names() {
        let requests = Mutex::new(Rank::RequestQueue, ());
        let core = Mutex::new(Rank::Core, ());
        let _core = core.lock();
        let _requests = requests.lock();
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "Core is taken while Core is held")]
    fn two_locks_of_one_rank_are_not_held_together() {
        let (one, other) = (Mutex::new(Rank::Core, ()), Mutex::new(Rank::Core, ()));
        let _one = one.lock();
        let _other = other.lock();
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "Core is taken while Windows is held")]
    fn readers_obey_the_order_too() {
        let core = RwLock::new(Rank::Core, ());
        let windows = RwLock::new(Rank::Windows, ());
        let _windows = windows.write();
        let _core = core.read();
    }

    #[test]
    fn a_lock_that_is_only_tried_may_be_of_any_rank() {
        let (core, requests) = (Mutex::new(Rank::Core, 1), Mutex::new(Rank::RequestQueue, 2));
        let core_guard = core.lock();
        assert!(core.try_lock().is_none());
        assert_eq!(requests.try_lock().map(|guard| *guard), Some(2));
        drop(core_guard);
        assert_eq!(*requests.lock() + *core.lock(), 3);
    }
}
