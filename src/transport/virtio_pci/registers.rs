//! The registers in BAR 0 as the driver sees them.
//!
//! The client's thread owns them. What the worker needs is in the rings and the interrupts.
//!
//! An access may have any width. A write changes a field only if it covers the field, or an aligned half of a 64-bit
//! field: other writes have no meaning in the specification.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Error as QueueError;

use super::fields::{copy, covers, field, write_address};
use super::interrupts::PciInterrupts;
use super::layout::{
    COMMON_BYTES, DEVICE_BYTES, NOTIFY_MULTIPLIER, Structure, TABLE_BYTES, VECTORS,
};
use super::ring::{PciRing, RingPlace};
use crate::device::{Device, EVENT_QUEUE, MAX_QUEUE_SIZE, QUEUES, REQUEST_QUEUE};
use crate::warn_limited;

pub(super) const ACKNOWLEDGE: u8 = status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
pub(super) const DRIVER: u8 = status(VIRTIO_CONFIG_S_DRIVER);
pub(super) const DRIVER_OK: u8 = status(VIRTIO_CONFIG_S_DRIVER_OK);
pub(super) const FEATURES_OK: u8 = status(VIRTIO_CONFIG_S_FEATURES_OK);
const NEEDS_RESET: u8 = status(VIRTIO_CONFIG_S_NEEDS_RESET);
pub(super) const FAILED: u8 = status(VIRTIO_CONFIG_S_FAILED);

/// The largest size of a queue, which it has after a reset.
#[expect(clippy::cast_possible_truncation, reason = "1024")]
pub(super) const LONGEST: u16 = MAX_QUEUE_SIZE as u16;
const _: () = assert!(LONGEST as usize == MAX_QUEUE_SIZE);

#[expect(clippy::cast_possible_truncation, reason = "the register has 8 bits")]
const fn status(bit: u32) -> u8 {
    bit as u8
}

/// What the client's thread must do after a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Consequence {
    /// The driver has kicked the request queue.
    pub(super) kicked: bool,
    /// The device may use its rings now: the worker must serve what is in them.
    pub(super) started: bool,
}

/// The registers in BAR 0.
pub(super) struct Registers {
    pub(super) device: Arc<Device>,
    pub(super) interrupts: Arc<PciInterrupts>,
    pub(super) rings: [PciRing; QUEUES],
    /// The driver lets the device reach memory: bus master, in the PCI command register.
    pub(super) is_bus_master: bool,
    /// The device has resumed and does not go on yet: it must not use its rings.
    pub(super) is_held: bool,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: [QueueRegisters; QUEUES],
    pub(super) generation: u8,
    /// The device configuration when the driver last read a part of it, or its generation.
    pub(super) seen_config: Vec<u8>,
    /// The MSI-X table as the driver has written it. The VMM emulates its own.
    pub(super) table: [u8; TABLE_BYTES as usize],
}

/// The fields of one queue.
#[derive(Clone, Copy)]
pub(super) struct QueueRegisters {
    pub(super) place: RingPlace,
    pub(super) is_enabled: bool,
}

impl Default for QueueRegisters {
    fn default() -> Self {
        Self {
            place: RingPlace {
                size: LONGEST,
                descriptors: 0,
                available: 0,
                used: 0,
            },
            is_enabled: false,
        }
    }
}

impl Registers {
    /// The registers after a reset.
    ///
    /// # Errors
    /// See [`PciRing::new`].
    pub(super) fn new(device: Arc<Device>) -> Result<Self, QueueError> {
        let interrupts = Arc::new(PciInterrupts::new(device.metrics().clone()));
        let ring = |queue: u16| PciRing::new(queue.into(), interrupts.clone());
        let seen_config = device.read_config(0, DEVICE_BYTES);
        Ok(Self {
            device,
            rings: [ring(REQUEST_QUEUE)?, ring(EVENT_QUEUE)?],
            interrupts,
            is_bus_master: false,
            is_held: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: [QueueRegisters::default(); QUEUES],
            generation: 0,
            seen_config,
            table: masked_table(),
        })
    }

