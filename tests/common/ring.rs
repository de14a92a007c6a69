//! The driver's side of a split virtqueue (virtio specification, "Split Virtqueues").

use std::sync::atomic::{Ordering, fence};

use vhost::VringConfigData;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::{Memory, USER_BASE};

/// The buffer continues in descriptor `next`.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor. Its fields may hold anything, also values that a driver must not use.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`] and [`INDIRECT`], combined.
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl Desc {
    /// A descriptor from its fields.
    pub fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            addr,
            len,
            flags,
            next,
        }
    }

    /// The 16 bytes of the table entry.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A virtqueue: the addresses of its parts, and the driver's position.
pub struct Queue {
    /// 0 is the request queue, 1 the event queue.
    pub index: usize,
    /// Number of entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index after the last chain that the driver made available.
    pub avail_idx: u16,
    /// Index after the last used entry that the driver took.
    pub used_idx: u16,
    /// Value of `avail_idx` at the last decision about a kick.
    kicked_idx: u16,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Notifies the device.
    pub kick: EventFd,
    /// Notifies the driver.
    pub call: EventFd,
}

impl Queue {
    /// A queue whose parts lie one after the other from `base`, which must be page aligned.
    pub fn new(index: usize, size: u16, base: u64, event_idx: bool) -> Self {
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4096);
        Self {
            index,
            size,
            desc: base,
            avail,
            used,
            avail_idx: 0,
            used_idx: 0,
            kicked_idx: 0,
            event_idx,
            kick: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
            call: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        }
    }

    /// Clears both rings and goes back to index 0, as a new driver does.
    pub fn reset(&mut self, memory: &Memory) {
        memory.write(self.avail, &vec![0; 6 + 2 * usize::from(self.size)]);
        memory.write(self.used, &vec![0; 6 + 8 * usize::from(self.size)]);
        self.avail_idx = 0;
        self.used_idx = 0;
        self.kicked_idx = 0;
    }

    /// Goes to `index`, at which both rings are empty.
    pub fn move_to(&mut self, memory: &Memory, index: u16) {
        memory.store_u16(self.avail + 2, index);
        memory.store_u16(self.used + 2, index);
        self.avail_idx = index;
        self.used_idx = index;
        self.kicked_idx = index;
    }

    /// The ring's configuration as the frontend sends it, with the frontend's addresses, not the guest's.
    pub fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER_BASE + self.desc,
            used_ring_addr: USER_BASE + self.used,
            avail_ring_addr: USER_BASE + self.avail,
            log_addr: None,
        }
    }

    /// Writes entry `index` of the descriptor table.
    pub fn set_desc(&self, memory: &Memory, index: u16, desc: Desc) {
        memory.write(self.desc + 16 * u64::from(index), &desc.bytes());
    }

    /// Makes the chain that starts at `head` available. `head` may be any number.
    pub fn publish(&mut self, memory: &Memory, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        memory.write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory.store_u16(self.avail + 2, self.avail_idx);
    }

    /// Asks the device for a notification with the next used entry.
    pub fn enable_notification(&self, memory: &Memory) {
        if self.event_idx {
            memory.store_u16(self.avail + 4 + 2 * u64::from(self.size), self.used_idx);
        }
        fence(Ordering::SeqCst);
    }

    /// Notifies the device of the chains published since the last call, if it asked for a notification. Returns
    /// whether it did.
    pub fn kick(&mut self, memory: &Memory) -> bool {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = memory.load_u16(self.used + 4 + 8 * u64::from(self.size));
            let behind = self.avail_idx.wrapping_sub(event).wrapping_sub(1);
            behind < self.avail_idx.wrapping_sub(self.kicked_idx)
        } else {
            memory.load_u16(self.used) & 1 == 0
        };
        self.kicked_idx = self.avail_idx;
        if wanted {
            self.kick_always();
        }
        wanted
    }

    /// Notifies the device, whether it asked for that or not.
    pub fn kick_always(&mut self) {
        self.kicked_idx = self.avail_idx;
        self.kick.write(1).expect("kick");
    }

    /// Whether the device has returned a used entry that the driver has not taken.
    pub fn has_used(&self, memory: &Memory) -> bool {
        memory.load_u16(self.used + 2) != self.used_idx
    }

    /// Takes the next used entry: head and used length.
    pub fn take_used(&mut self, memory: &Memory) -> Option<(u32, u32)> {
        if !self.has_used(memory) {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let entry = (memory.read_u32(at), memory.read_u32(at + 4));
        self.used_idx = self.used_idx.wrapping_add(1);
        Some(entry)
    }
}
