//! The data of IDENTIFY and GET LOG PAGE.

use crate::command::Failure;
use crate::disk::BLOCK_SHIFT;
use crate::prp::MAX_TRANSFER_SHIFT;
use crate::queues::MAX_ENTRIES;

/// Bytes of a data structure of IDENTIFY.
pub const IDENTIFY_BYTES: usize = 4096;
/// The maximum size of a log, in bytes.
pub const LOG_BYTES: usize = 4096;
/// The version of the specification: 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// The one namespace.
pub const NAMESPACE: u32 = 1;
/// The maximum number of pending requests for events, less one.
pub const EVENT_LIMIT: u8 = 3;

/// The data of IDENTIFY for a disk of `blocks` blocks.
///
/// # Errors
/// There is no such structure or namespace.
pub fn identify(structure: u32, nsid: u32, blocks: u64) -> Result<[u8; IDENTIFY_BYTES], Failure> {
    let mut page = [0; IDENTIFY_BYTES];
    match structure {
        0x00 if nsid == NAMESPACE => namespace(&mut page, blocks),
        // The list of a namespace's identifiers, which is empty.
        0x03 if nsid == NAMESPACE => {}
        0x00 | 0x03 => return Err(Failure::InvalidNamespace),
        0x01 => controller(&mut page),
        // The list of namespaces whose numbers exceed `nsid`.
        0x02 if nsid >= 0xffff_fffe => return Err(Failure::InvalidNamespace),
        0x02 if nsid < NAMESPACE => put(&mut page, 0, &NAMESPACE.to_le_bytes()),
        0x02 => {}
        _ => return Err(Failure::InvalidField),
    }
    Ok(page)
}

/// The data of GET LOG PAGE.
///
/// # Errors
/// There is no such log.
pub fn log_page(log: u32) -> Result<[u8; LOG_BYTES], Failure> {
    let mut page = [0; LOG_BYTES];
    match log {
        // Errors: none.
        0x01 => {}
        // Health: 300 K (27 degrees Celsius); available spare, and its threshold.
        0x02 => {
            put(&mut page, 1, &300u16.to_le_bytes());
            put(&mut page, 3, &[100, 10]);
        }
        // Firmware: the first slot is active.
        0x03 => {
            put(&mut page, 0, &[1]);
            text(&mut page, 8, 8, env!("CARGO_PKG_VERSION"));
        }
        _ => return Err(Failure::InvalidLogPage),
    }
    Ok(page)
}

fn controller(page: &mut [u8]) {
    put(page, 0, &crate::pci::VENDOR.to_le_bytes());
    put(page, 2, &crate::pci::VENDOR.to_le_bytes());
    text(page, 4, 20, &format!("viommu-{}", std::process::id()));
    text(page, 24, 40, "NVMe in a process of its own");
    text(page, 64, 8, env!("CARGO_PKG_VERSION"));
    put(page, 77, &[MAX_TRANSFER_SHIFT]);
    put(page, 80, &VERSION.to_le_bytes());
    // An I/O controller.
    put(page, 111, &[1]);
    // The maximum number of concurrent ABORTs, less one.
    put(page, 258, &[3]);
    put(page, 259, &[EVENT_LIMIT]);
    // One firmware slot, which is read-only.
    put(page, 260, &[0b11]);
    // Entries of 64 and 16 bytes, minimum and maximum.
    put(page, 512, &[0x66, 0x44]);
    put(page, 514, &MAX_ENTRIES.to_le_bytes());
    put(page, 516, &NAMESPACE.to_le_bytes());
    // WRITE ZEROES.
    put(page, 520, &(1u16 << 3).to_le_bytes());
    // There is a volatile write cache, which FLUSH writes back.
    put(page, 525, &[1]);
    let name = format!("nqn.2014-08.org.nvmexpress:viommu-{}", std::process::id());
    put(page, 768, name.as_bytes());
}

fn namespace(page: &mut [u8], blocks: u64) {
    for at in [0, 8, 16] {
        put(page, at, &blocks.to_le_bytes());
    }
    // The only format: blocks without metadata.
    put(page, 130, &[BLOCK_SHIFT]);
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = page.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Writes a text padded with blanks to `len` bytes.
fn text(page: &mut [u8], at: usize, len: usize, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(len, b' ');
    put(page, at, &bytes);
}
