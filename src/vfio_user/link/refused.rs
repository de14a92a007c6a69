//! The windows that a server has refused, and those that it is offered again.
//!
//! A server that connects is told windows before it has answered the first ones. At its limit it refuses all that are in
//! flight, and the guest has mapped them nevertheless. So whenever the server gives a window up, it is offered a refused
//! one in its place, even if the announcement has passed that one.

use std::collections::BTreeMap;

use crate::address::Iova;

/// The windows that a server has refused and the guest has mapped. While a server that has connected is told all windows,
/// these are up to [`MAX_REFUSED`]; besides, those of one request join them until the request takes them back.
///
/// [`MAX_REFUSED`]: super::limit::MAX_REFUSED
#[derive(Debug, Default)]
pub(super) struct RefusedWindows {
    /// Whether the window stays mapped, since no request has waited for the answer, by the window's first address.
    windows: BTreeMap<u64, bool>,
    /// The number of windows that the server has given up and in whose place none was offered yet. So a server that refuses
    /// a window for a reason of its own is offered one window for each that it gives up, and not again and again.
    places: u64,
    /// The next offer is the first window from this address on, or else the first of all.
    next: u64,
}

impl RefusedWindows {
    /// The number of windows.
    pub(super) fn len(&self) -> usize {
        self.windows.len()
    }

    /// Whether the window at `first` is one of them.
    pub(super) fn contains(&self, first: Iova) -> bool {
        self.windows.contains_key(&first.0)
    }

    /// The server has refused the window at `first`. `stays` says that the guest keeps its mapping.
    pub(super) fn insert(&mut self, first: Iova, stays: bool) {
        self.windows.insert(first.0, stays);
    }

    /// The window at `first` is unmapped, or offered again. Returns whether it was one of them.
    pub(super) fn remove(&mut self, first: Iova) -> bool {
        self.windows.remove(&first.0).is_some()
    }

    /// The guest has unmapped all windows.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The server has given up so many windows.
    pub(super) fn given_up(&mut self, count: u64) {
        let places = self.places.saturating_add(count);
        self.places = places.min(self.windows.len() as u64);
    }

    /// Takes the first address of the next window to offer, which stays one of them. `None` if there is none.
    pub(super) fn take_offer(&mut self) -> Option<Iova> {
        self.places = self.places.checked_sub(1)?;
        let staying = |(first, stays): (&u64, &bool)| stays.then_some(*first);
        let later = self.windows.range(self.next..).find_map(staying);
        let first = later.or_else(|| self.windows.range(..self.next).find_map(staying))?;
        self.next = first.wrapping_add(1);
        Some(Iova(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_offered_once_and_each_window_in_turn() {
        let mut refused = RefusedWindows::default();
        assert_eq!(refused.take_offer(), None);
        for (first, stays) in [(5, true), (7, false), (9, true), (u64::MAX, true)] {
            refused.insert(Iova(first), stays);
        }
        assert_eq!(
            refused.take_offer(),
            None,
            "the server has given nothing up"
        );
        refused.given_up(2);
        let mut offers = |count: u64| -> Vec<_> {
            refused.given_up(count);
            std::iter::from_fn(|| refused.take_offer().map(|first| first.0)).collect()
        };
        assert_eq!(offers(0), [5, 9]);
        assert_eq!(offers(1), [u64::MAX]);
        // No more places than windows.
        assert_eq!(offers(u64::MAX), [5, 9, u64::MAX, 5]);
        assert!(refused.remove(Iova(5)) && refused.remove(Iova(9)));
        assert!(!refused.remove(Iova(5)));
        assert!(refused.remove(Iova(u64::MAX)));
        refused.given_up(1);
        assert_eq!(refused.take_offer(), None, "it is about to be unmapped");
        assert!(refused.contains(Iova(7)));
        refused.clear();
        assert_eq!(refused.len(), 0);
    }
}
