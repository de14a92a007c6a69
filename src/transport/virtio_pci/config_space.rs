//! The PCI configuration space: header, capabilities, and the window of VIRTIO_PCI_CAP_PCI_CFG.

use super::layout::{
    COMMON_AT, COMMON_BYTES, DEVICE_AT, DEVICE_BYTES, ISR_AT, ISR_BYTES, NOTIFY_AT, NOTIFY_BYTES,
    NOTIFY_MULTIPLIER, PENDING_AT, REGISTERS_BAR, REGISTERS_BYTES, TABLE_AT, TRAPPED_BAR,
    TRAPPED_BYTES, VECTORS,
};

/// Bytes of the space: a conventional PCI device's, without extended capabilities.
pub(super) const SPACE_BYTES: usize = 256;

/// Vendor ID of virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device ID: 0x1040 and the virtio device ID of an IOMMU.
const DEVICE: u16 = 0x1040 + 23;
/// The subsystem device ID that QEMU's virtio devices have.
const SUBSYSTEM: u16 = 0x1100;
/// Revision 1: the device has no legacy interface.
const REVISION: u8 = 1;
/// Class 0x00ff, which QEMU's virtio-iommu-pci has.
const CLASS: [u8; 3] = [0, 0xff, 0];

const COMMAND_AT: usize = 0x04;
const BUS_MASTER: u16 = 1 << 2;
/// The writable bits of COMMAND: memory, bus master, INTx disable.
const COMMAND_BITS: u16 = 1 << 1 | BUS_MASTER | 1 << 10;
/// The low byte of the status register.
const STATUS_AT: usize = 0x06;
const INTERRUPT_STATUS: u8 = 1 << 3;
const HAS_CAPABILITIES: u8 = 1 << 4;
const BARS_AT: usize = 0x10;
const CAPABILITIES_AT: usize = 0x34;
const INTERRUPT_LINE_AT: usize = 0x3c;
/// The MSI-X capability comes first: cloud-hypervisor follows the list for each access, and stops there.
const MSIX_AT: usize = 0x40;
/// Message control of MSI-X, and its bits for enable and mask all.
const MSIX_CONTROL_AT: usize = MSIX_AT + 2;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_BITS: u16 = MSIX_ENABLE | 1 << 14;
/// The first capability of virtio.
const VIRTIO_AT: usize = 0x50;
/// `struct virtio_pci_cap`.
const CAP_BYTES: usize = 16;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// `cfg_type` of `struct virtio_pci_cap`.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// The capability that gives access to BARs through this space: after common, ISR, device and notify.
const WINDOW_AT: usize = VIRTIO_AT + 4 * CAP_BYTES + 4;
const WINDOW_BAR_AT: usize = WINDOW_AT + 4;
const WINDOW_OFFSET_AT: usize = WINDOW_AT + 8;
const WINDOW_LENGTH_AT: usize = WINDOW_AT + 12;
const WINDOW_DATA_AT: usize = WINDOW_AT + CAP_BYTES;
const WINDOW_DATA_BYTES: usize = 4;

/// An access to a BAR that the driver asks for through the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WindowAccess {
    pub(super) bar: u32,
    pub(super) offset: u64,
    /// 1, 2 or 4.
    pub(super) len: usize,
}

/// The configuration space.
#[derive(Clone)]
pub(super) struct PciSpace {
    bytes: [u8; SPACE_BYTES],
    /// The writable bits.
    writable: [u8; SPACE_BYTES],
    has_trapped_bar: bool,
}

impl PciSpace {
    /// The space after a reset, with BAR 2 if there is a trapped BAR.
    pub(super) fn new(has_trapped_bar: bool) -> Self {
        let mut space = Self {
            bytes: [0; SPACE_BYTES],
            writable: [0; SPACE_BYTES],
            has_trapped_bar,
        };
        space.put_header();
        space.put_capabilities();
        space
    }

    /// The space with what a driver has written to `bytes`, the space of an earlier process.
    pub(super) fn resumed(has_trapped_bar: bool, bytes: &[u8]) -> Self {
        let mut space = Self::new(has_trapped_bar);
        space.write(0, bytes);
        space
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8; SPACE_BYTES] {
        &self.bytes
    }

    /// Sets or clears the Interrupt Status bit of the status register.
    pub(super) fn set_interrupt_status(&mut self, is_set: bool) {
        if let Some(status) = self.bytes.get_mut(STATUS_AT) {
            *status = *status & !INTERRUPT_STATUS | u8::from(is_set) << 3;
        }
    }

