//! Commands that read and write the disk (NVM command set 1.4).

use vhost_device_iommu::warn_limited;

use crate::command::{Command, Failure};
use crate::disk::{BLOCK, Disk};
use crate::identify::NAMESPACE;
use crate::memory::{Gate, Memory};
use crate::prp;

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
/// The bit of `cdw12` that requires durable data before the completion.
const FORCE_UNIT_ACCESS: u32 = 1 << 30;
/// All namespaces.
const ALL: u32 = u32::MAX;

/// Executes a command of an I/O queue.
///
/// The worker accesses memory before or after the disk, never while a disk access is pending.
///
/// # Errors
/// The status to complete the command with.
pub fn execute(
    disk: &Disk,
    memory: &dyn Memory,
    gate: &Gate,
    command: &Command,
) -> Result<(), Failure> {
    if !matches!(command.opcode, FLUSH | WRITE | READ | WRITE_ZEROES) {
        return Err(Failure::InvalidOpcode);
    }
    let nsid = command.nsid.get();
    if nsid != NAMESPACE && !(nsid == ALL && command.opcode == FLUSH) {
        return Err(Failure::InvalidNamespace);
    }
    if command.flags != 0 {
        return Err(Failure::InvalidField);
    }
    if command.opcode == FLUSH {
        return flush(disk);
    }
    let first = u64::from(command.cdw11.get()) << 32 | u64::from(command.cdw10.get());
    let count = u64::from(command.cdw12.get() & 0xffff) + 1;
    if !disk.has(first, count) {
        return Err(Failure::LbaOutOfRange);
    }
    let bytes = usize::try_from(count).map_or(usize::MAX, |count| count * BLOCK);
    match command.opcode {
        READ => {
            let segments = prp::segments(memory, gate, command, bytes)?;
            let mut data = vec![0; bytes];
            disk.read(first, &mut data).map_err(|cause| {
                warn_limited!("cannot read {count} blocks at {first}: {cause}");
                Failure::UnrecoveredRead
            })?;
            let written = memory.write(gate, &segments, &data);
            written.map_err(|_| Failure::DataTransfer)
        }
        WRITE => {
            let segments = prp::segments(memory, gate, command, bytes)?;
            let mut data = vec![0; bytes];
            let read = memory.read(gate, &segments, &mut data);
            read.map_err(|_| Failure::DataTransfer)?;
            written(disk.write(first, &data))?;
            flush_if_forced(disk, command)
        }
        _ => {
            written(disk.zero(first, count))?;
            flush_if_forced(disk, command)
        }
    }
}

fn flush_if_forced(disk: &Disk, command: &Command) -> Result<(), Failure> {
    match command.cdw12.get() & FORCE_UNIT_ACCESS {
        0 => Ok(()),
        _ => flush(disk),
    }
}

fn flush(disk: &Disk) -> Result<(), Failure> {
    written(disk.flush())
}

fn written(outcome: std::io::Result<()>) -> Result<(), Failure> {
    outcome.map_err(|cause| {
        warn_limited!("cannot write the disk: {cause}");
        Failure::WriteFault
    })
}
