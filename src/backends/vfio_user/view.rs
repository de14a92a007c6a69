//! The memory that an emulated device reaches now, and its windows there.
//!
//! The view keeps no list of windows. It computes the windows of a domain from the domain's page table, and those of
//! bypass mode from the memory slots, so the number of mappings costs no memory here.

use std::sync::Arc;

use super::MemorySlot;
use super::dma_window::{DmaWindow, pieces, windows_of};
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};
use crate::page_table::TableReader;

/// The kind of access that the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Through the mappings of a domain.
    Translated,
    /// To all of guest RAM without the reserved regions.
    Bypass,
    /// None; there are no windows.
    Blocked,
    /// None, because of a failure; there are no windows.
    Quarantined,
}

/// The memory that the device reaches now.
#[derive(Clone, Debug)]
pub(super) struct DeviceView {
    pub(super) gate: Gate,
    /// The mappings; only with [`Gate::Translated`].
    table: Option<TableReader>,
    /// The guest RAM in reach, in ascending order and disjoint.
    slots: Vec<Arc<MemorySlot>>,
    /// The addresses that bypass mode does not reach.
    reserved: Arc<[IovaRange]>,
    /// The mappings of the latest MAPs, in ascending order and disjoint. The table may not have them, or not in whole.
    pending: Vec<Mapping>,
    /// Ranges of an UNMAP in progress. Their mappings may still be in the table, or a part of them, but count no more.
    leaving: Vec<IovaRange>,
    /// The number of windows, if they are counted.
    pub(super) count: usize,
}

impl DeviceView {
    /// A view without windows.
    pub(super) fn closed(gate: Gate, reserved: Arc<[IovaRange]>) -> Self {
        Self {
            gate,
            table: None,
            slots: Vec::new(),
            reserved,
            pending: Vec::new(),
            leaving: Vec::new(),
            count: 0,
        }
    }

    /// A view of the domain of `table`.
    pub(super) fn translated(
        table: TableReader,
        slots: Vec<Arc<MemorySlot>>,
        reserved: Arc<[IovaRange]>,
    ) -> Self {
        Self {
            table: Some(table),
            slots,
            ..Self::closed(Gate::Translated, reserved)
        }
    }

    /// A view of bypass mode.
    pub(super) fn bypass(slots: Vec<Arc<MemorySlot>>, reserved: Arc<[IovaRange]>) -> Self {
        Self {
            slots,
            ..Self::closed(Gate::Bypass, reserved)
        }
    }

    /// The view with its number of windows. Takes time proportional to the mappings.
    pub(super) fn counted(mut self) -> Self {
        self.count = self.windows_in(IovaRange::ALL).count();
        self
    }

    /// Whether the windows of this view are those that a server may have. Without access there are none, but a server that
    /// was cut off may have some.
    pub(super) fn knows_windows(&self) -> bool {
        match self.gate {
            Gate::Translated | Gate::Bypass => true,
            Gate::Blocked | Gate::Quarantined => false,
        }
    }

    /// The part of this view in one memory slot.
    pub(super) fn in_slot(&self, slot: &Arc<MemorySlot>) -> Self {
        let in_reach = self.slots.iter().filter(|s| ***s == **slot);
        Self {
            slots: in_reach.cloned().collect(),
            ..self.clone()
        }
    }

    /// Adds guest RAM. The caller adds its windows to [`Self::count`].
    pub(super) fn add_slot(&mut self, slot: &Arc<MemorySlot>) {
        let at = self.slots.partition_point(|s| s.range < slot.range);
        self.slots.insert(at, slot.clone());
    }

    /// Removes guest RAM. The caller subtracts its windows from [`Self::count`].
    pub(super) fn remove_slot(&mut self, slot: &MemorySlot) {
        self.slots.retain(|s| **s != *slot);
    }

    /// Adds a mapping before it is in the table. It overlaps no other one.
    pub(super) fn add(&mut self, mapping: &Mapping) {
        let at = self.pending_from(mapping.range.first());
        self.pending.insert(at, *mapping);
    }

    /// The latest mapping of exactly this range, unless a change has come since.
    pub(super) fn pending(&self, range: IovaRange) -> Option<Mapping> {
        let found = self.pending.get(self.pending_from(range.first()));
        found.filter(|mapping| mapping.range == range).copied()
    }

    /// Removes the latest mapping of exactly this range: the core will not commit it.
    pub(super) fn withdraw(&mut self, range: IovaRange) {
        if self.pending(range).is_some() {
            self.pending.remove(self.pending_from(range.first()));
        }
    }

    /// The core has committed the latest mappings.
    pub(super) fn settle(&mut self) {
        self.pending.clear();
    }

