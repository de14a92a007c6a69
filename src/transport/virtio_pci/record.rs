//! What a later process must know to go on with the VMM's device, as text. It is read like any hostile bytes.

use serde::{Deserialize, Serialize};

use super::config_space::SPACE_BYTES;
use super::interrupts::InterruptsRecord;
use super::layout::{DEVICE_BYTES, TABLE_BYTES, VECTORS};
use super::registers::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, LONGEST, QueueRegisters, Registers,
};
use super::ring::RingPlace;
use super::trapped_bar::TrappedBarRecord;
use crate::device::{Device, QUEUES};
use crate::vfio_user::message::DmaMapBody;

/// The bytes of the longest root pointer.
const MAX_ROOT: usize = 36;

/// Whether the state has changed since it was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RecordedChanges {
    /// The client has changed something.
    pub(super) any: bool,
    /// The record says that the device needs a reset, which the worker can find out, too.
    pub(super) needs_reset: bool,
}

/// The state of the device and its client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PciRecord {
    /// The device has BAR 2.
    pub(super) has_trapped_bar: bool,
    /// The configuration space.
    pub(super) space: Vec<u8>,
    pub(super) registers: RegistersRecord,
    pub(super) interrupts: InterruptsRecord,
    pub(super) windows: Vec<WindowRecord>,
    pub(super) trapped: Option<TrappedBarRecord>,
}

/// The registers in BAR 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegistersRecord {
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRecord>,
    generation: u8,
    seen_config: Vec<u8>,
    table: Vec<u8>,
}

/// A queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueRecord {
    pub(super) place: RingPlace,
    pub(super) is_enabled: bool,
}

/// A window of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WindowRecord {
    flags: u32,
    offset: u64,
    pub(super) address: u64,
    size: u64,
    /// The name of its file at the keeper.
    pub(super) file: Option<String>,
}

impl PciRecord {
    /// Decodes a record.
    ///
    /// # Errors
    /// Says what no device can have recorded.
    pub(super) fn decode(bytes: &[u8], has_trapped_bar: bool) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(bytes)
            .map_err(|cause| format!("its state cannot be decoded: {cause}"))?;
        let is_sound = record.space.len() == SPACE_BYTES
            && record.registers.is_sound()
            && record.interrupts.vectors.len() == usize::from(VECTORS)
            && record.interrupts.queues.len() == QUEUES
            && record
                .trapped
                .as_ref()
                .is_none_or(|trapped| trapped.root.len() <= MAX_ROOT);
        if !is_sound {
            return Err("it has a state that no driver can have made".into());
        }
        if record.has_trapped_bar != has_trapped_bar {
            return Err("the configuration now gives the device other BARs".into());
        }
        Ok(record)
    }

    /// The names of the descriptors, each as often as it is used.
    pub(super) fn names(&self) -> Vec<String> {
        let vectors = self.interrupts.vectors.iter();
        let windows = self.windows.iter().filter_map(|window| window.file.clone());
        let events = vectors.filter_map(|vector| vector.event.clone());
        windows.chain(events).collect()
    }
}

impl RegistersRecord {
    fn is_sound(&self) -> bool {
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        let is_size =
            |queue: &QueueRecord| queue.place.size.is_power_of_two() && queue.place.size <= LONGEST;
        let has_features = self.status & FEATURES_OK != 0;
        self.status & !known == 0
            && self.queues.len() == QUEUES
            && self.queues.iter().all(is_size)
            && self.seen_config.len() == DEVICE_BYTES as usize
            && self.table.len() == TABLE_BYTES as usize
            && !(has_features && self.driver_features & !Device::offered_features() != 0)
    }

    /// The features that the driver has accepted, if it has.
    pub(super) fn accepted_features(&self) -> Option<u64> {
        (self.status & FEATURES_OK != 0).then_some(self.driver_features)
    }

    pub(super) fn queues(&self) -> &[QueueRecord] {
        &self.queues
    }
}

impl WindowRecord {
    /// The window with its file under `file`.
    pub(super) fn new(window: &DmaMapBody, file: Option<String>) -> Self {
        Self {
            flags: window.flags.get(),
            offset: window.offset.get(),
            address: window.address.get(),
            size: window.size.get(),
            file,
        }
    }

    /// The DMA_MAP that made it.
    pub(super) fn body(&self) -> DmaMapBody {
        DmaMapBody {
            argsz: DmaMapBody::BYTES.into(),
            flags: self.flags.into(),
            offset: self.offset.into(),
            address: self.address.into(),
            size: self.size.into(),
        }
    }
}

impl Registers {
    /// The state for a later process.
    pub(super) fn record(&self) -> RegistersRecord {
        let queue = |queue: &QueueRegisters| QueueRecord {
            place: queue.place,
            is_enabled: queue.is_enabled,
        };
        RegistersRecord {
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            status: self.status,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(queue).collect(),
            generation: self.generation,
            seen_config: self.seen_config.clone(),
            table: self.table.to_vec(),
        }
    }

    /// Goes on with the registers of an earlier process. The rings have their places afterwards, and do not run before
    /// [`Self::go_on`].
    pub(super) fn resume(&mut self, record: &RegistersRecord, is_bus_master: bool) {
        self.is_held = true;
        self.is_bus_master = is_bus_master;
        self.device_feature_select = record.device_feature_select;
        self.driver_feature_select = record.driver_feature_select;
        self.driver_features = record.driver_features;
        self.status = record.status;
        self.queue_select = record.queue_select;
        self.generation = record.generation;
        self.seen_config.clone_from(&record.seen_config);
        for (byte, recorded) in self.table.iter_mut().zip(&record.table) {
            *byte = *recorded;
        }
        let queues = self.queues.iter_mut().zip(&record.queues);
        for ((queue, recorded), ring) in queues.zip(&self.rings) {
            queue.place = recorded.place;
            queue.is_enabled = recorded.is_enabled;
            if queue.is_enabled {
                // If it fails, it has failed before: the device needs a reset, and the record says so.
                let _ = ring.enable(&queue.place);
            }
        }
    }
}
