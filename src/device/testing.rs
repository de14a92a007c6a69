//! A device with a driver in front of it and no transport between them, for unit tests.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::plain_ring::{AVAIL_AT, PlainRing, USED_AT};
use super::ring::Ring;
use super::{Device, REQUEST_QUEUE, WorkerSettings};
use crate::address::PageMask;
use crate::backends::recorder::Recorder;
use crate::ids::EndpointId;
use crate::iommu::{Iommu, Predecessor, Settings};
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::page_table::Encoding;
use crate::protocol::reply::TAIL_LEN;
use crate::protocol::wire::{
    ReqAttach, ReqHead, ReqMap, ReqUnmap, VIRTIO_IOMMU_F_MAP_UNMAP, VIRTIO_IOMMU_T_ATTACH,
    VIRTIO_IOMMU_T_MAP, VIRTIO_IOMMU_T_UNMAP,
};
use crate::topology::{EndpointSpec, PciAddress, PciRange, ReservedRegions, Topology};

/// The only endpoint.
pub(crate) const ENDPOINT: EndpointId = EndpointId(0x30);
/// The most requests that the worker takes off the ring at a time.
pub(crate) const MAX_BATCH: usize = 4;
/// Entries of each ring.
pub(crate) const RING_SIZE: u16 = 16;
const MEMORY_LEN: usize = 0x10_0000;
const REQUEST_RING: u64 = 0x1_0000;
const EVENT_RING: u64 = 0x2_0000;
/// Offset of a ring's buffers from its descriptor table.
const BUFFERS_AT: u64 = 0x1000;
/// Bytes for the buffers of the chain at each descriptor.
const BUFFER_LEN: u64 = 0x100;
/// Offset of a chain's device-writable buffer from its device-readable one.
const WRITABLE_AT: u64 = 0x80;

/// A device with one recorder as its backend.
pub(crate) fn device() -> (Arc<Device>, Recorder) {
    let recorder = Recorder::new();
    let (settings, topology) = settings();
    let iommu = Iommu::new(settings, topology).expect("an arena");
    (device_of(iommu, &recorder, |_| {}), recorder)
}

fn settings() -> (Settings, Topology) {
    let at = PciAddress::from_endpoint_id(ENDPOINT);
    let endpoint = EndpointSpec {
        range: PciRange::new(at, at).expect("one function"),
        group: None,
        reserved: Vec::new(),
    };
    let reserved = ReservedRegions::new(Vec::new()).expect("no region");
    let iommu_at = "00:05.0".parse().expect("an address");
    let topology = Topology::new(iommu_at, reserved, &[endpoint]).expect("a topology");
    let settings = Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 15,
        bypass_at_boot: true,
        arena_limit: 4 << 20,
        encoding: Encoding::default(),
    };
    (settings, topology)
}

fn device_of(
    mut iommu: Iommu,
    recorder: &Recorder,
    restore: impl FnOnce(&mut Iommu),
) -> Arc<Device> {
    iommu
        .add_backend(Box::new(recorder.clone()), &[ENDPOINT])
        .expect("common addresses");
    let worker = WorkerSettings {
        longest_poll: Duration::ZERO,
        max_batch: MAX_BATCH,
        realtime: None,
    };
    let metrics = Arc::new(Metrics::default());
    let device = Device::new(Arc::new(Mutex::new(Rank::Core, iommu)), metrics, worker);
    let device = device.expect("event descriptors");
    restore(&mut device.iommu.lock());
    Arc::new(device)
}

/// A device that a later process can take over.
pub(crate) fn mortal_device() -> Arc<Device> {
    let (device, _) = device();
    device.iommu.lock().keep_journal();
    device
}

/// The device of the process after the one that had `old`, and what restores its core.
pub(crate) fn successor(old: &Device) -> (Arc<Device>, Box<dyn FnOnce() + Send>) {
    let (arena, store) = {
        let iommu = old.iommu.lock();
        (
            iommu.arena().memory().clone(),
            iommu.store().memory().clone(),
        )
    };
    let (settings, topology) = settings();
    let iommu = Iommu::successor(settings, topology).expect("an arena");
    let device = device_of(iommu, &Recorder::new(), |_| {});
    let core = device.iommu.clone();
    let restore = move || {
        let old = Predecessor {
            arena: arena.words(),
            store: store.words(),
        };
        core.lock().restore(old).expect("restored");
    };
    (device, Box::new(restore))
}

