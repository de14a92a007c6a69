//! Accesses in progress, and their way through the page tables.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::AccessError;
use super::lane::{Lane, is_inside_of, note_begin, note_end, preferred_lane};
use super::registration::Shared;
use super::session::Session;
use super::tlb::LAST_REACHED;
use crate::address::{Access, Gpa, Iova};
use crate::locks::MutexGuard;
use crate::page_table::epoch::{enter, leave};
use crate::page_table::{EndpointWord, Translation, reader};
use crate::shadow::wire::epoch_word;

/// The bits of an address that select a byte of its 4 KiB page.
const PAGE_MASK: u64 = 0xfff;

/// An access in progress: a lane whose epoch word is odd. The daemon waits for its end before anything that it may use goes
/// away, also if the registration ends meanwhile: so it goes on with the page tables with which it has begun.
#[derive(Debug)]
pub(super) struct EpochGuard<'a> {
    /// Reserves the epoch word: no other thread of this process uses it while this guard lives.
    pub(super) lane: MutexGuard<'a, Lane>,
    index: usize,
    value: u64,
    /// The thread that began the access ends it: it counts its accesses.
    _thread: PhantomData<*const ()>,
}

impl EpochGuard<'_> {
    /// Translates `iova`. The result may be used until this access ends, also after the loss of the daemon.
    #[inline]
    pub(super) fn translate(&self, iova: Iova, access: Access) -> Result<Translation, AccessError> {
        let session = self.lane.session.as_ref();
        let session = session.ok_or(AccessError::Disconnected)?;
        session.translate(iova, access)
    }

    /// The session whose page tables this access uses.
    pub(super) fn session(&self) -> Option<Arc<Session>> {
        self.lane.session.clone()
    }

    /// Fills the TLB with the translation of `iova..=last`.
    #[inline]
    fn translate_range(
        &mut self,
        iova: Iova,
        last: u64,
        access: Access,
    ) -> Result<(), AccessError> {
        let Lane { tlb, session } = &mut *self.lane;
        let session = session.as_ref().ok_or(AccessError::Disconnected)?;
        let mut at = iova.0;
        loop {
            let found = session.translate(Iova(at), access)?;
            let until = found.contiguous_last.0;
            if at == iova.0 && last <= until {
                if tlb.matches(at, last, found.gpa.0, found.access) {
                    return Ok(());
                }
                tlb.clear();
                // The piece begins at the start of the page, because the next access may lie below this one. The
                // IOVA and the guest-physical address have the same offset in their pages.
                let (start, gpa) = (at & !PAGE_MASK, found.gpa.0 & !PAGE_MASK);
                tlb.add(start, until.min(LAST_REACHED), gpa, found.access);
                return Ok(());
            }
            if at == iova.0 {
                tlb.clear();
            }
            tlb.add(at, until.min(last), found.gpa.0, found.access);
            if until >= last {
                return Ok(());
            }
            at = until + 1;
        }
    }
}

impl Drop for EpochGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        // The session stays in its lane while the lane is locked.
        if let Some(session) = &self.lane.session
            && let Some(word) = epoch_word(session.epochs.as_slice(), self.index)
        {
            note_end(session);
            leave(word, self.value);
        }
    }
}

/// Why an access has not begun.
enum NotBegun {
    /// All lanes are in use.
    Busy,
    /// There is no session, or the one with this number has ended.
    Unregistered(u64),
}

impl Shared {
    /// Begins an access in a lane that no other access of this process uses. Waits for the next registration if there is
    /// none.
    ///
    /// # Errors
    /// [`AccessError::Busy`] if all lanes are in use, and those of [`Self::wait_for_session`].
    #[inline]
    pub(super) fn enter(&self) -> Result<EpochGuard<'_>, AccessError> {
        loop {
            match self.try_enter() {
                Ok(inside) => return Ok(inside),
                Err(NotBegun::Busy) => return Err(AccessError::Busy),
                Err(NotBegun::Unregistered(stale)) => self.wait_for_session(stale)?,
            }
        }
    }

    #[inline]
    fn try_enter(&self) -> Result<EpochGuard<'_>, NotBegun> {
        let hint = preferred_lane();
        let (before, from) = self.lanes.split_at(hint.min(self.lanes.len()));
        let from = from.iter().enumerate().map(|(n, lane)| (n + hint, lane));
        for (index, lane) in from.chain(before.iter().enumerate()) {
            let Some(lane) = lane.try_lock() else {
                continue;
            };
            let Some(session) = &lane.session else {
                return Err(NotBegun::Unregistered(0));
            };
            let Some(word) = epoch_word(session.epochs.as_slice(), index) else {
                continue;
            };
            let value = enter(word);
            if session.is_revoked(index) && !is_inside_of(session) {
                leave(word, value);
                return Err(NotBegun::Unregistered(session.serial));
            }
            note_begin(session);
            return Ok(EpochGuard {
                lane,
                index,
                value,
                _thread: PhantomData,
            });
        }
        Err(NotBegun::Busy)
    }

    /// Begins an access and fills its TLB with the translation of `length` bytes at `iova`. Reports a refused access to
    /// the guest.
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
        let mut inside = self.enter()?;
        // Checked after the access has begun. The thread that removes memory first stores the new generation
        // and then waits for accesses in progress: either this load finds the store, or the thread waits for
        // this access.
        if generation < self.views.valid_from.load(Ordering::Acquire) {
            return Err(AccessError::Outdated);
        }
        if length == 0 {
            return Ok(inside);
        }
        match inside.translate_range(iova, last, access) {
            Ok(()) => Ok(inside),
            Err(refused) => {
                let session = inside.session();
                // The access ends first, so an UNMAP that waits for it does not wait for the report.
                drop(inside);
                self.report(session.as_deref(), &refused);
                Err(refused)
            }
        }
    }

    /// Reports a refused access to the daemon, or counts it.
    #[cold]
    pub(super) fn report(&self, session: Option<&Session>, refused: &AccessError) {
        let AccessError::Fault {
            access, address, ..
        } = refused
        else {
            return;
        };
        if !session.is_some_and(|session| session.report(*access, *address)) {
            self.count_unreported();
        }
    }
}

impl Session {
    /// Translates `iova`. The caller must be inside an access, or the translation is stale at once.
    #[inline]
    fn translate(&self, iova: Iova, access: Access) -> Result<Translation, AccessError> {
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
}
