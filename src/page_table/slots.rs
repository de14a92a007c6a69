//! Endpoint slots: words of the arena that tell readers where an endpoint's DMA goes.

use std::sync::Arc;

use super::arena::Arena;
use super::error::OutOfFrames;
use super::layout::{EndpointWord, FRAME_WORDS, TableOffset};
use super::words::SharedWords;

/// A set of endpoint slots. Each is blocked at first.
///
/// The slots keep their frames for the lifetime of the arena.
#[derive(Debug)]
pub struct EndpointSlots {
    memory: Arc<SharedWords>,
    frames: Vec<TableOffset>,
}

impl EndpointSlots {
    /// Allocates `count` slots.
    ///
    /// # Errors
    /// The arena has too few free frames.
    pub fn new(arena: &mut Arena, count: usize) -> Result<Self, OutOfFrames> {
        let needed = count.div_ceil(FRAME_WORDS) as u64;
        let free = arena.frames_free();
        let frames = if needed <= free {
            (0..needed).map_while(|_| arena.allocate()).collect()
        } else {
            return Err(OutOfFrames { needed, free });
        };
        Ok(Self {
            memory: arena.memory().clone(),
            frames,
        })
    }

    /// The index of the arena word that holds slot `index`; `usize::MAX`, which lies outside every
    /// arena, if there is no such slot.
    pub fn word(&self, index: usize) -> usize {
        let frame = self.frames.get(index / FRAME_WORDS);
        frame.map_or(usize::MAX, |f| f.slot((index % FRAME_WORDS) as u64))
    }

    /// Switches a slot to `state`: every access that begins after this call sees it. The caller must
    /// wait for accesses in progress.
    pub fn set(&self, index: usize, state: EndpointWord) {
        // The store is a release: a reader that sees the root must see its table filled.
        self.memory.store(self.word(index), state.bits());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_table::{Levels, Table};

    #[test]
    fn readers_see_each_slot_in_a_word_of_its_own() {
        let mut arena = Arena::new(1 << 20).expect("an arena");
        let used = arena.frames_used();
        let slots = EndpointSlots::new(&mut arena, 513).expect("two frames");
        assert_eq!(arena.frames_used(), used + 2);
        let table = Table::new(&mut arena, Levels::Five).expect("a frame");
        let domain = EndpointWord::Domain {
            root: table.root(),
            levels: table.levels(),
        };
        slots.set(0, EndpointWord::Bypass);
        slots.set(512, domain);
        assert_eq!(arena.view().endpoint(slots.word(0)), EndpointWord::Bypass);
        assert_eq!(arena.view().endpoint(slots.word(1)), EndpointWord::Blocked);
        assert_eq!(arena.view().endpoint(slots.word(512)), domain);
        let beyond = slots.word(5000);
        assert_eq!(arena.view().endpoint(beyond), EndpointWord::Blocked);
        slots.set(5000, EndpointWord::Bypass);
    }

    #[test]
    fn slots_beyond_the_free_frames_are_refused() {
        let mut arena = Arena::new(8192).expect("an arena");
        let refused = EndpointSlots::new(&mut arena, 513).expect_err("one frame");
        assert_eq!(refused, OutOfFrames { needed: 2, free: 1 });
        assert_eq!(arena.frames_free(), 1);
    }
}
