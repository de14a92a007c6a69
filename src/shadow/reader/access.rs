//! Accesses in progress, and their way through the page tables.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::error::AccessError;
use super::session::Session;
use super::tlb::{LAST_REACHED, Tlb};
use crate::address::{Access, Gpa, Iova};
use crate::locks::MutexGuard;
use crate::page_table::epoch::{enter, leave};
use crate::page_table::{EndpointWord, Translation, reader};
use crate::shadow::wire::{EPOCH_WORDS, epoch_word};

/// The bits of an address that select a byte of its 4 KiB page.
const PAGE_MASK: u64 = 0xfff;

/// An access in progress: an epoch word that is odd, and the TLB that goes with it.
#[derive(Debug)]
pub(super) struct EpochGuard<'a> {
    pub(super) word: &'a AtomicU64,
    value: u64,
    /// Reserves the word: no other thread of this process uses it while this guard lives.
    pub(super) tlb: MutexGuard<'a, Tlb>,
}

impl Drop for EpochGuard<'_> {
    fn drop(&mut self) {
        leave(self.word, self.value);
    }
}

impl Session {
    /// Begins an access with an epoch word that no other access of this process uses, or returns `None`
    /// if all of them are in use.
    #[inline]
    pub(super) fn enter(&self) -> Option<EpochGuard<'_>> {
        let hint = preferred_word();
        let (before, from) = self.tlbs.split_at(hint.min(self.tlbs.len()));
        let from = from.iter().enumerate().map(|(n, tlb)| (n + hint, tlb));
        for (index, tlb) in from.chain(before.iter().enumerate()) {
            if let Some(tlb) = tlb.try_lock() {
                let word = epoch_word(self.epochs.as_slice(), index)?;
                let value = enter(word);
                return Some(EpochGuard { word, value, tlb });
            }
        }
        None
    }

    /// Translates `iova`. The caller must be inside an access, or the translation is stale at once.
    #[inline]
    pub(super) fn translate(&self, iova: Iova, access: Access) -> Result<Translation, AccessError> {
        if !self.connected.load(Ordering::Acquire) {
            return Err(AccessError::Disconnected);
        }
        let found = match self.arena.view().endpoint(self.slot) {
            EndpointWord::Blocked => None,
            EndpointWord::Bypass => self.bypass(iova),
            EndpointWord::Domain { root, levels } => {
                reader::walk(self.arena.view(), root, levels, iova)
            }
        };
        found
            .filter(|found| found.access.allows(access))
            .ok_or(AccessError::Fault {
                endpoint: self.endpoint,
                access,
                address: iova,
            })
    }

    fn bypass(&self, iova: Iova) -> Option<Translation> {
        let mut last = u64::MAX;
        for region in &self.reserved {
            if region.contains(iova) {
                return None;
            }
            if region.first() > iova {
                last = last.min(region.first().0 - 1);
            }
        }
        Some(Translation {
            gpa: Gpa(iova.0),
            contiguous_last: Iova(last),
            access: Access::READ_WRITE,
            mmio: false,
        })
    }

    /// Begins an access and fills its TLB with the translation of `length` bytes at `iova`.
    pub(super) fn translate_range(
        &self,
        iova: Iova,
        length: u64,
        access: Access,
        generation: u64,
    ) -> Result<EpochGuard<'_>, AccessError> {
        let last = iova.0.checked_add(length.saturating_sub(1));
        let last = last.filter(|last| *last <= LAST_REACHED);
        let last = last.ok_or(AccessError::Range {
            address: iova,
            length,
        })?;
        let mut inside = self.enter().ok_or(AccessError::Busy)?;
        // Checked after the access has begun. The thread that removes memory first stores the new generation
        // and then waits for accesses in progress: either this load finds the store, or the thread waits for
        // this access.
        if generation < self.valid_from.load(Ordering::Acquire) {
            return Err(AccessError::Outdated);
        }
        if length == 0 {
            return Ok(inside);
        }
        let tlb = &mut *inside.tlb;
        let mut at = iova.0;
        loop {
            let found = self.translate(Iova(at), access)?;
            let until = found.contiguous_last.0;
            if at == iova.0 && last <= until {
                if tlb.matches(at, last, found.gpa.0, found.access) {
                    return Ok(inside);
                }
                tlb.clear();
                // The piece begins at the start of the page, because the next access may lie below this one. The
                // IOVA and the guest-physical address have the same offset in their pages.
                let (start, gpa) = (at & !PAGE_MASK, found.gpa.0 & !PAGE_MASK);
                tlb.add(start, until.min(LAST_REACHED), gpa, found.access);
                return Ok(inside);
            }
            if at == iova.0 {
                tlb.clear();
            }
            tlb.add(at, until.min(last), found.gpa.0, found.access);
            if until >= last {
                return Ok(inside);
            }
            at = until + 1;
        }
    }
}

/// The epoch word that this thread tries first: threads begin with different words, so that they seldom
/// contend for one.
fn preferred_word() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static WORD: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    WORD.with(|word| {
        if word.get() == usize::MAX {
            word.set(NEXT.fetch_add(1, Ordering::Relaxed) % EPOCH_WORDS);
        }
        word.get()
    })
}
