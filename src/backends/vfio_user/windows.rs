//! What an emulated device sees of memory: windows into guest RAM, and the accesses through them.

use std::collections::BTreeMap;
use std::sync::Arc;

use vm_memory::VolatileMemory;

use super::MemorySlot;
use crate::address::{Access, GpaRange, Iova, IovaRange, Mapping};
use crate::faults::{Fault, FaultReason, FaultSink};
use crate::ids::EndpointId;
use crate::locks::{Rank, RwLock, RwLockWriteGuard};
use crate::metrics::Counter;
use crate::vfio_user::{AccessDenied, DmaTarget, Window};

/// How far apart a device's process and guest RAM are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// The process gets no descriptor of guest RAM; each access is a message, which is checked.
    #[default]
    Messages,
    /// The process gets the descriptor of guest RAM with each window: it maps what it is told to,
    /// but nothing keeps a malicious one from mapping all the rest.
    Mappings,
}

/// What the windows stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// The mappings of a domain.
    Translated,
    /// All of guest RAM but for reserved regions.
    Bypass,
    /// Nothing; there are no windows.
    Blocked,
    /// Nothing, for something failed; there are no windows.
    Quarantined,
}

/// A window: a mapping, or as much of one as leads into one memory slot.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) range: IovaRange,
    access: Access,
    slot: Arc<MemorySlot>,
    /// Where in the slot it begins, in bytes.
    offset: u64,
}

/// The windows by first address.
pub(super) type Pieces = BTreeMap<u64, Piece>;

/// What the device sees right now.
#[derive(Debug)]
pub(super) struct View {
    pub(super) gate: Gate,
    pub(super) pieces: Pieces,
}

/// What one device sees. Whoever changes it waits for accesses that are under way.
pub(super) struct Space {
    endpoint: EndpointId,
    isolation: Isolation,
    /// What bypass mode does not reach.
    reserved: Vec<IovaRange>,
    sink: Arc<dyn FaultSink>,
    /// Accesses that were refused, whether the guest is told or not.
    refused: Counter,
    view: RwLock<View>,
}

impl Space {
    /// A space without windows.
    pub(super) fn new(
        endpoint: EndpointId,
        isolation: Isolation,
        reserved: Vec<IovaRange>,
        sink: Arc<dyn FaultSink>,
    ) -> Self {
        Self {
            endpoint,
            isolation,
            reserved,
            sink,
            refused: Counter::default(),
            view: RwLock::new(
                Rank::Windows,
                View {
                    gate: Gate::Blocked,
                    pieces: Pieces::new(),
                },
            ),
        }
    }

    /// Changes what the device sees. When this returns, no access is under way, and none begins
    /// before the guard is dropped.
    pub(super) fn change(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write()
    }

    /// How many windows there are, and how many accesses were refused so far.
    pub(super) fn figures(&self) -> (usize, u64) {
        (self.view.read().pieces.len(), self.refused.get())
    }

    /// Tells of a device that is stopped though it did nothing wrong with memory.
    pub(super) fn report_stop(&self, address: Iova) {
        self.sink.report(Fault {
            endpoint: self.endpoint,
            reason: FaultReason::Unknown,
            access: Access::NONE,
            address,
        });
    }

    /// All of `slot` that bypass mode reaches.
    pub(super) fn identity(&self, slot: &Arc<MemorySlot>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let last = Iova(slot.range.last().0);
        let mut next = Some(Iova(slot.range.first().0));
        while let Some(first) = next.filter(|n| *n <= last) {
            let Some(rest) = IovaRange::new(first, last) else {
                break;
            };
            let hit = self
                .reserved
                .iter()
                .filter(|r| r.overlaps(rest))
                .min_by_key(|r| r.first());
            let free = match hit {
                Some(hit) if hit.first() <= first => None,
                Some(hit) => IovaRange::new(first, Iova(hit.first().0 - 1)),
                None => Some(rest),
            };
            pieces.extend(free.map(|range| Piece {
                range,
                access: Access::READ_WRITE,
                slot: slot.clone(),
                offset: range.first().0 - slot.range.first().0,
            }));
            next = hit.and_then(|hit| hit.last().0.checked_add(1)).map(Iova);
        }
        pieces
    }

    /// The window for a piece, as a server is told of it.
    pub(super) fn window(&self, piece: &Piece) -> Window {
        let file = match self.isolation {
            Isolation::Messages => None,
            Isolation::Mappings => {
                let at = piece.slot.offset.saturating_add(piece.offset);
                Some((piece.slot.file.clone(), at))
            }
        };
        Window {
            range: piece.range,
            access: piece.access,
            file,
        }
    }

