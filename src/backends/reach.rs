//! The memory behind guest-physical addresses: guest RAM and BARs of passthrough devices.

use std::io;
use std::sync::Arc;

use super::{BackendError, BackendErrorKind, MemorySlot};
use crate::address::{Gpa, IovaRange, Mapping};
use crate::vfio::{Bar, DeviceMemory};

/// A part of a mapping that leads into one memory slot or one BAR.
pub(super) struct Piece<'a> {
    /// The part of the mapping.
    pub part: Mapping,
    /// The slot or BAR.
    pub target: PieceTarget<'a>,
    /// The part's first byte in the slot or BAR.
    pub offset: u64,
}

/// The memory that a piece leads to.
pub(super) enum PieceTarget<'a> {
    Ram(&'a MemorySlot),
    Bar(&'a Arc<dyn DeviceMemory>, u32),
}

/// A BAR and its device.
type DeviceBar<'a> = (&'a Arc<dyn DeviceMemory>, Bar);

/// All memory that mappings can lead to.
#[derive(Default)]
pub(super) struct Reach {
    /// In the order of addresses, disjoint.
    slots: Vec<MemorySlot>,
    devices: Vec<Arc<dyn DeviceMemory>>,
}

impl Reach {
    /// The memory of `devices`, and no guest RAM yet.
    pub(super) fn new(devices: Vec<Arc<dyn DeviceMemory>>) -> Self {
        Self {
            slots: Vec::new(),
            devices,
        }
    }

    /// The slots of guest RAM, in ascending order.
    pub(super) fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    pub(super) fn add(&mut self, slot: &MemorySlot) {
        let at = self.slots.partition_point(|s| s.range < slot.range);
        self.slots.insert(at, slot.clone());
    }

    pub(super) fn remove(&mut self, slot: &MemorySlot) {
        self.slots.retain(|s| s != slot);
    }

    /// Calls `act` for every piece of a mapping, in ascending order.
    ///
    /// # Errors
    /// [`BackendErrorKind::Fault`] if a part of the mapping leads to no memory; then `act` is not called at all. Else the
    /// first failure of `act`.
    pub(super) fn for_each_piece(
        &self,
        mapping: &Mapping,
        mut act: impl FnMut(Piece<'_>) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        if let Some((slot, offset)) = self.in_one_slot(mapping) {
            return act(Piece {
                part: *mapping,
                target: PieceTarget::Ram(slot),
                offset,
            });
        }
        let bars = self.bars();
        let mut pieces = Vec::new();
        let mut at = Some(mapping.gpa);
        while let Some(gpa) = at {
            let piece = self
                .piece_at(&bars, mapping, gpa)
                .ok_or_else(|| BackendError {
                    kind: BackendErrorKind::Fault,
                    message: format!(
                        "{mapping} leads to {gpa}, where there is neither guest RAM nor memory of \
                         a passthrough device"
                    ),
                })?;
            at = gpa
                .checked_add(piece.part.range.span())
                .and_then(|last| last.checked_add(1))
                .filter(|next| mapping.target().is_some_and(|t| t.contains(*next)));
            pieces.push(piece);
        }
        pieces.into_iter().try_for_each(act)
    }

    /// The slot that contains the whole target of a mapping, and the target's first byte in the slot. Nearly every
    /// mapping has such a slot.
    #[inline]
    pub(super) fn in_one_slot(&self, mapping: &Mapping) -> Option<(&MemorySlot, u64)> {
        let slot = self.slot_at(mapping.gpa)?;
        let offset = mapping.gpa.0 - slot.range.first().0;
        let room = slot.range.span() - offset;
        (mapping.range.span() <= room).then_some((slot, offset))
    }

    #[inline]
    fn slot_at(&self, gpa: Gpa) -> Option<&MemorySlot> {
        let at = self.slots.partition_point(|s| s.range.last() < gpa);
        self.slots.get(at).filter(|s| s.range.contains(gpa))
    }

    /// The BARs of all devices. A device that cannot report its BARs has not been started, and has none yet.
    fn bars(&self) -> Vec<DeviceBar<'_>> {
        let mut found = Vec::new();
        for device in &self.devices {
            let bars = device.bars().unwrap_or_default();
            found.extend(bars.into_iter().map(|bar| (device, bar)));
        }
        found
    }

    fn piece_at<'a>(
        &'a self,
        bars: &[DeviceBar<'a>],
        mapping: &Mapping,
        gpa: Gpa,
    ) -> Option<Piece<'a>> {
        let (target, range) = match self.slot_at(gpa) {
            Some(slot) => (PieceTarget::Ram(slot), slot.range),
            None => {
                let (device, bar) = bars.iter().find(|(_, bar)| bar.range.contains(gpa))?;
                (PieceTarget::Bar(device, bar.index), bar.range)
            }
        };
        // Only the guest can make BARs overlap; then the first one counts.
        let part = mapping.part_in(range)?.part_from(gpa)?;
        Some(Piece {
            part,
            target,
            offset: gpa.0 - range.first().0,
        })
    }
}

