//! Which locks this thread holds, in builds with debug assertions; nothing in others.

use std::marker::PhantomData;

use super::Rank;

#[cfg(debug_assertions)]
thread_local! {
    static HELD: std::cell::RefCell<Vec<Rank>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// A lock's rank, as far as this build checks it.
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

    /// Notes that the lock is about to be taken.
    ///
    /// # Panics
    /// With debug assertions, where this thread holds a lock of the same or of a higher rank.
    pub(super) fn take(self) -> Held {
        #[cfg(debug_assertions)]
        HELD.with_borrow(|held| {
            if let Some(highest) = held.iter().max().filter(|held| **held >= self.rank) {
                panic!(
                    "lock order: {:?} is taken while {highest:?} is held (see locks::Rank)",
                    self.rank
                );
            }
        });
        self.note()
    }

    /// Notes that the lock was taken without waiting, which no order forbids.
    pub(super) fn note(self) -> Held {
        #[cfg(debug_assertions)]
        HELD.with_borrow_mut(|held| held.push(self.rank));
        Held {
            #[cfg(debug_assertions)]
            rank: self.rank,
            same_thread: PhantomData,
        }
    }
}

/// The note that this thread holds a lock; it ends with the guard.
#[derive(Debug)]
pub(super) struct Held {
    #[cfg(debug_assertions)]
    rank: Rank,
    /// A guard is given up by the thread that took it.
    same_thread: PhantomData<*const ()>,
}

#[cfg(debug_assertions)]
impl Drop for Held {
    fn drop(&mut self) {
        // Guards may be dropped in another order than they were taken in. While a thread ends, the
        // note may be gone before the guard.
        let _ = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            if let Some(at) = held.iter().rposition(|rank| *rank == self.rank) {
                held.remove(at);
            }
        });
    }
}
