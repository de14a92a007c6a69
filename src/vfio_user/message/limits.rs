//! The sizes of messages.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// The most bytes of data in one transfer (`max_data_xfer_size`); also what a peer that names no
/// size means.
pub const MAX_DATA: u32 = 1 << 20;
/// The longest message accepted, header included: the largest transfer and room for what surrounds
/// it.
pub const MAX_MESSAGE: u32 = MAX_DATA + 4096;
/// The most descriptors that come with one message: what the system carries at once.
pub const MAX_DESCRIPTORS: usize = 253;
