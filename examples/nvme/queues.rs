//! Queues as the controller keeps them; the entries are in guest memory.

use crate::command::{COMMAND_BYTES, COMPLETION_BYTES};

/// The most entries of a queue.
pub const MAX_ENTRIES: u16 = 1024;
/// I/O queues of each kind that there can be.
pub const MAX_IO_QUEUES: u16 = 8;
/// Queues of each kind, that for administration among them.
pub const QUEUES: usize = MAX_IO_QUEUES as usize + 1;

/// A submission queue.
#[derive(Clone, Copy, Debug)]
pub struct Submission {
    /// The address of the first entry.
    pub base: u64,
    /// Entries, `2..=MAX_ENTRIES`.
    pub size: u16,
    /// The next entry to fetch.
    pub head: u16,
    /// Where the driver will put the next one.
    pub tail: u16,
    /// Where completions go.
    pub completion: u16,
}

impl Submission {
    /// The address of the next command, which is thereby taken; `None` where there is none.
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
    /// Entries, `2..=MAX_ENTRIES`.
    pub size: u16,
    /// The next entry the driver will look at.
    pub head: u16,
    /// Where the next completion goes.
    pub tail: u16,
    /// What new entries have in the lowest bit of their status.
    pub phase: bool,
    /// The interrupt that tells of entries, if one is wanted.
    pub vector: Option<u16>,
}

impl Completions {
    /// Whether another entry fits.
    pub fn has_room(&self) -> bool {
        (self.tail + 1) % self.size != self.head
    }

    /// The address of the next entry, which is thereby taken, and its phase.
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
