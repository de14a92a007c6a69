//! The address space of an emulated device: accesses to guest RAM, and the windows that the device's server is told.

use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::dma_window::DmaWindow;
use super::view::{DeviceView, Gate};
use crate::address::{Access, Iova, IovaRange, Mapping};
use crate::faults::{Fault, FaultReason, FaultSink};
use crate::ids::EndpointId;
use crate::locks::{Rank, RwLock, RwLockWriteGuard};
use crate::metrics::Counter;
use crate::vfio_user::{AccessDenied, DmaTarget, Window};

/// How a device's server is isolated from guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// The server gets no descriptor of guest RAM. Each access is a message, which the interposer checks. The server is told
    /// large regions instead of mappings.
    #[default]
    Messages,
    /// The same, but the server is told each mapping.
    ExactMessages,
    /// The server gets the descriptor of guest RAM with each window, and maps the window. Nothing keeps a malicious server
    /// from mapping all other RAM, too.
    Mappings,
}

/// The address space of one device. A change waits for accesses in progress.
pub(super) struct Space {
    endpoint: EndpointId,
    isolation: Isolation,
    sink: Arc<dyn FaultSink>,
    /// The number of refused accesses, whether the guest gets a fault or not.
    refused: Counter,
    /// The number of memory slots that were removed while a server that was cut off might still map them.
    pub(super) kept_slots: Counter,
    /// The interposer's thread reads the page table only while it holds this lock.
    view: RwLock<DeviceView>,
    /// The regions that the server is told instead of windows, in ascending order; only with [`Isolation::Messages`].
    regions: RwLock<Vec<DmaRegion>>,
}

impl Space {
    /// A space without windows.
    pub(super) fn new(
        endpoint: EndpointId,
        isolation: Isolation,
        reserved: Arc<[IovaRange]>,
        sink: Arc<dyn FaultSink>,
    ) -> Self {
        Self {
            endpoint,
            isolation,
            sink,
            refused: Counter::default(),
            kept_slots: Counter::default(),
            view: RwLock::new(Rank::Windows, DeviceView::closed(Gate::Blocked, reserved)),
            regions: RwLock::new(Rank::Windows, Vec::new()),
        }
    }

