//! Physical region pages: the memory of a command's data (base specification 1.4, section 4.3).

use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use crate::command::{Command, Failure};
use crate::memory::{Gate, Memory, Segment};

/// Bytes of a page. The controller supports no other size.
pub const PAGE: usize = 4096;
/// The maximum number of pages that a command transfers, as a power of two.
pub const MAX_TRANSFER_SHIFT: u8 = 8;
/// The maximum number of bytes that a command transfers.
pub const MAX_TRANSFER: usize = PAGE << MAX_TRANSFER_SHIFT;

/// The memory of a command's `len` bytes, `1..=MAX_TRANSFER`.
///
/// # Errors
/// The status to complete the command with: an address is misaligned, or a list cannot be read.
pub fn segments(
    memory: &dyn Memory,
    gate: &Gate,
    command: &Command,
    len: usize,
) -> Result<Vec<Segment>, Failure> {
    if len == 0 || len > MAX_TRANSFER {
        return Err(Failure::InvalidField);
    }
    let (first, second) = (command.prp1.get(), command.prp2.get());
    if first % 4 != 0 {
        return Err(Failure::InvalidPrpOffset);
    }
    let mut found = Vec::new();
    let in_first = len.min(PAGE - offset(first));
    push(&mut found, first, in_first);
    let mut left = len - in_first;
    if left == 0 {
        return Ok(found);
    }
    if left <= PAGE {
        return match offset(second) {
            0 => {
                push(&mut found, second, left);
                Ok(found)
            }
            _ => Err(Failure::InvalidPrpOffset),
        };
    }
    let mut list = second;
    // Each iteration consumes a page or more of the data, so that the loop ends for every list.
    while left > 0 {
        if list % 8 != 0 {
            return Err(Failure::InvalidPrpOffset);
        }
        let room = (PAGE - offset(list)) / 8;
        let pages = left.div_ceil(PAGE);
        let read = pages.min(room);
        let mut bytes = [0; PAGE];
        let bytes = &mut bytes[..read * 8];
        let at = Segment {
            address: list,
            len: bytes.len(),
        };
        let got = memory.read(gate, &[at], bytes);
        got.map_err(|_| Failure::DataTransfer)?;
        let entries = <[U64]>::ref_from_bytes(bytes).map_err(|_| Failure::Internal)?;
        // If the list goes on, the last entry of a page is the address of the list's next page.
        let (entries, next) = match entries.split_last() {
            Some((next, entries)) if pages > room => (entries, next.get()),
            Some(_) | None => (entries, 0),
        };
        if entries.is_empty() && room == 1 && offset(next) == PAGE - 8 {
            return Err(Failure::InvalidPrpOffset);
        }
        for entry in entries {
            if offset(entry.get()) != 0 {
                return Err(Failure::InvalidPrpOffset);
            }
            let step = left.min(PAGE);
            push(&mut found, entry.get(), step);
            left -= step;
        }
        list = next;
    }
    Ok(found)
}

fn offset(address: u64) -> usize {
    usize::try_from(address % PAGE as u64).unwrap_or(0)
}

/// Adds a segment, or extends the last one if it ends at `address`.
fn push(found: &mut Vec<Segment>, address: u64, len: usize) {
    if let Some(last) = found.last_mut()
        && last.address.checked_add(last.len as u64) == Some(address)
    {
        last.len += len;
        return;
    }
    found.push(Segment { address, len });
}
