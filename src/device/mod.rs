//! The virtio-iommu device, whichever transport a VMM reaches it through: features, configuration space, memory, rings,
//! reset.
//!
//! A transport (`transport::vhost_user`) translates its messages into calls of [`Device`] and gives it its rings as
//! [`ring::Ring`]. For each VMM it calls, in this order: [`Device::prepare`], [`Device::connect`],
//! [`Device::announce_vmm`], then what the VMM asks for, last [`Device::stop`] and [`Device::disconnect`].

mod chain;
mod event_queue;
mod execute;
pub mod guest_memory;
#[cfg(test)]
mod plain_ring;
mod polling;
mod request_queue;
mod request_ring;
mod resume;
pub mod ring;
mod serve;
mod status;
mod stored_ring;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod view;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::guest_memory::{check_regions, slots};
use crate::error_limited;
use crate::faults::Fault;
use crate::faults::log::FaultLog;
use crate::iommu::Iommu;
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::process::realtime::Realtime;
use crate::process::watchdog::Pulse;
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::probe::RESV_MEM_LEN;
use crate::protocol::wire::{
    VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_DOMAIN_RANGE, VIRTIO_IOMMU_F_INPUT_RANGE,
    VIRTIO_IOMMU_F_MAP_UNMAP, VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE,
};

use self::execute::probe_size;
use self::polling::Polling;
use self::request_queue::RequestQueue;
use self::resume::RingState;
use self::stored_ring::StoredRing;

/// Index of the request queue.
pub const REQUEST_QUEUE: u16 = 0;
/// Index of the event queue.
pub const EVENT_QUEUE: u16 = 1;
/// Number of queues.
pub const QUEUES: usize = 2;
/// The longest ring a driver may use, in entries.
pub const MAX_QUEUE_SIZE: usize = 1024;

/// How the worker serves.
#[derive(Clone, Copy, Debug)]
pub struct WorkerSettings {
    /// How long it looks at an empty request ring at most before it sleeps.
    pub longest_poll: Duration,
    /// The most requests it takes off the ring at a time.
    pub max_batch: usize,
    /// The priority it has, where it is not the usual one.
    pub realtime: Option<Realtime>,
}

/// The virtio-iommu device of one VM.
///
/// Lock order: what says whose QMP events count, then `requests`, then `events`, then `iommu`, then
/// the lock of a ring. The others are held for a moment only, with nothing locked after them.
pub struct Device {
    /// Guards: the request queue between passes, and that no pass is under way while a ring is
    /// stopped or memory changes. Given up fairly, so that a busy driver keeps nobody out.
    requests: Mutex<Requests>,
    /// The event queue's ring. Guards: that no fault is being written while memory changes.
    events: Mutex<Option<Box<dyn StoredRing>>>,
    iommu: Arc<Mutex<Iommu>>,
    /// Guest memory that was checked; the rings' own copy is not.
    memory: Mutex<Option<Arc<GuestMemoryMmap>>>,
    config: ConfigSpace,
    /// What the configuration space shows; the core has it too.
    bypass: AtomicBool,
    features: AtomicU64,
    connected: AtomicBool,
    /// The frontend has said something: QEMU connects before it has any device, but speaks when it
    /// makes this one, after those that come before it on its command line.
    announced: AtomicBool,
    /// Tells the worker to leave its loop; set before the connection's threads are joined.
    shutdown: AtomicBool,
    /// Changes with guest memory: a worker that polls has to look at the ring where it is now.
    memory_changes: AtomicU64,
    /// The worker's own.
    polling: Mutex<Polling>,
    realtime: Option<Realtime>,
    /// The worker is a new thread, with the priority of the others.
    worker_is_new: AtomicBool,
    /// Makes the worker look at the request ring without a kick.
    wake: EventFd,
    /// What the worker says that it is alive with.
    pulse: Arc<Pulse>,
    max_batch: usize,
    metrics: Arc<Metrics>,
    faults: FaultLog,
}

#[derive(Default)]
struct Requests {
    queue: RequestQueue,
    /// Guest memory, as in the device's own `memory`.
    memory: Option<Arc<GuestMemoryMmap>>,
    ring: Option<Box<dyn StoredRing>>,
    /// Where the ring was when it was stopped, until a pass finds it running again.
    stopped: Option<RingState>,
}

