//! The device without a socket: its registers as a driver uses them, and its messages as a client sends them. The test
//! serves the rings itself, in place of the worker.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::device::{CONFIG_REGION, MSIX_IRQS, VirtioPciDevice};
use super::layout::{NO_VECTOR, REGISTERS_BYTES};
use super::memory::MAX_SLOTS;
use super::trapped_bar::TrappedBar;
use crate::address::{Access, Iova};
use crate::backends::recorder::{Hook, Recorder};
use crate::device::Device;
use crate::device::acpi::ReadOnlyWindows;
use crate::device::ring::{LockedRing, Ring};
use crate::device::testing::{ENDPOINT, attach, device, map};
use crate::faults::{Fault, FaultReason};
use crate::process::keeper_testing::Manager;
use crate::process::peer_event::PeerEvent;
use crate::vfio_user::message::{
    DMA_MAP_READ, DMA_MAP_WRITE, DMA_UNMAP_ALL, DmaMapBody, DmaUnmapBody,
};
use crate::vfio_user::server::{IrqAction, IrqSet, IrqSetData, ServedDevice};
use crate::vfio_user::version::{Capabilities, Version};

const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const RAM_BYTES: u64 = 0x10_0000;
/// Guest-physical addresses of the two rings.
const RINGS: [u64; 2] = [0x1_0000, 0x2_0000];
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
const BUFFERS: u64 = 0x8000;
/// The status of a request for a domain that does not exist.
const NO_ENT: u8 = 6;
const VERSION_1: u64 = 1 << 32;
const MAP_UNMAP: u64 = 1 << 2;

struct Bed {
    pci: VirtioPciDevice,
    device: Arc<Device>,
    recorder: Recorder,
    /// Requests that the driver has made.
    made: u16,
}

impl Bed {
    /// A device with RAM, after a reset.
    fn new() -> Self {
        Self::with(None)
    }

    fn with(trapped: Option<Box<dyn TrappedBar>>) -> Self {
        let (device, recorder) = device();
        let pci = VirtioPciDevice::new(device.clone(), trapped, Box::new(|_| {}));
        let mut bed = Self {
            pci: pci.expect("a device"),
            device,
            recorder,
            made: 0,
        };
        bed.connect();
        bed
    }

    fn connect(&mut self) {
        self.pci
            .negotiate(&Version::default(), &mut Capabilities::default());
        self.map(0, RAM_BYTES, Some(ram(RAM_BYTES)))
            .expect("mapped");
        self.set_bus_master(true);
    }

    /// The driver lets the device reach memory, or not.
    fn set_bus_master(&mut self, is_bus_master: bool) {
        let command: u16 = if is_bus_master { 6 } else { 2 };
        self.write_space(4, &command.to_le_bytes());
    }

    fn enable_msix(&mut self) {
        self.write_space(0x42, &0x8000u16.to_le_bytes());
    }

    fn map(&mut self, address: u64, size: u64, file: Option<OwnedFd>) -> Result<(), i32> {
        self.map_with(DMA_MAP_READ | DMA_MAP_WRITE, address, size, 0, file)
    }

    fn map_with(
        &mut self,
        flags: u32,
        address: u64,
        size: u64,
        offset: u64,
        file: Option<OwnedFd>,
    ) -> Result<(), i32> {
        let window = DmaMapBody {
            argsz: DmaMapBody::BYTES.into(),
            flags: flags.into(),
            offset: offset.into(),
            address: address.into(),
            size: size.into(),
        };
        self.pci.dma_map(&window, file)
    }

    fn unmap(&mut self, flags: u32, address: u64, size: u64) -> Result<(), i32> {
        self.pci.dma_unmap(&DmaUnmapBody {
            argsz: DmaUnmapBody::BYTES.into(),
            flags: flags.into(),
            address: address.into(),
            size: size.into(),
        })
    }

    fn read(&mut self, at: u64, len: usize) -> u64 {
        self.read_of(0, at, len)
    }

    fn read_space(&mut self, at: u64, len: usize) -> u64 {
        self.read_of(CONFIG_REGION, at, len)
    }

    fn read_of(&mut self, region: u32, at: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        let read = self.pci.read_region(region, at, &mut bytes[..len]);
        assert_eq!(read, Ok(len));
        u64::from_le_bytes(bytes)
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        assert_eq!(self.pci.write_region(0, at, data), Ok(data.len()));
    }

    fn write_space(&mut self, at: u64, data: &[u8]) {
        let written = self.pci.write_region(CONFIG_REGION, at, data);
        assert_eq!(written, Ok(data.len()));
    }

