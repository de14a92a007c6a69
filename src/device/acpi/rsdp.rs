//! The root system description pointer (ACPI specification, section "Root System Description Pointer (RSDP)").

use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Where cloud-hypervisor puts the RSDP.
const BEHIND_CONVENTIONAL_MEMORY: u64 = 0xa_0000;
/// Where firmware puts it, at a multiple of 16.
const BIOS_AREA: std::ops::Range<u64> = 0xe_0000..0x10_0000;
const STEP: usize = 16;
const CHUNK: usize = 0x1000;

const SIGNATURE: &[u8; 8] = b"RSD PTR ";
/// Length of the structure of revision 0, and of the part that the first checksum covers.
const SHORT_LEN: usize = 20;
/// Length of the structure of revision 2.
const LONG_LEN: usize = 36;

/// The VMM's RSDP, with correct checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rsdp {
    at: u64,
    bytes: Vec<u8>,
}

impl Rsdp {
    /// Its guest-physical address.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Its bytes: 20 of revision 0, 36 of revision 2.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The address of the XSDT, if there is one.
    pub(super) fn xsdt(&self) -> Option<u64> {
        let field = self.bytes.get(24..32)?.try_into().ok()?;
        Some(u64::from_le_bytes(field)).filter(|&at| at != 0)
    }

    /// The address of the RSDT, if there is one.
    pub(super) fn rsdt(&self) -> Option<u64> {
        let field = self.bytes.get(16..20)?.try_into().ok()?;
        Some(u64::from(u32::from_le_bytes(field))).filter(|&at| at != 0)
    }
}

/// The first valid RSDP of guest memory.
pub(super) fn find<M: GuestMemory + ?Sized>(memory: &M) -> Option<Rsdp> {
    read(memory, BEHIND_CONVENTIONAL_MEMORY).or_else(|| {
        BIOS_AREA
            .step_by(CHUNK)
            .find_map(|chunk| find_in_chunk(memory, chunk))
    })
}

/// The RSDP of one page of the BIOS area. A page that is not guest RAM has none.
fn find_in_chunk<M: GuestMemory + ?Sized>(memory: &M, chunk: u64) -> Option<Rsdp> {
    let mut bytes = [0; CHUNK];
    memory.read_slice(&mut bytes, GuestAddress(chunk)).ok()?;
    bytes
        .chunks_exact(STEP)
        .zip((chunk..).step_by(STEP))
        .filter(|(piece, _)| piece.starts_with(SIGNATURE))
        .find_map(|(_, at)| read(memory, at))
}

fn read<M: GuestMemory + ?Sized>(memory: &M, at: u64) -> Option<Rsdp> {
    let mut bytes = vec![0; SHORT_LEN];
    memory.read_slice(&mut bytes, GuestAddress(at)).ok()?;
    if !bytes.starts_with(SIGNATURE) || sum(&bytes) != 0 {
        return None;
    }
    match bytes[15] {
        0 => {}
        2 => {
            bytes.resize(LONG_LEN, 0);
            memory.read_slice(&mut bytes, GuestAddress(at)).ok()?;
            let length = u32::from_le_bytes(bytes[20..24].try_into().ok()?);
            // The short part again: the guest may have changed it between the two reads.
            if !bytes.starts_with(SIGNATURE)
                || usize::try_from(length) != Ok(LONG_LEN)
                || bytes[15] != 2
                || sum(&bytes[..SHORT_LEN]) != 0
                || sum(&bytes) != 0
            {
                return None;
            }
        }
        _ => return None,
    }
    Some(Rsdp { at, bytes })
}

/// The sum of bytes, which is 0 for a table with a correct checksum.
pub(super) fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}