impl Device {
    /// The device in front of `iommu`, without a frontend.
    ///
    /// # Errors
    /// Where the system has no event descriptor left.
    pub fn new(
        iommu: Arc<Mutex<Iommu>>,
        metrics: Arc<Metrics>,
        worker: WorkerSettings,
    ) -> io::Result<Self> {
        let (config, bypass) = {
            let iommu = iommu.lock();
            let config = ConfigSpace {
                page_sizes: iommu.page_sizes(),
                input_range: iommu.input_range(),
                last_domain: iommu.last_domain(),
                probe_size: probe_size(iommu.topology().max_reserved_count()),
            };
            (config, iommu.bypass())
        };
        Ok(Self {
            requests: Mutex::new(Rank::RequestQueue, Requests::default()),
            events: Mutex::new(Rank::EventQueue, None),
            iommu,
            memory: Mutex::new(Rank::GuestMemory, None),
            config,
            bypass: AtomicBool::new(bypass),
            features: AtomicU64::new(0),
            connected: AtomicBool::new(false),
            announced: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
            memory_changes: AtomicU64::new(0),
            polling: Mutex::new(Rank::Polling, Polling::new(worker.longest_poll)),
            realtime: worker.realtime,
            worker_is_new: AtomicBool::new(true),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            pulse: Arc::new(Pulse::new("the worker")?),
            max_batch: worker.max_batch,
            metrics,
            faults: FaultLog::default(),
        })
    }

    /// Tells the guest of a refused access. Where it has posted no buffer the fault is dropped.
    /// Both are counted.
    pub fn report_fault(&self, fault: &Fault) {
        let events = self.events.lock();
        let delivered = match (&*events, self.memory()) {
            (Some(ring), Some(memory)) => ring.deliver(&memory, fault),
            _ => false,
        };
        if delivered {
            self.metrics.faults_delivered.inc();
        } else {
            self.metrics.faults_dropped.inc();
        }
        drop(events);
        if let Some(counter) = self.metrics.faults.get(fault.reason.index()) {
            counter.inc();
        }
        self.faults.add(*fault, delivered);
    }

    /// The faults that were reported.
    pub fn faults(&self) -> &FaultLog {
        &self.faults
    }

    /// Counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The memory of the VM that is connected, as it is now.
    pub fn memory(&self) -> Option<Arc<GuestMemoryMmap>> {
        self.memory.lock().clone()
    }

    /// Whether a frontend is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// A frontend will connect: its worker may serve.
    pub fn prepare(&self) {
        self.shutdown.store(false, Ordering::Release);
        self.worker_is_new.store(true, Ordering::Release);
    }

    /// A frontend has connected: it finds a device without a past.
    pub fn connect(&self) {
        self.connected.store(true, Ordering::Relaxed);
        self.metrics.connections.inc();
    }

    /// The VMM says that it has reset the VM, and with it this device: all domains go at once, before
    /// the next driver, or its firmware, does anything. Returns whether they were still there.
    ///
    /// A ring that runs is the next driver's already, and its beginning did the same.
    pub fn reset_vm(&self) -> bool {
        let mut requests = self.requests.lock();
        if requests.stopped.is_none() {
            return false;
        }
        requests.queue.broken = false;
        let mut iommu = self.iommu.lock();
        let had_domains = iommu.domain_ids().next().is_some();
        iommu.reset_vm();
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        had_domains
    }

    /// How many reserved regions of an endpoint a PROBE has room for: the guest was told.
    pub fn probe_room(&self) -> usize {
        self.config.probe_size as usize / RESV_MEM_LEN
    }

