//! The address spaces of domains and of bypass mode: making, filling and destroying them.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::noted::{SpaceNotes, SpaceRole};
use crate::address::{Access, Iova, IovaRange, Mapping};
use crate::backends::reach::{Piece, PieceTarget, Reach, no_peer_access, not_mapped, refused};
use crate::backends::{BackendError, BackendErrorKind, Contents, MemorySlot};
use crate::ids::DomainId;
use crate::vfio::{AddressSpaces, DmaSource};
use crate::warn_limited;

/// The most address spaces that wait for their destruction. The kernel refuses to destroy one while a device is attached
/// that cannot be detached, for example because it does not wake up. Each may pin all of guest RAM, and the guest can make
/// new ones.
pub(super) const MAX_CONDEMNED: usize = 256;

/// The guest RAM that stays pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pinning {
    /// All of it, pinned once; mappings are copies.
    All,
    /// The mapped part; all of it while an endpoint is in bypass mode.
    Mapped,
}

/// The address spaces, and the memory that they can map.
pub(super) struct Spaces {
    pub(super) kernel: Arc<dyn AddressSpaces>,
    pinning: Pinning,
    /// Whether mappings are copies of parts of the address space of bypass mode. False while a device is attached to
    /// that address space: the attached device keeps its pages pinned, and a copy would lead to the pinned pages. If
    /// the VMM has discarded pages since, the guest has new pages, and the pinned ones are wrong.
    copies: bool,
    pub(super) reach: Reach,
    bypass: Option<Bypass>,
    /// Address spaces that could not be destroyed, with the memory that may be mapped in them.
    condemned: Vec<(u32, Vec<MemorySlot>)>,
    /// The records of the address spaces.
    pub(super) notes: RefCell<SpaceNotes>,
    /// The kernel has refused to map a file.
    lacks_files: Cell<bool>,
    /// Whole address spaces that an attach has failed to enter or to leave.
    suspects: Vec<u32>,
    /// An earlier process's address spaces are not taken over yet, or the iommufd has not come yet: nothing is made.
    pub(super) adopting: bool,
}

/// The address space of bypass mode.
struct Bypass {
    ioas: u32,
    /// The slots that it maps, at their guest-physical addresses.
    slots: Vec<MemorySlot>,
}

impl Spaces {
    /// No address spaces yet.
    pub(super) fn new(kernel: Arc<dyn AddressSpaces>, pinning: Pinning, reach: Reach) -> Self {
        Self {
            kernel,
            pinning,
            copies: pinning == Pinning::All,
            reach,
            bypass: None,
            condemned: Vec::new(),
            notes: RefCell::new(SpaceNotes::new()),
            lacks_files: Cell::new(false),
            suspects: Vec::new(),
            adopting: false,
        }
    }

    /// Makes an empty address space. `failure` says what is missing without it.
    pub(super) fn alloc(
        &mut self,
        role: SpaceRole,
        failure: impl fmt::Display,
    ) -> Result<u32, BackendError> {
        if self.condemned.len() >= MAX_CONDEMNED {
            return Err(BackendError {
                kind: BackendErrorKind::NoMem,
                message: format!(
                    "{failure}: the kernel has refused to destroy {MAX_CONDEMNED} others; see the kernel's log for the \
                     device that cannot be detached"
                ),
            });
        }
        let notes = self.notes.get_mut();
        notes.set_pending(true);
        let made = self.kernel.alloc();
        if let Ok(ioas) = &made {
            notes.add(*ioas, role);
        }
        notes.set_pending(false);
        made.map_err(|cause| refused(failure, &cause))
    }

    /// Records whether an address space has the mappings of its role.
    fn set_whole(&mut self, ioas: u32, is_whole: bool) {
        let notes = self.notes.get_mut();
        notes.change(ioas, |state| state.is_whole = is_whole);
    }

    /// Has a later process make an address space anew, until [`Self::trust_again`]. The kernel may not know who is in it.
    pub(super) fn suspect(&mut self, ioas: u32) {
        let state = self.notes.get_mut().state(ioas);
        if state.is_some_and(|state| state.is_whole) {
            self.set_whole(ioas, false);
            self.suspects.push(ioas);
        }
    }

