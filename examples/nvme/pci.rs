//! The configuration space of the controller: one memory BAR, which also has MSI-X.

use crate::queues::MAX_IO_QUEUES;

/// Bytes of the configuration space.
pub const CONFIG_BYTES: usize = 256;
/// Bytes of BAR 0.
pub const BAR_BYTES: usize = 16 << 10;
/// The number of interrupts: one for each completion queue.
pub const VECTORS: u16 = MAX_IO_QUEUES + 1;
/// A vendor ID that emulators use.
pub const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x4e56;
/// The offset of the MSI-X table in BAR 0. The client emulates the table; here it reads as zeros.
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PENDING: u32 = 0x3000;
const COMMAND: usize = 0x04;
const BAR_0: usize = 0x10;
const MSIX: u8 = 0x40;
/// The writable bits of COMMAND: memory, bus master, INTx disable.
const COMMAND_BITS: u16 = 1 << 1 | BUS_MASTER | 1 << 10;
const BUS_MASTER: u16 = 1 << 2;

/// The configuration space.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// The writable bits.
    writable: [u8; CONFIG_BYTES],
}

impl ConfigSpace {
    /// The space after a reset.
    pub fn new() -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
        };
        let bytes = &mut space.bytes;
        put(bytes, 0x00, &VENDOR.to_le_bytes());
        put(bytes, 0x02, &DEVICE.to_le_bytes());
        // The status register: there are capabilities.
        put(bytes, 0x06, &[1 << 4]);
        // Revision; an NVMe I/O controller.
        put(bytes, 0x08, &[1, 0x02, 0x08, 0x01]);
        // Memory, 64 bits.
        put(bytes, BAR_0, &[0b100]);
        put(bytes, 0x2c, &VENDOR.to_le_bytes());
        put(bytes, 0x2e, &DEVICE.to_le_bytes());
        put(bytes, 0x34, &[MSIX]);
        let msix = usize::from(MSIX);
        put(bytes, msix, &[0x11, 0]);
        put(bytes, msix + 2, &(VECTORS - 1).to_le_bytes());
        put(bytes, msix + 4, &MSIX_TABLE.to_le_bytes());
        put(bytes, msix + 8, &MSIX_PENDING.to_le_bytes());
        let writable = &mut space.writable;
        put(writable, COMMAND, &COMMAND_BITS.to_le_bytes());
        let address = !(BAR_BYTES as u64 - 1);
        put(writable, BAR_0, &address.to_le_bytes());
        // The interrupt line.
        put(writable, 0x3c, &[0xff]);
        // MSI-X: enable, and mask all.
        put(writable, msix + 3, &[0xc0]);
        space
    }

    /// Reads from offset `at` on; zeros after the end.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        into.fill(0);
        let from = usize::try_from(at).ok().and_then(|at| self.bytes.get(at..));
        for (into, from) in into.iter_mut().zip(from.unwrap_or_default()) {
            *into = *from;
        }
    }

    /// Writes from offset `at` on. Only writable bits change.
    pub fn write(&mut self, at: u64, from: &[u8]) {
        let Ok(at) = usize::try_from(at) else { return };
        let places = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in places.zip(from) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// Whether the device may reach memory.
    pub fn is_bus_master(&self) -> bool {
        let low = self.bytes.get(COMMAND).copied().unwrap_or(0);
        u16::from(low) & BUS_MASTER != 0
    }
}

fn put(bytes: &mut [u8], at: usize, from: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + from.len()) {
        place.copy_from_slice(from);
    }
}