/// A device that a VMM has connected to, with guest memory, and the driver of its two rings.
pub(crate) struct Bed {
    pub(crate) device: Arc<Device>,
    pub(crate) recorder: Recorder,
    pub(crate) requests: DriverRing,
    pub(crate) events: DriverRing,
    memory: Arc<GuestMemoryMmap>,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let (device, recorder) = device();
        let ranges = [(GuestAddress(0), MEMORY_LEN)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("guest memory"));
        let bed = Self {
            device,
            recorder,
            requests: DriverRing::new(memory.clone(), REQUEST_RING),
            events: DriverRing::new(memory.clone(), EVENT_RING),
            memory,
        };
        bed.device.iommu.lock().keep_journal();
        bed.connect();
        bed
    }

    /// A VMM connects, and its driver accepts the features it needs.
    pub(crate) fn connect(&self) {
        self.device.prepare();
        self.device.connect();
        self.device.announce_vmm();
        self.device.await_driver();
        self.device.set_memory(self.memory.clone()).expect("taken");
        let features = [VIRTIO_F_VERSION_1, VIRTIO_IOMMU_F_MAP_UNMAP];
        let features = features.iter().fold(0, |bits, bit| bits | 1 << bit);
        assert_eq!(Device::offered_features() & features, features);
        self.device.accept_features(features);
    }

    /// The process dies, and another one goes on. Its guest memory is `memory`, or all.
    pub(crate) fn restart(&mut self, memory: Option<Arc<GuestMemoryMmap>>) {
        let (arena, store) = {
            let iommu = self.device.iommu.lock();
            (
                iommu.arena().memory().clone(),
                iommu.store().memory().clone(),
            )
        };
        let (settings, topology) = settings();
        self.recorder = Recorder::new();
        // The indices come from the journal.
        self.requests.ring = PlainRing::new(RING_SIZE, REQUEST_RING);
        let iommu = Iommu::successor(settings, topology).expect("an arena");
        self.device = device_of(iommu, &self.recorder, |iommu| {
            let old = Predecessor {
                arena: arena.words(),
                store: store.words(),
            };
            iommu.restore(old).expect("restored");
        });
        let memory = memory.unwrap_or_else(|| self.memory.clone());
        let all = std::mem::replace(&mut self.memory, memory);
        self.connect();
        self.memory = all;
    }

    /// All guest memory is there.
    pub(crate) fn share_memory(&self) {
        self.device.set_memory(self.memory.clone()).expect("taken");
    }

    /// The VMM disconnects.
    pub(crate) fn disconnect(&self) {
        self.device.stop();
        self.device.disconnect();
    }

    /// The worker handles the event of a kick.
    pub(crate) fn kick(&self) {
        self.device.begin_event(&self.events.ring);
        self.device.serve_kick(&self.requests.ring);
    }

    /// The VMM stops the request ring.
    pub(crate) fn stop(&self) {
        self.requests.ring.lock().running = false;
        self.device.stop_ring(REQUEST_QUEUE);
    }

    /// The request ring does not run yet.
    pub(crate) fn pause_unseen(&self) {
        self.requests.ring.lock().running = false;
    }

    /// The VMM starts the request ring where it was stopped.
    pub(crate) fn start(&self) {
        self.requests.ring.lock().running = true;
    }

    /// Another driver clears the request ring, and the VMM starts it.
    pub(crate) fn start_new_driver(&mut self) {
        self.requests = DriverRing::new(self.memory.clone(), REQUEST_RING);
        self.requests.clear();
    }

    /// Sends one request and returns its status.
    pub(crate) fn request(&mut self, request: &[u8]) -> u8 {
        let head = self.requests.put(request, TAIL_LEN);
        self.kick();
        assert_eq!(self.requests.take_used(), Some((head, 4)));
        self.requests.written(head)[0]
    }
}

/// The driver's side of a ring. Each chain has a device-readable and a device-writable buffer of its own.
pub(crate) struct DriverRing {
    /// The device's side.
    pub(crate) ring: PlainRing,
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    /// Chains made available so far.
    put: u16,
    /// Used entries taken so far.
    taken: u16,
}

