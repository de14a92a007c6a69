//! Admin commands (base specification 1.4, section 5), except those that change queues.

use crate::command::{Command, Failure};
use crate::disk::Disk;
use crate::identify::{self, LOG_BYTES};
use crate::memory::{Gate, Memory};
use crate::prp::{self, MAX_TRANSFER};
use crate::queues::MAX_IO_QUEUES;
use crate::state::Change;

const GET_LOG_PAGE: u8 = 0x02;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;

/// The change of the state that a command makes; `None` if it makes none.
pub fn change_of(command: &Command) -> Option<Change> {
    Some(match command.opcode {
        0x00 => Change::DeleteSubmission,
        0x01 => Change::CreateSubmission,
        0x04 => Change::DeleteCompletions,
        0x05 => Change::CreateCompletions,
        0x0c => Change::RequestEvent,
        _ => return None,
    })
}

/// Executes a command that leaves the queues unchanged. Returns the result for its completion.
///
/// # Errors
/// The status to complete the command with.
pub fn execute(
    disk: &Disk,
    memory: &dyn Memory,
    gate: &Gate,
    command: &Command,
) -> Result<u32, Failure> {
    let answer = |data: &[u8]| {
        let segments = prp::segments(memory, gate, command, data.len())?;
        let written = memory.write(gate, &segments, data);
        written.map(|()| 0).map_err(|_| Failure::DataTransfer)
    };
    let cdw10 = command.cdw10.get();
    match command.opcode {
        IDENTIFY => answer(&identify::identify(
            cdw10 & 0xff,
            command.nsid.get(),
            disk.blocks(),
        )?),
        GET_LOG_PAGE => {
            let page = identify::log_page(cdw10 & 0xff)?;
            answer(&log_part(&page, command)?)
        }
        // The worker executes one command at a time: the command to abort is complete or has not started.
        ABORT => Ok(1),
        SET_FEATURES => set_feature(cdw10 & 0xff, command.cdw11.get()),
        GET_FEATURES => get_feature(cdw10 & 0xff, command.cdw11.get()),
        _ => Err(Failure::InvalidOpcode),
    }
}

/// The requested part of a log. Zeros follow the end of a log.
fn log_part(page: &[u8; LOG_BYTES], command: &Command) -> Result<Vec<u8>, Failure> {
    let low = command.cdw10.get() >> 16;
    let dwords = u64::from(command.cdw11.get() & 0xffff) << 16 | u64::from(low);
    let len = usize::try_from((dwords + 1) * 4).unwrap_or(usize::MAX);
    let offset = u64::from(command.cdw13.get()) << 32 | u64::from(command.cdw12.get());
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    if len > MAX_TRANSFER || offset % 4 != 0 || offset > LOG_BYTES {
        return Err(Failure::InvalidField);
    }
    let rest = page.get(offset..).unwrap_or_default();
    let mut part = rest.get(..len).unwrap_or(rest).to_vec();
    part.resize(len, 0);
    Ok(part)
}

/// The numbers of features (section 5.21).
mod feature {
    pub const ARBITRATION: u32 = 0x01;
    pub const POWER: u32 = 0x02;
    pub const TEMPERATURE: u32 = 0x04;
    pub const ERROR_RECOVERY: u32 = 0x05;
    pub const WRITE_CACHE: u32 = 0x06;
    pub const QUEUES: u32 = 0x07;
    pub const COALESCING: u32 = 0x08;
    pub const VECTOR: u32 = 0x09;
    pub const ATOMICITY: u32 = 0x0a;
    pub const EVENTS: u32 = 0x0b;
}

/// The maximum numbers of I/O queues of both kinds, less one each.
const QUEUE_COUNTS: u32 = (MAX_IO_QUEUES as u32 - 1) << 16 | (MAX_IO_QUEUES as u32 - 1);

fn set_feature(feature: u32, value: u32) -> Result<u32, Failure> {
    match feature {
        feature::QUEUES if value & 0xffff == 0xffff || value >> 16 == 0xffff => {
            Err(Failure::InvalidField)
        }
        feature::QUEUES => Ok(QUEUE_COUNTS),
        feature::WRITE_CACHE if value & 1 == 1 => Ok(0),
        feature::WRITE_CACHE => Err(Failure::FeatureNotChangeable),
        // Accepted without effect: there is one power state, the temperature is constant, interrupts are
        // never delayed, and no event happens.
        feature::ARBITRATION
        | feature::POWER
        | feature::TEMPERATURE
        | feature::ERROR_RECOVERY
        | feature::COALESCING
        | feature::VECTOR
        | feature::ATOMICITY
        | feature::EVENTS => Ok(0),
        _ => Err(Failure::InvalidField),
    }
}

fn get_feature(feature: u32, value: u32) -> Result<u32, Failure> {
    match feature {
        feature::QUEUES => Ok(QUEUE_COUNTS),
        feature::WRITE_CACHE => Ok(1),
        // The over-temperature threshold in kelvins; there is no under-temperature threshold.
        feature::TEMPERATURE if value >> 20 & 3 == 0 => Ok(343),
        feature::VECTOR => Ok(value & 0xffff),
        feature::ARBITRATION
        | feature::POWER
        | feature::TEMPERATURE
        | feature::ERROR_RECOVERY
        | feature::COALESCING
        | feature::ATOMICITY
        | feature::EVENTS => Ok(0),
        _ => Err(Failure::InvalidField),
    }
}
