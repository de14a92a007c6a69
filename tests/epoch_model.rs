//! The two ways in which a page leaves a device, under a model checker, which explores every interleaving of accesses
//! with the writer's changes:
//!
//! - A reader of the shared table makes each access in an epoch, and the writer waits for the epochs.
//! - The daemon serves the accesses of a device's server under the lock of the device's view, and UNMAP takes that lock
//!   once.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::sync::atomic::Ordering;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, fence};
use loom::sync::{Arc, RwLock};
use loom::thread;
use vhost_device_iommu::page_table::epoch::{GracePeriod, Word, enter, is_idle, leave};

/// A word in the model.
struct Modelled(AtomicU64);

impl Word for Modelled {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }

    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// A reader's words, one entry (0: free, otherwise 1 + the index of its page), and pages. The model
/// refuses every access to a page that is not ordered with the writes to that page.
struct Shared {
    words: Vec<Modelled>,
    entry: AtomicU64,
    pages: Vec<UnsafeCell<u64>>,
}

impl Shared {
    fn new(words: usize, pages: usize) -> Arc<Self> {
        Arc::new(Self {
            words: (0..words).map(|_| Modelled(AtomicU64::new(0))).collect(),
            entry: AtomicU64::new(1),
            pages: (0..pages).map(|_| UnsafeCell::new(0)).collect(),
        })
    }

    /// One access of a reader, in the same steps as in `shadow`.
    fn access(&self, word: usize) {
        let inside = enter(&self.words[word]);
        let entry = self.entry.load(Ordering::Acquire);
        if entry > 0 {
            self.read(usize::try_from(entry - 1).expect("small"));
        }
        leave(&self.words[word], inside);
    }

    #[expect(unsafe_code, reason = "the model checks every access to a page")]
    fn read(&self, page: usize) {
        // SAFETY: the model fails if another thread writes to the page meanwhile.
        self.pages[page].with(|page| unsafe { *page });
    }

    fn wait(&self) {
        let mut grace = GracePeriod::begin(&self.words);
        while !grace.is_over(|word| self.words.get(word)) {
            thread::yield_now();
        }
    }

    /// Gives the page to a new owner, which writes to it.
    #[expect(unsafe_code, reason = "the model checks every access to a page")]
    fn reuse(&self, page: usize) {
        // SAFETY: the model fails if another thread reads the page meanwhile.
        self.pages[page].with_mut(|page| unsafe { *page += 1 });
    }
}

#[test]
fn an_unmapped_page_is_not_reached_after_the_wait() {
    loom::model(|| {
        let shared = Shared::new(1, 1);
        let reader = shared.clone();
        let reader = thread::spawn(move || reader.access(0));
        shared.entry.store(0, Ordering::Release);
        shared.wait();
        shared.reuse(0);
        reader.join().expect("no race");
    });
}

/// The next access of the same reader reuses the word, and the writer must not wait for it.
#[test]
fn consecutive_accesses_have_all_ended_after_the_wait() {
    loom::model(|| {
        let shared = Shared::new(1, 2);
        let reader = shared.clone();
        let reader = thread::spawn(move || {
            reader.access(0);
            reader.access(0);
        });
        // Another page replaces the first, as in an ATTACH to another domain.
        shared.entry.store(2, Ordering::Release);
        shared.wait();
        shared.reuse(0);
        reader.join().expect("no race");
    });
}

#[test]
fn the_writer_waits_for_all_words() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let shared = Shared::new(2, 1);
        let readers: Vec<_> = [0, 1]
            .map(|word| {
                let reader = shared.clone();
                thread::spawn(move || reader.access(word))
            })
            .into();
        shared.entry.store(0, Ordering::Release);
        shared.wait();
        shared.reuse(0);
        for reader in readers {
            reader.join().expect("no race");
        }
    });
}

