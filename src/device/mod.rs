//! The device as a vhost-user frontend sees it: features, rings, configuration, memory, reset.

mod chain;
mod event_queue;
pub mod guest_memory;
mod polling;
mod request_queue;
mod request_ring;
mod resume;
mod ring;
mod status;
mod view;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use log::debug;
use parking_lot::{Mutex, MutexGuard};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::guest_memory::{check_regions, slots};
use crate::faults::log::FaultLog;
use crate::iommu::{Fault, Iommu};
use crate::metrics::Metrics;
use crate::process::realtime::Realtime;
use crate::process::sandbox::{self, Role};
use crate::process::watchdog::Pulse;
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::probe::RESV_MEM_LEN;
use crate::protocol::wire::{
    VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_DOMAIN_RANGE, VIRTIO_IOMMU_F_INPUT_RANGE,
    VIRTIO_IOMMU_F_MAP_UNMAP, VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE,
};
use crate::{error_limited, info_limited, warn_limited};

use self::polling::{Look, Polling};
use self::request_queue::{Context, Pass, RequestQueue, probe_size};
use self::request_ring::NextChain;
use self::resume::{Restart, RingState};
use self::ring::is_running;
use self::view::GuestView;

/// Index of the request queue.
const REQUEST_QUEUE: u16 = 0;
/// Index of the event queue.
const EVENT_QUEUE: u16 = 1;
const QUEUES: usize = 2;
/// Number of the event that is no queue's; the backend crate keeps 2 to itself.
const WAKE_EVENT: u16 = 3;
/// Number of the event by which the watchdog asks.
const PULSE_EVENT: u16 = 4;
/// The longest ring a driver may use.
const MAX_QUEUE_SIZE: usize = 1024;

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
    events: Mutex<Option<VringRwLock>>,
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
    spoken: AtomicBool,
    /// Tells the worker to leave its loop; set before the connection's threads are joined.
    shutdown: AtomicBool,
    /// Changes with guest memory: a worker that polls has to look at the ring where it is now.
    memory_changes: AtomicU64,
    /// The worker's own.
    polling: Mutex<Polling>,
    realtime: Option<Realtime>,
    /// The worker is a new thread, with the priority of the others.
    ordinary: AtomicBool,
    /// Makes the worker look at the request ring without a kick.
    wake: EventFd,
    /// What the worker says that it is alive with.
    pulse: Arc<Pulse>,
    /// Descriptors vhost-user-backend has given up without closing them.
    exit_consumers: Mutex<Vec<RawFd>>,
    max_batch: usize,
    metrics: Arc<Metrics>,
    faults: FaultLog,
}