    /// Changes the device's view. While the guard lives, no access is in progress, and the interposer's thread is not in
    /// the page table.
    pub(super) fn change(&self) -> RwLockWriteGuard<'_, DeviceView> {
        self.view.write()
    }

    /// The number of windows that a connected server has, and the number of refused accesses so far.
    pub(super) fn figures(&self) -> (usize, u64) {
        let windows = match self.isolation {
            Isolation::Messages => self.regions.read().len(),
            Isolation::ExactMessages | Isolation::Mappings => self.view.read().count,
        };
        (windows, self.refused.get())
    }

    /// Replaces the regions that a server is told.
    pub(super) fn set_regions(&self, regions: &[DmaRegion]) {
        *self.regions.write() = regions.to_vec();
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

    /// Reports that the device does not reach a mapping, because its server has no room for it. The device has not tried
    /// to yet.
    pub(super) fn report_missing(&self, mapping: &Mapping) {
        self.sink.report(Fault {
            endpoint: self.endpoint,
            reason: FaultReason::Mapping,
            access: mapping.access,
            address: mapping.range.first(),
        });
    }

    /// The window as the link sends it to the server.
    pub(super) fn wire_window(&self, window: &DmaWindow) -> Window {
        let file = match self.isolation {
            Isolation::Messages | Isolation::ExactMessages => None,
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
    /// only if the endpoint may `access` all of it.
    fn with_memory(
        &self,
        range: IovaRange,
        access: Access,
        mut act: impl FnMut(usize, VolatileSlice<'_>),
    ) -> Result<(), AccessDenied> {
        self.with_parts(range, access, |parts| {
            for (at, memory) in parts {
                act(at, memory);
            }
        })
    }

    /// As [`Self::with_memory`], with all parts at once.
    fn with_parts(
        &self,
        range: IovaRange,
        access: Access,
        act: impl FnOnce(Vec<(usize, VolatileSlice<'_>)>),
    ) -> Result<(), AccessDenied> {
        // Held until the copy ends: UNMAP waits for that.
        let view = self.view.read();
        match view.parts(range, access) {
            Ok(parts) => {
                act(parts);
                Ok(())
            }
            Err(address) => {
                let gate = view.gate;
                let is_reserved = view.is_reserved(address);
                drop(view);
                self.report(gate, is_reserved, access, address);
                Err(AccessDenied)
            }
        }
    }

    fn report(&self, gate: Gate, is_reserved: bool, access: Access, address: Iova) {
        self.refused.inc();
        let reason = match gate {
            Gate::Translated => FaultReason::Mapping,
            // An access to addresses without memory is no fault of the IOMMU.
            Gate::Bypass if !is_reserved => return,
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

/// A piece of 8 TiB of a device's addresses, which is the most that libvfio-user takes as one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DmaRegion(u64);

impl DmaRegion {
    const SHIFT: u32 = 43;

    /// The region of an address.
    pub(super) fn of(address: Iova) -> Self {
        Self(address.0 >> Self::SHIFT)
    }

    /// All regions that share an address with `range`, in ascending order.
    pub(super) fn all_of(range: IovaRange) -> impl Iterator<Item = Self> {
        let (first, last) = (Self::of(range.first()), Self::of(range.last()));
        (first.0..=last.0).map(Self)
    }

    /// How many regions after `first` this one is.
    pub(super) fn distance(self, first: Self) -> usize {
        usize::try_from(self.0 - first.0).unwrap_or(usize::MAX)
    }

    /// The first address.
    pub(super) fn first(self) -> Iova {
        Iova(self.0 << Self::SHIFT)
    }

    /// The last address.
    fn last(self) -> Iova {
        Iova(self.first().0 | ((1 << Self::SHIFT) - 1))
    }

    /// The address after the last one, if there is one.
    pub(super) fn end(self) -> Option<Iova> {
        self.last().0.checked_add(1).map(Iova)
    }
}

impl From<DmaRegion> for Window {
    /// The window that the server is told: all of the region, with all rights, and without memory.
    fn from(region: DmaRegion) -> Self {
        let range = IovaRange::new(region.first(), region.last());
        Self {
            range: range.unwrap_or(IovaRange::ALL),
            access: Access::READ_WRITE,
            file: None,
        }
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

    fn read_in_place(
        &self,
        range: IovaRange,
        act: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> Result<(), AccessDenied> {
        self.with_parts(range, Access::READ, |parts| {
            let parts: Vec<_> = parts.into_iter().map(|(_, memory)| memory).collect();
            act(&parts);
        })
    }

    fn write(&self, range: IovaRange, from: &[u8]) -> Result<(), AccessDenied> {
        self.with_memory(range, Access::WRITE, |at, memory| {
            if let Some(from) = from.get(at..) {
                memory.copy_from(from);
            }
        })
    }

    fn windows_from(&self, first: Iova, limit: usize) -> Vec<Window> {
        if self.isolation == Isolation::Messages {
            let regions = self.regions.read();
            let rest = regions.iter().filter(|region| region.first() >= first);
            return rest.take(limit).map(|r| Window::from(*r)).collect();
        }
        let view = self.view.read();
        let rest = IovaRange::new(first, Iova(u64::MAX)).unwrap_or(IovaRange::ALL);
        let windows = view.windows_in(rest).take(limit);
        windows.map(|p| self.wire_window(&p)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use parking_lot::Mutex;
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;
    use crate::address::Gpa;
    use crate::backends::testing::slot;
    use crate::page_table::{Arena, Levels, Table};

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

    fn space() -> (Space, Arc<Sink>) {
        let sink = Arc::new(Sink::default());
        let isolation = Isolation::Messages;
        (
            Space::new(EndpointId(8), isolation, Arc::new([]), sink.clone()),
            sink,
        )
    }

    fn mapping(first: u64, gpa: u64, access: Access) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova(first), 0x1000).expect("not empty"),
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
        let (space, sink) = space();
        let mut arena = Arena::new(1 << 20).expect("an arena");
        let mut table = Table::new(&mut arena, Levels::Four).expect("a frame");
        for m in [
            mapping(0x10_0000, 0x8000, Access::READ_WRITE),
            mapping(0x10_1000, 0x1000, Access::READ_WRITE),
            mapping(0x10_2000, 0x2000, Access::READ),
        ] {
            let plan = table.plan_map(&arena, &m).expect("free");
            table.commit_map(&mut arena, plan);
        }
        let reader = table.reader(&arena);
        *space.change() = DeviceView::translated(reader, slots.to_vec(), Arc::new([]));
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
    fn bypass_reaches_all_but_reserved_regions() {
        let (space, sink) = space();
        let slot = Arc::new(slot(0x1000, 0x8000, 0));
        let reserved = [range(0x4000, 0x4fff), range(0x8000, 0x9_0000)];
        *space.change() = DeviceView::bypass(vec![slot], reserved.into());
        assert_eq!(space.write(range(0x5000, 0x5000), &[1]), Ok(()));
        for denied in [range(0x4fff, 0x5000), range(0x10_0000, 0x10_0000)] {
            assert_eq!(space.write(denied, &[1, 2]), Err(AccessDenied));
        }
        assert_eq!(*sink.0.lock(), [(FaultReason::Mapping, 0x4fff)]);
    }

    #[test]
    fn the_reason_of_a_fault_follows_the_gate() {
        let (space, sink) = space();
        for gate in [Gate::Blocked, Gate::Quarantined, Gate::Translated] {
            *space.change() = DeviceView::closed(gate, Arc::new([]));
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

    /// UNMAP changes the view. Its answer must come after the kernel has stopped to refer to the memory.
    #[test]
    fn no_change_is_made_while_memory_is_used_in_place() {
        let (space, sink) = space();
        let slot = Arc::new(slot(0x1000, 0x8000, 0));
        *space.change() = DeviceView::bypass(vec![slot], Arc::new([]));
        let changed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let read = space.read_in_place(range(0x2ffe, 0x3001), &mut |parts| {
                let len: usize = parts.iter().map(VolatileSlice::len).sum();
                assert_eq!(len, 4);
                scope.spawn(|| {
                    *space.change() = DeviceView::closed(Gate::Blocked, Arc::new([]));
                    changed.store(true, Ordering::Relaxed);
                });
                std::thread::sleep(Duration::from_millis(100));
                assert!(!changed.load(Ordering::Relaxed), "the change waits");
            });
            assert_eq!(read, Ok(()));
        });
        assert!(changed.load(Ordering::Relaxed));
        let mut is_called = false;
        let refused = space.read_in_place(range(0x2ffe, 0x3001), &mut |_| is_called = true);
        assert_eq!(refused, Err(AccessDenied));
        assert!(!is_called);
        assert_eq!(*sink.0.lock(), [(FaultReason::Domain, 0x2ffe)]);
    }
}