    /// The position of the first of the latest mappings that ends at `first` or later.
    fn pending_from(&self, first: Iova) -> usize {
        self.pending.partition_point(|m| m.range.last() < first)
    }

    /// Removes the mappings in `range` before they leave the table. Returns the table; `None` if no mapping is there.
    pub(super) fn leave(&mut self, range: IovaRange) -> Option<TableReader> {
        self.settle();
        let table = self.table.as_ref()?;
        table.mappings_in(range).next()?;
        self.leaving.push(range);
        Some(table.clone())
    }

    /// The mappings of every [`Self::leave`] have left the table. They had `windows` windows.
    pub(super) fn left(&mut self, windows: usize) {
        self.leaving.clear();
        self.discount(windows);
    }

    /// Subtracts windows that were removed from [`Self::count`].
    pub(super) fn discount(&mut self, windows: usize) {
        self.count = self.count.saturating_sub(windows);
    }

    /// The windows whose first address lies in `range`, in ascending order.
    pub(super) fn windows_in(
        &self,
        range: IovaRange,
    ) -> Box<dyn Iterator<Item = DmaWindow> + Send + '_> {
        let starts_there = move |window: &DmaWindow| range.contains(window.range.first());
        match (self.gate, &self.table) {
            (Gate::Translated, Some(table)) => {
                let stretches = self.stretches(range).into_iter();
                let mappings = stretches.flat_map(|stretch| {
                    let (in_table, pending) = match stretch {
                        Stretch::Table(range) => (Some(table.mappings_in(range)), None),
                        Stretch::Pending(mapping) => (None, Some(mapping)),
                    };
                    in_table.into_iter().flatten().chain(pending)
                });
                let windows = mappings.flat_map(|mapping| windows_of(mapping, &self.slots));
                Box::new(windows.filter(starts_there))
            }
            (Gate::Bypass, _) => {
                let windows = self.slots.iter().flat_map(|slot| self.identity(slot));
                let windows = windows.flat_map(pieces);
                Box::new(windows.filter(starts_there))
            }
            (Gate::Translated | Gate::Blocked | Gate::Quarantined, _) => {
                Box::new(std::iter::empty())
            }
        }
    }

    /// The parts of `range` where the table can be read, and the latest mappings, in ascending order. The core may be
    /// changing the rest of the table.
    fn stretches(&self, range: IovaRange) -> Vec<Stretch> {
        let is_leaving = |m: &Mapping| self.leaving.iter().any(|r| r.overlaps(m.range));
        let pending = self.pending.iter().filter(|mapping| !is_leaving(mapping));
        let leaving = self.leaving.iter().map(|range| (*range, None));
        let mut holes: Vec<_> = leaving
            .chain(pending.map(|mapping| (mapping.range, Some(*mapping))))
            .filter(|(hole, _)| hole.overlaps(range))
            .collect();
        holes.sort_unstable_by_key(|(hole, _)| hole.first());
        let mut stretches = Vec::with_capacity(2 * holes.len() + 1);
        let mut next = Some(range.first());
        for (hole, mapping) in holes {
            if let Some(first) = next
                && let Some(last) = hole.first().0.checked_sub(1)
            {
                stretches.extend(IovaRange::new(first, Iova(last)).map(Stretch::Table));
            }
            stretches.extend(mapping.map(Stretch::Pending));
            let after = hole.last().0.checked_add(1).map(Iova);
            // Ranges of an UNMAP may overlap.
            next = next.zip(after).map(|(next, after)| next.max(after));
        }
        let rest = next.and_then(|first| IovaRange::new(first, range.last()));
        stretches.extend(rest.map(Stretch::Table));
        stretches
    }

    /// The windows of `slot` in bypass mode: the slot without the reserved regions.
    fn identity<'a>(&'a self, slot: &'a Arc<MemorySlot>) -> impl Iterator<Item = DmaWindow> + 'a {
        let last = Iova(slot.range.last().0);
        let mut next = Some(Iova(slot.range.first().0));
        std::iter::from_fn(move || {
            loop {
                let first = next.filter(|n| *n <= last)?;
                let rest = IovaRange::new(first, last)?;
                let hit = self.reserved_in(rest);
                next = hit.and_then(|hit| hit.last().0.checked_add(1)).map(Iova);
                let free = match hit {
                    Some(hit) if hit.first() <= first => continue,
                    Some(hit) => IovaRange::new(first, Iova(hit.first().0 - 1))?,
                    None => rest,
                };
                return Some(DmaWindow {
                    range: free,
                    access: Access::READ_WRITE,
                    slot: slot.clone(),
                    offset: first.0 - slot.range.first().0,
                });
            }
        })
    }

    /// The first reserved region that overlaps `range`.
    fn reserved_in(&self, range: IovaRange) -> Option<IovaRange> {
        let hits = self.reserved.iter().filter(|r| r.overlaps(range));
        hits.min_by_key(|r| r.first()).copied()
    }

    /// Whether `address` is reserved in bypass mode.
    pub(super) fn is_reserved(&self, address: Iova) -> bool {
        self.reserved.iter().any(|r| r.contains(address))
    }

    /// The parts of the memory behind `range`, in ascending order, each with its offset in `range`.
    ///
    /// # Errors
    /// The first address for which no mapping allows `access`.
    pub(super) fn parts(
        &self,
        range: IovaRange,
        access: Access,
    ) -> Result<Vec<(usize, vm_memory::VolatileSlice<'_>)>, Iova> {
        let mut parts = Vec::new();
        let mut next = Some(range.first());
        while let Some(at) = next.filter(|at| range.contains(*at)) {
            let (gpa, contiguous) = self.target_of(at, access).ok_or(at)?;
            let from = self.slots.partition_point(|s| s.range.last() < gpa);
            let slot = self.slots.get(from).filter(|s| s.range.contains(gpa));
            let slot = slot.ok_or(at)?;
            let span = (contiguous.0 - at.0)
                .min(range.last().0 - at.0)
                .min(slot.range.last().0 - gpa.0);
            let small = |n: u64| usize::try_from(n).map_err(|_| at);
            let offset = small(gpa.0 - slot.range.first().0)?;
            let len = small(span)?.saturating_add(1);
            let memory = slot.memory.as_ref();
            let memory = vm_memory::VolatileMemory::get_slice(memory, offset, len);
            parts.push((small(at.0 - range.first().0)?, memory.map_err(|_| at)?));
            next =
                at.0.checked_add(span)
                    .and_then(|last| last.checked_add(1))
                    .map(Iova);
        }
        Ok(parts)
    }

    /// The guest-physical address behind `at`, and the last address up to which guest-physical addresses are contiguous
    /// and the rights are the same; `None` if `access` is not allowed.
    fn target_of(&self, at: Iova, access: Access) -> Option<(Gpa, Iova)> {
        match (self.gate, &self.table) {
            (Gate::Translated, Some(table)) => {
                if self.leaving.iter().any(|range| range.contains(at)) {
                    return None;
                }
                let pending = self.pending.get(self.pending_from(at));
                if let Some(mapping) = pending.filter(|m| m.range.contains(at)) {
                    let gpa = mapping.gpa.checked_add(at.0 - mapping.range.first().0)?;
                    let allowed = mapping.access.allows(access);
                    return allowed.then_some((gpa, mapping.range.last()));
                }
                let found = table
                    .translate(at)
                    .filter(|found| found.access.allows(access))?;
                Some((found.gpa, found.contiguous_last))
            }
            (Gate::Bypass, _) => {
                let rest = IovaRange::new(at, Iova(u64::MAX))?;
                let last = match self.reserved_in(rest) {
                    Some(region) if region.contains(at) => return None,
                    Some(region) => Iova(region.first().0 - 1),
                    None => Iova(u64::MAX),
                };
                Some((Gpa(at.0), last))
            }
            (Gate::Translated | Gate::Blocked | Gate::Quarantined, _) => None,
        }
    }
}

