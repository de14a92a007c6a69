//! Epochs show the writer when every reader has left the frames and the memory that the writer has
//! taken away.
//!
//! A reader has *epoch words* in memory that the writer reads. A word belongs to one access at a
//! time. It is odd during an access and even between accesses, and it never takes the same value
//! twice.
//!
//! ```text
//! reader                                    writer
//! word := odd             (1)               entry := free           (5)
//! fence, SeqCst           (2)               fence, SeqCst           (6)
//! loads slot and entries  (3)               loads every word        (7)
//! uses the memory                           waits for each that is odd to change  (8)
//! word := even, release   (4)               the memory and the frames are free
//! ```
//!
//! Correctness:
//! - One of the two fences comes first. If it is the reader's, (7) sees (1) or a later store, so the
//!   writer waits for this access. If it is the writer's, (3) sees (5), so this access finds the
//!   entry free.
//! - Every store to a word is a release, and (7) and (8) are acquires. Once the writer sees a word
//!   change, the access has ended, even if the next access has taken the word meanwhile.
//! - A word that is even at (7), or that has changed since, belongs to no access begun before (5).
//!   The writer waits for no other access, so a steady stream of new accesses cannot delay it.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A word that readers and the writer share.
///
/// It is a trait so that a model checker can substitute its own atomics.
pub trait Word {
    /// Reads the word.
    fn load(&self, order: Ordering) -> u64;
    /// Writes the word.
    fn store(&self, value: u64, order: Ordering);
    /// A sequentially consistent fence over all words.
    fn fence();
}

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        Self::load(self, order)
    }

    fn store(&self, value: u64, order: Ordering) {
        Self::store(self, value, order);
    }

    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// Begins an access. Entries loaded after this call stay usable until [`leave`].
///
/// No other access may use `word` until then. Returns the value that the caller must pass to
/// [`leave`].
pub fn enter<W: Word>(word: &W) -> u64 {
    // The result is odd whatever the word held: the memory belongs to the reader's process, and a
    // value corrupted there harms only that process.
    let inside = word.load(Ordering::Relaxed).wrapping_add(1) | 1;
    // Not relaxed: a writer may see this store instead of the one that ended the previous access,
    // and must then see everything that access did.
    word.store(inside, Ordering::Release);
    W::fence();
    inside
}

/// Ends the access that [`enter`] began.
pub fn leave<W: Word>(word: &W, inside: u64) {
    word.store(inside.wrapping_add(1), Ordering::Release);
}

/// The accesses that the writer must wait for: those in progress when it began to wait.
#[derive(Clone, Debug, Default)]
pub struct GracePeriod {
    /// Index of each odd word, and the value it had.
    inside: Vec<(usize, u64)>,
}

impl GracePeriod {
    /// Collects the accesses in progress. They may have loaded entries before the writer changed
    /// them.
    pub fn begin<'a, W: Word + 'a>(words: impl IntoIterator<Item = &'a W>) -> Self {
        W::fence();
        let now = words.into_iter().map(|word| word.load(Ordering::Acquire));
        let inside = now.enumerate().filter(|(_, value)| value & 1 == 1);
        Self {
            inside: inside.collect(),
        }
    }

    /// Whether all of these accesses have ended. `word` must return each word by its index in
    /// [`Self::begin`].
    pub fn is_over<'a, W: Word + 'a>(&mut self, word: impl Fn(usize) -> Option<&'a W>) -> bool {
        self.inside.retain(|(index, value)| {
            word(*index).is_some_and(|word| word.load(Ordering::Acquire) == *value)
        });
        self.inside.is_empty()
    }
}

/// Whether no access is in progress. The caller must have made sure that none begins any more, except within another one of
/// the same thread; once this function has returned true, it does so for ever.
///
/// An access may begin in a word that was looked at already, and outlive the access in which it began. So all words are
/// looked at twice: no value comes twice, and words that have the same even values both times were even together in
/// between.
pub fn is_idle<'a, W: Word + 'a>(words: impl Iterator<Item = &'a W> + Clone) -> bool {
    W::fence();
    let values = words.clone().map(|word| word.load(Ordering::Acquire));
    let values: Vec<u64> = values.collect();
    let same = |(word, value): (&W, &u64)| word.load(Ordering::Acquire) == *value;
    values.iter().all(|value| value & 1 == 0) && words.zip(&values).all(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_writer_waits_only_for_accesses_begun_before() {
        let words: [AtomicU64; 3] = Default::default();
        let first = enter(&words[0]);
        let second = enter(&words[1]);
        let mut grace = GracePeriod::begin(&words);
        let _late = enter(&words[2]);
        assert!(!grace.is_over(|i| words.get(i)));
        leave(&words[0], first);
        let _again = enter(&words[0]);
        assert!(!grace.is_over(|i| words.get(i)), "the second access lasts");
        leave(&words[1], second);
        assert!(grace.is_over(|i| words.get(i)), "the rest began later");
    }

    #[test]
    fn a_word_of_any_value_becomes_odd() {
        for before in [0, 1, 2, u64::MAX - 1, u64::MAX] {
            let word = AtomicU64::new(before);
            let inside = enter(&word);
            assert_eq!(inside & 1, 1);
            assert_ne!(inside, before);
            leave(&word, inside);
            assert_eq!(word.load(Ordering::Relaxed) & 1, 0);
        }
    }
}