    /// Does something with each part of memory behind `range`, in order, if all of it may be used
    /// like that: with where in `range` it is, and the bytes.
    fn with_memory(
        &self,
        range: IovaRange,
        access: Access,
        mut act: impl FnMut(usize, vm_memory::VolatileSlice<'_>),
    ) -> Result<(), AccessDenied> {
        let view = self.view.read();
        let checked = view.each_part(range, access, |_, _| {});
        match checked {
            Ok(()) => {
                // As it was a moment ago, for the view is locked.
                let done = view.each_part(range, access, &mut act);
                done.map_err(|_| AccessDenied)
            }
            Err(address) => {
                let gate = view.gate;
                drop(view);
                self.report(gate, access, address);
                Err(AccessDenied)
            }
        }
    }

    fn report(&self, gate: Gate, access: Access, address: Iova) {
        self.refused.inc();
        let reason = match gate {
            Gate::Translated => FaultReason::Mapping,
            // Where there is no memory is none of the IOMMU's business.
            Gate::Bypass if !self.reserved.iter().any(|r| r.contains(address)) => return,
            Gate::Bypass => FaultReason::Mapping,
            Gate::Blocked => FaultReason::Domain,
            Gate::Quarantined => FaultReason::Unknown,
        };
        self.sink.report(Fault {
            endpoint: self.endpoint,
            reason,
            access,
            address,
        });
    }
}

impl DmaTarget for Space {
    fn read(&self, range: IovaRange, into: &mut [u8]) -> Result<(), AccessDenied> {
        self.with_memory(range, Access::READ, |at, memory| {
            if let Some(into) = into.get_mut(at..) {
                memory.copy_to(into);
            }
        })
    }

    fn write(&self, range: IovaRange, from: &[u8]) -> Result<(), AccessDenied> {
        self.with_memory(range, Access::WRITE, |at, memory| {
            if let Some(from) = from.get(at..) {
                memory.copy_from(from);
            }
        })
    }

    fn windows(&self) -> Vec<Window> {
        let view = self.view.read();
        view.pieces.values().map(|p| self.window(p)).collect()
    }
}

impl View {
    /// # Errors
    /// The first address that may not be used like that.
    fn each_part(
        &self,
        range: IovaRange,
        access: Access,
        mut act: impl FnMut(usize, vm_memory::VolatileSlice<'_>),
    ) -> Result<(), Iova> {
        let mut next = Some(range.first());
        while let Some(at) = next.filter(|at| range.contains(*at)) {
            let before = self.pieces.range(..=at.0).next_back();
            let piece = before
                .map(|(_, piece)| piece)
                .filter(|p| p.range.contains(at) && p.access.allows(access))
                .ok_or(at)?;
            let last = piece.range.last().min(range.last());
            let skipped = at.0 - piece.range.first().0;
            let small = |n: u64| usize::try_from(n).map_err(|_| at);
            let offset = small(piece.offset.saturating_add(skipped))?;
            let len = small(last.0 - at.0)?.saturating_add(1);
            let memory = piece.slot.memory.get_slice(offset, len).map_err(|_| at)?;
            act(small(at.0 - range.first().0)?, memory);
            next = last.0.checked_add(1).map(Iova);
        }
        Ok(())
    }
}

/// The pieces of a mapping that lead into guest RAM. `slots` are in the order of addresses and
/// disjoint. A mapping without rights has none.
pub(super) fn pieces_of<'a>(
    mapping: &'a Mapping,
    slots: &'a [Arc<MemorySlot>],
) -> impl Iterator<Item = Piece> + 'a {
    let target = mapping.target().filter(|_| mapping.access != Access::NONE);
    let from = slots.partition_point(|s| s.range.last() < mapping.gpa);
    let touched = slots
        .iter()
        .skip(from)
        .take_while(move |s| target.is_some_and(|t| reaches(t, s.range)));
    touched.filter_map(|slot| {
        let part = mapping.part_in(slot.range)?;
        Some(Piece {
            range: part.range,
            access: part.access,
            slot: slot.clone(),
            offset: part.gpa.0 - slot.range.first().0,
        })
    })
}

fn reaches(target: GpaRange, slot: GpaRange) -> bool {
    target.intersection(slot).is_some()
}

impl Piece {
    /// Whether it leads into this slot.
    pub(super) fn is_in(&self, slot: &MemorySlot) -> bool {
        *self.slot == *slot
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use vm_memory::Bytes;

    use super::*;
    use crate::address::Gpa;
    use crate::backends::testing::slot;

    #[derive(Default)]
    struct Sink(Mutex<Vec<(FaultReason, u64)>>);

    impl FaultSink for Sink {
        fn report(&self, fault: Fault) {
            self.0.lock().push((fault.reason, fault.address.0));
        }
    }

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
    }

    fn space(reserved: Vec<IovaRange>) -> (Space, Arc<Sink>) {
        let sink = Arc::new(Sink::default());
        let isolation = Isolation::Messages;
        (
            Space::new(EndpointId(8), isolation, reserved, sink.clone()),
            sink,
        )
    }

