//! The virtio-iommu device behind any transport: features, configuration space, memory, rings, reset.
//!
//! A transport (`transport::vhost_user`) turns the VMM's messages into calls of [`Device`], and hands over its
//! rings as [`ring::Ring`]. For each VMM it calls, in this order:
//!
//! 1. [`Device::prepare`], before it starts a worker thread.
//! 2. [`Device::connect`] when the VMM has connected, and [`Device::announce_vmm`] at the VMM's first message.
//! 3. The method that belongs to each message of the VMM. The worker calls `begin_event` at each of its events, and
//!    then `serve_kick`, `serve_wake` or [`Device::answer_watchdog`]. The first three are generic over the ring, and
//!    public to this crate alone, so that the compiler inlines the request path.
//! 4. [`Device::stop`] when the VMM has gone, and [`Device::disconnect`] after it has joined the worker.

pub mod acpi;
mod chain;
mod event_queue;
pub(crate) mod execute;
pub mod guest_memory;
mod interrupted;
#[cfg(test)]
pub(crate) mod plain_ring;
mod polling;
pub(crate) mod request_queue;
mod request_ring;
pub(crate) mod resume;
pub mod ring;
mod serve;
mod start_gate;
mod status;
mod stored_ring;
pub mod take_over;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod view;
mod vmm_refusal;
mod vmm_watcher;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::guest_memory::{check_regions, slots};
use crate::faults::Fault;
use crate::faults::log::FaultLog;
use crate::iommu::Iommu;
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::process::life::Life;
use crate::process::realtime::Realtime;
use crate::process::watchdog::Pulse;
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::probe::RESV_MEM_LEN;
use crate::protocol::wire::{
    VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_DOMAIN_RANGE, VIRTIO_IOMMU_F_INPUT_RANGE,
    VIRTIO_IOMMU_F_MAP_UNMAP, VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE,
};
use crate::{error_limited, warn_limited};

use self::acpi::TableState;
use self::execute::probe_size;
use self::polling::Polling;
use self::request_queue::RequestQueue;
use self::resume::RingState;
use self::ring::send_interrupts;
use self::start_gate::StartGate;
use self::stored_ring::StoredRing;
use self::vmm_refusal::VmmRefusal;

pub use self::vmm_watcher::VmmWatcher;

/// Index of the request queue.
pub const REQUEST_QUEUE: u16 = 0;
/// Index of the event queue.
pub const EVENT_QUEUE: u16 = 1;
/// Number of queues.
pub const QUEUES: usize = 2;
/// The longest ring a driver may use, in entries.
pub const MAX_QUEUE_SIZE: usize = 1024;

/// How the worker serves the request queue.
#[derive(Clone, Copy, Debug)]
pub struct WorkerSettings {
    /// The longest time for which it polls an empty request ring before it sleeps.
    pub longest_poll: Duration,
    /// The most requests it takes off the ring at a time.
    pub max_batch: usize,
    /// Its realtime priority, if it has one.
    pub realtime: Option<Realtime>,
}