#[derive(Default)]
struct Requests {
    queue: RequestQueue,
    /// Guest memory, as in the device's own `memory`.
    memory: Option<Arc<GuestMemoryMmap>>,
    ring: Option<VringRwLock>,
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
            requests: Mutex::default(),
            events: Mutex::new(None),
            iommu,
            memory: Mutex::new(None),
            config,
            bypass: AtomicBool::new(bypass),
            features: AtomicU64::new(0),
            connected: AtomicBool::new(false),
            spoken: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
            memory_changes: AtomicU64::new(0),
            polling: Mutex::new(Polling::new(worker.longest_poll)),
            realtime: worker.realtime,
            ordinary: AtomicBool::new(true),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            pulse: Arc::new(Pulse::new("the worker")?),
            exit_consumers: Mutex::default(),
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
            (Some(ring), Some(memory)) => event_queue::deliver(ring, &memory, fault),
            _ => false,
        };
        if delivered {
            self.metrics.faults_delivered.inc();
        } else {
            self.metrics.faults_dropped.inc();
        }
        drop(events);
        if let Some(counter) = self.metrics.faults.get(fault.reason as usize) {
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
    pub(crate) fn prepare(&self) {
        self.shutdown.store(false, Ordering::Release);
        self.ordinary.store(true, Ordering::Release);
    }

    /// A frontend has connected: it finds a device without a past.
    pub(crate) fn connect(&self) {
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

    /// What makes the worker look at the request ring, and the number of that event.
    pub(crate) fn wake_event(&self) -> (RawFd, u64) {
        (self.wake.as_raw_fd(), u64::from(WAKE_EVENT))
    }

    /// What the worker answers the watchdog with, and while there is no frontend whoever waits for one.
    pub(crate) fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// The event by which the watchdog asks, and its number.
    pub(crate) fn pulse_event(&self) -> (RawFd, u64) {
        (self.pulse.event(), u64::from(PULSE_EVENT))
    }

    /// Tells the worker to stop; its threads can be joined after this.
    pub(crate) fn stop(&self) {
        self.shutdown.store(true, Ordering::Release);
    }

    /// The frontend is gone and its threads are joined: nothing of its VM is kept.
    pub(crate) fn disconnect(&self) {
        *self.requests.lock() = Requests::default();
        *self.events.lock() = None;
        *self.memory.lock() = None;
        self.features.store(0, Ordering::Relaxed);
        self.spoken.store(false, Ordering::Relaxed);
        let mut iommu = self.iommu.lock();
        iommu.disconnect();
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        // Whoever holds the core's lock sees both the VM and what is its, or neither.
        self.connected.store(false, Ordering::Relaxed);
    }

    /// The descriptors the backend crate has leaked so far.
    pub(crate) fn take_leaked(&self) -> Vec<RawFd> {
        std::mem::take(&mut *self.exit_consumers.lock())
    }

    /// The frontend speaks: with its first word, the devices before this one are there.
    fn spoken_to(&self) {
        if !self.spoken.swap(true, Ordering::Relaxed) {
            self.iommu.lock().connect();
        }
    }

    /// Serves the request ring until it is empty, has stayed so for as long as is worth waiting, and
    /// the driver has been asked to notify.
    fn serve_requests(&self, ring: &VringRwLock) {
        let mut polling = self.polling.lock();
        {
            let requests = self.requests.lock();
            if let Some(memory) = &requests.memory {
                requests.queue.do_without_kicks(ring, memory);
            }
        }
        loop {
            if self.shutdown.load(Ordering::Acquire) {
                return;
            }
            // A driver that is never idle keeps the worker here.
            self.pulse.answer();
            match self.serve_batch(ring) {
                Pass::Served => {}
                Pass::Stopped => return,
                Pass::Empty if self.poll(ring, &mut polling) => {}
                Pass::Empty if self.ask_for_kick(ring) => {}
                Pass::Empty => return,
            }
        }
    }

    /// Looks at the ring without a lock that anybody else wants. Returns whether there may be
    /// something.
    fn poll(&self, ring: &VringRwLock, polling: &mut Polling) -> bool {
        // Before the memory, so that what is looked at is that of this number or a later one.
        let changes = self.memory_changes.load(Ordering::Acquire);
        let (memory, places) = {
            let requests = self.requests.lock();
            (requests.memory.clone(), requests.queue.places())
        };
        let Some(memory) = memory else {
            return false;
        };
        let view = GuestView::new(&memory);
        let next = NextChain::of(ring.get_ref().get_queue());
        let look = polling.look(|| {
            if next.is_there(&view) {
                // All at once, where the one leads to the other: most of the time of a single request is
                // that of fetching what the driver's processor has just written.
                next.prefetch(&view);
                places.prefetch(&view);
                return true;
            }
            self.shutdown.load(Ordering::Relaxed)
                || self.memory_changes.load(Ordering::Relaxed) != changes
        });
        match look {
            Look::Found(gap) => {
                self.metrics.polls_paid.inc();
                let gap = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
                self.metrics.polls_paid_ns.add(gap);
            }
            Look::Over => self.metrics.polls_unpaid.inc(),
            Look::None => {}
        }
        matches!(look, Look::Found(_))
    }

    /// Whether requests have come meanwhile, for which the driver may not notify.
    fn ask_for_kick(&self, ring: &VringRwLock) -> bool {
        let requests = self.requests.lock();
        let memory = requests.memory.as_ref();
        memory.is_some_and(|memory| requests.queue.ask_for_kick(ring, memory))
    }

    fn serve_batch(&self, ring: &VringRwLock) -> Pass {
        let mut requests = self.requests.lock();
        let Some(memory) = requests.memory.clone() else {
            return Pass::Stopped;
        };
        if requests.stopped.is_some() || requests.ring.is_none() {
            // Only a ring that runs says where it goes on.
            if !is_running(&ring.get_ref()) {
                return Pass::Stopped;
            }
            if let Some(stopped) = requests.stopped.take() {
                self.restart(&mut requests, ring, &memory, &stopped);
            }
            if requests.ring.is_none() {
                requests.ring = Some(ring.clone());
                // The VMM has all its devices by now.
                self.iommu.lock().settle_unattached();
            }
        }
        let mut iommu = self.iommu.lock();
        let mut context = Context {
            iommu: &mut iommu,
            memory: &memory,
            features: self.features.load(Ordering::Acquire),
            config: &self.config,
            metrics: &self.metrics,
            max_batch: self.max_batch,
        };
        let pass = requests.queue.serve(ring, &mut context);
        MutexGuard::unlock_fair(iommu);
        MutexGuard::unlock_fair(requests);
        pass
    }

    /// The request ring runs again after a stop: the same driver goes on, or a new one begins.
    fn restart(
        &self,
        requests: &mut Requests,
        ring: &VringRwLock,
        memory: &GuestMemoryMmap,
        stopped: &RingState,
    ) {
        requests.queue.broken = false;
        let now = RingState::of(
            ring,
            self.features.load(Ordering::Acquire),
            requests.queue.last_used,
        );
        match stopped.compare(&now, memory) {
            Restart::Resumed => debug!("the request ring goes on at {}", now.next_avail),
            Restart::NewDriver => {
                info_limited!("a new driver has started the device: all domains are gone");
                requests.queue = RequestQueue::default();
                self.metrics.resets.inc();
                self.iommu.lock().reset();
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

    /// What every frontend asks first, in the thread that hears it.
    fn features(&self) -> u64 {
        sandbox::enter(Role::VhostUser);
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
        .fold(
            VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            |bits, &bit| bits | 1 << bit,
        )
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.spoken_to();
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// Not offered, and done all the same where a frontend asks for it.
    fn reset_device(&self) {
        let mut requests = self.requests.lock();
        requests.queue = RequestQueue::default();
        requests.stopped = None;
        self.features.store(0, Ordering::Release);
        self.metrics.resets.inc();
        self.iommu.lock().reset();
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
            let mut iommu = self.iommu.lock();
            iommu.set_bypass(bypass);
            self.bypass.store(bypass, Ordering::Relaxed);
        }
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // For a frontend that has not asked for the features.
        sandbox::enter(Role::VhostUser);
        self.spoken_to();
        let mut requests = self.requests.lock();
        let _no_fault = self.events.lock();
        let memory = memory.memory().into_inner();
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

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![1 << REQUEST_QUEUE | 1 << EVENT_QUEUE]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let pair = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|cause| error_limited!("cannot make an event descriptor: {cause}"))
            .ok()?;
        self.exit_consumers.lock().push(pair.0.as_raw_fd());
        Some(pair)
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if index != u32::from(REQUEST_QUEUE) {
            return Ok(());
        }
        // The ring is not ready any more, so once the lock was held no request is in flight.
        let mut requests = self.requests.lock();
        // A stop that no pass has looked at still says where the driver was.
        if requests.stopped.is_none()
            && let Some(ring) = &requests.ring
        {
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
        sandbox::enter(Role::Worker);
        if let Some(ring) = rings.get(usize::from(EVENT_QUEUE)) {
            self.events.lock().get_or_insert_with(|| ring.clone());
        }
        if self.ordinary.load(Ordering::Relaxed) {
            self.ordinary.store(false, Ordering::Relaxed);
            if let Some(Err(cause)) = self.realtime.map(Realtime::apply) {
                warn_limited!("the worker has no realtime priority: {cause}");
            }
        }
        if event == PULSE_EVENT {
            // Alive is who gets what a request needs.
            drop(self.requests.lock());
            drop(self.iommu.lock());
            self.pulse.answer();
        }
        if event == WAKE_EVENT {
            // Fails where it was read already.
            let _ = self.wake.read();
        }
        if event == REQUEST_QUEUE {
            self.metrics.wakeups.inc();
            self.polling.lock().woken();
        }
        // Nothing waits for buffers of the event queue: faults without one are dropped.
        if matches!(event, REQUEST_QUEUE | WAKE_EVENT)
            && let Some(ring) = rings.get(usize::from(REQUEST_QUEUE))
        {
            self.serve_requests(ring);
        }
        Ok(())
    }
}
