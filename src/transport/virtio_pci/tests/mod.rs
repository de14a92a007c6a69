//! The device without a socket: its registers as a driver uses them, and its messages as a client sends them. The test
//! serves the rings itself, in place of the worker.

mod interrupts;
mod memory;
mod registers;
mod rings;

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
        let taken = self
            .pci
            .negotiate(&Version::default(), &mut Capabilities::default());
        assert_eq!(taken, Ok(()));
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