/// The virtio-iommu device of one VM.
///
/// Lock order: the state of the QMP monitor, then `polling`, `requests`, `events`, `iommu`, and last the lock of a
/// ring. `memory` is a leaf: its holder takes no further lock.
pub struct Device {
    /// Guards the request queue between passes. Its holder may stop a ring or change memory: no pass is in progress.
    /// The worker unlocks it fairly, so a busy driver cannot keep other threads out.
    requests: Mutex<Requests>,
    /// Guards the event queue's ring. Its holder may change memory: no thread is writing a fault record.
    events: Mutex<Option<Arc<dyn StoredRing>>>,
    iommu: Arc<Mutex<Iommu>>,
    /// Guest memory, checked. The transport's own copy is not.
    memory: Mutex<Option<Arc<GuestMemoryMmap>>>,
    config: ConfigSpace,
    /// `bypass` as the configuration space shows it: a copy of the core's, so that reading it takes no lock.
    bypass: AtomicBool,
    features: AtomicU64,
    connected: AtomicBool,
    /// The VMM has sent its first message. A connection does not suffice: QEMU connects before it makes any device. It
    /// sends the first message when it makes this device, after the devices that precede it on the command line.
    announced: AtomicBool,
    /// Tells the worker to leave its loop. Set before the transport joins the worker's thread.
    shutdown: AtomicBool,
    /// Incremented when guest memory changes: a worker that polls must look the ring up again.
    memory_changes: AtomicU64,
    /// Only the worker locks it.
    polling: Mutex<Polling>,
    realtime: Option<Realtime>,
    /// The worker's thread is new and has not applied `realtime` yet.
    worker_is_new: AtomicBool,
    /// Wakes the worker to serve the request ring without a kick.
    wake: EventFd,
    /// The worker answers the watchdog through it.
    pulse: Arc<Pulse>,
    max_batch: usize,
    metrics: Arc<Metrics>,
    faults: FaultLog,
    /// Set by a transport that tells the guest its endpoints.
    table_state: Mutex<TableState>,
    /// What this process has taken over.
    life: OnceLock<Arc<Life>>,
    watcher: OnceLock<Arc<dyn VmmWatcher>>,
    refusal: OnceLock<VmmRefusal>,
    /// Holds back the requests of a driver that starts, if something is to be checked before.
    start_gate: OnceLock<StartGate>,
}

#[derive(Default)]
struct Requests {
    queue: RequestQueue,
    /// The same as `memory` of the device.
    memory: Option<Arc<GuestMemoryMmap>>,
    /// The request ring, once a pass has found it running.
    ring: Option<Box<dyn StoredRing>>,
    /// The state of the ring when the VMM stopped it, until a pass finds it running again.
    stopped: Option<RingState>,
}

impl Device {
    /// The device in front of `iommu`. No VMM is connected.
    ///
    /// # Errors
    /// The system has no event descriptor left.
    pub fn new(
        iommu: Arc<Mutex<Iommu>>,
        metrics: Arc<Metrics>,
        worker: WorkerSettings,
    ) -> io::Result<Self> {
        let (config, bypass) = {
            let mut iommu = iommu.lock();
            let probe_size = probe_size(iommu.topology().max_reserved_count());
            let probe_size = iommu.offer_probe_size(probe_size);
            let config = ConfigSpace {
                page_sizes: iommu.page_sizes(),
                input_range: iommu.input_range(),
                last_domain: iommu.last_domain(),
                probe_size,
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
            table_state: Mutex::new(Rank::TableState, TableState::default()),
            life: OnceLock::new(),
            watcher: OnceLock::new(),
            refusal: OnceLock::new(),
            start_gate: OnceLock::new(),
        })
    }

