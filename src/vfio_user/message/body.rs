//! What follows the header: structures, and the bits in them.

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

/// Derives what every structure on the wire has.
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
    /// Before the text of VERSION.
    VersionBody, 4, {
    /// Must be the same on both sides.
    major: U16,
    /// The lower of the two sides' counts.
    minor: U16,
});
wire!(
    /// DMA_MAP. A descriptor comes with it where the memory can be mapped.
    DmaMapBody, 32, {
    /// Bytes of this structure.
    argsz: U32,
    /// `DMA_MAP_*`.
    flags: U32,
    /// Where in the descriptor's file the memory begins.
    offset: U64,
    /// The device's address for it.
    address: U64,
    /// Bytes.
    size: U64,
});
wire!(
    /// DMA_UNMAP and its reply.
    DmaUnmapBody, 24, {
    /// The most bytes of a reply.
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
    /// What the device is and can.
    flags: U32,
    /// Regions.
    regions: U32,
    /// Kinds of interrupts.
    irqs: U32,
});
wire!(
    /// DEVICE_GET_REGION_INFO and its reply, which capabilities may follow.
    RegionInfoBody, 32, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// What can be done with the region.
    flags: U32,
    /// Which region.
    index: U32,
    /// Where the first capability is, from the start of this structure.
    cap_offset: U32,
    /// Bytes of the region.
    size: U64,
    /// Where in the descriptor's file the region begins.
    offset: U64,
});
wire!(
    /// DEVICE_GET_REGION_IO_FDS and its reply, which entries follow.
    RegionIoFdsBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// Zero.
    flags: U32,
    /// Which region.
    index: U32,
    /// Entries.
    count: U32,
});
wire!(
    /// DEVICE_GET_IRQ_INFO and its reply.
    IrqInfoBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// What can be done with the interrupts.
    flags: U32,
    /// Which kind.
    index: U32,
    /// How many.
    count: U32,
});
wire!(
    /// DEVICE_SET_IRQS, which bytes may follow.
    IrqSetBody, 20, {
    /// Bytes of this structure and what follows.
    argsz: U32,
    /// `IRQ_*`.
    flags: U32,
    /// Which kind.
    index: U32,
    /// The first one.
    start: U32,
    /// How many.
    count: U32,
});
wire!(
    /// REGION_READ and REGION_WRITE and their replies, which data may follow.
    RegionAccessBody, 16, {
    /// Where in the region.
    offset: U64,
    /// Which region.
    region: U32,
    /// Bytes.
    count: U32,
});
wire!(
    /// Before the entries of REGION_WRITE_MULTI, and its reply.
    WriteMultiBody, 8, {
    /// Entries.
    count: U64,
});
wire!(
    /// An entry of REGION_WRITE_MULTI.
    WriteOneBody, 24, {
    /// Where in the region.
    offset: U64,
    /// Which region.
    region: U32,
    /// Bytes of `data` that count.
    count: U32,
    /// The data.
    data: [u8; 8],
});
wire!(
    /// DMA_READ and DMA_WRITE and their replies, which data may follow.
    DmaAccessBody, 16, {
    /// The device's address.
    address: U64,
    /// Bytes.
    count: U64,
});
wire!(
    /// Before the data of DEVICE_FEATURE and its reply.
    FeatureBody, 8, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// The feature's number, and what to do with it.
    flags: U32,
});
wire!(
    /// MIG_DATA_READ and MIG_DATA_WRITE, which data may follow.
    MigDataBody, 8, {
    /// Bytes of this structure and what follows.
    argsz: U32,
    /// Bytes of data.
    size: U32,
});

/// Reads the structure a body begins with. Returns what follows it too.
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
