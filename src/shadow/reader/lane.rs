//! A lane: an epoch word, and what belongs to the access that has it.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::session::Session;
use super::tlb::Tlb;
use crate::shadow::wire::EPOCH_WORDS;

/// What one access at a time may use. Its lock reserves the epoch word with its index; threads only try it and never wait
/// for it.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) tlb: Tlb,
    /// The session whose page tables the access uses; `None` while the process is not registered.
    pub(super) session: Option<Arc<Session>>,
}

impl Lane {
    /// A lane without a session.
    pub(super) fn new() -> Self {
        Self {
            tlb: Tlb::new(),
            session: None,
        }
    }
}

thread_local! {
    /// The lane that this thread tries first.
    static PREFERRED: Cell<usize> = const { Cell::new(usize::MAX) };
    /// The accesses that this thread has in progress.
    static INSIDE: Cell<Inside> = const { Cell::new(Inside { all: 0, session: 0, of_session: 0 }) };
}

/// The accesses that a thread has in progress.
#[derive(Clone, Copy)]
struct Inside {
    all: u32,
    /// The address of a session in which the thread has accesses, and their number: that of the first access. The session
    /// stays there while it has accesses.
    session: usize,
    of_session: u32,
}

/// The lane that this thread tries first: threads begin with different lanes, so that they seldom contend for one.
#[inline]
pub(super) fn preferred_lane() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    PREFERRED.with(|lane| {
        if lane.get() == usize::MAX {
            lane.set(NEXT.fetch_add(1, Ordering::Relaxed) % EPOCH_WORDS);
        }
        lane.get()
    })
}

/// Whether this thread has an access in progress, with any handle.
pub(super) fn is_inside() -> bool {
    INSIDE.get().all > 0
}

/// Whether this thread has an access in progress that uses `session`. May miss one that began within an access with another
/// handle.
pub(super) fn is_inside_of(session: &Session) -> bool {
    let inside = INSIDE.get();
    inside.of_session > 0 && inside.session == std::ptr::from_ref(session).addr()
}

/// Counts an access of this thread that begins.
#[inline]
pub(super) fn note_begin(session: &Session) {
    let mut inside = INSIDE.get();
    inside.all += 1;
    let address = std::ptr::from_ref(session).addr();
    if inside.of_session == 0 {
        inside.session = address;
    }
    if inside.session == address {
        inside.of_session += 1;
    }
    INSIDE.set(inside);
}

/// Counts an access of this thread that ends.
#[inline]
pub(super) fn note_end(session: &Session) {
    let mut inside = INSIDE.get();
    inside.all -= 1;
    if inside.session == std::ptr::from_ref(session).addr() {
        inside.of_session = inside.of_session.saturating_sub(1);
    }
    INSIDE.set(inside);
}