    /// Reports a refused access to the guest. If the driver has posted no buffer, the fault is dropped. Both outcomes
    /// are counted.
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
        let ring = events.clone();
        drop(events);
        if let Some(ring) = ring {
            send_interrupts(|| ring.send_interrupts());
        }
        if let Some(counter) = self.metrics.faults.get(fault.reason.index()) {
            counter.inc();
        }
        self.faults.add(*fault, delivered);
    }

    /// The last faults, delivered and dropped.
    pub fn faults(&self) -> &FaultLog {
        &self.faults
    }

    /// Counters.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Whether the guest has learnt its endpoints from this device.
    pub fn table_state(&self) -> TableState {
        *self.table_state.lock()
    }

    /// Records what became of the table that tells the guest its endpoints.
    pub fn set_table_state(&self, state: TableState) {
        *self.table_state.lock() = state;
    }

    /// The present memory of the connected VM.
    pub fn memory(&self) -> Option<Arc<GuestMemoryMmap>> {
        self.memory.lock().clone()
    }

    /// Whether a VMM is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Lets the worker of the next VMM serve. The transport must call this before it starts the worker's thread: the
    /// worker could otherwise take a kick and serve nothing.
    pub fn prepare(&self) {
        self.shutdown.store(false, Ordering::Release);
        self.worker_is_new.store(true, Ordering::Release);
    }

    /// A VMM has connected. [`Device::disconnect`] has cleared the state of the previous one.
    pub fn connect(&self) {
        self.connected.store(true, Ordering::Relaxed);
        self.metrics.connections.inc();
    }

    /// The VMM has reset the VM, and with it this device. Drops all domains at once, before firmware or the next
    /// driver does anything. Returns whether there were domains.
    ///
    /// If the ring is running, the new driver has already triggered this reset.
    pub fn reset_vm(&self) -> bool {
        let mut requests = self.requests.lock();
        let mut iommu = self.iommu.lock();
        match &mut requests.stopped {
            Some(stopped) => stopped.end_driver(),
            // No ring has run since the restore: the domains are those of the driver before the reset.
            None if iommu.is_interrupted() => {}
            // The driver of a refused state is gone.
            None if iommu.is_next_driver_foreign() => {}
            None => return false,
        }
        requests.queue.broken = false;
        let had_domains = iommu.domain_ids().next().is_some();
        iommu.reset_vm();
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        had_domains
    }

    /// The number of reserved regions of one endpoint that fit into PROBE's property list. The list cannot grow any
    /// more: the guest has read its size.
    pub fn probe_room(&self) -> usize {
        self.config.probe_size as usize / RESV_MEM_LEN
    }

    /// The descriptor that is readable when the worker must call `serve_wake`.
    pub fn wake_event(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// The watchdog's pulse. The worker must answer it; while no VMM is connected, the transport's own thread must.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Tells the worker to leave its loop. The transport can join its thread after this.
    pub fn stop(&self) {
        self.shutdown.store(true, Ordering::Release);
    }

    /// The VMM has gone and the worker's thread is joined. Clears all state of its VM.
    pub fn disconnect(&self) {
        let mut requests = self.requests.lock();
        self.close_start_gate(&requests);
        *requests = Requests::default();
        drop(requests);
        *self.events.lock() = None;
        *self.memory.lock() = None;
        self.features.store(0, Ordering::Relaxed);
        self.announced.store(false, Ordering::Relaxed);
        let mut iommu = self.iommu.lock();
        iommu.disconnect();
        iommu.note_features(0);
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        // Cleared last, so a holder of the core lock never sees half a teardown.
        self.connected.store(false, Ordering::Relaxed);
    }

    /// The VMM is about to share memory, and it holds the virtio device's state: if no ring has started since it
    /// connected, its driver may have domains that the device does not have. The core blocks the endpoints until a ring
    /// shows by its index whose driver it is.
    pub fn await_driver(&self) {
        // A stopped ring without a ring is of a driver that an earlier process has served.
        let is_new = |requests: &Requests| requests.ring.is_none() && requests.stopped.is_none();
        if is_new(&self.requests.lock()) {
            // Without a lock, because it may wait.
            self.tell_driver_start();
        }
        let requests = self.requests.lock();
        if is_new(&requests) {
            self.iommu.lock().await_driver();
        }
    }

    /// The feature bits that the device offers, without those of a transport.
    pub fn offered_features() -> u64 {
        // Not VIRTIO_RING_F_INDIRECT_DESC: with it a driver allocates and frees a table for each request, which costs
        // more than the two descriptors it saves. The device still serves a driver that uses tables: the driver may
        // have started on a device that offers them.
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

    /// The driver has accepted these feature bits. They may include the transport's own.
    pub fn accept_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
        self.iommu.lock().note_features(features);
    }

    /// `size` bytes of the configuration space from `offset`; zeroes past its end.
    pub fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config
            .read(self.bypass.load(Ordering::Relaxed), offset, size)
    }

    /// The driver writes `bytes` to the configuration space at `offset`. Only `bypass` is writable, and only until a
    /// driver runs that has not accepted BYPASS_CONFIG.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) {
        if let Some(bypass) = ConfigSpace::written_bypass(offset, bytes) {
            let requests = self.requests.lock();
            let features = self.features.load(Ordering::Acquire);
            // The worker may not have seen yet that a stopped ring runs again.
            let between_drivers = requests.stopped.is_some()
                && !requests.ring.as_ref().is_some_and(|ring| ring.is_running());
            let has_driver = features != 0 && !between_drivers;
            if has_driver && features & 1 << VIRTIO_IOMMU_F_BYPASS_CONFIG == 0 {
                warn_limited!(
                    "a write to `bypass` is ignored: the driver has not accepted BYPASS_CONFIG"
                );
                return;
            }
            let mut iommu = self.iommu.lock();
            iommu.set_bypass(bypass);
            self.bypass.store(bypass, Ordering::Relaxed);
        }
    }

    /// Replaces guest memory. On error the device has no guest memory.
    ///
    /// # Errors
    /// A region is refused, see [`check_regions`], or the system cannot say which file it is of.
    pub fn set_memory(&self, memory: Arc<GuestMemoryMmap>) -> io::Result<()> {
        let mut requests = self.requests.lock();
        let _no_fault = self.events.lock();
        match check_regions(&memory).and_then(|()| slots(&memory)) {
            Ok(slots) => self.iommu.lock().set_memory(slots),
            Err(cause) => {
                error_limited!("the VMM's memory is refused: {cause}");
                *self.memory.lock() = None;
                requests.memory = None;
                self.iommu.lock().set_memory(Vec::new());
                return Err(cause);
            }
        }
        *self.memory.lock() = Some(memory.clone());
        requests.memory = Some(memory);
        self.memory_changes.fetch_add(1, Ordering::Release);
        // Wake the worker: requests that were out of reach may be readable now, and the driver does not kick for them
        // again.
        requests.queue.broken = false;
        self.wake_worker()
    }

    /// Whether the VMM has shared memory.
    pub fn has_memory(&self) -> bool {
        let memory = self.memory.lock();
        memory
            .as_ref()
            .is_some_and(|memory| memory.num_regions() > 0)
    }

    /// The VMM has stopped the ring of queue `index`: [`LockedRing::is_running`](ring::LockedRing::is_running) is
    /// false. When this returns, no request of that ring is in progress.
    pub fn stop_ring(&self, index: u16) {
        if index != REQUEST_QUEUE {
            return;
        }
        let mut requests = self.requests.lock();
        self.close_start_gate(&requests);
        // A second stop before any pass must not replace the first: the first has the index that the last driver
        // reached.
        if requests.stopped.is_none()
            && let Some(ring) = &requests.ring
        {
            let features = self.features.load(Ordering::Acquire);
            requests.stopped = Some(ring.state(features, requests.queue.last_used));
        }
    }

    /// The driver or the VMM has reset the device. Drops all domains; `bypass` keeps its value. A transport that has
    /// rings of its own must have stopped them.
    pub fn reset(&self) {
        self.reset_core(Iommu::reset);
    }

    /// The VMM has reset the device together with the VM: as [`Self::reset`], and `bypass` returns to its value at
    /// boot. For transports that are told of it; [`Self::reset_vm`] is for news from elsewhere.
    pub fn reset_with_vm(&self) {
        self.reset_core(Iommu::reset_vm);
    }

    fn reset_core(&self, reset: impl FnOnce(&mut Iommu)) {
        let mut requests = self.requests.lock();
        self.close_start_gate(&requests);
        requests.queue = RequestQueue::default();
        requests.stopped = None;
        // The next pass asks for the index at which the ring starts.
        requests.ring = None;
        self.features.store(0, Ordering::Release);
        self.metrics.resets.inc();
        let mut iommu = self.iommu.lock();
        iommu.note_features(0);
        reset(&mut iommu);
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
    }

    /// Waits until no pass over a ring that the transport has stopped is in progress.
    pub fn wait_for_rings(&self) {
        drop(self.requests.lock());
        drop(self.events.lock());
    }

    /// Makes the worker serve the request ring, as if the driver had kicked.
    ///
    /// # Errors
    /// The event descriptor cannot be written to.
    pub fn wake_worker(&self) -> io::Result<()> {
        self.wake.write(1)
    }
}