    pub(super) fn interrupts(&self) -> &Arc<PciInterrupts> {
        &self.interrupts
    }

    /// The rings of the request queue and of the event queue.
    pub(super) fn rings(&self) -> &[PciRing; QUEUES] {
        &self.rings
    }

    /// Reads from `offset` on. Bytes between the structures are zero.
    pub(super) fn read(&mut self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        for (structure, at, part) in Structure::parts(offset, into.len()) {
            let Some(into) = into.get_mut(part) else {
                continue;
            };
            match structure {
                Structure::Common => copy(&self.common(covers(at, into.len(), 21, 1)), at, into),
                Structure::Isr => copy(&[self.interrupts.take_isr()], at, into),
                Structure::Device => {
                    self.update_generation();
                    copy(&self.seen_config, at, into);
                }
                Structure::Notify => {}
                Structure::Table => copy(&self.table, at, into),
                Structure::Pending => {
                    copy(&self.interrupts.pending_bits().to_le_bytes(), at, into);
                }
            }
        }
    }

    /// Writes from `offset` on.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Consequence {
        let mut consequence = Consequence::default();
        for (structure, at, part) in Structure::parts(offset, data.len()) {
            let Some(data) = data.get(part) else { continue };
            match structure {
                Structure::Common => consequence.started |= self.write_common(at, data),
                Structure::Device => {
                    let at = u32::try_from(at).unwrap_or(u32::MAX);
                    self.device.write_config(at, data);
                }
                Structure::Notify => consequence.kicked |= self.kick(at, data.len()),
                Structure::Table => {
                    for (byte, new) in self.table.iter_mut().skip(at).zip(data) {
                        *byte = *new;
                    }
                }
                // Read-only.
                Structure::Isr | Structure::Pending => {}
            }
        }
        // A write may have made the device need a reset.
        self.interrupts.send();
        consequence
    }

    /// The driver changes bus mastering. Returns whether the device may use its rings now.
    pub(super) fn set_bus_master(&mut self, is_bus_master: bool) -> bool {
        if self.is_bus_master == is_bus_master {
            return false;
        }
        self.is_bus_master = is_bus_master;
        self.update_rings()
    }

    /// The driver resets the device.
    // PCI-9: when this returns, no request is in progress, and the registers have their initial values.
    pub(super) fn reset(&mut self) {
        self.stop_rings();
        self.device.reset();
        self.clear();
    }

    /// The VMM resets the device, together with the VM or before it gives it to the guest.
    pub(super) fn reset_with_vm(&mut self) {
        self.stop_rings();
        self.device.reset_with_vm();
        self.clear();
        self.table = masked_table();
        self.is_bus_master = false;
    }

    /// The VMM has gone; the caller has told the device so.
    pub(super) fn release(&mut self) {
        self.clear();
        self.interrupts.clear();
        self.table = masked_table();
        self.is_bus_master = false;
        self.is_held = false;
    }

    /// The device goes on after it has resumed. Returns whether it may use its rings now.
    pub(super) fn go_on(&mut self) -> bool {
        self.is_held = false;
        self.update_rings()
    }

    /// The device must not use its rings any more.
    pub(super) fn stop_rings(&self) {
        for ring in &self.rings {
            ring.stop();
        }
    }

    fn clear(&mut self) {
        for ring in &self.rings {
            ring.clear();
        }
        self.interrupts.reset();
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.queue_select = 0;
        self.queues = [QueueRegisters::default(); QUEUES];
    }

    /// The common configuration. `shows_generation` says whether the driver reads `config_generation`.
    fn common(&mut self, shows_generation: bool) -> [u8; COMMON_BYTES as usize] {
        if shows_generation {
            self.update_generation();
        }
        let word = |bits: u64, select: u32| match select {
            0 => bits.to_le_bytes().first_chunk().copied(),
            1 => bits.to_le_bytes().last_chunk().copied(),
            _ => None,
        };
        let offered = Device::offered_features();
        // PCI-6: a window beyond the 64 bits has none.
        let device_feature: [u8; 4] = word(offered, self.device_feature_select).unwrap_or_default();
        // PCI-7
        let driver_feature: [u8; 4] =
            word(self.driver_features, self.driver_feature_select).unwrap_or_default();
        let index = usize::from(self.queue_select);
        let queue = self.queues.get(index).copied();
        // PCI-11: a queue that does not exist has size 0.
        let place = queue.map_or(
            RingPlace {
                size: 0,
                descriptors: 0,
                available: 0,
                used: 0,
            },
            |queue| queue.place,
        );
        let is_enabled = queue.is_some_and(|queue| queue.is_enabled);
        let mut status = self.status;
        if self.interrupts.needs_reset() {
            status |= NEEDS_RESET;
        }
        let notify_off = queue.map_or(0, |_| self.queue_select);
        let mut bytes = [0; COMMON_BYTES as usize];
        let mut at = 0;
        for field in [
            &self.device_feature_select.to_le_bytes()[..],
            &device_feature,
            &self.driver_feature_select.to_le_bytes(),
            &driver_feature,
            &self.interrupts.config_vector().to_le_bytes(),
            &u16::try_from(QUEUES).unwrap_or(0).to_le_bytes(),
            &[status, self.generation],
            &self.queue_select.to_le_bytes(),
            &place.size.to_le_bytes(),
            &self.interrupts.queue_vector(index).to_le_bytes(),
            &u16::from(is_enabled).to_le_bytes(),
            &notify_off.to_le_bytes(),
            &place.descriptors.to_le_bytes(),
            &place.available.to_le_bytes(),
            &place.used.to_le_bytes(),
        ] {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
            at += field.len();
        }
        bytes
    }

    /// Changes `config_generation` if the device configuration has changed since the driver last looked.
    // PCI-8
    fn update_generation(&mut self) {
        let config = self.device.read_config(0, DEVICE_BYTES);
        if config != self.seen_config {
            self.seen_config = config;
            self.generation = self.generation.wrapping_add(1);
        }
    }

    /// Writes to the common configuration. Returns whether the device may use its rings now.
    fn write_common(&mut self, at: usize, data: &[u8]) -> bool {
        let mut started = false;
        if let Some(select) = field(at, data, 0).map(u32::from_le_bytes) {
            self.device_feature_select = select;
        }
        if let Some(select) = field(at, data, 8).map(u32::from_le_bytes) {
            self.driver_feature_select = select;
        }
        if let Some(features) = field(at, data, 12).map(u32::from_le_bytes) {
            self.set_driver_features(features);
        }
        if let Some(vector) = field(at, data, 16).map(u16::from_le_bytes) {
            self.interrupts.map_config(vector);
        }
        if let Some([status]) = field(at, data, 20) {
            started |= self.set_status(status);
        }
        if let Some(select) = field(at, data, 22).map(u16::from_le_bytes) {
            self.queue_select = select;
        }
        let index = usize::from(self.queue_select);
        if let Some(size) = field(at, data, 24).map(u16::from_le_bytes)
            && size.is_power_of_two()
            && size <= LONGEST
        {
            // PCI-12: the driver may make a queue smaller.
            self.change_place(|place| place.size = size);
        }
        if let Some(vector) = field(at, data, 26).map(u16::from_le_bytes) {
            self.interrupts.map_queue(index, vector);
        }
        // Before `queue_enable`, which stands before them: a write of the whole structure sets up the queue.
        self.change_place(|place| {
            for (address, offset) in [
                (&mut place.descriptors, 32),
                (&mut place.available, 40),
                (&mut place.used, 48),
            ] {
                write_address(address, at, data, offset);
            }
        });
        if let Some(1) = field(at, data, 28).map(u16::from_le_bytes) {
            started |= self.enable_queue();
        }
        started
    }

    /// Changes the selected queue, unless it is enabled.
    fn change_place(&mut self, change: impl FnOnce(&mut RingPlace)) {
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = queue.filter(|queue| !queue.is_enabled) {
            change(&mut queue.place);
        }
    }

    fn set_driver_features(&mut self, word: u32) {
        // The driver must not change them once FEATURES_OK is set.
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let (shift, kept) = match self.driver_feature_select {
            0 => (0, !0 << 32),
            1 => (32, !0 >> 32),
            _ => return,
        };
        self.driver_features = self.driver_features & kept | u64::from(word) << shift;
    }

    /// Returns whether the device may use its rings now.
    fn set_status(&mut self, status: u8) -> bool {
        if status == 0 {
            self.reset();
            return false;
        }
        // The driver must not clear a bit, except by a reset.
        let before = self.status;
        self.status |= status & (ACKNOWLEDGE | DRIVER | FAILED);
        if status & FEATURES_OK != 0 && before & FEATURES_OK == 0 && self.accepts_features() {
            self.status |= FEATURES_OK;
            self.device.accept_features(self.driver_features);
        }
        if status & DRIVER_OK == 0 || before & DRIVER_OK != 0 {
            return false;
        }
        if self.status & FEATURES_OK == 0 {
            warn_limited!(
                "the driver has started the device without negotiating features: the device needs a reset"
            );
            self.interrupts.request_reset();
        }
        self.status |= DRIVER_OK;
        self.interrupts.set_driver_ok();
        self.update_rings()
    }

    /// Whether the driver has accepted features that it can accept.
    // STATUS-3: FEATURES_OK stays clear if the driver accepts bits that were not offered, or not VERSION_1.
    fn accepts_features(&self) -> bool {
        self.driver_features & !Device::offered_features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    // A write of 1 enables the queue; it takes a reset to disable it.
    fn enable_queue(&mut self) -> bool {
        let index = usize::from(self.queue_select);
        let (Some(queue), Some(ring)) = (self.queues.get_mut(index), self.rings.get(index)) else {
            return false;
        };
        if queue.is_enabled {
            return false;
        }
        queue.is_enabled = true;
        if let Err(cause) = ring.enable(&queue.place) {
            warn_limited!("queue {index} cannot be enabled, so the device needs a reset: {cause}");
            self.interrupts.request_reset();
        }
        self.update_rings()
    }

    /// Lets the device use its rings if the driver has started it. Returns whether it may use them.
    // STATUS-1: no buffer is used before DRIVER_OK.
    fn update_rings(&mut self) -> bool {
        let has_driver = self.status & (DRIVER_OK | FEATURES_OK) == DRIVER_OK | FEATURES_OK;
        let is_live = has_driver && self.is_bus_master && !self.is_held;
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        if is_live {
            self.check_reach();
        }
        for ring in &self.rings {
            ring.set_live(is_live, event_idx);
        }
        if !is_live {
            self.device.wait_for_rings();
        }
        is_live
    }

    /// The driver needs to know if it has put a ring where there is no memory: such a ring would be silent.
    fn check_reach(&self) {
        let memory = self.device.memory();
        let lost = self
            .rings
            .iter()
            .position(|ring| ring.is_out_of_reach(memory.as_deref()));
        if let Some(index) = lost
            && !self.interrupts.needs_reset()
        {
            warn_limited!(
                "the ring of queue {index} is not in guest memory: the device needs a reset"
            );
            self.interrupts.request_reset();
        }
    }

    /// A write to the notification structure. Returns whether the worker must serve the request queue.
    ///
    /// A kick of the event queue needs no action: a fault that finds no buffer is dropped, not kept for the next one.
    fn kick(&self, at: usize, len: usize) -> bool {
        let multiplier = NOTIFY_MULTIPLIER as usize;
        let at_requests = usize::from(REQUEST_QUEUE) * multiplier;
        let kicks = at <= at_requests && at + len > at_requests;
        if kicks && self.status & DRIVER_OK != 0 {
            self.check_reach();
        }
        kicks
    }
}

/// The MSI-X table after a reset: all vectors are masked.
fn masked_table() -> [u8; TABLE_BYTES as usize] {
    let mut table = [0; TABLE_BYTES as usize];
    for vector in 0..usize::from(VECTORS) {
        if let Some(control) = table.get_mut(16 * vector + 12) {
            *control = 1;
        }
    }
    table
}
