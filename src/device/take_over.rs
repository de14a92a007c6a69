//! Going on with the driver of an earlier process, once the core is restored, and leaving it to a later one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::resume::RingState;
use super::view::GuestView;
use super::{Device, MAX_QUEUE_SIZE, request_ring};
use crate::process::life::Life;

/// How long [`Device::wait_for_interrupted`] waits.
const PATIENCE: Duration = Duration::from_secs(1);

/// A request ring that the VMM has stopped, for a pause or for a reset of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoppedRing {
    /// The index at which it was stopped.
    pub next_avail: u16,
    /// Its entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

impl Device {
    /// Notes in `life` when the guest's requests are answered again. Only the first call has an effect.
    pub fn record_life(&self, life: Arc<Life>) {
        // Fails if there is one.
        let _ = self.life.set(life);
    }

    /// Notes that no later process can go on after this one.
    pub fn forgo_restart(&self) {
        self.iommu.lock().forgo_restart();
        if let Some(life) = self.life.get() {
            life.forgo();
        }
    }

    /// The request ring that starts next has a driver whose domains the core does not have: that of a process whose state was
    /// refused. Without this, a ring that happens to be at index 0 would count as that of a new driver.
    pub fn distrust_next_driver(&self) {
        self.iommu.lock().distrust_next_driver();
    }

    /// Waits until no batch is in progress, up to `patience`, and keeps all others from beginning for the rest of this
    /// process. Returns whether that succeeded.
    pub fn hold(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let left = || deadline.saturating_duration_since(Instant::now());
        self.requests.hold(left()) && self.events.hold(left()) && self.iommu.hold(left())
    }

    /// Takes over what the device has of the restored core. `stopped` is the request ring if the VMM had stopped it when the
    /// earlier process died: the index at which it starts again tells whether its driver resumes.
    ///
    /// The transport must call this after the restore, when the device has its memory and features, and before the ring
    /// runs.
    pub fn take_over(&self, stopped: Option<StoppedRing>) {
        let memory = self.memory();
        let features = self.features.load(Ordering::Acquire);
        let mut requests = self.requests.lock();
        let mut iommu = self.iommu.lock();
        self.bypass.store(iommu.bypass(), Ordering::Relaxed);
        if stopped.is_none() && iommu.is_driver_unknown() {
            // Its ring has not been stopped, so the one that starts next is its ring.
            iommu.distrust_next_driver();
        }
        // Without a batch the ring has served no request, and its first start tells whose it is. A batch that is not
        // finished is finished when the ring runs.
        let batch = iommu
            .interrupted()
            .and_then(|interrupted| interrupted.batch);
        let finished = batch.filter(|batch| batch.count == 0);
        let (Some(stopped), Some(memory), Some(finished)) = (stopped, memory, finished) else {
            return;
        };
        iommu.take_interrupted();
        let Some(mut queue) = stopped.queue() else {
            return;
        };
        let view = GuestView::new(&memory);
        // Not the index that the VMM was told: it may have set that of the next start already.
        queue.set_next_avail(finished.next_avail);
        queue.set_next_used(request_ring::used_index(&queue, &view).unwrap_or(0));
        requests.queue.last_used = request_ring::last_used(&queue, &view);
        let state = RingState::of_queue(&queue, features, requests.queue.last_used);
        requests.stopped = Some(state);
    }

    /// The index at which the request ring goes on, if an earlier process has served it: all requests before it are
    /// answered.
    pub fn interrupted_base(&self) -> Option<u16> {
        let iommu = self.iommu.lock();
        Some(iommu.interrupted()?.batch?.next_avail)
    }

