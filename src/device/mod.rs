//! The device as a vhost-user frontend sees it: features, rings, configuration, memory, reset.

mod chain;
mod event_queue;
mod request_queue;
mod restart;
mod status;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, error, info};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::guest_memory::{FrontendMemory, check_regions};
use crate::iommu::{Fault, Iommu};
use crate::metrics::Metrics;
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::wire::{
    VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_DOMAIN_RANGE, VIRTIO_IOMMU_F_INPUT_RANGE,
    VIRTIO_IOMMU_F_MAP_UNMAP, VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE,
};
use crate::warn_limited;

use self::request_queue::{Context, Pass, RequestQueue, probe_size};
use self::restart::{Restart, RingState};

/// Index of the request queue.
const REQUEST_QUEUE: u16 = 0;
/// Index of the event queue.
const EVENT_QUEUE: u16 = 1;
const QUEUES: usize = 2;
/// The longest ring a driver may use.
const MAX_QUEUE_SIZE: usize = 1024;

/// The virtio-iommu device of one VM.
///
/// Lock order: `requests`, then `iommu`, then the lock of a ring.
pub struct Device {
    /// Guards: the request queue between passes, and that no pass is under way while a ring is
    /// stopped or memory changes.
    requests: Mutex<Requests>,
    iommu: Arc<Mutex<Iommu>>,
    memory: Mutex<Option<FrontendMemory>>,
    event_ring: Mutex<Option<VringRwLock>>,
    config: ConfigSpace,
    /// What the configuration space shows; the core has it too.
    bypass: AtomicBool,
    features: AtomicU64,
    connected: AtomicBool,
    /// Tells the worker to leave its loop; set before the connection's threads are joined.
    shutdown: AtomicBool,
    /// Descriptors vhost-user-backend has given up without closing them.
    exit_consumers: Mutex<Vec<RawFd>>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Requests {
    queue: RequestQueue,
    ring: Option<VringRwLock>,
    /// Where the ring was when it was stopped last; taken when it starts again.
    stopped: Option<RingState>,
}

impl Device {
    /// The device in front of `iommu`, without a frontend.
    pub fn new(iommu: Arc<Mutex<Iommu>>, metrics: Arc<Metrics>) -> Self {
        let (config, bypass) = {
            let iommu = lock(&iommu);
            let config = ConfigSpace {
                page_sizes: iommu.page_sizes(),
                input_range: iommu.input_range(),
                last_domain: iommu.last_domain(),
                probe_size: probe_size(iommu.topology().max_reserved_count()),
            };
            (config, iommu.bypass())
        };
        Self {
            requests: Mutex::default(),
            iommu,
            memory: Mutex::new(None),
            event_ring: Mutex::new(None),
            config,
            bypass: AtomicBool::new(bypass),
            features: AtomicU64::new(0),
            connected: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
            exit_consumers: Mutex::default(),
            metrics,
        }
    }

    /// Tells the guest of a refused access. Where it has posted no buffer the fault is dropped.
    /// Both are counted.
    pub fn report_fault(&self, fault: &Fault) {
        let ring = lock(&self.event_ring).clone();
        let memory = self.memory();
        let delivered = match (ring, memory) {
            (Some(ring), Some(memory)) => event_queue::deliver(&ring, &memory.memory(), fault),
            _ => false,
        };
        if delivered {
            self.metrics.faults_delivered.inc();
        } else {
            self.metrics.faults_dropped.inc();
        }
    }

    /// Counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The memory of the VM that is connected.
    pub fn memory(&self) -> Option<FrontendMemory> {
        lock(&self.memory).clone()
    }

    /// Whether a frontend is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// A frontend has connected: it finds a device without a past.
    pub(crate) fn connect(&self) {
        self.shutdown.store(false, Ordering::Release);
        self.connected.store(true, Ordering::Relaxed);
        self.metrics.connections.inc();
    }

    /// Tells the worker to stop; its threads can be joined after this.
    pub(crate) fn stop(&self) {
        self.shutdown.store(true, Ordering::Release);
    }

    /// The frontend is gone and its threads are joined: nothing of its VM is kept.
    ///
    /// Returns the descriptors the backend crate has leaked for this connection.
    pub(crate) fn disconnect(&self) -> Vec<RawFd> {
        self.connected.store(false, Ordering::Relaxed);
        *lock(&self.requests) = Requests::default();
        *lock(&self.event_ring) = None;
        *lock(&self.memory) = None;
        self.features.store(0, Ordering::Relaxed);
        let mut iommu = lock(&self.iommu);
        iommu.reset_system();
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        std::mem::take(&mut *lock(&self.exit_consumers))
    }

