//! Distinguishes a paused driver that resumes from a new driver.
//!
//! The VMM stops and starts the rings with the same messages for a pause and for a guest reset. The index at which
//! the request ring starts tells them apart: a paused driver's ring resumes at its old index, a new driver's ring
//! starts at 0. A ring that starts at any other index belongs to a driver whose requests another daemon has served,
//! or this daemon at another time: the VMM has connected anew or restored a snapshot. A ring that was stopped at 0 is ambiguous. Then the driver is the same if the ring has its old
//! addresses and still holds the last used entry: a new driver clears its rings.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ring::{LockedRing, Ring};

/// The driver to which a restarted request ring belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// The same driver resumes.
    Resumed,
    /// A new driver has begun.
    NewDriver,
    /// A driver resumes whose domains the device does not have.
    UnknownDriver,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedEntry {
    /// Its slot in the used ring.
    pub slot: u16,
    /// Index of the chain's first descriptor.
    pub head: u16,
    /// The used length.
    pub len: u32,
}

/// Indices, addresses and features of a ring at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Index of the next available entry.
    pub next_avail: u16,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    features: u64,
    last_used: Option<UsedEntry>,
}

impl RingState {
    /// The state of `ring` with these features. `last_used` is the last used entry that is not all zero: a new
    /// driver's cleared ring cannot hold it.
    pub fn of(ring: &impl Ring, features: u64, last_used: Option<UsedEntry>) -> Self {
        Self::of_queue(ring.lock().queue(), features, last_used)
    }

    /// The same of a ring's indices and addresses.
    pub fn of_queue(queue: &Queue, features: u64, last_used: Option<UsedEntry>) -> Self {
        Self {
            next_avail: queue.next_avail(),
            size: queue.size(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            features,
            last_used,
        }
    }

    /// Compares this state, of the stopped ring, with `now`, its state when it runs again.
    pub fn compare(&self, now: &Self, memory: &GuestMemoryMmap) -> Restart {
        let resumed = if self.next_avail != 0 {
            now.next_avail == self.next_avail
        } else {
            self == now && self.shows_last_used(memory)
        };
        if resumed {
            Restart::Resumed
        } else {
            now.first_start()
        }
    }

    /// The driver of a ring in this state, if the device has not served the ring before.
    pub fn first_start(&self) -> Restart {
        if self.next_avail == 0 {
            Restart::NewDriver
        } else {
            Restart::UnknownDriver
        }
    }

    /// The driver of the stopped ring is gone: no ring resumes this state.
    pub fn end_driver(&mut self) {
        self.next_avail = 0;
        self.last_used = None;
    }

    /// Whether the used ring still holds the last used entry.
    fn shows_last_used(&self, memory: &GuestMemoryMmap) -> bool {
        const HEADER_LEN: u64 = 4;
        const ENTRY_LEN: u64 = 8;
        let Some(UsedEntry { slot, head, len }) = self.last_used else {
            return false;
        };
        let offset = HEADER_LEN + u64::from(slot) * ENTRY_LEN;
        let Some(at) = self.used.checked_add(offset) else {
            return false;
        };
        let mut entry = [0; 8];
        if memory.read_slice(&mut entry, GuestAddress(at)).is_err() {
            return false;
        }
        let mut expected = [0; 8];
        expected[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        expected[4..].copy_from_slice(&len.to_le_bytes());
        entry == expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped_at(next_avail: u16) -> RingState {
        RingState {
            next_avail,
            size: 4,
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            features: 1 << 32,
            last_used: Some(UsedEntry {
                slot: 3,
                head: 2,
                len: 4,
            }),
        }
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory")
    }

    #[test]
    fn the_index_tells_a_pause_from_a_reset() {
        let (stopped, memory) = (stopped_at(7), memory());
        assert_eq!(stopped.compare(&stopped, &memory), Restart::Resumed);
        let new = stopped_at(0);
        assert_eq!(stopped.compare(&new, &memory), Restart::NewDriver);
        let odd = stopped_at(6);
        assert_eq!(stopped.compare(&odd, &memory), Restart::UnknownDriver);
        let stopped_at_0 = stopped_at(0);
        assert_eq!(stopped_at_0.compare(&odd, &memory), Restart::UnknownDriver);
    }

    #[test]
    fn an_ended_driver_does_not_resume() {
        let (mut ended, memory) = (stopped_at(7), memory());
        ended.end_driver();
        let same_index = stopped_at(7);
        assert_eq!(ended.compare(&same_index, &memory), Restart::UnknownDriver);
        assert_eq!(ended.compare(&stopped_at(0), &memory), Restart::NewDriver);
    }

    #[test]
    fn a_ring_stopped_at_0_is_known_by_its_last_entry() {
        let (stopped, memory) = (stopped_at(0), memory());
        assert_eq!(stopped.compare(&stopped, &memory), Restart::NewDriver);
        let last = GuestAddress(0x3000 + 4 + 3 * 8);
        memory
            .write_slice(&[2, 0, 0, 0, 4, 0, 0, 0], last)
            .expect("in memory");
        assert_eq!(stopped.compare(&stopped, &memory), Restart::Resumed);
        let moved = RingState {
            available: 0x2800,
            ..stopped
        };
        assert_eq!(stopped.compare(&moved, &memory), Restart::NewDriver);
        let none = RingState {
            last_used: None,
            ..stopped
        };
        assert_eq!(none.compare(&none, &memory), Restart::NewDriver);
    }
}