    /// Waits until the worker has begun to finish the batch of the earlier process, up to a second: only then the VMM may
    /// stop the ring and start it for another driver.
    pub fn wait_for_interrupted(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.iommu.lock().is_interrupted() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl StoppedRing {
    fn queue(&self) -> Option<Queue> {
        let size = u16::try_from(MAX_QUEUE_SIZE).ok()?;
        let mut queue = Queue::new(size).ok()?;
        queue.try_set_size(self.size).ok()?;
        let at = GuestAddress;
        queue
            .try_set_desc_table_address(at(self.descriptors))
            .ok()?;
        queue.try_set_avail_ring_address(at(self.available)).ok()?;
        queue.try_set_used_ring_address(at(self.used)).ok()?;
        queue.set_next_avail(self.next_avail);
        Some(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::super::plain_ring::{AVAIL_AT, USED_AT};
    use super::super::ring::Ring;
    use super::super::testing::{Bed, RING_SIZE, attach, map, unmap};
    use super::*;
    use crate::protocol::reply::Status;

    const OK: u8 = Status::Ok as u8;

    /// A driver with a mapping, whose ring was stopped before the process died.
    fn stopped_and_restarted() -> (Bed, StoppedRing) {
        let mut bed = Bed::new();
        assert_eq!(bed.request(&attach(1)), OK);
        assert_eq!(bed.request(&map(1, 0x1000)), OK);
        let at = bed.requests.ring.lock().queue.desc_table();
        bed.stop();
        bed.restart(None);
        let stopped = StoppedRing {
            next_avail: 2,
            size: RING_SIZE,
            descriptors: at,
            available: at + AVAIL_AT,
            used: at + USED_AT,
        };
        assert_eq!(bed.device.interrupted_base(), Some(2));
        (bed, stopped)
    }

    #[test]
    fn a_driver_that_was_paused_when_the_process_died_resumes() {
        let (mut bed, stopped) = stopped_and_restarted();
        bed.device.take_over(Some(stopped));
        assert_eq!(bed.device.interrupted_base(), None);
        // The VMM shares its memory again before it starts the ring.
        bed.device.await_driver();
        bed.share_memory();
        bed.requests.ring.lock().queue.set_next_avail(2);
        bed.requests.ring.lock().queue.set_next_used(2);
        assert_eq!(bed.request(&unmap(1, 0x1000)), OK);
    }

    #[test]
    fn a_new_driver_after_the_death_starts_anew() {
        let (mut bed, stopped) = stopped_and_restarted();
        bed.device.take_over(Some(stopped));
        bed.device.await_driver();
        bed.share_memory();
        bed.start_new_driver();
        assert_eq!(bed.request(&unmap(1, 0x1000)), Status::NoEnt as u8);
        assert_eq!(bed.request(&attach(1)), OK);
    }

    /// A refused driver whose ring is at index 0, as a new driver's would be.
    fn refused() -> Bed {
        let bed = Bed::new();
        bed.device.iommu.lock().block_unknown_driver();
        bed
    }

    #[test]
    fn the_distrust_of_the_next_driver_outlives_the_process() {
        let mut bed = refused();
        bed.device.distrust_next_driver();
        for _ in 0..2 {
            bed.restart(None);
            // The ring was stopped when the process died.
            let at = bed.requests.ring.lock().queue.desc_table();
            bed.device.take_over(Some(StoppedRing {
                next_avail: 0,
                size: RING_SIZE,
                descriptors: at,
                available: at + AVAIL_AT,
                used: at + USED_AT,
            }));
        }
        assert_ne!(bed.request(&attach(1)), OK);
        assert!(bed.device.iommu.lock().is_driver_unknown());
        assert!(!bed.device.iommu.lock().is_next_driver_foreign());
        bed.stop();
        bed.start_new_driver();
        assert_eq!(bed.request(&attach(1)), OK);
    }

    #[test]
    fn a_reset_ends_the_distrust_for_later_processes_too() {
        let ends: [fn(&Bed); 3] = [
            |bed| bed.device.reset(),
            |bed| assert!(!bed.device.reset_vm(), "there were no domains"),
            |bed| {
                bed.disconnect();
                bed.connect();
            },
        ];
        for end in ends {
            let mut bed = refused();
            bed.device.distrust_next_driver();
            end(&bed);
            bed.restart(None);
            bed.device.take_over(None);
            assert_eq!(bed.request(&attach(1)), OK);
        }
    }

    #[test]
    fn the_running_ring_of_an_unknown_driver_stays_unknown() {
        let mut bed = refused();
        bed.restart(None);
        bed.device.take_over(None);
        assert_ne!(bed.request(&attach(1)), OK);
        assert!(bed.device.iommu.lock().is_driver_unknown());
    }

    #[test]
    fn the_device_shows_the_bypass_of_the_restored_core() {
        const BYPASS: u32 = 36;
        let mut bed = Bed::new();
        bed.device.iommu.lock().set_bypass(false);
        assert_eq!(bed.request(&attach(1)), OK);
        bed.restart(None);
        bed.device.bypass.store(true, Ordering::Relaxed);
        bed.device.take_over(None);
        assert_eq!(bed.device.read_config(BYPASS, 1), [0]);
        // The ring that was running goes on by itself.
        assert_eq!(bed.request(&map(1, 0x1000)), OK);
    }
}
