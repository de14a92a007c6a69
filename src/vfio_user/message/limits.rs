//! Limits of a message's size.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// The maximum number of bytes of data in one transfer (`max_data_xfer_size`), also that of a peer
/// that names none.
pub const MAX_DATA: u32 = 1 << 20;
/// The maximum size of a message in bytes, header included: the largest transfer, and room for the
/// structures before it.
pub const MAX_MESSAGE: u32 = MAX_DATA + 4096;
/// The maximum number of descriptors with one message, which is that of the kernel (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;