    /// Reads from `at` on; zeros after the end.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) {
        into.fill(0);
        let from = usize::try_from(at).ok().and_then(|at| self.bytes.get(at..));
        for (into, from) in into.iter_mut().zip(from.unwrap_or_default()) {
            *into = *from;
        }
    }

    /// Writes from `at` on. Only writable bits change.
    pub(super) fn write(&mut self, at: u64, from: &[u8]) {
        let Ok(at) = usize::try_from(at) else { return };
        let places = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in places.zip(from) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// Whether the device may reach memory.
    pub(super) fn is_bus_master(&self) -> bool {
        self.u16_at(COMMAND_AT) & BUS_MASTER != 0
    }

    /// Whether the driver has enabled MSI-X.
    pub(super) fn uses_msix(&self) -> bool {
        self.u16_at(MSIX_CONTROL_AT) & MSIX_ENABLE != 0
    }

    /// The access that the driver makes through the window with an access of `len` bytes at `at`; `None` if that does
    /// not touch the window's data, or if the window's length, alignment or BAR is invalid.
    // PCI-22, PCI-23
    pub(super) fn window_access(&self, at: u64, len: usize) -> Option<WindowAccess> {
        let at = usize::try_from(at).ok()?;
        let touches =
            at < WINDOW_DATA_AT + WINDOW_DATA_BYTES && at.saturating_add(len) > WINDOW_DATA_AT;
        let (offset, length) = (self.u32_at(WINDOW_OFFSET_AT), self.u32_at(WINDOW_LENGTH_AT));
        let bar = u32::from(self.bytes.get(WINDOW_BAR_AT).copied()?);
        let bytes = match bar {
            REGISTERS_BAR => REGISTERS_BYTES,
            TRAPPED_BAR if self.has_trapped_bar => TRAPPED_BYTES,
            _ => return None,
        };
        let is_valid = matches!(length, 1 | 2 | 4)
            && offset % length == 0
            && u64::from(offset) + u64::from(length) <= bytes;
        (touches && is_valid).then_some(WindowAccess {
            bar,
            offset: offset.into(),
            len: length as usize,
        })
    }

    /// The data of the window.
    pub(super) fn window_data(&self) -> [u8; WINDOW_DATA_BYTES] {
        self.u32_at(WINDOW_DATA_AT).to_le_bytes()
    }

    /// Stores the first bytes of the window's data.
    pub(super) fn set_window_data(&mut self, data: &[u8]) {
        put(
            &mut self.bytes,
            WINDOW_DATA_AT,
            data.get(..WINDOW_DATA_BYTES).unwrap_or(data),
        );
    }

    fn put_header(&mut self) {
        let bytes = &mut self.bytes;
        put(bytes, 0x00, &VENDOR.to_le_bytes());
        put(bytes, 0x02, &DEVICE.to_le_bytes());
        put(bytes, STATUS_AT, &[HAS_CAPABILITIES]);
        put(bytes, 0x08, &[REVISION]);
        put(bytes, 0x09, &CLASS);
        // BAR 0: memory, 64 bits. BAR 2: memory, 32 bits.
        put(bytes, BARS_AT, &[0b100]);
        put(bytes, 0x2c, &VENDOR.to_le_bytes());
        put(bytes, 0x2e, &SUBSYSTEM.to_le_bytes());
        let writable = &mut self.writable;
        put(writable, COMMAND_AT, &COMMAND_BITS.to_le_bytes());
        put(writable, BARS_AT, &(!(REGISTERS_BYTES - 1)).to_le_bytes());
        if self.has_trapped_bar {
            let mask = !(TRAPPED_BYTES - 1);
            put(writable, BARS_AT + 8, &mask.to_le_bytes()[..4]);
        }
        put(writable, INTERRUPT_LINE_AT, &[0xff]);
    }

    fn put_capabilities(&mut self) {
        let bytes = &mut self.bytes;
        put(bytes, CAPABILITIES_AT, &[byte(MSIX_AT)]);
        put(bytes, MSIX_AT, &[CAP_MSIX, byte(VIRTIO_AT)]);
        put(bytes, MSIX_CONTROL_AT, &(VECTORS - 1).to_le_bytes());
        put(
            bytes,
            MSIX_AT + 4,
            &(TABLE_AT | REGISTERS_BAR).to_le_bytes(),
        );
        put(
            bytes,
            MSIX_AT + 8,
            &(PENDING_AT | REGISTERS_BAR).to_le_bytes(),
        );
        put(
            &mut self.writable,
            MSIX_CONTROL_AT,
            &MSIX_BITS.to_le_bytes(),
        );

        let mut at = VIRTIO_AT;
        for (cfg_type, offset, len, more) in [
            (CFG_COMMON, COMMON_AT, COMMON_BYTES, 0),
            (CFG_ISR, ISR_AT, ISR_BYTES, 0),
            (CFG_DEVICE, DEVICE_AT, DEVICE_BYTES, 0),
            (CFG_NOTIFY, NOTIFY_AT, NOTIFY_BYTES, 4),
            (CFG_PCI, 0, 0, WINDOW_DATA_BYTES),
        ] {
            let cap_len = CAP_BYTES + more;
            let next = if cfg_type == CFG_PCI { 0 } else { at + cap_len };
            let bar = if cfg_type == CFG_PCI {
                0
            } else {
                REGISTERS_BAR
            };
            put(
                bytes,
                at,
                &[CAP_VENDOR, byte(next), byte(cap_len), cfg_type],
            );
            put(bytes, at + 4, &bar.to_le_bytes()[..1]);
            put(bytes, at + 8, &offset.to_le_bytes());
            put(bytes, at + 12, &len.to_le_bytes());
            if cfg_type == CFG_NOTIFY {
                put(bytes, at + CAP_BYTES, &NOTIFY_MULTIPLIER.to_le_bytes());
            }
            at += cap_len;
        }
        let writable = &mut self.writable;
        put(writable, WINDOW_BAR_AT, &[0xff]);
        put(writable, WINDOW_OFFSET_AT, &[0xff; 8]);
        put(writable, WINDOW_DATA_AT, &[0xff; WINDOW_DATA_BYTES]);
    }

    fn u16_at(&self, at: usize) -> u16 {
        let bytes = self.bytes.get(at..).and_then(|from| from.first_chunk());
        bytes.map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    fn u32_at(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..).and_then(|from| from.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }
}

fn put(bytes: &mut [u8], at: usize, from: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + from.len()) {
        place.copy_from_slice(from);
    }
}

/// An offset in the space, which has 256 bytes.
fn byte(offset: usize) -> u8 {
    u8::try_from(offset).unwrap_or(0)
}
