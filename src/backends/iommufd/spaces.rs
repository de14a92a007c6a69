//! The address spaces of domains and of bypass mode: making, filling and destroying them.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

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
        }
    }

    /// Makes an empty address space. `failure` says what is missing without it.
    pub(super) fn alloc(&self, failure: impl fmt::Display) -> Result<u32, BackendError> {
        if self.condemned.len() >= MAX_CONDEMNED {
            return Err(BackendError {
                kind: BackendErrorKind::NoMem,
                message: format!(
                    "{failure}: the kernel has refused to destroy {MAX_CONDEMNED} others; see the kernel's log for the \
                     device that cannot be detached"
                ),
            });
        }
        self.kernel
            .alloc()
            .map_err(|cause| refused(failure, &cause))
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
        let ioas = self.alloc(format_args!("domain {domain} gets no address space"))?;
        let filled = contents
            .mappings(domain)
            .try_for_each(|mapping| self.map_into(ioas, &mapping, &mut 0));
        if let Err(cause) = filled {
            self.destroy(ioas);
            return Err(cause);
        }
        Ok(ioas)
    }

    /// The address space of bypass mode with all of guest RAM; made if there is none.
    pub(super) fn bypass_ioas(&mut self) -> Result<u32, BackendError> {
        if self.bypass.is_none() {
            let ioas = self.alloc("bypass mode gets no address space")?;
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
            return self.kernel.map(ioas, range, access, here);
        }
        let at = slot.offset.saturating_add(offset);
        let by_file = DmaSource::File(slot.file.as_fd(), at);
        match self.kernel.map(ioas, range, access, by_file) {
            // Kernels before 6.13 lack IOMMU_IOAS_MAP_FILE.
            Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.kernel.map(ioas, range, access, here)
            }
            done => done,
        }
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
        if let Err(cause) = self.kernel.destroy(ioas) {
            warn_limited!("address space {ioas} cannot be destroyed yet: {cause}");
            let all = self.reach.slots().iter().chain(&slots).cloned().collect();
            self.condemned.push((ioas, all));
        }
    }

    /// Tries again to destroy the address spaces that could not be destroyed.
    pub(super) fn sweep(&mut self) {
        let kernel = &self.kernel;
        self.condemned
            .retain(|(ioas, _)| kernel.destroy(*ioas).is_err());
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
                    self.condemned.push((ioas, slots));
                }
                let failure = format_args!("guest RAM at {} stays mapped", slot.range);
                Err(refused(failure, &cause))
            }
        }
    }

    /// Destroys an empty address space: now, or once no device is attached to it any more. Returns the kernel's answer
    /// to the first attempt.
    pub(super) fn destroy_or_condemn(&mut self, ioas: u32) -> io::Result<()> {
        let destroyed = self.kernel.destroy(ioas);
        if destroyed.is_err() {
            self.condemned.push((ioas, Vec::new()));
        }
        destroyed
    }
}
