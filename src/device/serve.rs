//! The device's methods for the worker, which serves the request ring at the transport's events.
//!
//! The generic methods are `pub(crate)`, not `pub`. Another crate could instantiate a public generic method, so the
//! compiler would have to export the functions that the method calls. It would then no longer inline functions with a
//! single caller.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::debug;

use vm_memory::GuestMemoryMmap;

use super::execute::Context;
use super::polling::{PollOutcome, Polling};
use super::request_queue::{Pass, RequestQueue};
use super::request_ring::{self, NextChain};
use super::resume::{Restart, RingState};
use super::ring::{LockedRing, Ring, send_interrupts};
use super::view::GuestView;
use super::{Device, Requests};
use crate::iommu::Iommu;
use crate::locks::MutexGuard;
use crate::process::realtime::Realtime;
use crate::{info_limited, warn_limited};

impl Device {
    /// Prepares the worker for an event of any kind. `events` is the event queue's ring. The worker must call this
    /// before it handles the event.
    pub(crate) fn begin_event(&self, events: &impl Ring) {
        self.events
            .lock()
            .get_or_insert_with(|| Arc::new(events.clone()));
        if self.worker_is_new.load(Ordering::Relaxed) {
            self.worker_is_new.store(false, Ordering::Relaxed);
            if let Some(Err(cause)) = self.realtime.map(Realtime::apply) {
                warn_limited!("the worker has no realtime priority: {cause}");
            }
        }
    }

    /// Answers the watchdog's question whether the worker is alive.
    pub fn answer_watchdog(&self) {
        // Prove liveness by taking every lock a request takes.
        drop(self.requests.lock());
        drop(self.iommu.lock());
        self.pulse.answer();
    }

    /// The driver has kicked the request queue. `ring` is its ring.
    pub(crate) fn serve_kick(&self, ring: &impl Ring) {
        self.metrics.wakeups.inc();
        self.polling.lock().woken();
        self.serve_requests(ring);
    }

    /// [`Device::wake_event`] is readable. `ring` is the request queue's ring.
    pub(crate) fn serve_wake(&self, ring: &impl Ring) {
        // Ignored: the read fails if an earlier event has read the descriptor already.
        let _ = self.wake.read();
        self.serve_requests(ring);
    }

    /// Serves the request ring until it stays empty for a polling window. Then asks the driver for a kick with its
    /// next request.
    fn serve_requests(&self, ring: &impl Ring) {
        let mut polling = self.polling.lock();
        {
            let requests = self.requests.lock();
            if let Some(memory) = &requests.memory {
                requests.queue.disable_notifications(ring, memory);
            }
        }
        loop {
            if self.shutdown.load(Ordering::Acquire) {
                return;
            }
            // Answer the watchdog here, too: a driver that is never idle keeps the worker in this loop.
            self.pulse.answer();
            match self.serve_batch(ring) {
                Pass::Served => {}
                Pass::Stopped => return,
                Pass::Empty if self.poll(ring, &mut polling) => {}
                Pass::Empty if self.enable_notifications(ring) => {}
                Pass::Empty => return,
            }
        }
    }

    /// Polls the ring without a lock that another thread may wait for. Returns whether there may be a request.
    fn poll(&self, ring: &impl Ring, polling: &mut Polling) -> bool {
        // Load the number before the memory. If memory changes in between, the number differs and polling ends. If
        // the number were loaded last, the worker would poll the old memory unnoticed.
        let changes = self.memory_changes.load(Ordering::Acquire);
        let (memory, last_chain) = {
            let requests = self.requests.lock();
            (requests.memory.clone(), requests.queue.last_chain())
        };
        let Some(memory) = memory else {
            return false;
        };
        let view = GuestView::new(&memory);
        let next = NextChain::of(ring.lock().queue());
        let outcome = polling.poll(|| {
            if next.is_due(&view) {
                // Prefetch all lines at once, not each line when the one before has been read. A single request takes
                // most of its time to fetch the cache lines that the driver's processor has just written.
                next.prefetch(&view);
                last_chain.prefetch(&view);
                return true;
            }
            self.shutdown.load(Ordering::Relaxed)
                || self.memory_changes.load(Ordering::Relaxed) != changes
        });
        match outcome {
            PollOutcome::Hit(gap) => {
                self.metrics.polls_paid.inc();
                let gap = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
                self.metrics.polls_paid_ns.add(gap);
            }
            PollOutcome::Expired => self.metrics.polls_unpaid.inc(),
            PollOutcome::Skipped => {}
        }
        matches!(outcome, PollOutcome::Hit(_))
    }

