//! The structures that bodies begin with, and their flags.

use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::command::Command;
use super::malformed::Malformed;

/// `flags` of [`DmaMapBody`]: the device may read.
pub const DMA_MAP_READ: u32 = 1 << 0;
/// `flags` of [`DmaMapBody`]: the device may write.
pub const DMA_MAP_WRITE: u32 = 1 << 1;
/// `flags` of [`DmaUnmapBody`]: report the pages that the device wrote.
pub const DMA_UNMAP_DIRTY: u32 = 1 << 0;
/// `flags` of [`DmaUnmapBody`]: unmap everything; address and size are 0.
pub const DMA_UNMAP_ALL: u32 = 1 << 1;
/// `flags` of [`DeviceInfoBody`]: the device can be reset.
pub const DEVICE_RESET: u32 = 1 << 0;
/// `flags` of [`DeviceInfoBody`]: it is a PCI device.
pub const DEVICE_PCI: u32 = 1 << 1;
/// `flags` of [`RegionInfoBody`]: the client may read the region.
pub const REGION_READ: u32 = 1 << 0;
/// `flags` of [`RegionInfoBody`]: the client may write the region.
pub const REGION_WRITE: u32 = 1 << 1;
/// `flags` of [`RegionInfoBody`]: the client may map the region.
pub const REGION_MMAP: u32 = 1 << 2;
/// `flags` of [`RegionInfoBody`]: capabilities follow.
pub const REGION_CAPS: u32 = 1 << 3;
/// Capability of a region: the parts of it that can be mapped.
pub const REGION_CAP_SPARSE_MMAP: u16 = 1;
/// Capability of a region: its type.
pub const REGION_CAP_TYPE: u16 = 2;
/// Capability of a region: the MSI-X table may be mapped with the rest.
pub const REGION_CAP_MSIX_MAPPABLE: u16 = 3;
/// `flags` of [`IrqInfoBody`]: eventfds can signal the interrupts.
pub const IRQ_INFO_EVENTFD: u32 = 1 << 0;
/// `flags` of [`IrqSetBody`]: no data.
pub const IRQ_DATA_NONE: u32 = 1 << 0;
/// `flags` of [`IrqSetBody`]: a byte for each interrupt.
pub const IRQ_DATA_BOOL: u32 = 1 << 1;
/// `flags` of [`IrqSetBody`]: a descriptor for each interrupt.
pub const IRQ_DATA_EVENTFD: u32 = 1 << 2;
/// `flags` of [`IrqSetBody`]: the bits for the kind of data.
pub const IRQ_DATA: u32 = IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD;
/// `flags` of [`IrqSetBody`]: mask the interrupts.
pub const IRQ_ACTION_MASK: u32 = 1 << 3;
/// `flags` of [`IrqSetBody`]: unmask the interrupts.
pub const IRQ_ACTION_UNMASK: u32 = 1 << 4;
/// `flags` of [`IrqSetBody`]: signal the interrupts, or set what signals them.
pub const IRQ_ACTION_TRIGGER: u32 = 1 << 5;
/// `flags` of [`IrqSetBody`]: the bits for the action.
pub const IRQ_ACTIONS: u32 = IRQ_ACTION_MASK | IRQ_ACTION_UNMASK | IRQ_ACTION_TRIGGER;
/// `flags` of [`FeatureBody`]: the bits for the number of the feature.
pub const FEATURE_INDEX: u32 = 0xffff;
/// Features that start, stop and read a log of the pages that DMA wrote.
pub const FEATURES_DMA_LOGGING: std::ops::RangeInclusive<u32> = 6..=8;

/// Defines a structure, derives its conversions and checks its size.
macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal, { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl $name {
            /// Bytes of the structure.
            pub const BYTES: u32 = $size;
        }
    };
}