    /// All devices have left the suspects, or were attached anew.
    pub(super) fn trust_again(&mut self) {
        for ioas in std::mem::take(&mut self.suspects) {
            let state = self.notes.get_mut().state(ioas);
            let is_used = state.is_some_and(|state| state.role != SpaceRole::Spare);
            self.set_whole(ioas, is_used);
        }
    }

    /// The number of address spaces that could not be destroyed yet.
    pub(super) fn condemned(&self) -> usize {
        self.condemned.len()
    }

    /// Makes the address space of a domain and fills it.
    pub(super) fn make_domain(
        &mut self,
        domain: DomainId,
        contents: &dyn Contents,
    ) -> Result<u32, BackendError> {
        let failure = format_args!("domain {domain} gets no address space");
        let ioas = self.alloc(SpaceRole::Domain(domain), failure)?;
        let filled = contents
            .mappings(domain)
            .try_for_each(|mapping| self.map_into(ioas, &mapping, &mut 0));
        if let Err(cause) = filled {
            self.destroy(ioas);
            return Err(cause);
        }
        self.set_whole(ioas, true);
        Ok(ioas)
    }

    /// The address space of bypass mode with all of guest RAM; made if there is none.
    pub(super) fn bypass_ioas(&mut self) -> Result<u32, BackendError> {
        if self.bypass.is_none() {
            let ioas = self.alloc(SpaceRole::Bypass, "bypass mode gets no address space")?;
            self.bypass = Some(Bypass {
                ioas,
                slots: Vec::new(),
            });
        }
        self.fill_bypass()
    }

    /// Maps the slots that the address space of bypass mode lacks. On error, it still lacks one or more of them.
    fn fill_bypass(&mut self) -> Result<u32, BackendError> {
        let mut bypass = self.bypass.take().ok_or_else(|| BackendError {
            kind: BackendErrorKind::DevErr,
            message: "bypass mode has no address space".into(),
        })?;
        let mut done = Ok(bypass.ioas);
        for slot in self.reach.slots() {
            if bypass.slots.contains(slot) {
                continue;
            }
            match self.map_slot(bypass.ioas, slot) {
                Ok(()) => bypass.slots.push(slot.clone()),
                // Continue: the other slots are of use without this one.
                Err(cause) => done = Err(cause),
            }
        }
        self.set_whole(bypass.ioas, done.is_ok());
        self.bypass = Some(bypass);
        done
    }

    /// Maps a slot at its guest-physical addresses.
    fn map_slot(&self, ioas: u32, slot: &MemorySlot) -> Result<(), BackendError> {
        let range = slot.range.identity();
        self.map_ram(ioas, range, Access::READ_WRITE, slot, 0)
            .map_err(|cause| {
                refused(
                    format_args!("guest RAM at {} stays unmapped", slot.range),
                    &cause,
                )
            })
    }

