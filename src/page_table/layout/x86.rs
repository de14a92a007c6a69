//! The bits of [`Format::X86FirstStage`](super::Format::X86FirstStage): first-stage translation of x86-64.

use crate::address::Access;

/// Hardware may use the entry. Clear in a leaf without access rights.
pub const PRESENT: u64 = 1 << 0;
/// The endpoint may write.
pub const WRITE: u64 = 1 << 1;
/// Unprivileged requests may use the entry. Always set together with [`PRESENT`].
pub const USER: u64 = 1 << 2;
/// Always set, so that hardware never writes to a table.
pub const ACCESSED: u64 = 1 << 5;
/// Always set in leaves, so that hardware never writes to a table.
pub const DIRTY: u64 = 1 << 6;
/// A leaf at level 2 or 3.
pub const PAGE_SIZE: u64 = 1 << 7;
/// First leaf of a mapping.
pub const FIRST: u64 = 1 << 52;
/// Last leaf of a mapping.
pub const LAST: u64 = 1 << 53;
/// The target is device memory.
pub const MMIO: u64 = 1 << 54;
/// The endpoint may not read. Hardware cannot express this right; software readers must obey it.
pub const NO_READ: u64 = 1 << 55;

/// The bits of a pointer to a table, beside address and count.
pub const TABLE: u64 = PRESENT | WRITE | USER | ACCESSED;
/// The lowest bit of the number of entries in use.
pub const USED_SHIFT: u32 = 52;

/// The bits of a leaf at `level`, beside the address and the marks of a mapping's ends. Never zero.
pub(super) fn leaf(level: u32, access: Access, mmio: bool) -> u64 {
    let mut bits = ACCESSED | DIRTY;
    if access.read || access.write {
        bits |= PRESENT | USER;
    }
    if access.write {
        bits |= WRITE;
    }
    if !access.read {
        bits |= NO_READ;
    }
    if mmio {
        bits |= MMIO;
    }
    if level > 1 {
        bits |= PAGE_SIZE;
    }
    bits
}
