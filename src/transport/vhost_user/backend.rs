//! Turns vhost-user messages and the worker's events into calls of the device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::ring::VmmRing;
use crate::device::{Device, EVENT_QUEUE, MAX_QUEUE_SIZE, QUEUES, REQUEST_QUEUE};
use crate::error_limited;
use crate::locks::{Mutex, Rank};
use crate::process::sandbox::{self, Role};

/// Event number of [`Device::wake_event`]. The queues have 0 and 1, and the backend crate reserves 2 for itself.
const WAKE_EVENT: u16 = 3;
/// Event number of the watchdog's question.
const PULSE_EVENT: u16 = 4;

/// The device as a vhost-user backend. It serves all VMMs, one after the other.
pub struct VhostUserDevice {
    device: Arc<Device>,
    /// Descriptors that the backend crate leaks, see [`VhostUserDevice::take_leaked`].
    exit_consumers: Mutex<Vec<RawFd>>,
}

impl VhostUserDevice {
    /// The backend in front of `device`.
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            exit_consumers: Mutex::new(Rank::ExitConsumers, Vec::new()),
        }
    }

    /// The descriptors that the backend crate has leaked since the last call: it forgets the consumers of the exit
    /// events. The caller must close them once the connection's daemon is dropped.
    pub(super) fn take_leaked(&self) -> Vec<RawFd> {
        std::mem::take(&mut *self.exit_consumers.lock())
    }

    /// The device's descriptors that the worker waits for besides the kicks, each with its event number.
    pub(super) fn own_events(&self) -> [(RawFd, u16); 2] {
        [
            (self.device.wake_event(), WAKE_EVENT),
            (self.device.pulse().event(), PULSE_EVENT),
        ]
    }
}

impl VhostUserBackend for VhostUserDevice {
    type Bitmap = ();
    type Vring = VmmRing;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    /// Most VMMs ask for the features first, so this enters the sandbox of the thread that receives messages.
    fn features(&self) -> u64 {
        sandbox::enter(Role::VhostUser);
        VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | Device::offered_features()
    }

    fn acked_features(&self, features: u64) {
        self.device.accept_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.device.announce_vmm();
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    /// Ends all domains at once. A VMM that sends RESET_DEVICE (OpenVMM) has stopped the rings before, and keeps its
    /// memory table.
    fn reset_device(&self) {
        self.device.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The backend crate also sets it in the rings, where the device reads it.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.device.read_config(offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.device.write_config(offset, bytes);
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // Frontends may skip GET_FEATURES.
        sandbox::enter(Role::VhostUser);
        self.device.announce_vmm();
        self.device.await_driver();
        self.device.set_memory(memory.memory().into_inner())
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
        if let Ok(index) = u16::try_from(index) {
            self.device.stop_ring(index);
        }
        Ok(())
    }

    /// Never fails: on an error the backend crate would end the worker's thread silently.
    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        rings: &[VmmRing],
        _thread: usize,
    ) -> io::Result<()> {
        sandbox::enter(Role::Worker);
        if let Some(ring) = rings.first() {
            ring.connection().end_with_this_thread();
        }
        if let Some(events) = rings.get(usize::from(EVENT_QUEUE)) {
            self.device.begin_event(events);
        }
        // A kick of the event queue needs no action: a fault that finds no buffer is dropped, not kept for the next
        // one.
        match (event, rings.get(usize::from(REQUEST_QUEUE))) {
            (REQUEST_QUEUE, Some(requests)) => self.device.serve_kick(requests),
            (WAKE_EVENT, Some(requests)) => self.device.serve_wake(requests),
            (PULSE_EVENT, _) => self.device.answer_watchdog(),
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::device;

    #[test]
    fn the_vmm_counts_as_present_from_its_first_message() {
        for first in [
            |vmm: &VhostUserDevice| {
                vmm.protocol_features();
            },
            |vmm: &VhostUserDevice| {
                let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
                vmm.update_memory(memory).expect("no memory");
            },
        ] {
            let (device, recorder) = device();
            let vmm = VhostUserDevice::new(device.clone());
            device.connect();
            assert!(!recorder.state().connected);
            first(&vmm);
            assert!(recorder.state().connected);
            device.disconnect();
            assert!(!recorder.state().connected);
        }
    }

    #[test]
    fn the_offer_is_the_devices_features_and_protocol_features() {
        let (device, _) = device();
        let features = VhostUserDevice::new(device).features();
        let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(features, own | Device::offered_features());
        assert_eq!(own & Device::offered_features(), 0);
    }
}