/// The error for a system call that failed with `cause`. `failure` is the effect, such as "guest RAM stays mapped".
pub(super) fn refused(failure: impl std::fmt::Display, cause: &io::Error) -> BackendError {
    let (kind, cure) = match cause.raw_os_error() {
        Some(libc::ENOMEM) => (
            BackendErrorKind::NoMem,
            "; the host is out of memory, or RLIMIT_MEMLOCK (LimitMEMLOCK= of a unit) is too low, which iommufd compares \
             with the locked memory of all processes of the user",
        ),
        Some(libc::ENOSPC) => (
            BackendErrorKind::NoMem,
            "; raise dma_entry_limit of the module vfio_iommu_type1",
        ),
        Some(libc::EFAULT) => (BackendErrorKind::Fault, ""),
        Some(libc::EINVAL | libc::EOVERFLOW | libc::EADDRINUSE) => (
            BackendErrorKind::Range,
            "; the host IOMMU does not take these addresses",
        ),
        _ => (BackendErrorKind::DevErr, ""),
    };
    BackendError {
        kind,
        message: format!("{failure}: {cause}{cure}"),
    }
}

/// The error for a part of a mapping that the host did not map.
#[cold]
pub(super) fn not_mapped(part: &Mapping, cause: &io::Error) -> BackendError {
    refused(format_args!("the host does not map {part}"), cause)
}

/// Checks the result of a system call that unmaps `range`: it must have unmapped at least `least` bytes.
#[inline]
pub(super) fn unmapped(
    range: IovaRange,
    least: u64,
    result: io::Result<u64>,
) -> Result<(), BackendError> {
    match result {
        Ok(bytes) if bytes >= least => Ok(()),
        result => Err(not_unmapped(range, least, result)),
    }
}

#[cold]
fn not_unmapped(range: IovaRange, least: u64, result: io::Result<u64>) -> BackendError {
    match result {
        Ok(bytes) => BackendError {
            kind: BackendErrorKind::DevErr,
            message: format!(
                "the host unmapped {bytes:#x} bytes of {range}, which had {least:#x} or more; the rest may \
                 stay mapped"
            ),
        },
        Err(cause) => refused(format_args!("{range} stays mapped"), &cause),
    }
}

/// The error for a mapping into another device's memory that the host did not make.
pub(super) fn no_peer_access(part: &Mapping, cause: &io::Error) -> BackendError {
    let failure = format_args!("{part} leads into the memory of a device");
    if let Some(libc::ENOMEM | libc::ENOSPC | libc::EEXIST) = cause.raw_os_error() {
        return refused(failure, cause);
    }
    BackendError {
        kind: BackendErrorKind::Fault,
        message: format!(
            "{failure}, which the host does not let other devices reach: {cause}; with iommufd this needs \
             Linux 7.0 and VFIO's DMA buffers"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Access, GpaRange, Iova};
    use crate::backends::testing::slot;
    use crate::vfio::fake::FakeMemory;

    fn mapping(first: u64, gpa: u64, len: u64) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova(first), len).expect("not empty"),
            gpa: Gpa(gpa),
            access: Access::READ,
            mmio: false,
        }
    }

    /// Of every piece: first address, length, whether it is a BAR, and offset.
    fn pieces(reach: &Reach, mapping: &Mapping) -> Result<Vec<(u64, u64, bool, u64)>, String> {
        let mut found = Vec::new();
        reach
            .for_each_piece(mapping, |piece| {
                found.push((
                    piece.part.range.first().0,
                    piece.part.range.span() + 1,
                    matches!(piece.target, PieceTarget::Bar(..)),
                    piece.offset,
                ));
                Ok(())
            })
            .map_err(|e| {
                assert_eq!(e.kind, BackendErrorKind::Fault);
                e.message
            })?;
        Ok(found)
    }

    #[test]
    fn mappings_are_cut_at_slots_and_bars() {
        let bar = GpaRange::from_len(Gpa(0x8000), 0x2000).expect("not empty");
        let mut reach = Reach::new(vec![Arc::new(FakeMemory::at(3, bar))]);
        for (gpa, len) in [(0x6000, 0x2000), (0x1000, 0x3000), (0x4000, 0x2000)] {
            reach.add(&slot(gpa, len, 0));
        }
        assert_eq!(
            pieces(&reach, &mapping(0x10_2000, 0x2000, 0x1000)),
            Ok(vec![(0x10_2000, 0x1000, false, 0x1000)])
        );
        assert_eq!(
            pieces(&reach, &mapping(0x10_2000, 0x2000, 0x7000)),
            Ok(vec![
                (0x10_2000, 0x2000, false, 0x1000),
                (0x10_4000, 0x2000, false, 0),
                (0x10_6000, 0x2000, false, 0),
                (0x10_8000, 0x1000, true, 0),
            ])
        );
        assert_eq!(
            pieces(&reach, &mapping(0, 0x9000, 0x1000)),
            Ok(vec![(0, 0x1000, true, 0x1000)])
        );
    }

    #[test]
    fn a_mapping_to_no_memory_is_refused_before_any_piece_is_made() {
        let mut reach = Reach::default();
        let low = slot(0x1000, 0x1000, 0);
        reach.add(&low);
        reach.add(&slot(0x3000, 0x1000, 0));
        for (gpa, len, hole) in [
            (0, 0x1000, "leads to 0x0,"),
            (0x1000, 0x2000, "leads to 0x2000,"),
            (0x3000, 0x2000, "leads to 0x4000,"),
        ] {
            let mut acted = false;
            let refused = reach.for_each_piece(&mapping(0, gpa, len), |_| {
                acted = true;
                Ok(())
            });
            let message = refused.expect_err("a hole").message;
            assert!(message.contains(hole), "{message}");
            assert!(!acted);
        }
        reach.remove(&low);
        assert!(pieces(&reach, &mapping(0, 0x1000, 0x1000)).is_err());
    }
}