    fn insert(space: &Space, gate: Gate, pieces: impl IntoIterator<Item = Piece>) {
        let mut view = space.change();
        view.gate = gate;
        let by_first = pieces.into_iter().map(|p| (p.range.first().0, p));
        view.pieces.extend(by_first);
    }

    fn mapping(first: u64, len: u64, gpa: u64, access: Access) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova(first), len).expect("not empty"),
            gpa: Gpa(gpa),
            access,
            mmio: false,
        }
    }

    #[test]
    fn accesses_go_through_neighbouring_windows_or_not_at_all() {
        let slots = [
            Arc::new(slot(0x1000, 0x2000, 0x3000)),
            Arc::new(slot(0x8000, 0x1000, 0)),
        ];
        let (space, sink) = space(Vec::new());
        for m in [
            mapping(0x10_0000, 0x1000, 0x8000, Access::READ_WRITE),
            mapping(0x10_1000, 0x1000, 0x1000, Access::READ_WRITE),
            mapping(0x10_2000, 0x1000, 0x2000, Access::READ),
        ] {
            insert(&space, Gate::Translated, pieces_of(&m, &slots));
        }
        assert_eq!(space.write(range(0x10_0ffe, 0x10_1001), b"abcd"), Ok(()));
        let mut there = [0; 2];
        slots[1]
            .memory
            .as_volatile_slice()
            .read_slice(&mut there, 0xffe)
            .expect("inside");
        assert_eq!(&there, b"ab");
        slots[0]
            .memory
            .as_volatile_slice()
            .read_slice(&mut there, 0)
            .expect("inside");
        assert_eq!(&there, b"cd");
        let mut back = [0; 4];
        assert_eq!(space.read(range(0x10_0ffe, 0x10_1001), &mut back), Ok(()));
        assert_eq!(&back, b"abcd");
        assert!(sink.0.lock().is_empty());

        // The second half may not be written: neither is the first.
        assert_eq!(
            space.write(range(0x10_1ffe, 0x10_2001), b"wxyz"),
            Err(AccessDenied)
        );
        assert_eq!(space.read(range(0x10_1ffe, 0x10_2001), &mut back), Ok(()));
        assert_eq!(back, [0; 4]);
        assert_eq!(
            space.read(range(0x10_2fff, 0x10_3000), &mut back[..2]),
            Err(AccessDenied)
        );
        assert_eq!(
            space.read(range(0xf_ffff, 0x10_0000), &mut back[..2]),
            Err(AccessDenied)
        );
        assert_eq!(
            *sink.0.lock(),
            [
                (FaultReason::Mapping, 0x10_2000),
                (FaultReason::Mapping, 0x10_3000),
                (FaultReason::Mapping, 0xf_ffff),
            ]
        );
    }

    #[test]
    fn mappings_have_one_window_for_each_slot() {
        let slots = [
            Arc::new(slot(0x1000, 0x1000, 0)),
            Arc::new(slot(0x2000, 0x1000, 0)),
            Arc::new(slot(0x4000, 0x1000, 0)),
        ];
        let cut = |m: Mapping| -> Vec<_> {
            pieces_of(&m, &slots)
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
    fn bypass_reaches_all_but_reserved_regions() {
        let slot = Arc::new(slot(0x1000, 0x8000, 0));
        let reserved = vec![
            range(0x7000, 0x7fff),
            range(0, 0x1fff),
            range(0x4000, 0x4fff),
            range(0x8000, 0x9_0000),
        ];
        let (space, sink) = space(reserved);
        let pieces = space.identity(&slot);
        let ranges: Vec<_> = pieces.iter().map(|p| (p.range, p.offset)).collect();
        assert_eq!(
            ranges,
            [
                (range(0x2000, 0x3fff), 0x1000),
                (range(0x5000, 0x6fff), 0x4000)
            ]
        );
        insert(&space, Gate::Bypass, pieces);
        assert_eq!(space.write(range(0x5000, 0x5000), &[1]), Ok(()));
        assert_eq!(
            space.write(range(0x4fff, 0x5000), &[1, 2]),
            Err(AccessDenied)
        );
        assert_eq!(
            space.write(range(0x10_0000, 0x10_0000), &[1]),
            Err(AccessDenied)
        );
        assert_eq!(*sink.0.lock(), [(FaultReason::Mapping, 0x4fff)]);
    }

    #[test]
    fn the_reason_of_a_fault_follows_the_gate() {
        let (space, sink) = space(Vec::new());
        for gate in [Gate::Blocked, Gate::Quarantined, Gate::Translated] {
            insert(&space, gate, None);
            assert_eq!(space.read(range(0, 0), &mut [0]), Err(AccessDenied));
        }
        let reasons: Vec<_> = sink.0.lock().iter().map(|(reason, _)| *reason).collect();
        assert_eq!(
            reasons,
            [
                FaultReason::Domain,
                FaultReason::Unknown,
                FaultReason::Mapping
            ]
        );
    }
}