    /// Readable when the worker must look at the request ring without a kick; see [`Device::serve_wake`].
    pub fn wake_event(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// What the worker answers the watchdog with, and while there is no frontend whoever waits for one.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Tells the worker to stop; its threads can be joined after this.
    pub fn stop(&self) {
        self.shutdown.store(true, Ordering::Release);
    }

    /// The frontend is gone and its threads are joined: nothing of its VM is kept.
    pub fn disconnect(&self) {
        *self.requests.lock() = Requests::default();
        *self.events.lock() = None;
        *self.memory.lock() = None;
        self.features.store(0, Ordering::Relaxed);
        self.announced.store(false, Ordering::Relaxed);
        let mut iommu = self.iommu.lock();
        iommu.disconnect();
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        // Whoever holds the core's lock sees both the VM and what is its, or neither.
        self.connected.store(false, Ordering::Relaxed);
    }

    /// The VMM counts as present from its first message: the devices before this one on its command line are there
    /// then. Only the first call has an effect.
    pub fn announce_vmm(&self) {
        if !self.announced.swap(true, Ordering::Relaxed) {
            self.iommu.lock().connect();
        }
    }

    /// The feature bits the device offers, without those of a transport.
    pub fn offered_features() -> u64 {
        // Not VIRTIO_RING_F_INDIRECT_DESC: a driver that has it allocates and frees a table for each
        // request, which costs it more than the two descriptors of the ring it spares. One that
        // uses tables nevertheless, for it began with another device, is answered.
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_IOMMU_F_INPUT_RANGE,
            VIRTIO_IOMMU_F_DOMAIN_RANGE,
            VIRTIO_IOMMU_F_MAP_UNMAP,
            VIRTIO_IOMMU_F_PROBE,
            VIRTIO_IOMMU_F_MMIO,
            VIRTIO_IOMMU_F_BYPASS_CONFIG,
        ]
        .iter()
        .fold(0, |bits, &bit| bits | 1 << bit)
    }

    /// The driver has accepted these feature bits; a transport's own may be among them.
    pub fn accept_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    /// `size` bytes of the configuration space from `offset`; zeroes past its end.
    pub fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config
            .read(self.bypass.load(Ordering::Relaxed), offset, size)
    }

    /// The driver writes to the configuration space. Only `bypass` changes.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) {
        if let Some(bypass) = ConfigSpace::written_bypass(offset, bytes) {
            let mut iommu = self.iommu.lock();
            iommu.set_bypass(bypass);
            self.bypass.store(bypass, Ordering::Relaxed);
        }
    }

    /// The VMM has changed guest memory: `memory` is all of it. On error the device has no memory.
    ///
    /// # Errors
    /// Names the region that is refused; see [`check_regions`].
    pub fn set_memory(&self, memory: Arc<GuestMemoryMmap>) -> io::Result<()> {
        let mut requests = self.requests.lock();
        let _no_fault = self.events.lock();
        match check_regions(&memory).and_then(|()| slots(&memory)) {
            Ok(slots) => self.iommu.lock().set_memory(slots),
            Err(cause) => {
                error_limited!("the frontend's memory is refused: {cause}");
                *self.memory.lock() = None;
                requests.memory = None;
                self.iommu.lock().set_memory(Vec::new());
                return Err(cause);
            }
        }
        *self.memory.lock() = Some(memory.clone());
        requests.memory = Some(memory);
        self.memory_changes.fetch_add(1, Ordering::Release);
        // Requests that could not be read before may be there now, and nobody kicks for them.
        requests.queue.broken = false;
        self.wake.write(1)
    }

    /// The VMM has stopped the ring of queue `index`, whose [`Ring::Locked`](ring::Ring) is not running any more. When
    /// this returns no request of it is in progress.
    pub fn stop_ring(&self, index: u16) {
        if index != REQUEST_QUEUE {
            return;
        }
        let mut requests = self.requests.lock();
        // A stop that no pass has looked at still says where the driver was.
        if requests.stopped.is_none()
            && let Some(ring) = &requests.ring
        {
            let features = self.features.load(Ordering::Acquire);
            requests.stopped = Some(ring.state(features, requests.queue.last_used));
        }
    }

    /// The VMM has reset the device: all domains are gone.
    pub fn reset(&self) {
        let mut requests = self.requests.lock();
        requests.queue = RequestQueue::default();
        requests.stopped = None;
        self.features.store(0, Ordering::Release);
        self.metrics.resets.inc();
        self.iommu.lock().reset();
    }
}
