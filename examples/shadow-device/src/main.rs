//! A DMA copy engine: the smallest device that does DMA through the guest's IOMMU from a process of its own.
//!
//! `shadow-device SOCKET ENDPOINT` reads one command a line from standard input, `FROM TO BYTES`, copies
//! that many bytes of guest memory between the two I/O virtual addresses, and answers each command with one
//! line: `copied`, or `failed:` and the reason. Numbers are decimal, or hexadecimal after `0x`.
//!
//! The device outlives the daemon: the library registers again with the next one, and accesses wait meanwhile.

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::PathBuf;

use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::{ShadowMemory, ShadowReader};
use vm_memory::{Bytes, GuestAddress};

/// The most bytes of one access: the guest's UNMAP waits for an access in progress, so each one is short.
const PIECE: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(socket), Some(endpoint), None) = (args.next(), args.next(), args.next()) else {
        return Err(
            "usage: shadow-device SOCKET ENDPOINT; for 00:06.0 the endpoint is 0x30".into(),
        );
    };
    let endpoint = number(&endpoint.to_string_lossy())?;
    let endpoint = EndpointId(u32::try_from(endpoint)?);
    let reader = ShadowReader::connect(&PathBuf::from(socket), endpoint)?;
    let mut memory = reader.memory();
    let mut answers = std::io::stdout();
    for command in std::io::stdin().lock().lines() {
        // The VMM may have added or removed guest memory since the last command.
        if reader.has_changed(&memory) {
            memory = reader.memory();
        }
        match copy(&memory, &command?) {
            Ok(()) => writeln!(answers, "copied")?,
            Err(cause) => writeln!(answers, "failed: {cause}")?,
        }
        answers.flush()?;
    }
    Ok(())
}

/// Carries out the command `FROM TO BYTES`.
fn copy(memory: &ShadowMemory, command: &str) -> Result<(), Box<dyn Error>> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let [from, to, bytes] = words.as_slice() else {
        return Err(format!("{command:?} is not FROM TO BYTES").into());
    };
    let (from, to, bytes) = (number(from)?, number(to)?, number(bytes)?);
    let mut buffer = [0; PIECE];
    let mut done = 0;
    while done < bytes {
        let length = usize::try_from(bytes - done)?.min(PIECE);
        let (piece, _) = buffer.split_at_mut(length);
        // Each call is one access. The library reports one that the IOMMU refuses to the guest.
        memory.read_slice(piece, address(from, done)?)?;
        memory.write_slice(piece, address(to, done)?)?;
        done += length as u64;
    }
    Ok(())
}

fn address(first: u64, offset: u64) -> Result<GuestAddress, Box<dyn Error>> {
    let sum = first.checked_add(offset);
    let sum = sum.ok_or("the range passes the last address")?;
    Ok(GuestAddress(sum))
}

fn number(text: &str) -> Result<u64, Box<dyn Error>> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|cause| format!("{text:?} is not a number: {cause}").into())
}
