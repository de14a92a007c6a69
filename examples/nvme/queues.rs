//! The controller's view of queues. The entries are in guest memory.

use crate::command::{COMMAND_BYTES, COMPLETION_BYTES};

/// The maximum number of entries of a queue.
pub const MAX_ENTRIES: u16 = 1024;
/// The maximum number of I/O queues of each kind.
pub const MAX_IO_QUEUES: u16 = 8;
/// The maximum number of queues of each kind, including the admin queue.
pub const QUEUES: usize = MAX_IO_QUEUES as usize + 1;

/// A submission queue.
#[derive(Clone, Copy, Debug)]
pub struct Submission {
    /// The address of the first entry.
    pub base: u64,
    /// The number of entries, `2..=MAX_ENTRIES`.
    pub size: u16,
    /// The next entry to fetch.
    pub head: u16,
    /// The entry that the driver writes next.
    pub tail: u16,
    /// The completion queue.
    pub completion: u16,
}

impl Submission {
    /// Takes the next command. Returns its address; `None` if the queue is empty.
    pub fn take(&mut self) -> Option<u64> {
        if self.head == self.tail {
            return None;
        }
        let at = entry(self.base, self.head, COMMAND_BYTES);
        self.head = (self.head + 1) % self.size;
        Some(at)
    }
}

/// A completion queue.
#[derive(Clone, Copy, Debug)]
pub struct Completions {
    /// The address of the first entry.
    pub base: u64,
    /// The number of entries, `2..=MAX_ENTRIES`.
    pub size: u16,
    /// The entry that the driver reads next.
    pub head: u16,
    /// The entry for the next completion.
    pub tail: u16,
    /// The phase tag of new entries: the lowest bit of their status.
    pub phase: bool,
    /// The interrupt to signal after an entry was written, if the driver wants one.
    pub vector: Option<u16>,
}

impl Completions {
    /// Whether another entry fits.
    pub fn has_room(&self) -> bool {
        (self.tail + 1) % self.size != self.head
    }

    /// Takes the next entry. Returns its address and its phase tag; `None` if the queue is full.
    pub fn take(&mut self) -> Option<(u64, bool)> {
        if !self.has_room() {
            return None;
        }
        let at = entry(self.base, self.tail, COMPLETION_BYTES);
        let phase = self.phase;
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Some((at, phase))
    }
}

fn entry(base: u64, index: u16, bytes: usize) -> u64 {
    base.wrapping_add(u64::from(index) * bytes as u64)
}
