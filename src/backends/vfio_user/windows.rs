//! The memory of an emulated device: windows into guest RAM, and accesses through them.

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

/// How a device's server is isolated from guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// The server gets no descriptor of guest RAM. Each access is a message, which the interposer checks.
    #[default]
    Messages,
    /// The server gets the descriptor of guest RAM with each window, and maps the window. Nothing keeps a malicious server
    /// from mapping all other RAM, too.
    Mappings,
}

/// The kind of access that the windows give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// The mappings of a domain.
    Translated,
    /// All of guest RAM without the reserved regions.
    Bypass,
    /// None; there are no windows.
    Blocked,
    /// None, because of a failure; there are no windows.
    Quarantined,
}

/// A window: a mapping, or the part of one that leads into one memory slot.
#[derive(Clone, Debug)]
pub(super) struct DmaWindow {
    pub(super) range: IovaRange,
    access: Access,
    slot: Arc<MemorySlot>,
    /// The window's first byte in the slot.
    offset: u64,
}

/// Windows by first address.
pub(super) type DmaWindows = BTreeMap<u64, DmaWindow>;

/// The windows that the device has now.
#[derive(Debug)]
pub(super) struct DeviceView {
    pub(super) gate: Gate,
    pub(super) windows: DmaWindows,
}

/// The address space of one device. A change waits for accesses in progress.
pub(super) struct Space {
    endpoint: EndpointId,
    isolation: Isolation,
    /// The addresses that bypass mode does not reach.
    reserved: Vec<IovaRange>,
    sink: Arc<dyn FaultSink>,
    /// The number of refused accesses, whether the guest gets a fault or not.
    refused: Counter,
    view: RwLock<DeviceView>,
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
                DeviceView {
                    gate: Gate::Blocked,
                    windows: DmaWindows::new(),
                },
            ),
        }
    }

    /// Changes the device's view. While the guard lives, no access is in progress.
    pub(super) fn change(&self) -> RwLockWriteGuard<'_, DeviceView> {
        self.view.write()
    }

    /// The number of windows, and the number of refused accesses so far.
    pub(super) fn figures(&self) -> (usize, u64) {
        (self.view.read().windows.len(), self.refused.get())
    }

    /// Reports that the device is stopped because of a failure, not because of an access.
    pub(super) fn report_stop(&self, address: Iova) {
        self.sink.report(Fault {
            endpoint: self.endpoint,
            reason: FaultReason::Unknown,
            access: Access::NONE,
            address,
        });
    }

    /// The windows of `slot` in bypass mode: the slot without the reserved regions.
    pub(super) fn identity(&self, slot: &Arc<MemorySlot>) -> Vec<DmaWindow> {
        let mut windows = Vec::new();
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
            windows.extend(free.map(|range| DmaWindow {
                range,
                access: Access::READ_WRITE,
                slot: slot.clone(),
                offset: range.first().0 - slot.range.first().0,
            }));
            next = hit.and_then(|hit| hit.last().0.checked_add(1)).map(Iova);
        }
        windows
    }

    /// The window as the link sends it to the server.
    pub(super) fn wire_window(&self, window: &DmaWindow) -> Window {
        let file = match self.isolation {
            Isolation::Messages => None,
            Isolation::Mappings => {
                let at = window.slot.offset.saturating_add(window.offset);
                Some((window.slot.file.clone(), at))
            }
        };
        Window {
            range: window.range,
            access: window.access,
            file,
        }
    }

    /// Calls `act` with each part of the memory behind `range`, in ascending order, and the part's offset in `range`; but
    /// only if the windows allow `access` to all of it.
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
                // Cannot fail: the view is locked, and was checked above.
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
            // An access to addresses without memory is no fault of the IOMMU.
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
        view.windows.values().map(|p| self.wire_window(p)).collect()
    }
}

impl DeviceView {
    /// Calls `act` with each part of the memory behind `range`, and the part's offset in `range`.
    ///
    /// # Errors
    /// The first address for which no window allows `access`.
    fn each_part(
        &self,
        range: IovaRange,
        access: Access,
        mut act: impl FnMut(usize, vm_memory::VolatileSlice<'_>),
    ) -> Result<(), Iova> {
        let mut next = Some(range.first());
        while let Some(at) = next.filter(|at| range.contains(*at)) {
            let before = self.windows.range(..=at.0).next_back();
            let window = before
                .map(|(_, window)| window)
                .filter(|p| p.range.contains(at) && p.access.allows(access))
                .ok_or(at)?;
            let last = window.range.last().min(range.last());
            let skipped = at.0 - window.range.first().0;
            let small = |n: u64| usize::try_from(n).map_err(|_| at);
            let offset = small(window.offset.saturating_add(skipped))?;
            let len = small(last.0 - at.0)?.saturating_add(1);
            let memory = window.slot.memory.get_slice(offset, len).map_err(|_| at)?;
            act(small(at.0 - range.first().0)?, memory);
            next = last.0.checked_add(1).map(Iova);
        }
        Ok(())
    }
}

/// The windows of a mapping: the parts of it that lead into guest RAM. `slots` must be in ascending order and disjoint.
/// A mapping without rights has no windows.
pub(super) fn windows_of<'a>(
    mapping: &'a Mapping,
    slots: &'a [Arc<MemorySlot>],
) -> impl Iterator<Item = DmaWindow> + 'a {
    let target = mapping.target().filter(|_| mapping.access != Access::NONE);
    let from = slots.partition_point(|s| s.range.last() < mapping.gpa);
    let touched = slots
        .iter()
        .skip(from)
        .take_while(move |s| target.is_some_and(|t| reaches(t, s.range)));
    touched.filter_map(|slot| {
        let part = mapping.part_in(slot.range)?;
        Some(DmaWindow {
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

impl DmaWindow {
    /// Whether the window leads into `slot`.
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

    fn insert(space: &Space, gate: Gate, windows: impl IntoIterator<Item = DmaWindow>) {
        let mut view = space.change();
        view.gate = gate;
        let by_first = windows.into_iter().map(|p| (p.range.first().0, p));
        view.windows.extend(by_first);
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
            insert(&space, Gate::Translated, windows_of(&m, &slots));
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

        // The second half is read-only, so the first half is not written either.
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
            windows_of(&m, &slots)
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
        let windows = space.identity(&slot);
        let ranges: Vec<_> = windows.iter().map(|p| (p.range, p.offset)).collect();
        assert_eq!(
            ranges,
            [
                (range(0x2000, 0x3fff), 0x1000),
                (range(0x5000, 0x6fff), 0x4000)
            ]
        );
        insert(&space, Gate::Bypass, windows);
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
