//! Epochs: how the writer learns that readers have left what they found before.
//!
//! A reader has *epoch words* in memory that the writer reads. A word belongs to one access at a
//! time; it is odd while that access lasts, even between two, and never has the same value twice.
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
//! Why that is enough:
//! - One of the two fences comes first. If it is the reader's, (7) sees (1) or something later, so the
//!   writer waits for this access. If it is the writer's, (3) sees (5), so this access finds
//!   nothing that goes away.
//! - Every store to a word is a release and (7), (8) are acquires: when a word has changed, what the
//!   access did is over, also where its word was taken by the next access meanwhile.
//! - A word that was even at (7), or changed since, belongs to no access begun before (5): the writer
//!   waits for nobody else, and readers that come all the time cannot hold it up.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A word that readers and the writer share.
///
/// A trait, so that a model checker can put its own in.
pub trait Word {
    /// Reads the word.
    fn load(&self, order: Ordering) -> u64;
    /// Writes the word.
    fn store(&self, value: u64, order: Ordering);
    /// A fence, sequentially consistent, over all words.
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

/// Begins an access. What is loaded after this stays usable until [`leave`].
///
/// The caller is the only one to use `word` until then. Returns what `leave` wants to see.
pub fn enter<W: Word>(word: &W) -> u64 {
    // Odd whatever was there: nothing but this process's own harm comes from another value.
    let inside = word.load(Ordering::Relaxed).wrapping_add(1) | 1;
    // Release, not relaxed: the writer that sees this instead of the end of the access before must
    // see what that one did, too.
    word.store(inside, Ordering::Release);
    W::fence();
    inside
}

/// Ends the access that [`enter`] has begun.
pub fn leave<W: Word>(word: &W, inside: u64) {
    word.store(inside.wrapping_add(1), Ordering::Release);
}

/// Accesses the writer waits for.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    /// Word and the value it had.
    inside: Vec<(usize, u64)>,
}

impl Waiting {
    /// The accesses in progress that may have found what was there before this call.
    pub fn begin<'a, W: Word + 'a>(words: impl IntoIterator<Item = &'a W>) -> Self {
        W::fence();
        let now = words.into_iter().map(|word| word.load(Ordering::Acquire));
        let inside = now.enumerate().filter(|(_, value)| value & 1 == 1);
        Self {
            inside: inside.collect(),
        }
    }

    /// Whether all of them have ended. `word` gives the words in the order they had before.
    pub fn is_over<'a, W: Word + 'a>(&mut self, word: impl Fn(usize) -> Option<&'a W>) -> bool {
        self.inside.retain(|(index, value)| {
            word(*index).is_some_and(|word| word.load(Ordering::Acquire) == *value)
        });
        self.inside.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_accesses_begun_before_are_waited_for() {
        let words: [AtomicU64; 3] = Default::default();
        let first = enter(&words[0]);
        let second = enter(&words[1]);
        let mut waiting = Waiting::begin(&words);
        let _late = enter(&words[2]);
        assert!(!waiting.is_over(|i| words.get(i)));
        leave(&words[0], first);
        let _again = enter(&words[0]);
        assert!(
            !waiting.is_over(|i| words.get(i)),
            "the second one is still inside"
        );
        leave(&words[1], second);
        assert!(waiting.is_over(|i| words.get(i)), "those inside came later");
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