/// A registration that its daemon, or the next one, ends: the entry stays, and `revoked` stops new accesses. The reader's
/// second access begins within its first one, whether revoked or not, and outlives it.
#[test]
fn no_access_is_in_progress_once_a_revoked_registration_is_idle() {
    for first in [0, 1] {
        loom::model(move || {
            let shared = Shared::new(2, 1);
            let revoked = Arc::new(AtomicU64::new(0));
            let (reader, stop) = (shared.clone(), revoked.clone());
            let reader = thread::spawn(move || {
                let (outer, inner) = (&reader.words[first], &reader.words[1 - first]);
                let outside = enter(outer);
                if stop.load(Ordering::Acquire) != 0 {
                    leave(outer, outside);
                    return;
                }
                let inside = enter(inner);
                leave(outer, outside);
                reader.read(0);
                leave(inner, inside);
            });
            revoked.store(1, Ordering::Release);
            while !is_idle(shared.words.iter()) {
                thread::yield_now();
            }
            shared.reuse(0);
            reader.join().expect("no race");
        });
    }
}

/// A table of two levels, as the daemon walks it for a device's server. An entry is 0, or 1 + the index of the frame or
/// page below it.
struct Served {
    /// The lock of the device's view, with the root's index.
    view: RwLock<usize>,
    roots: Vec<AtomicU64>,
    /// The frames below the root. An UNMAP gives an empty one to its next user.
    frames: Vec<UnsafeCell<u64>>,
    pages: Vec<UnsafeCell<u64>>,
}

impl Served {
    /// Two domains: the root 0 leads through frame 0 to page 0, the root 1 through frame 1 to page 1. The device is in
    /// the first.
    fn new() -> Arc<Self> {
        let cells = |values: [u64; 2]| values.map(UnsafeCell::new).into();
        Arc::new(Self {
            view: RwLock::new(0),
            roots: [1, 2].map(AtomicU64::new).into(),
            frames: cells([1, 2]),
            pages: cells([0, 0]),
        })
    }

    /// One access of the device's server, in the same steps as in the interposer's thread.
    #[expect(
        unsafe_code,
        reason = "the model checks every access to a frame and a page"
    )]
    fn access(&self) {
        let view = self.view.read().expect("not poisoned");
        let Some(frame) = self.roots[*view].load(Ordering::Acquire).checked_sub(1) else {
            return;
        };
        let frame = usize::try_from(frame).expect("small");
        // SAFETY: the model fails if another thread writes to the frame meanwhile.
        let page = self.frames[frame].with(|frame| unsafe { *frame });
        let page = usize::try_from(page.checked_sub(1).expect("an entry")).expect("small");
        // SAFETY: the model fails if another thread writes to the page meanwhile.
        self.pages[page].with(|page| unsafe { *page });
        drop(view);
    }

    /// Gives a frame and a page to new owners, which write to them.
    #[expect(
        unsafe_code,
        reason = "the model checks every access to a frame and a page"
    )]
    fn reuse(&self, frame: usize, page: usize) {
        // SAFETY: the model fails if another thread reads the frame meanwhile.
        self.frames[frame].with_mut(|frame| unsafe { *frame = 0 });
        // SAFETY: the model fails if another thread reads the page meanwhile.
        self.pages[page].with_mut(|page| unsafe { *page += 1 });
    }
}

#[test]
fn an_access_that_the_daemon_serves_ends_before_the_unmap() {
    loom::model(|| {
        let served = Served::new();
        let server = served.clone();
        let server = thread::spawn(move || {
            server.access();
            server.access();
        });
        served.roots[0].store(0, Ordering::Release);
        drop(served.view.write().expect("not poisoned"));
        served.reuse(0, 0);
        server.join().expect("no race");
    });
}

/// Accesses go through the old domain or the new one, and through the old one no longer once the endpoint has moved.
#[test]
fn an_access_that_the_daemon_serves_ends_before_the_endpoint_has_moved() {
    loom::model(|| {
        let served = Served::new();
        let server = served.clone();
        let server = thread::spawn(move || {
            server.access();
            server.access();
        });
        *served.view.write().expect("not poisoned") = 1;
        served.roots[0].store(0, Ordering::Release);
        served.reuse(0, 0);
        server.join().expect("no race");
    });
}