/// A part of the addresses of a domain.
enum Stretch {
    /// The table has the mappings.
    Table(IovaRange),
    /// One of the latest mappings.
    Pending(Mapping),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::testing::slot;
    use crate::page_table::{Arena, Levels, Table};

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
    }

    fn mapping(first: u64, len: u64, gpa: u64, access: Access) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova(first), len).expect("not empty"),
            gpa: Gpa(gpa),
            access,
            mmio: false,
        }
    }

    fn map(table: &mut Table, arena: &mut Arena, mapping: &Mapping) {
        let plan = table.plan_map(arena, mapping).expect("free");
        table.commit_map(arena, plan);
    }

    fn ranges(view: &DeviceView, within: IovaRange) -> Vec<(u64, u64)> {
        let windows = view.windows_in(within);
        windows
            .map(|w| (w.range.first().0, w.range.last().0))
            .collect()
    }

    #[test]
    fn mappings_have_one_window_for_each_slot() {
        let slots = [
            Arc::new(slot(0x1000, 0x1000, 0)),
            Arc::new(slot(0x2000, 0x1000, 0)),
            Arc::new(slot(0x4000, 0x1000, 0)),
        ];
        let cut = |m: Mapping| -> Vec<_> {
            windows_of(m, &slots)
                .map(|p| (p.range.first().0, p.range.last().0, p.offset))
                .collect()
        };
        assert_eq!(
            cut(mapping(0, 0x3000, 0x1800, Access::READ)),
            [(0, 0x7ff, 0x800), (0x800, 0x17ff, 0), (0x2800, 0x2fff, 0)]
        );
        assert_eq!(
            cut(mapping(0x9000, 0x3000, 0x2000, Access::READ)),
            [(0x9000, 0x9fff, 0), (0xb000, 0xbfff, 0)]
        );
        assert_eq!(cut(mapping(0, 0x1000, 0x9000, Access::READ)), []);
        assert_eq!(cut(mapping(0, 0x1000, 0x1000, Access::NONE)), []);
    }

    #[test]
    fn windows_follow_the_table_and_the_steps_of_a_request() {
        let mut arena = Arena::new(1 << 20).expect("an arena");
        let mut table = Table::new(&mut arena, Levels::Four).expect("a frame");
        let slots = vec![
            Arc::new(slot(0x1000, 0x2000, 0)),
            Arc::new(slot(0x3000, 0x2000, 0)),
        ];
        // The second one spans both slots.
        for m in [
            mapping(0x1_0000, 0x1000, 0x1000, Access::READ),
            mapping(0x2_0000, 0x4000, 0x1000, Access::READ_WRITE),
            mapping(0x3_0000, 0x1000, 0x9000, Access::READ),
            mapping(0x4_0000, 0x1000, 0x1000, Access::NONE),
            mapping(0x5_0000, 0x1000, 0x4000, Access::WRITE),
        ] {
            map(&mut table, &mut arena, &m);
        }
        let reserved: Arc<[IovaRange]> = Arc::new([]);
        let mut view =
            DeviceView::translated(table.reader(&arena), slots.clone(), reserved).counted();
        let all = [
            (0x1_0000, 0x1_0fff),
            (0x2_0000, 0x2_1fff),
            (0x2_2000, 0x2_3fff),
            (0x5_0000, 0x5_0fff),
        ];
        assert_eq!((ranges(&view, IovaRange::ALL), view.count), (all.into(), 4));
        // From the middle of a mapping on: only windows that begin there.
        assert_eq!(ranges(&view, range(0x2_0001, u64::MAX)), all[2..]);
        assert_eq!(ranges(&view.in_slot(&slots[1]), IovaRange::ALL), all[2..]);

        // MAP: in the view before it is in the table, and once only when it is there, too.
        let added = mapping(0x4_8000, 0x2000, 0x2000, Access::READ);
        view.add(&added);
        let more = [
            &all[..3],
            &[(0x4_8000, 0x4_8fff), (0x4_9000, 0x4_9fff)],
            &all[3..],
        ]
        .concat();
        assert_eq!(ranges(&view, IovaRange::ALL), more);
        assert!(view.parts(added.range, Access::READ).is_ok());
        map(&mut table, &mut arena, &added);
        assert_eq!(ranges(&view, IovaRange::ALL), more);
        view.settle();
        assert_eq!(ranges(&view, IovaRange::ALL), more);

        // UNMAP: out of the view before it is out of the table. Its ranges may overlap, and cover holes.
        assert!(view.leave(range(0x1_1000, 0x1_ffff)).is_none());
        for gone in [range(0x2_0000, 0x4_ffff), range(0x1_0000, 0x2_3fff)] {
            assert!(view.leave(gone).is_some());
            let failed = view.parts(range(0x2_0000, 0x2_0000), Access::READ).err();
            assert_eq!(failed, Some(Iova(0x2_0000)));
            assert!(!ranges(&view, IovaRange::ALL).contains(&all[1]));
        }
        assert_eq!(ranges(&view, IovaRange::ALL), all[3..]);
        let plan = table
            .plan_unmap(&arena, range(0x1_0000, 0x4_ffff))
            .expect("whole mappings");
        let _ = table.commit_unmap(&mut arena, plan);
        view.left(3);
        assert_eq!(
            (ranges(&view, IovaRange::ALL), view.count),
            (all[3..].into(), 1)
        );
    }

    #[test]
    fn bypass_has_all_but_reserved_regions() {
        let slot = Arc::new(slot(0x1000, 0x8000, 0));
        let reserved = [
            range(0x7000, 0x7fff),
            range(0, 0x1fff),
            range(0x4000, 0x4fff),
            range(0x8000, 0x9_0000),
        ];
        let view = DeviceView::bypass(vec![slot], reserved.into()).counted();
        let windows = view.windows_in(IovaRange::ALL);
        let windows: Vec<_> = windows.map(|p| (p.range, p.offset)).collect();
        assert_eq!(
            windows,
            [
                (range(0x2000, 0x3fff), 0x1000),
                (range(0x5000, 0x6fff), 0x4000)
            ]
        );
        assert_eq!(view.count, 2);
    }
}