    /// Serves the request ring until it is empty and the driver has been asked to notify.
    fn serve_requests(&self, ring: &VringRwLock) {
        let mut promised = false;
        while !self.shutdown.load(Ordering::Acquire) {
            match self.serve_batch(ring) {
                Pass::Served => promised = false,
                Pass::Stopped => return,
                Pass::Empty if promised => {
                    return self.give_up("it promises requests that cannot be read");
                }
                Pass::Empty => match ring.enable_notification() {
                    Ok(false) => return,
                    Ok(true) => promised = true,
                    Err(cause) => return self.give_up(&cause.to_string()),
                },
            }
        }
    }

    fn give_up(&self, cause: &str) {
        lock(&self.requests).queue.broken = true;
        warn_limited!("the request ring is left alone until the driver starts it anew: {cause}");
    }

    fn serve_batch(&self, ring: &VringRwLock) -> Pass {
        let mut requests = lock(&self.requests);
        let Some(memory) = self.memory() else {
            return Pass::Stopped;
        };
        if let Some(stopped) = requests.stopped.take() {
            self.restart(&mut requests, ring, &memory.memory(), &stopped);
        }
        if requests.ring.is_none() {
            requests.ring = Some(ring.clone());
        }
        let mut iommu = lock(&self.iommu);
        let mut context = Context {
            iommu: &mut iommu,
            memory: &memory.memory(),
            features: self.features.load(Ordering::Acquire),
            config: &self.config,
            metrics: &self.metrics,
        };
        requests.queue.serve(ring, &mut context)
    }

    /// The request ring runs again after a stop: the same driver goes on, or a new one begins.
    fn restart(
        &self,
        requests: &mut Requests,
        ring: &VringRwLock,
        memory: &GuestMemoryMmap,
        stopped: &RingState,
    ) {
        let now = RingState::of(
            ring,
            self.features.load(Ordering::Acquire),
            requests.queue.last_used,
        );
        match stopped.compare(&now, memory) {
            Restart::Resumed => debug!("the request ring goes on at {}", now.next_avail),
            Restart::NewDriver => {
                info!("a new driver has started the device: all domains are gone");
                requests.queue = RequestQueue::default();
                self.metrics.resets.inc();
                lock(&self.iommu).reset();
            }
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_IOMMU_F_INPUT_RANGE,
            VIRTIO_IOMMU_F_DOMAIN_RANGE,
            VIRTIO_IOMMU_F_MAP_UNMAP,
            VIRTIO_IOMMU_F_PROBE,
            VIRTIO_IOMMU_F_MMIO,
            VIRTIO_IOMMU_F_BYPASS_CONFIG,
        ]
        .iter()
        .fold(
            VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            |bits, &bit| bits | 1 << bit,
        )
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        let mut requests = lock(&self.requests);
        requests.queue = RequestQueue::default();
        requests.stopped = None;
        self.metrics.resets.inc();
        lock(&self.iommu).reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings keep it.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config
            .read(self.bypass.load(Ordering::Relaxed), offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if let Some(bypass) = ConfigSpace::written_bypass(offset, bytes) {
            let mut iommu = lock(&self.iommu);
            iommu.set_bypass(bypass);
            self.bypass.store(bypass, Ordering::Relaxed);
        }
        Ok(())
    }

    fn update_memory(&self, memory: FrontendMemory) -> io::Result<()> {
        let _no_pass = lock(&self.requests);
        if let Err(cause) = check_regions(&memory.memory()) {
            error!("the frontend's memory is refused: {cause}");
            *lock(&self.memory) = None;
            return Err(cause);
        }
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![1 << REQUEST_QUEUE | 1 << EVENT_QUEUE]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let pair = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|cause| error!("cannot make an event descriptor: {cause}"))
            .ok()?;
        lock(&self.exit_consumers).push(pair.0.as_raw_fd());
        Some(pair)
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if index != u32::from(REQUEST_QUEUE) {
            return Ok(());
        }
        // The ring is not ready any more, so once the lock was held no request is in flight.
        let mut requests = lock(&self.requests);
        if let Some(ring) = &requests.ring {
            let features = self.features.load(Ordering::Acquire);
            requests.stopped = Some(RingState::of(ring, features, requests.queue.last_used));
        }
        Ok(())
    }

    /// Never fails: an error would end the worker for good.
    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        rings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        if let Some(ring) = rings.get(usize::from(EVENT_QUEUE)) {
            let mut known = lock(&self.event_ring);
            if known.is_none() {
                *known = Some(ring.clone());
            }
        }
        // Nothing waits for buffers of the event queue: faults without one are dropped.
        if event == REQUEST_QUEUE
            && let Some(ring) = rings.get(usize::from(event))
        {
            self.serve_requests(ring);
        }
        Ok(())
    }
}

/// Locks even where a thread has panicked with the lock held: the core publishes last, so its
/// state holds at any time.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
