//! Fields of a structure in an access of any width.

/// Copies the bytes of a structure from offset `at` on.
pub(super) fn copy(structure: &[u8], at: usize, into: &mut [u8]) {
    for (into, byte) in into.iter_mut().zip(structure.iter().skip(at)) {
        *into = *byte;
    }
}

/// Whether `len` bytes at `at` have a byte of the `size` bytes at `field`.
pub(super) fn covers(at: usize, len: usize, field: usize, size: usize) -> bool {
    at < field + size && field < at + len
}

/// The bytes of the field at `offset`, if `data` at `at` has all of them.
pub(super) fn field<const LEN: usize>(at: usize, data: &[u8], offset: usize) -> Option<[u8; LEN]> {
    data.get(offset.checked_sub(at)?..)?.first_chunk().copied()
}

/// Writes the halves of an address that `data` at `at` covers.
// PCI-3
pub(super) fn write_address(address: &mut u64, at: usize, data: &[u8], offset: usize) {
    if let Some(low) = field(at, data, offset).map(u32::from_le_bytes) {
        *address = *address >> 32 << 32 | u64::from(low);
    }
    if let Some(high) = field(at, data, offset + 4).map(u32::from_le_bytes) {
        *address = u64::from(high) << 32 | *address & u64::from(u32::MAX);
    }
}
