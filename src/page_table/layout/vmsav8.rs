//! The bits of [`Format::Vmsav8Stage1`](super::Format::Vmsav8Stage1): VMSAv8-64 stage 1, granule of 4 KiB.
//!
//! Our level *k* is Arm's level 4 - *k*: our level 1, of the pages, is Arm's level 3.

use crate::address::Access;

/// Hardware may use the entry. Clear in a leaf without access rights.
pub const VALID: u64 = 1 << 0;
/// Set in a page and in a pointer to a table, clear in a block of 2 MiB or 1 GiB.
pub const PAGE_OR_TABLE: u64 = 1 << 1;
/// AttrIndx: the leaf has the attributes at index 1 of [`MAIR`], not those at index 0.
pub const DEVICE: u64 = 1 << 2;
/// `AP[1]`: unprivileged requests may use the entry. Always set in leaves.
pub const UNPRIVILEGED: u64 = 1 << 6;
/// `AP[2]`: the endpoint may not write.
pub const READ_ONLY: u64 = 1 << 7;
/// SH: inner shareable. Always set in leaves; hardware ignores it for device memory.
pub const INNER_SHAREABLE: u64 = 3 << 8;
/// AF, always set in leaves: with it clear, hardware would fault, or write to the table.
pub const ACCESSED: u64 = 1 << 10;
/// nG, always set in leaves: cached translations belong to one ASID.
pub const NOT_GLOBAL: u64 = 1 << 11;
/// PXN and UXN, always set in leaves: requests cannot fetch instructions.
pub const EXECUTE_NEVER: u64 = 3 << 53;
/// The endpoint may not read. Hardware cannot express this right; software readers must obey it.
pub const NO_READ: u64 = 1 << 55;
/// The target is device memory.
pub const MMIO: u64 = 1 << 56;
/// Last leaf of a mapping.
pub const LAST: u64 = 1 << 57;
/// First leaf of a mapping.
pub const FIRST: u64 = 1 << 58;

/// The memory attributes that the leaves refer to, for the context descriptor's MAIR. Index 0: normal memory, write-back,
/// read- and write-allocate. Index 1: Device-nGnRE.
pub const MAIR: u64 = 0x04ff;

/// The bits of a pointer to a table, beside address and count.
pub const TABLE: u64 = VALID | PAGE_OR_TABLE;
/// The lowest bit of the number of entries in use: hardware ignores bits 11:2 of a pointer to a table.
pub const USED_SHIFT: u32 = 2;

/// The bits of a leaf at `level`, beside the address and the marks of a mapping's ends. Never zero.
pub(super) fn leaf(level: u32, access: Access, mmio: bool) -> u64 {
    let mut bits = UNPRIVILEGED | INNER_SHAREABLE | ACCESSED | NOT_GLOBAL | EXECUTE_NEVER;
    if access.read || access.write {
        bits |= VALID;
    }
    if !access.write {
        bits |= READ_ONLY;
    }
    if !access.read {
        bits |= NO_READ;
    }
    if mmio {
        bits |= MMIO | DEVICE;
    }
    if level == 1 {
        bits |= PAGE_OR_TABLE;
    }
    bits
}