wire!(
    /// VERSION and its reply. The text of the capabilities follows.
    VersionBody, 4, {
    /// Client and server must have the same.
    major: U16,
    /// The lower one of client and server applies.
    minor: U16,
});
wire!(
    /// DMA_MAP. A descriptor comes with it if the memory can be mapped.
    DmaMapBody, 32, {
    /// Bytes of this structure.
    argsz: U32,
    /// `DMA_MAP_*`.
    flags: U32,
    /// The offset of the memory in the descriptor's file.
    offset: U64,
    /// The device's address of the memory.
    address: U64,
    /// Bytes.
    size: U64,
});
wire!(
    /// DMA_UNMAP and its reply.
    DmaUnmapBody, 24, {
    /// The maximum number of bytes of a reply.
    argsz: U32,
    /// `DMA_UNMAP_*`.
    flags: U32,
    /// The device's address.
    address: U64,
    /// Bytes.
    size: U64,
});
wire!(
    /// DEVICE_GET_INFO and its reply.
    DeviceInfoBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// `DEVICE_*`.
    flags: U32,
    /// The number of regions.
    regions: U32,
    /// The number of kinds of interrupts.
    irqs: U32,
});
wire!(
    /// DEVICE_GET_REGION_INFO and its reply. Capabilities may follow.
    RegionInfoBody, 32, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// `REGION_*`.
    flags: U32,
    /// The number of the region.
    index: U32,
    /// The offset of the first capability from the start of this structure.
    cap_offset: U32,
    /// Bytes of the region; 0 if the device lacks it.
    size: U64,
    /// The offset of the region in the descriptor's file.
    offset: U64,
});
wire!(
    /// DEVICE_GET_REGION_IO_FDS and its reply. Entries follow.
    RegionIoFdsBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// Zero.
    flags: U32,
    /// The number of the region.
    index: U32,
    /// The number of entries.
    count: U32,
});
wire!(
    /// DEVICE_GET_IRQ_INFO and its reply.
    IrqInfoBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// `IRQ_INFO_*`.
    flags: U32,
    /// The kind of the interrupts.
    index: U32,
    /// The number of interrupts.
    count: U32,
});
wire!(
    /// DEVICE_SET_IRQS. A byte for each interrupt may follow.
    IrqSetBody, 20, {
    /// Bytes of this structure and the bytes that follow.
    argsz: U32,
    /// `IRQ_DATA_*` and `IRQ_ACTION_*`.
    flags: U32,
    /// The kind of the interrupts.
    index: U32,
    /// The first interrupt.
    start: U32,
    /// The number of interrupts.
    count: U32,
});
wire!(
    /// REGION_READ and REGION_WRITE and their replies. Data may follow.
    RegionAccessBody, 16, {
    /// The offset in the region.
    offset: U64,
    /// The number of the region.
    region: U32,
    /// Bytes.
    count: U32,
});
wire!(
    /// REGION_WRITE_MULTI, before its entries, and its reply.
    WriteMultiBody, 8, {
    /// The number of entries.
    count: U64,
});
wire!(
    /// An entry of REGION_WRITE_MULTI.
    WriteOneBody, 24, {
    /// The offset in the region.
    offset: U64,
    /// The number of the region.
    region: U32,
    /// The number of bytes of `data` to write.
    count: U32,
    /// The data.
    data: [u8; 8],
});
wire!(
    /// DMA_READ and DMA_WRITE and their replies. Data may follow.
    DmaAccessBody, 16, {
    /// The device's address.
    address: U64,
    /// Bytes.
    count: U64,
});
wire!(
    /// DEVICE_FEATURE and its reply, before their data.
    FeatureBody, 8, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// The number of the feature, and whether to get, set or probe it.
    flags: U32,
});
wire!(
    /// MIG_DATA_READ and MIG_DATA_WRITE. Data may follow.
    MigDataBody, 8, {
    /// Bytes of this structure and of the data.
    argsz: U32,
    /// Bytes of data.
    size: U32,
});

/// Decodes the structure that a body begins with. Returns it and the rest of the body.
///
/// # Errors
/// [`Malformed::Short`].
pub fn take<T: FromBytes + Immutable + KnownLayout + Unaligned>(
    command: Command,
    body: &[u8],
) -> Result<(T, &[u8]), Malformed> {
    T::read_from_prefix(body).map_err(|_| Malformed::Short {
        command,
        need: size_of::<T>(),
        have: body.len(),
    })
}
