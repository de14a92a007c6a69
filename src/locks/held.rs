//! The record of the locks that this thread holds. Only builds with debug assertions keep it.

use std::marker::PhantomData;

use super::Rank;

#[cfg(debug_assertions)]
thread_local! {
    static HELD: std::cell::RefCell<Vec<Rank>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// A lock's rank; empty in builds that do not check it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ranked {
    #[cfg(debug_assertions)]
    rank: Rank,
}

impl Ranked {
    pub(super) const fn new(rank: Rank) -> Self {
        #[cfg(not(debug_assertions))]
        let _ = rank;
        Self {
            #[cfg(debug_assertions)]
            rank,
        }
    }

    /// Checks the rank of a lock that this thread is about to take, and records the lock.
    ///
    /// # Panics
    /// With debug assertions, if this thread holds a lock of the same or of a higher rank.
    pub(super) fn take(self) -> Held {
        // While a thread ends, its record may be gone; nothing is checked then.
        #[cfg(debug_assertions)]
        let _ = HELD.try_with(|held| {
            if let Some(highest) = held
                .borrow()
                .iter()
                .max()
                .filter(|held| **held >= self.rank)
            {
                panic!(
                    "lock order: {:?} is taken while {highest:?} is held (see locks::Rank)",
                    self.rank
                );
            }
        });
        self.note()
    }

    /// Records the lock without a check. A lock that was taken without waiting may have any rank.
    pub(super) fn note(self) -> Held {
        #[cfg(debug_assertions)]
        let _ = HELD.try_with(|held| held.borrow_mut().push(self.rank));
        Held {
            #[cfg(debug_assertions)]
            rank: self.rank,
            same_thread: PhantomData,
        }
    }
}

/// The record that this thread holds a lock. It lives as long as the guard.
#[derive(Debug)]
pub(super) struct Held {
    #[cfg(debug_assertions)]
    rank: Rank,
    /// Not `Send`: the thread that took the lock must drop the guard.
    same_thread: PhantomData<*const ()>,
}

#[cfg(debug_assertions)]
impl Drop for Held {
    fn drop(&mut self) {
        // Guards may be dropped in another order than they were taken in. While a thread ends, `HELD` may be
        // gone before the guard.
        let _ = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            if let Some(at) = held.iter().rposition(|rank| *rank == self.rank) {
                held.remove(at);
            }
        });
    }
}