impl DriverRing {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>, base: u64) -> Self {
        Self {
            ring: PlainRing::new(RING_SIZE, base),
            memory,
            base,
            put: 0,
            taken: 0,
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let at = GuestAddress(self.base + at);
        self.memory.write_slice(bytes, at).expect("in memory");
    }

    pub(crate) fn clear(&self) {
        self.write(AVAIL_AT, &[0; 4]);
        self.write(USED_AT, &[0; 4 + 8 * RING_SIZE as usize]);
    }

    /// Asks the device not to send interrupts.
    pub(crate) fn suppress_interrupts(&self) {
        self.write(AVAIL_AT, &1u16.to_le_bytes());
    }

    /// Claims `index` as the number of chains made available.
    pub(crate) fn claim(&self, index: u16) {
        self.write(AVAIL_AT + 2, &index.to_le_bytes());
    }

    /// Makes a chain available: a device-readable buffer, unless it is empty, and a device-writable one of
    /// `writable` bytes. Returns the index of its first descriptor.
    pub(crate) fn put(&mut self, readable: &[u8], writable: usize) -> u32 {
        let head = self.put * 2 % RING_SIZE;
        let buffer = self.base + BUFFERS_AT + BUFFER_LEN * u64::from(head);
        let mut descriptors = Vec::new();
        if !readable.is_empty() {
            self.write(buffer - self.base, readable);
            descriptors.push((buffer, readable.len(), VRING_DESC_F_NEXT));
        }
        self.write(buffer - self.base + WRITABLE_AT, &[0xff; 0x80]);
        descriptors.push((buffer + WRITABLE_AT, writable, VRING_DESC_F_WRITE));
        for (index, (at, len, flags)) in (head..).zip(descriptors) {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(u32::try_from(len).expect("small").to_le_bytes());
            bytes.extend(u16::try_from(flags).expect("16 bits").to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            self.write(16 * u64::from(index), &bytes);
        }
        let slot = u64::from(self.put % RING_SIZE);
        self.write(AVAIL_AT + 4 + 2 * slot, &head.to_le_bytes());
        self.put = self.put.wrapping_add(1);
        self.claim(self.put);
        head.into()
    }

    /// The next used entry: index of the chain's first descriptor, and the used length.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        let read = |at: u64| {
            let mut bytes = [0; 4];
            let at = GuestAddress(self.base + USED_AT + at);
            self.memory.read_slice(&mut bytes, at).expect("in memory");
            u32::from_le_bytes(bytes)
        };
        if read(0) >> 16 == u32::from(self.taken) {
            return None;
        }
        let slot = u64::from(self.taken % RING_SIZE);
        self.taken = self.taken.wrapping_add(1);
        Some((read(4 + 8 * slot), read(8 + 8 * slot)))
    }

    /// The device-writable buffer of the chain at `head`; bytes that the device has not written are 0xff.
    pub(crate) fn written(&self, head: u32) -> [u8; 0x80] {
        let mut bytes = [0; 0x80];
        let at = self.base + BUFFERS_AT + BUFFER_LEN * u64::from(head) + WRITABLE_AT;
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("in memory");
        bytes
    }
}

fn head(kind: u8) -> ReqHead {
    ReqHead {
        kind,
        reserved: [0; 3],
    }
}

pub(crate) fn attach(domain: u32) -> Vec<u8> {
    let request = ReqAttach {
        head: head(VIRTIO_IOMMU_T_ATTACH),
        domain: domain.into(),
        endpoint: ENDPOINT.0.into(),
        flags: 0.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

/// MAP of the page at `iova` to the same address in guest memory.
pub(crate) fn map(domain: u32, iova: u64) -> Vec<u8> {
    let request = ReqMap {
        head: head(VIRTIO_IOMMU_T_MAP),
        domain: domain.into(),
        virt_start: iova.into(),
        virt_end: (iova + 0xfff).into(),
        phys_start: iova.into(),
        flags: 3.into(),
    };
    request.as_bytes().to_vec()
}

pub(crate) fn unmap(domain: u32, iova: u64) -> Vec<u8> {
    let request = ReqUnmap {
        head: head(VIRTIO_IOMMU_T_UNMAP),
        domain: domain.into(),
        virt_start: iova.into(),
        virt_end: (iova + 0xfff).into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}
