//! The place for a second BAR of the device, whose accesses other code answers.

use serde::{Deserialize, Serialize};

use crate::device::acpi::ReadOnlyWindows;

/// What a later process must know of a [`TrappedBar`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrappedBarRecord {
    /// Where the table is that the guest has found through the BAR.
    pub table_at: u64,
    /// The bytes of the root pointer in the BAR.
    pub root: Vec<u8>,
}

/// A 32-bit BAR of 4 KiB, BAR 2. The guest waits for each answer, and the VMM with it: an implementation must not wait
/// for anything that the guest or the VMM controls.
///
/// The device calls it in the thread that serves the VMM, and holds no lock meanwhile.
pub trait TrappedBar: Send {
    /// The guest, or the VMM, reads `into.len()` bytes from `offset` on, all of them in the BAR. `into` is zero.
    /// `read_only` is the BIOS area as far as the VMM has mapped it read-only.
    fn read(&mut self, offset: u64, into: &mut [u8], read_only: &ReadOnlyWindows);

    /// The guest, or the VMM, writes `data` from `offset` on.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The guest's driver has started the device.
    fn driver_started(&mut self) {}

    /// The VM starts anew: a VMM has connected or disconnected, or has reset the device.
    fn restart(&mut self) {}

    /// What a later process must know; `None` if it can begin anew.
    fn record(&self) -> Option<TrappedBarRecord> {
        None
    }

    /// Goes on with the BAR of an earlier process.
    fn resume(&mut self, record: &TrappedBarRecord) {
        let _ = record;
    }
}
