//! The root system description pointer (ACPI specification, section "Root System Description Pointer (RSDP)").

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::read_only::{BIOS_AREA, ReadOnlyWindows};

/// Where cloud-hypervisor puts the RSDP.
const BEHIND_CONVENTIONAL_MEMORY: u64 = 0xa_0000;
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
    /// All of it is RAM, not memory that the VMM has mapped read-only.
    is_in_ram: bool,
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

    /// Whether all of it is RAM, so that a table may follow.
    pub(super) fn is_in_ram(&self) -> bool {
        self.is_in_ram
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

/// The first valid RSDP of guest memory: of RAM, or of the BIOS area that the VMM has mapped read-only.
pub(super) fn find<M: GuestMemory + ?Sized>(
    memory: &M,
    read_only: &ReadOnlyWindows,
) -> Option<Rsdp> {
    let source = Source { memory, read_only };
    source.read(BEHIND_CONVENTIONAL_MEMORY).or_else(|| {
        BIOS_AREA
            .step_by(CHUNK)
            .find_map(|chunk| source.find_in_chunk(chunk))
    })
}

/// Where the RSDP is read.
struct Source<'a, M: ?Sized> {
    memory: &'a M,
    read_only: &'a ReadOnlyWindows,
}

impl<M: GuestMemory + ?Sized> Source<'_, M> {
    /// The RSDP of one page of the BIOS area. A page that is neither RAM nor in a window has none.
    fn find_in_chunk(&self, chunk: u64) -> Option<Rsdp> {
        let mut bytes = [0; CHUNK];
        self.fill(chunk, &mut bytes)?;
        bytes
            .chunks_exact(STEP)
            .zip((chunk..).step_by(STEP))
            .filter(|(piece, _)| piece.starts_with(SIGNATURE))
            .find_map(|(_, at)| self.read(at))
    }

    /// A valid RSDP at `at`.
    fn read(&self, at: u64) -> Option<Rsdp> {
        let mut bytes = vec![0; SHORT_LEN];
        self.fill(at, &mut bytes)?;
        if !bytes.starts_with(SIGNATURE) || sum(&bytes) != 0 {
            return None;
        }
        match bytes[15] {
            0 => {}
            2 => {
                bytes.resize(LONG_LEN, 0);
                self.fill(at, &mut bytes)?;
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
        let is_in_ram = self
            .memory
            .check_range(GuestAddress(at), bytes.len(), Permissions::Read);
        Some(Rsdp {
            at,
            bytes,
            is_in_ram,
        })
    }

    /// Reads the bytes from `at` on. A page is RAM or in a window, so a structure may lie in both.
    fn fill(&self, mut at: u64, mut into: &mut [u8]) -> Option<()> {
        while !into.is_empty() {
            let in_page = CHUNK - usize::try_from(at % CHUNK as u64).ok()?;
            let (piece, rest) = into.split_at_mut(in_page.min(into.len()));
            if self.memory.read_slice(piece, GuestAddress(at)).is_err()
                && !self.read_only.read(at, piece)
            {
                return None;
            }
            at = at.checked_add(piece.len() as u64)?;
            into = rest;
        }
        Some(())
    }
}

/// The sum of bytes, which is 0 for a table with a correct checksum.
pub(super) fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}