    /// Maps a part of RAM from its file, or from this process's memory if the kernel cannot map the file.
    #[inline]
    fn map_ram(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        slot: &MemorySlot,
        offset: u64,
    ) -> io::Result<()> {
        let here = DmaSource::Host(&slot.memory, offset);
        if !slot.is_shared_memory {
            // Not by file: the kernel would accept the mapping, and find out only when a device is attached that it
            // cannot pin the file's pages.
            return self.map_by_address(ioas, range, access, here);
        }
        let at = slot.offset.saturating_add(offset);
        let by_file = DmaSource::File(slot.file.as_fd(), at);
        match self.kernel.map(ioas, range, access, by_file) {
            // Kernels before 6.13 lack IOMMU_IOAS_MAP_FILE.
            Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.lacks_files.set(true);
                self.map_by_address(ioas, range, access, here)
            }
            done => done,
        }
    }

    #[cold]
    fn map_by_address(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        here: DmaSource<'_>,
    ) -> io::Result<()> {
        self.note_by_address(ioas);
        self.kernel.map(ioas, range, access, here)
    }

    #[cold]
    fn note_by_address(&self, ioas: u32) {
        let mut notes = self.notes.borrow_mut();
        notes.change(ioas, |state| state.by_address = true);
    }

    /// Maps a mapping into an address space. Adds the number of bytes that it has mapped to `done`, also on error.
    #[inline]
    pub(super) fn map_into(
        &self,
        ioas: u32,
        mapping: &Mapping,
        done: &mut u64,
    ) -> Result<(), BackendError> {
        match self.reach.in_one_slot(mapping) {
            Some((slot, offset)) if mapping.access != Access::NONE => {
                self.map_part(ioas, mapping, slot, offset)?;
                *done += mapping.range.len_bytes().unwrap_or(0);
                Ok(())
            }
            Some(_) | None => self.map_piecewise(ioas, mapping, done),
        }
    }

    /// As [`Self::map_into`], for a mapping without rights or one that does not lead into a single slot.
    #[cold]
    fn map_piecewise(
        &self,
        ioas: u32,
        mapping: &Mapping,
        done: &mut u64,
    ) -> Result<(), BackendError> {
        self.reach.for_each_piece(mapping, |piece| {
            if mapping.access == Access::NONE {
                // Nothing may use such a mapping, and the kernel refuses a mapping without rights.
                return Ok(());
            }
            self.map_piece(ioas, &piece)?;
            *done += piece.part.range.len_bytes().unwrap_or(0);
            Ok(())
        })
    }

    /// Maps a part that leads into one slot.
    #[inline]
    fn map_part(
        &self,
        ioas: u32,
        part: &Mapping,
        slot: &MemorySlot,
        offset: u64,
    ) -> Result<(), BackendError> {
        let copied = self.bypass.as_ref().filter(|_| self.copies);
        let done = match copied.filter(|b| b.slots.contains(slot)) {
            Some(bypass) => {
                if !slot.is_shared_memory || self.lacks_files.get() {
                    // The copy leads to the same pages as the mapping in bypass mode, which is one by address.
                    self.note_by_address(ioas);
                }
                let from = Iova(part.gpa.0);
                self.kernel
                    .copy(ioas, part.range, part.access, bypass.ioas, from)
            }
            None => self.map_ram(ioas, part.range, part.access, slot, offset),
        };
        done.map_err(|cause| not_mapped(part, &cause))
    }

    fn map_piece(&self, ioas: u32, piece: &Piece<'_>) -> Result<(), BackendError> {
        let Piece {
            part,
            target,
            offset,
        } = piece;
        match target {
            PieceTarget::Ram(slot) => self.map_part(ioas, part, slot, *offset),
            PieceTarget::Bar(device, bar) => {
                let refuse = |cause| no_peer_access(part, &cause);
                let len = part.range.len_bytes().unwrap_or(u64::MAX);
                let buffer = device.export(*bar, *offset, len).map_err(refuse)?;
                let source = DmaSource::File(buffer.as_fd(), 0);
                self.kernel
                    .map(ioas, part.range, part.access, source)
                    .map_err(refuse)
            }
        }
    }

    /// The address space of bypass mode, if there is one.
    pub(super) fn bypass(&self) -> Option<u32> {
        self.bypass.as_ref().map(|bypass| bypass.ioas)
    }

    pub(super) fn destroy(&mut self, ioas: u32) {
        self.destroy_with(ioas, Vec::new());
    }

    /// Destroys an address space. If that fails, keeps `slots` and guest RAM mapped into this process: they may still
    /// be mapped in the address space.
    pub(super) fn destroy_with(&mut self, ioas: u32, slots: Vec<MemorySlot>) {
        if let Err(cause) = self.try_destroy(ioas) {
            warn_limited!("address space {ioas} cannot be destroyed yet: {cause}");
            let all = self.reach.slots().iter().chain(&slots).cloned().collect();
            self.condemned.push((ioas, all));
        }
    }

    /// Destroys an address space, and removes its record.
    fn try_destroy(&mut self, ioas: u32) -> io::Result<()> {
        let notes = self.notes.get_mut();
        let state = notes.state(ioas);
        if state.is_some() {
            notes.change(ioas, |state| state.role = SpaceRole::Spare);
            // It is empty by the time that it has no record. If this fails, destroying it has the same effect.
            let _ = self.kernel.unmap(ioas, IovaRange::ALL);
        }
        notes.set_pending(true);
        notes.remove(ioas);
        let destroyed = self.kernel.destroy(ioas);
        if destroyed.is_err() && state.is_some() {
            notes.add(ioas, SpaceRole::Spare);
        }
        notes.set_pending(false);
        destroyed
    }

    /// Has an address space destroyed by the next [`Self::sweep`] that finds no device in it.
    pub(super) fn condemn(&mut self, ioas: u32, slots: Vec<MemorySlot>) {
        let notes = self.notes.get_mut();
        notes.change(ioas, |state| state.is_whole = false);
        self.condemned.push((ioas, slots));
    }

    /// Tries again to destroy the address spaces that could not be destroyed.
    pub(super) fn sweep(&mut self) {
        for (ioas, slots) in std::mem::take(&mut self.condemned) {
            if self.try_destroy(ioas).is_err() {
                self.condemned.push((ioas, slots));
            }
        }
    }

    /// Uses the address space of bypass mode that an earlier process has made and filled.
    pub(super) fn adopt_bypass(&mut self, ioas: u32) {
        let slots = self.reach.slots().to_vec();
        self.bypass = Some(Bypass { ioas, slots });
    }

    /// Destroys what can be destroyed, and forgets the rest, which ends with the iommufd.
    pub(super) fn forget_all(&mut self) {
        if let Some(bypass) = self.bypass.take() {
            self.destroy_with(bypass.ioas, bypass.slots);
        }
        self.sweep();
        self.condemned.clear();
        self.suspects.clear();
        self.lacks_files.set(false);
        self.copies = self.pinning == Pinning::All;
        let kernel = self.kernel.clone();
        self.notes.get_mut().forget_all(&*kernel);
    }

    /// Makes the mappings of domains without the address space of bypass mode, until [`Self::moved`].
    pub(super) fn copy_nothing(&mut self) {
        self.copies = false;
    }

    /// Makes the address space of bypass mode if it must always be there.
    pub(super) fn make_bypass_if_pinned(&mut self) {
        if self.pinning == Pinning::All
            && !self.reach.slots().is_empty()
            && let Err(cause) = self.bypass_ioas()
        {
            warn_limited!("guest RAM cannot be pinned for bypass mode: {cause}");
        }
    }

    /// Updates the address spaces after devices have moved. `is_bypass_used` says whether a device is in the address
    /// space of bypass mode now. An unused address space of bypass mode is destroyed if it pins memory.
    pub(super) fn moved(&mut self, is_bypass_used: bool) {
        self.copies = self.pinning == Pinning::All && !is_bypass_used;
        if self.pinning == Pinning::Mapped
            && !is_bypass_used
            && let Some(bypass) = self.bypass.take()
        {
            self.destroy_with(bypass.ioas, bypass.slots);
        }
    }

    /// Adds guest RAM.
    pub(super) fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        if self.adopting {
            // Taken over with the address spaces.
            self.reach.add(slot);
            return Ok(());
        }
        self.sweep();
        self.reach.add(slot);
        if self.pinning == Pinning::All || self.bypass.is_some() {
            self.bypass_ioas()?;
        }
        Ok(())
    }

    /// Removes guest RAM.
    pub(super) fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.reach.remove(slot);
        let Some(bypass) = &mut self.bypass else {
            return Ok(());
        };
        let Some(at) = bypass.slots.iter().position(|s| s == slot) else {
            return Ok(());
        };
        match self.kernel.unmap(bypass.ioas, slot.range.identity()) {
            Ok(_) => {
                bypass.slots.swap_remove(at);
                Ok(())
            }
            Err(cause) => {
                // The core quarantines the endpoints in this address space. The next endpoint in bypass mode gets a new
                // one.
                if let Some(Bypass { ioas, slots }) = self.bypass.take() {
                    self.condemn(ioas, slots);
                }
                let failure = format_args!("guest RAM at {} stays mapped", slot.range);
                Err(refused(failure, &cause))
            }
        }
    }

    /// Destroys an empty address space: now, or once no device is attached to it any more. Returns the kernel's answer
    /// to the first attempt.
    pub(super) fn destroy_or_condemn(&mut self, ioas: u32) -> io::Result<()> {
        let destroyed = self.try_destroy(ioas);
        if destroyed.is_err() {
            self.condemned.push((ioas, Vec::new()));
        }
        destroyed
    }
}
