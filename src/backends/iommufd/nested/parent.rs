//! The address spaces: that of the second stage has guest RAM at its guest-physical addresses, and what the IOMMU itself
//! reads. That of bypass mode has guest RAM alone, so that no device reads the tables there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::address::{Access, Gpa, GpaRange, Mapping};
use crate::backends::reach::{PieceTarget, Reach, no_peer_access, refused, unmapped};
use crate::backends::{BackendError, BackendErrorKind, MemorySlot};
use crate::vfio::{AddressSpaces, DmaSource};
use crate::warn_limited;

/// The memory of the page tables.
#[derive(Debug)]
pub struct WalkedTables {
    /// The memfd.
    pub file: OwnedFd,
    /// The guest-physical address that its entries name each other by: the base in the header of the arena.
    pub base: Gpa,
    /// Its size: whole pages.
    pub bytes: u64,
}

/// The address spaces, without the second stages that are made of the first one.
pub(super) struct ParentSpace {
    kernel: Arc<dyn AddressSpaces>,
    /// The address space of the second stage.
    pub(super) ioas: u32,
    /// The address space of bypass mode.
    pub(super) bypass: u32,
    reach: Reach,
    /// The tables and the context descriptors. No guest RAM may be there, and no mapping may lead there.
    own: GpaRange,
}

impl ParentSpace {
    /// Maps the tables, and behind them the memory of the context descriptors, for reading only: whatever a table says, no
    /// device can change them.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(
        kernel: Arc<dyn AddressSpaces>,
        reach: Reach,
        tables: &WalkedTables,
        contexts: (BorrowedFd<'_>, u64),
    ) -> Result<Self, BackendError> {
        let no_range = || BackendError {
            kind: BackendErrorKind::Range,
            message: format!(
                "the page tables at {} do not fit into the addresses",
                tables.base
            ),
        };
        let behind = Gpa(tables
            .base
            .0
            .checked_add(tables.bytes)
            .ok_or_else(no_range)?);
        let own = tables.bytes.checked_add(contexts.1);
        let own = own.and_then(|bytes| GpaRange::from_len(tables.base, bytes));
        let own = own.ok_or_else(no_range)?;
        let alloc = || {
            let failure = "guest RAM gets no address space";
            kernel.alloc().map_err(|cause| refused(failure, &cause))
        };
        let ioas = alloc()?;
        let bypass = alloc().inspect_err(|_| destroy(&*kernel, ioas))?;
        let space = Self {
            kernel,
            ioas,
            bypass,
            reach,
            own,
        };
        for (at, bytes, file) in [
            (tables.base, tables.bytes, tables.file.as_fd()),
            (behind, contexts.1, contexts.0),
        ] {
            let range = GpaRange::from_len(at, bytes).ok_or_else(no_range)?;
            let source = DmaSource::File(file, 0);
            space
                .kernel
                .map(ioas, range.identity(), Access::READ, source)
                .map_err(|cause| {
                    refused(
                        format_args!("the IOMMU cannot read the page tables at {range}"),
                        &cause,
                    )
                })?;
        }
        Ok(space)
    }

    /// Checks that all of a mapping leads to guest RAM.
    ///
    /// # Errors
    /// A part leads to what the IOMMU itself reads, to another device, or to no memory.
    #[inline]
    pub(super) fn check(&self, mapping: &Mapping) -> Result<(), BackendError> {
        if self.reach.in_one_slot(mapping).is_some() {
            return Ok(());
        }
        self.check_pieces(mapping)
    }

    #[cold]
    fn check_pieces(&self, mapping: &Mapping) -> Result<(), BackendError> {
        self.reach
            .for_each_piece(mapping, |piece| match piece.target {
                PieceTarget::Ram(_) => Ok(()),
                PieceTarget::Bar(..) => {
                    let unsupported = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
                    Err(no_peer_access(&piece.part, &unsupported))
                }
            })
    }

    /// Maps a slot of guest RAM.
    ///
    /// # Errors
    /// It lies where the tables are, or the kernel refuses. Nothing of it is mapped.
    pub(super) fn add(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        if slot.range.intersection(self.own).is_some() {
            return Err(BackendError {
                kind: BackendErrorKind::Range,
                message: format!(
                    "guest RAM at {} stays unmapped: the page tables are at {}",
                    slot.range, self.own
                ),
            });
        }
        let source = if slot.is_shared_memory {
            DmaSource::File(slot.file.as_fd(), slot.offset)
        } else {
            DmaSource::Host(&slot.memory, 0)
        };
        let range = slot.range.identity();
        let failed = |cause| {
            let failure = format_args!("guest RAM at {} stays unmapped", slot.range);
            refused(failure, &cause)
        };
        self.kernel
            .map(self.ioas, range, Access::READ_WRITE, source)
            .map_err(failed)?;
        // The copy shares the pinned pages.
        let copied = self.kernel.copy(
            self.bypass,
            range,
            Access::READ_WRITE,
            self.ioas,
            range.first(),
        );
        if let Err(cause) = copied {
            // If this fails, too, the slot is reachable for devices in domains only, which have no mapping that leads there.
            let _ = self.kernel.unmap(self.ioas, range);
            return Err(failed(cause));
        }
        self.reach.add(slot);
        Ok(())
    }

    /// Unmaps a slot everywhere. The kernel invalidates the translations of both stages that lead there.
    ///
    /// # Errors
    /// The kernel's. A part may stay reachable.
    pub(super) fn remove(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        let is_mapped = self.reach.slots().contains(slot);
        if !is_mapped {
            return Ok(());
        }
        let range = slot.range.identity();
        let least = range.len_bytes().unwrap_or(u64::MAX);
        let outcomes = [self.bypass, self.ioas]
            .map(|space| unmapped(range, least, self.kernel.unmap(space, range)));
        outcomes.into_iter().collect::<Result<(), _>>()?;
        self.reach.remove(slot);
        Ok(())
    }
}

impl Drop for ParentSpace {
    fn drop(&mut self) {
        destroy(&*self.kernel, self.bypass);
        destroy(&*self.kernel, self.ioas);
    }
}

fn destroy(kernel: &dyn AddressSpaces, ioas: u32) {
    if let Err(cause) = kernel.destroy(ioas) {
        warn_limited!("the address space {ioas} cannot be destroyed: {cause}");
    }
}