    /// See [`RequestQueue::enable_notifications`].
    fn enable_notifications(&self, ring: &impl Ring) -> bool {
        let requests = self.requests.lock();
        let memory = requests.memory.as_ref();
        memory.is_some_and(|memory| requests.queue.enable_notifications(ring, memory))
    }

    /// Serves one batch of requests.
    fn serve_batch(&self, ring: &impl Ring) -> Pass {
        let mut requests = self.requests.lock();
        let Some(memory) = requests.memory.clone() else {
            return Pass::Stopped;
        };
        if requests.stopped.is_some() || requests.ring.is_none() {
            // Wait until the ring runs: the VMM sets the index, which `restart` needs, before it starts the ring.
            if !ring.lock().is_running() {
                return Pass::Stopped;
            }
            // A driver that an earlier process has served goes on at once.
            if let Some(gate) = self.start_gate.get()
                && !self.iommu.lock().is_interrupted()
                && !gate.enter()
            {
                // The worker serves the ring when the check is done.
                return Pass::Stopped;
            }
            let interrupted = {
                let mut iommu = self.iommu.lock();
                if iommu.is_interrupted() {
                    let view = GuestView::new(&memory);
                    let used = request_ring::used_index(ring.lock().queue(), &view);
                    if used.is_none() {
                        // The worker serves the ring again when memory changes.
                        return Pass::Stopped;
                    }
                }
                iommu.take_interrupted()
            };
            if let Some(interrupted) = interrupted
                && interrupted.batch.is_some()
            {
                // An earlier process has served this driver.
                requests.ring = Some(Box::new(ring.clone()));
                let mut iommu = self.iommu.lock();
                let mut context = self.context(&mut iommu, &memory);
                let pass = requests
                    .queue
                    .finish_interrupted(ring, &mut context, interrupted);
                MutexGuard::unlock_fair(iommu);
                MutexGuard::unlock_fair(requests);
                send_interrupts(|| ring.send_interrupts());
                if let Some(life) = self.life.get() {
                    life.resume();
                }
                return pass;
            }
            self.start_ring(&mut requests, ring, &memory);
            if requests.ring.is_none() {
                requests.ring = Some(Box::new(ring.clone()));
                // The driver runs, so the VMM has made all its devices.
                self.iommu.lock().retarget_unattached();
            }
        }
        let mut iommu = self.iommu.lock();
        let mut context = self.context(&mut iommu, &memory);
        let pass = requests.queue.serve(ring, &mut context);
        MutexGuard::unlock_fair(iommu);
        MutexGuard::unlock_fair(requests);
        send_interrupts(|| ring.send_interrupts());
        pass
    }

    #[inline]
    fn context<'a>(&'a self, iommu: &'a mut Iommu, memory: &'a GuestMemoryMmap) -> Context<'a> {
        Context {
            iommu,
            memory,
            features: self.features.load(Ordering::Acquire),
            config: &self.config,
            metrics: &self.metrics,
            max_batch: self.max_batch,
        }
    }

    /// The request ring runs for the first time, or again after a stop. Its driver is new, resumes, or is unknown.
    fn start_ring(&self, requests: &mut Requests, ring: &impl Ring, memory: &GuestMemoryMmap) {
        requests.queue.broken = false;
        let running = RingState::of(
            ring,
            self.features.load(Ordering::Acquire),
            requests.queue.last_used,
        );
        let stopped = requests.stopped.take();
        let is_foreign = self.iommu.lock().is_next_driver_foreign();
        let driver = match &stopped {
            None if is_foreign => Restart::UnknownDriver,
            Some(stopped) => stopped.compare(&running, memory),
            None => running.first_start(),
        };
        match driver {
            Restart::Resumed => debug!("the request ring goes on at {}", running.next_avail),
            // `serve_batch` switches the endpoints.
            Restart::NewDriver if stopped.is_none() => self.iommu.lock().driver_has_started(),
            Restart::NewDriver => {
                info_limited!("a new driver has started the device: all domains are gone");
                requests.queue = RequestQueue::default();
                self.metrics.resets.inc();
                self.iommu.lock().reset();
            }
            Restart::UnknownDriver => {
                warn_limited!(
                    "the request ring starts at index {}: its driver has domains that this daemon does not have, \
                     because the daemon was restarted or the VM was restored; all endpoints are blocked until a \
                     driver starts anew: reset the VM",
                    running.next_avail
                );
                requests.queue = RequestQueue::default();
                self.iommu.lock().block_unknown_driver();
            }
        }
        if is_foreign {
            self.iommu.lock().next_driver_has_started();
        }
    }
}
