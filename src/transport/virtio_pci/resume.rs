//! The device goes on with the client of an earlier process.

use std::io;

use vm_memory::{Bytes, GuestAddress};

use super::config_space::PciSpace;
use super::device::VirtioPciDevice;
use super::interrupts::InterruptsRecord;
use super::memory::ClientMemory;
use super::record::{PciRecord, QueueRecord, RecordedChanges};
use crate::vfio_user::server::{ClientEvent, ClientFiles, DeviceRecord};

/// Where the used index is in the used ring.
const USED_INDEX: u64 = 2;

impl VirtioPciDevice {
    /// The state for a later process, if it has changed since the last call.
    pub(super) fn record_changes(&mut self) -> Option<DeviceRecord> {
        if !self.keeping.is_present() {
            return None;
        }
        let now = RecordedChanges {
            any: false,
            needs_reset: self.interrupts.needs_reset(),
        };
        if self.changes == now {
            return None;
        }
        self.changes = now;
        let record = PciRecord {
            has_trapped_bar: self.trapped.is_some(),
            space: self.space.bytes().to_vec(),
            registers: self.registers.record(),
            interrupts: self.interrupts.record(),
            windows: self.memory.records(),
            trapped: self.trapped_bar().and_then(|bar| bar.record()),
        };
        Some(DeviceRecord {
            names: record.names(),
            kept: self.keeping.take_kept(),
            // It has only numbers and names: it cannot fail.
            bytes: serde_json::to_vec(&record).unwrap_or_default(),
        })
    }

    /// Goes on with the client that has left `record`. Restores the core in any case.
    pub(super) fn resume_client(&mut self, record: &[u8], files: &ClientFiles) -> io::Result<()> {
        self.is_connected = true;
        self.device.prepare();
        self.device.connect();
        self.device.announce_vmm();
        (self.vmm_present)(true);
        let record = PciRecord::decode(record, self.trapped.is_some()).map_err(io::Error::other);
        // The core is restored with the VMM's memory, and before a ring runs.
        let record = record.and_then(|record| {
            self.memory = ClientMemory::resume(&self.device, &record.windows, files)?;
            Ok(record)
        });
        if let Ok(record) = &record
            && let Some(features) = record.registers.accepted_features()
        {
            self.device.accept_features(features);
        }
        if let Some(restore) = self.restore.take() {
            restore();
        }
        let record = record?;
        self.device.take_over(None);
        self.resume_driver(&record, vector_events(&record.interrupts, files)?);
        Ok(())
    }

    fn resume_driver(&mut self, record: &PciRecord, events: Vec<Option<ClientEvent>>) {
        self.space = PciSpace::resumed(self.trapped.is_some(), &record.space);
        self.registers
            .resume(&record.registers, self.space.is_bus_master());
        self.interrupts.set_uses_msix(self.space.uses_msix());
        self.interrupts.resume(&record.interrupts, events);
        let queues = record.registers.queues().iter();
        for (ring, queue) in self.rings().iter().zip(queues) {
            if let Some(index) = self.used_index(queue) {
                ring.go_on_at(index);
            }
        }
        if let (Some(trapped), Some(record)) = (&mut self.trapped, &record.trapped) {
            trapped.resume(record);
        }
        self.changes.needs_reset = record.interrupts.needs_reset;
    }

    /// The index up to which the device has returned chains.
    fn used_index(&self, queue: &QueueRecord) -> Option<u16> {
        let at = queue.place.used.checked_add(USED_INDEX)?;
        let memory = self.device.memory().filter(|_| queue.is_enabled)?;
        let index: u16 = memory.read_obj(GuestAddress(at)).ok()?;
        Some(u16::from_le(index))
    }
}

/// The eventfds of the vectors.
fn vector_events(
    record: &InterruptsRecord,
    files: &ClientFiles,
) -> io::Result<Vec<Option<ClientEvent>>> {
    let event = |name: &String| ClientEvent::resumed(name, files);
    let vectors = record.vectors.iter();
    vectors
        .map(|vector| vector.event.as_ref().map(event).transpose())
        .collect()
}