    fn status(&mut self) -> u64 {
        self.read(20, 1)
    }

    /// The driver accepts `features` and sets FEATURES_OK. Returns the status.
    fn negotiate(&mut self, features: u64) -> u64 {
        self.write(20, &[3]);
        for (select, word) in [(0u32, features), (1, features >> 32)] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &word.to_le_bytes()[..4]);
        }
        self.write(20, &[11]);
        self.status()
    }

    fn enable(&mut self, queue: u16, size: u16, at: u64) {
        self.write(22, &queue.to_le_bytes());
        self.write(24, &size.to_le_bytes());
        for (offset, address) in [(32, at), (40, at + AVAILABLE), (48, at + USED)] {
            self.write(offset, &address.to_le_bytes()[..4]);
            self.write(offset + 4, &address.to_le_bytes()[4..]);
        }
        self.write(28, &1u16.to_le_bytes());
    }

    /// The driver maps a queue to an MSI-X vector.
    fn map_vector(&mut self, queue: u16, vector: u16) {
        self.write(22, &queue.to_le_bytes());
        self.write(26, &vector.to_le_bytes());
    }

    /// The driver of the request queue's last ring is gone, and with it what it has put there.
    fn clear_ring(&self) {
        self.put(RINGS[0] + USED, &[0; 4]);
        self.put(RINGS[0] + AVAILABLE, &[0; 4]);
    }

    fn bypass(&mut self) -> u64 {
        self.read(CONFIG + 36, 1)
    }

    /// Changes `bypass` in the device configuration. Returns the value before.
    fn flip_bypass(&mut self) -> u64 {
        let bypass = self.bypass();
        self.write(CONFIG + 36, &[u8::from(bypass == 0)]);
        assert_ne!(self.bypass(), bypass);
        bypass
    }

    /// The driver starts the device with both queues.
    fn start(&mut self) {
        assert_eq!(self.negotiate(VERSION_1 | MAP_UNMAP), 11);
        for (queue, at) in (0..).zip(RINGS) {
            self.enable(queue, 16, at);
        }
        self.made = 0;
        self.write(20, &[15]);
        assert_eq!(self.status(), 15);
    }

    fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.device.memory().expect("guest memory")
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let at = GuestAddress(at);
        self.memory().write_slice(bytes, at).expect("in memory");
    }

    /// Puts a request into the ring, without a kick.
    fn make(&mut self, request: &[u8]) {
        let [ring, _] = RINGS;
        self.put(ring + BUFFERS, request);
        self.put(ring + BUFFERS + 0x100, &[0xff; 4]);
        let mut table = Vec::new();
        for (at, len, flags, next) in [
            (ring + BUFFERS, request.len(), 1u16, 1u16),
            (ring + BUFFERS + 0x100, 4, 2, 0),
        ] {
            table.extend(at.to_le_bytes());
            table.extend(u32::try_from(len).expect("small").to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        self.put(ring, &table);
        let slot = u64::from(self.made % 16);
        self.put(ring + AVAILABLE + 4 + 2 * slot, &[0; 2]);
        self.made += 1;
        self.put(ring + AVAILABLE + 2, &self.made.to_le_bytes());
    }

    /// The driver kicks the request queue, and the worker wakes up.
    fn kick(&mut self) {
        self.write(NOTIFY, &[0, 0]);
        self.work();
    }

    /// What the worker does when it wakes up.
    fn work(&self) {
        let [requests, events] = self.pci.rings();
        self.device.begin_event(&events);
        self.device.serve_kick(&requests);
    }

    /// The number of requests that were answered.
    fn answered(&self) -> u16 {
        let mut index = [0; 2];
        let at = GuestAddress(RINGS[0] + USED + 2);
        self.memory().read_slice(&mut index, at).expect("in memory");
        u16::from_le_bytes(index)
    }

    /// The driver starts the device and attaches the endpoint to domain 1.
    fn start_and_attach(&mut self) {
        self.start();
        assert_eq!(self.request(&attach(1)), 0);
    }

    /// A kick for an ATTACH in the ring of a device that must not use it, until `allow`.
    fn assert_waits_for(&mut self, allow: impl FnOnce(&mut Self)) {
        self.make(&attach(1));
        self.kick();
        assert_eq!(self.answered(), 0);
        allow(self);
        self.work();
        assert_eq!(self.answered(), 1);
    }

    /// Makes a request and returns its status.
    fn request(&mut self, request: &[u8]) -> u8 {
        self.make(request);
        self.kick();
        assert_eq!(self.answered(), self.made);
        let mut status = [0];
        let at = GuestAddress(RINGS[0] + BUFFERS + 0x100);
        self.memory()
            .read_slice(&mut status, at)
            .expect("in memory");
        status[0]
    }

    fn set_irqs(&mut self, action: IrqAction, start: u32, data: IrqSetData<'_>) -> Result<(), i32> {
        self.pci.set_irqs(IrqSet {
            index: MSIX_IRQS,
            action,
            start,
            data,
        })
    }

    /// The client gives the eventfd of one vector.
    fn give_event(&mut self, vector: u32) -> OwnedFd {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let copy = PeerEvent::new(event.try_clone().expect("a duplicate")).expect("an eventfd");
        self.set_irqs(
            IrqAction::Trigger,
            vector,
            IrqSetData::Eventfds(vec![Some(copy)]),
        )
        .expect("set");
        event
    }

    /// The driver makes the request ring unusable, and the worker sees it.
    fn break_ring(&mut self) {
        self.put(RINGS[0] + AVAILABLE + 2, &1000u16.to_le_bytes());
        self.kick();
    }
}

fn ram(size: u64) -> OwnedFd {
    let file = memfd_create("ram", MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&file, size).expect("sized");
    fcntl_add_seals(&file, SealFlags::SHRINK).expect("sealed");
    file
}

fn count(event: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(event.as_fd(), &mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

/// Offset, length and `cfg_type` of each virtio capability, and the number of the first capability.
fn capabilities(bed: &mut Bed) -> (u64, Vec<(u64, u64, u64)>) {
    let mut at = bed.read_space(0x34, 1);
    let first = bed.read_space(at, 1);
    let mut found = Vec::new();
    while at != 0 {
        if bed.read_space(at, 1) == 9 {
            found.push((at, bed.read_space(at + 2, 1), bed.read_space(at + 3, 1)));
        }
        at = bed.read_space(at + 1, 1);
    }
    (first, found)
}

#[test]
fn the_header_is_that_of_a_modern_virtio_iommu() {
    let mut bed = Bed::new();
    assert_eq!(bed.read_space(0, 4), 0x1057_1af4);
    assert_eq!(bed.read_space(8, 4), 0x00ff_0001, "class and revision");
    assert!(bed.read_space(0x2e, 2) >= 0x40);
    assert_eq!(bed.read_space(0x3d, 1), 0, "no INTx");
    assert_eq!(bed.read_space(6, 2), 1 << 4);
    // A VMM finds the size of a BAR by writing ones.
    for (at, size) in [
        (0x10, 0xffff_8004),
        (0x14, 0xffff_ffff),
        (0x18, 0),
        (0x1c, 0),
    ] {
        bed.write_space(at, &[0xff; 4]);
        assert_eq!(bed.read_space(at, 4), size, "{at:#x}");
    }
    // Read-only.
    bed.write_space(0, &[0xff; 4]);
    bed.write_space(0x34, &[0xff; 4]);
    assert_eq!(bed.read_space(0, 4), 0x1057_1af4);
    assert_eq!(bed.read_space(0x34, 1), 0x40);
}

#[test]
fn capabilities_name_every_structure_and_msix_comes_first() {
    let mut bed = Bed::new();
    let (first, found) = capabilities(&mut bed);
    assert_eq!(first, 0x11);
    let kinds: Vec<_> = found.iter().map(|(_, _, kind)| *kind).collect();
    assert_eq!(kinds, [1, 3, 4, 2, 5]);
    let mut end = 0;
    for (at, len, kind) in found {
        let extra = if kind == 2 || kind == 5 { 4 } else { 0 };
        assert_eq!(len, 16 + extra, "{kind}");
        assert!(at >= end && at + len <= 256);
        end = at + len;
        let (bar, offset, length) = (
            bed.read_space(at + 4, 1),
            bed.read_space(at + 8, 4),
            bed.read_space(at + 12, 4),
        );
        if kind == 5 {
            continue;
        }
        assert_eq!((bar, offset % 4), (0, 0));
        assert!(offset + length <= REGISTERS_BYTES);
        if kind == 2 {
            let multiplier = bed.read_space(at + 16, 4);
            assert_eq!(multiplier, 4);
            for queue in 0..2u16 {
                bed.write(22, &queue.to_le_bytes());
                assert!(length >= bed.read(30, 2) * multiplier + 2);
            }
        }
    }
    // Three vectors, with table and pending bits on pages of their own.
    assert_eq!(bed.read_space(0x42, 2), 2);
    assert_eq!(bed.read_space(0x44, 4), 0x4000);
    assert_eq!(bed.read_space(0x48, 4), 0x5000);
}

#[test]
fn the_halves_of_an_address_are_written_alone() {
    let mut bed = Bed::new();
    bed.write(32, &[1, 2, 3, 4]);
    assert_eq!(bed.read(32, 8), 0x0403_0201);
    bed.write(36, &[5, 6, 7, 8]);
    assert_eq!(bed.read(32, 8), 0x0807_0605_0403_0201);
    assert_eq!(bed.read(36, 4), 0x0807_0605);
    bed.write(32, &[9; 4]);
    assert_eq!(bed.read(32, 8), 0x0807_0605_0909_0909);
    bed.write(40, &[7; 8]);
    assert_eq!(bed.read(40, 8), 0x0707_0707_0707_0707);
    // A part of a half is no write.
    bed.write(48, &[7; 3]);
    assert_eq!(bed.read(48, 8), 0);
}

#[test]
fn features_are_shown_in_windows() {
    let mut bed = Bed::new();
    let offered = Device::offered_features();
    for (select, word) in [
        (0u32, offered & 0xffff_ffff),
        (1, offered >> 32),
        (2, 0),
        (u32::MAX, 0),
    ] {
        bed.write(0, &select.to_le_bytes());
        assert_eq!(bed.read(4, 4), word);
        bed.write(8, &select.to_le_bytes());
        bed.write(12, &u32::try_from(word).expect("32 bits").to_le_bytes());
        assert_eq!(bed.read(12, 4), word);
    }
    bed.write(8, &0u32.to_le_bytes());
    assert_eq!(bed.read(12, 4), offered & 0xffff_ffff);
}

#[test]
fn features_ok_needs_a_valid_subset() {
    let offered = Device::offered_features();
    for (features, is_accepted) in [
        (VERSION_1, true),
        (offered, true),
        (offered & !VERSION_1, false),
        (VERSION_1 | 1 << 33, false),
        (VERSION_1 | 1 << 28, false),
        (0, false),
    ] {
        let mut bed = Bed::new();
        let status = bed.negotiate(features);
        assert_eq!(status & 8 != 0, is_accepted, "{features:#x}");
        // Accepted features stay.
        bed.write(8, &0u32.to_le_bytes());
        bed.write(12, &[0xff; 4]);
        assert_eq!(bed.read(12, 4) == 0xffff_ffff, !is_accepted);
    }
}

#[test]
fn the_generation_changes_with_the_configuration() {
    let mut bed = Bed::new();
    let before = bed.read(21, 1);
    assert_eq!(bed.read(21, 1), before);
    bed.flip_bypass();
    // The driver reads the other value in between.
    bed.flip_bypass();
    let after = bed.read(21, 1);
    assert_ne!(after, before);
    assert_eq!(bed.read(21, 1), after);
}

#[test]
fn a_reset_ends_the_domains_and_clears_the_registers() {
    let mut bed = Bed::new();
    bed.start_and_attach();
    assert_eq!(bed.request(&map(1, 0x1000)), 0);
    assert!(!bed.recorder.state().domains.is_empty());
    bed.write(16, &0u16.to_le_bytes());
    bed.write(20, &[0]);
    assert_eq!(bed.status(), 0);
    for queue in 0..2u16 {
        bed.write(22, &queue.to_le_bytes());
        assert_eq!(bed.read(24, 2), 1024);
        assert_eq!(bed.read(26, 2), u64::from(NO_VECTOR));
        assert_eq!((bed.read(28, 2), bed.read(32, 8)), (0, 0));
    }
    assert_eq!(bed.read(16, 2), u64::from(NO_VECTOR));
    // Nothing of the last driver is served, and the next one has no domains.
    bed.make(&map(1, 0x2000));
    bed.kick();
    bed.clear_ring();
    bed.start();
    assert_eq!(bed.request(&map(1, 0x3000)), NO_ENT);
    assert_eq!(bed.request(&attach(1)), 0);
    assert_eq!(bed.device.metrics().resets.get(), 1);
}

/// The worker may wait for the locks that the reset holds, and must find the rings stopped when it gets them: else it
/// would serve requests of the last driver after the domains have ended.
#[test]
fn rings_have_stopped_when_a_reset_ends_the_domains() {
    type Reset = fn(&mut Bed);
    let resets: [(&str, Reset); 3] = [
        ("the driver's", |bed| bed.write(20, &[0])),
        ("the VMM's", |bed| bed.pci.reset().expect("reset")),
        ("the end of the connection", |bed| bed.pci.release()),
    ];
    for (name, reset) in resets {
        let mut bed = Bed::new();
        bed.start_and_attach();
        let rings = bed.pci.rings();
        assert!(rings.iter().all(|ring| ring.lock().is_running()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = seen.clone();
        bed.recorder.state().at_attach = Some(Hook(Arc::new(move || {
            let mut all = all.lock().expect("no panic");
            all.extend(rings.iter().map(|ring| ring.lock().is_running()));
        })));
        reset(&mut bed);
        bed.recorder.state().at_attach = None;
        let seen = seen.lock().expect("no panic");
        assert!(
            !seen.is_empty() && !seen.contains(&true),
            "{name}: {seen:?}"
        );
    }
}

#[test]
fn no_request_is_served_before_driver_ok() {
    let mut bed = Bed::new();
    bed.negotiate(VERSION_1 | MAP_UNMAP);
    bed.enable(0, 16, RINGS[0]);
    bed.assert_waits_for(|bed| bed.write(20, &[15]));
}

#[test]
fn a_device_that_is_no_bus_master_leaves_memory_alone() {
    let mut bed = Bed::new();
    bed.start();
    bed.set_bus_master(false);
    bed.assert_waits_for(|bed| bed.set_bus_master(true));
}

#[test]
fn sizes_of_queues_are_powers_of_two() {
    let mut bed = Bed::new();
    for size in [1u16, 2, 64, 512, 1024] {
        bed.write(24, &size.to_le_bytes());
        assert_eq!(bed.read(24, 2), u64::from(size));
    }
    for size in [0u16, 3, 1023, 2048, 0xffff] {
        bed.write(24, &size.to_le_bytes());
        assert_eq!(bed.read(24, 2), 1024, "{size} is refused");
    }
    for queue in [2u16, 3, 0xffff] {
        bed.write(22, &queue.to_le_bytes());
        bed.write(24, &64u16.to_le_bytes());
        bed.write(28, &1u16.to_le_bytes());
        assert_eq!((bed.read(24, 2), bed.read(28, 2)), (0, 0));
    }
    assert_eq!(bed.read(18, 2), 2, "queues");
}

#[test]
fn an_enabled_queue_keeps_its_place() {
    let mut bed = Bed::new();
    bed.enable(0, 16, RINGS[0]);
    bed.write(32, &[0; 8]);
    bed.write(24, &32u16.to_le_bytes());
    bed.write(28, &0u16.to_le_bytes());
    assert_eq!(bed.read(32, 8), RINGS[0]);
    assert_eq!((bed.read(24, 2), bed.read(28, 2)), (16, 1));
}

#[test]
fn events_are_mapped_to_vectors() {
    let mut bed = Bed::new();
    for field in [16, 26] {
        assert_eq!(bed.read(field, 2), u64::from(NO_VECTOR), "after a reset");
        for vector in 0..3u16 {
            bed.write(field, &vector.to_le_bytes());
            assert_eq!(bed.read(field, 2), u64::from(vector));
        }
        for vector in [3, 0x7ff, 0x800, NO_VECTOR] {
            bed.write(field, &0u16.to_le_bytes());
            bed.write(field, &vector.to_le_bytes());
            assert_eq!(bed.read(field, 2), u64::from(NO_VECTOR), "{vector:#x}");
        }
    }
}

#[test]
fn a_request_interrupts_through_its_vector() {
    let mut bed = Bed::new();
    bed.enable_msix();
    let event = bed.give_event(1);
    bed.start_and_attach();
    assert_eq!(count(&event), 0, "the queue has no vector");
    assert_eq!(bed.read(ISR, 1), 0);
    bed.map_vector(0, 1);
    assert_eq!(bed.request(&map(1, 0x1000)), 0);
    assert_eq!(count(&event), 1);
    assert_eq!(bed.read(ISR, 1), 0, "not used with MSI-X");
}

/// The client gives a vector the eventfd that it has: the record has it once, and says that it was kept twice.
#[test]
fn an_eventfd_that_replaces_itself_is_reported_twice() {
    let mut bed = Bed::new();
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    bed.pci.kept_with(keeper.clone(), None);
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    for _ in 0..2 {
        let copy = PeerEvent::new(event.try_clone().expect("a duplicate")).expect("an eventfd");
        let events = IrqSetData::Eventfds(vec![Some(copy)]);
        bed.set_irqs(IrqAction::Trigger, 1, events).expect("set");
    }
    let record = bed.pci.take_record().expect("a change");
    assert_eq!(record.kept, ["file.0", "file.0"]);
    assert_eq!(
        record.names.iter().filter(|name| *name == "file.0").count(),
        1
    );
    // A refused window is in no record.
    bed.map(0, RAM_BYTES, Some(ram(RAM_BYTES)))
        .expect_err("overlaps");
    let short = bed.map(RAM_BYTES, RAM_BYTES, Some(ram(0x1000)));
    short.expect_err("behind the end of the file");
    let record = bed.pci.take_record().expect("a change");
    assert_eq!(record.kept, ["file.1"]);
    assert!(!record.names.contains(&"file.1".into()));
    assert_eq!(keeper.users("file.0"), 2);
}

#[test]
fn masked_interrupts_wait() {
    let mut bed = Bed::new();
    bed.start();
    bed.map_vector(0, 1);
    // The client gives the eventfd later.
    assert_eq!(bed.request(&attach(1)), 0);
    assert_eq!(bed.read(0x5000, 8), 1 << 1);
    let event = bed.give_event(1);
    assert_eq!(count(&event), 1);
    bed.set_irqs(IrqAction::Mask, 1, IrqSetData::All(1))
        .expect("masked");
    assert_eq!(bed.request(&map(1, 0x1000)), 0);
    assert_eq!((count(&event), bed.read(0x5000, 8)), (0, 1 << 1));
    bed.set_irqs(IrqAction::Unmask, 0, IrqSetData::Chosen(&[0, 1, 0]))
        .expect("unmasked");
    assert_eq!((count(&event), bed.read(0x5000, 8)), (1, 0));
    bed.set_irqs(IrqAction::Trigger, 0, IrqSetData::Disable)
        .expect("disabled");
    assert_eq!(bed.request(&map(1, 0x2000)), 0);
    assert_eq!(count(&event), 0);
}

#[test]
fn the_isr_status_tells_without_msix() {
    let mut bed = Bed::new();
    bed.start_and_attach();
    assert_eq!(bed.read_space(6, 1), 1 << 4 | 1 << 3);
    assert_eq!(bed.read(ISR, 1), 1);
    assert_eq!(bed.read(ISR, 1), 0, "cleared by the read");
    assert_eq!(bed.read_space(6, 1), 1 << 4);
    bed.break_ring();
    assert_eq!(bed.read(ISR, 1), 2);
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let mut bed = Bed::new();
    bed.enable_msix();
    let event = bed.give_event(0);
    bed.start();
    bed.break_ring();
    assert_eq!(bed.status(), 15 | 64);
    assert_eq!(count(&event), 0, "configuration changes have no vector");
    assert_eq!(bed.read(ISR, 1), 2, "the bit comes before the notification");
    bed.write(20, &[0]);
    assert_eq!(bed.status(), 0);
    bed.clear_ring();
    bed.start();
    bed.write(16, &[0, 0]);
    assert_eq!(bed.request(&attach(1)), 0);
    bed.break_ring();
    assert_eq!(bed.status(), 15 | 64);
    assert_eq!(count(&event), 1);
    assert_eq!(bed.device.metrics().needs_reset.get(), 2);
    // It stays so until the reset.
    bed.put(RINGS[0] + AVAILABLE + 2, &1u16.to_le_bytes());
    bed.kick();
    assert_eq!(bed.status(), 15 | 64);
}

#[test]
fn a_ring_outside_memory_asks_for_a_reset() {
    for (queue, at) in [(0, RAM_BYTES - 0x4000), (1, 1 << 40), (0, 0x1_0008)] {
        let mut bed = Bed::new();
        bed.negotiate(VERSION_1 | MAP_UNMAP);
        bed.enable(queue, 16, at);
        bed.write(20, &[15]);
        assert_eq!(bed.status(), 15 | 64, "{at:#x}");
    }
    // Memory that goes away under a ring.
    let mut bed = Bed::new();
    bed.start();
    bed.unmap(0, 0, RAM_BYTES).expect("unmapped");
    assert_eq!(bed.status(), 15);
    bed.write(NOTIFY, &[0, 0]);
    assert_eq!(bed.status(), 15 | 64);
}

#[test]
fn a_driver_without_features_is_told_so() {
    let mut bed = Bed::new();
    bed.write(20, &[7]);
    assert_eq!(bed.status(), 7 | 64);
}

#[test]
fn the_window_reaches_the_registers() {
    let mut bed = Bed::new();
    let (_, found) = capabilities(&mut bed);
    let (at, _, _) = *found.last().expect("a window");
    let aim = |bed: &mut Bed, bar: u8, offset: u32, len: u32| {
        bed.write_space(at + 4, &[bar]);
        bed.write_space(at + 8, &offset.to_le_bytes());
        bed.write_space(at + 12, &len.to_le_bytes());
    };
    aim(&mut bed, 0, 20, 1);
    bed.write_space(at + 16, &[3, 0xff, 0xff, 0xff]);
    assert_eq!(bed.status(), 3);
    assert_eq!(bed.read_space(at + 16, 1), 3);
    aim(&mut bed, 0, 18, 2);
    assert_eq!(bed.read_space(at + 16, 2), 2);
    // Accesses that a driver must not make do nothing.
    for (bar, offset, len) in [
        (0, 20, 0),
        (0, 20, 3),
        (0, 21, 2),
        (1, 20, 1),
        (0, 0x8000, 4),
        (0, u32::MAX, 1),
    ] {
        aim(&mut bed, bar, offset, len);
        bed.write_space(at + 16, &[0xff; 4]);
        assert_eq!(bed.status(), 3);
    }
    // Reading the whole space, as a VMM does, clears nothing unless the window leads there.
    aim(&mut bed, 0, 0x1000, 0);
    bed.start_and_attach();
    for at in (0..256).step_by(4) {
        bed.read_space(at, 4);
    }
    assert_eq!(bed.read(ISR, 1), 1);
}

#[test]
fn windows_become_memory_and_go() {
    let mut bed = Bed::new();
    let regions = |bed: &Bed| bed.device.memory().map_or(0, |memory| memory.num_regions());
    assert_eq!(bed.recorder.state().memory.len(), 1);
    bed.map(1 << 32, 0x1000, Some(ram(0x1000))).expect("mapped");
    assert_eq!(regions(&bed), 2);
    // Windows that are no memory exist all the same.
    bed.map(1 << 33, 0x1000, None).expect("recorded");
    bed.map_with(DMA_MAP_READ, 1 << 34, 0x1000, 0, Some(ram(0x1000)))
        .expect("recorded");
    let (pipe, _other) = std::io::pipe().expect("a pipe");
    bed.map(1 << 35, 0x1000, Some(pipe.into()))
        .expect("recorded");
    assert_eq!(regions(&bed), 2);
    assert_eq!(bed.device.metrics().windows_without_memory.get(), 2);
    for address in [1 << 32, 1 << 33, 1 << 34, 1 << 35] {
        assert_eq!(
            bed.map(address, 0x1000, Some(ram(0x1000))),
            Err(libc::EEXIST)
        );
        assert_eq!(bed.unmap(0, address, 0x2000), Err(libc::ENOENT));
        bed.unmap(0, address, 0x1000).expect("unmapped");
        assert_eq!(bed.unmap(0, address, 0x1000), Err(libc::ENOENT));
    }
    assert_eq!(regions(&bed), 1);
    assert_eq!(bed.recorder.state().memory.len(), 1);
    bed.unmap(DMA_UNMAP_ALL, 0, 0).expect("unmapped");
    assert_eq!((regions(&bed), bed.recorder.state().memory.len()), (0, 0));
}

#[test]
fn windows_that_lie_are_refused_and_forgotten() {
    let mut bed = Bed::new();
    let at = 1 << 32;
    for (size, offset) in [
        (0x2000, 0),
        (0x1000, 0x1000),
        (0x800, 0x800),
        (0x1000, u64::MAX - 0xfff),
        (1 << 60, 0),
    ] {
        let refused = bed.map_with(3, at, size, offset, Some(ram(0x1000)));
        assert_eq!(refused, Err(libc::EINVAL), "{size:#x} {offset:#x}");
    }
    assert_eq!(bed.device.metrics().windows_refused.get(), 5);
    // A file that cannot be written, though the client says so.
    let name = std::env::current_exe().expect("a program");
    let file = std::fs::File::open(name).expect("readable");
    assert!(bed.map(at, 0x1000, Some(file.into())).is_err());
    assert_eq!(bed.map(at, 0, None), Err(libc::EINVAL));
    assert_eq!(bed.map(u64::MAX, 2, None), Err(libc::EINVAL));
    bed.map(at, 0x1000, Some(ram(0x1000)))
        .expect("nothing was left behind");
    let memory = bed.device.memory().expect("guest memory");
    assert_eq!(memory.num_regions(), 2);
}

#[test]
fn the_number_of_slots_has_a_limit() {
    let mut bed = Bed::new();
    let file = ram(0x1000);
    let last = (1..).find(|n| {
        let file = file.try_clone().expect("a descriptor");
        bed.map(n << 32, 0x1000, Some(file)).is_err()
    });
    assert_eq!(last, Some(MAX_SLOTS as u64));
    bed.map(last.expect("some") << 32, 0x1000, None)
        .expect("not memory");
}

#[test]
fn a_client_that_goes_leaves_nothing() {
    let mut bed = Bed::new();
    let bypass = bed.flip_bypass();
    bed.start_and_attach();
    let event = bed.give_event(1);
    bed.pci.release();
    assert!(!bed.recorder.state().connected && bed.device.memory().is_none());
    assert!(bed.recorder.state().memory.is_empty());
    assert_eq!(count(&event), 0);
    bed.connect();
    assert_eq!(bed.status(), 0);
    assert_eq!(bed.bypass(), bypass);
    bed.start();
    bed.map_vector(0, 1);
    assert_eq!(bed.request(&map(1, 0x1000)), NO_ENT);
    assert_eq!(count(&event), 0, "the eventfd was the last client's");
}

#[test]
fn a_reset_by_the_vmm_restores_the_space_and_bypass() {
    let mut bed = Bed::new();
    let bypass = bed.flip_bypass();
    bed.start_and_attach();
    bed.pci.reset().expect("reset");
    assert_eq!((bed.status(), bed.read_space(4, 2)), (0, 0));
    assert_eq!(bed.bypass(), bypass);
    // Guest memory stays.
    assert!(bed.device.memory().is_some());
    bed.clear_ring();
    // The device is no bus master any more.
    bed.start();
    bed.assert_waits_for(|bed| bed.set_bus_master(true));
}

#[test]
fn a_fault_reaches_the_event_queue() {
    let mut bed = Bed::new();
    let event = bed.give_event(2);
    let fault = Fault {
        endpoint: ENDPOINT,
        access: Access::WRITE,
        address: Iova(0x5000),
        reason: FaultReason::Mapping,
    };
    bed.start();
    bed.map_vector(1, 2);
    bed.work();
    bed.device.report_fault(&fault);
    assert_eq!(count(&event), 0, "no buffer");
    let ring = RINGS[1];
    let mut descriptor = (ring + BUFFERS).to_le_bytes().to_vec();
    descriptor.extend([24, 0, 0, 0, 2, 0, 0, 0]);
    bed.put(ring, &descriptor);
    bed.put(ring + AVAILABLE, &[0, 0, 1, 0, 0, 0]);
    bed.device.report_fault(&fault);
    assert_eq!(count(&event), 1);
    let mut record = [0; 24];
    let at = GuestAddress(ring + BUFFERS);
    bed.memory().read_slice(&mut record, at).expect("in memory");
    assert_eq!(record[8..12], ENDPOINT.0.to_le_bytes());
    assert_eq!(record[16..], 0x5000u64.to_le_bytes());
}

/// Answers with the number of restarts.
struct CountingBar(Arc<Mutex<u8>>);

impl TrappedBar for CountingBar {
    fn read(&mut self, offset: u64, into: &mut [u8], _: &ReadOnlyWindows) {
        into.fill(*self.0.lock().expect("no panic") + u8::try_from(offset).expect("small"));
    }

    fn restart(&mut self) {
        *self.0.lock().expect("no panic") += 1;
    }
}

#[test]
fn a_trapped_bar_is_a_32_bit_bar_of_a_page() {
    let restarts = Arc::new(Mutex::new(0));
    let mut bed = Bed::with(Some(Box::new(CountingBar(restarts.clone()))));
    bed.write_space(0x18, &[0xff; 4]);
    assert_eq!(bed.read_space(0x18, 4), 0xffff_f000);
    assert_eq!(bed.pci.region(2).map(|region| region.size), Some(0x1000));
    assert_eq!(*restarts.lock().expect("no panic"), 1);
    assert_eq!(bed.read_of(2, 8, 2), 0x0909);
    bed.pci.reset().expect("reset");
    bed.pci.release();
    assert_eq!(*restarts.lock().expect("no panic"), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No access panics, and each gets an answer of its length.
    #[test]
    fn any_access_is_answered(
        accesses in proptest::collection::vec(
            (any::<bool>(), any::<bool>(), 0..0x8000u64, proptest::collection::vec(any::<u8>(), 0..70)),
            0..200,
        ),
        small in proptest::collection::vec((0..64u64, any::<u64>(), 1..9usize), 0..200),
    ) {
        let mut bed = Bed::new();
        for (writes, space, at, data) in accesses {
            let (region, at) = if space { (CONFIG_REGION, at % 256) } else { (0, at) };
            let len = data.len();
            let done = if writes {
                bed.pci.write_region(region, at, &data)
            } else {
                bed.pci.read_region(region, at, &mut vec![0; len])
            };
            prop_assert_eq!(done, Ok(len));
        }
        for (at, value, len) in small {
            bed.write(COMMON + at, &value.to_le_bytes()[..len]);
            bed.work();
        }
        bed.write(20, &[0]);
        prop_assert_eq!(bed.status(), 0);
    }
}
