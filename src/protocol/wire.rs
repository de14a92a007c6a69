//! Little-endian structures and constants, named as in the specification.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Feature bit: `input_range` of the configuration space is valid.
pub const VIRTIO_IOMMU_F_INPUT_RANGE: u32 = 0;
/// Feature bit: `domain_range` of the configuration space is valid.
pub const VIRTIO_IOMMU_F_DOMAIN_RANGE: u32 = 1;
/// Feature bit: MAP and UNMAP requests are available.
pub const VIRTIO_IOMMU_F_MAP_UNMAP: u32 = 2;
/// Feature bit: the PROBE request is available.
pub const VIRTIO_IOMMU_F_PROBE: u32 = 4;
/// Feature bit: the MMIO flag of MAP is available.
pub const VIRTIO_IOMMU_F_MMIO: u32 = 5;
/// Feature bit: `bypass` of the configuration space and bypass domains are available.
pub const VIRTIO_IOMMU_F_BYPASS_CONFIG: u32 = 6;

/// Request type ATTACH.
pub const VIRTIO_IOMMU_T_ATTACH: u8 = 1;
/// Request type DETACH.
pub const VIRTIO_IOMMU_T_DETACH: u8 = 2;
/// Request type MAP.
pub const VIRTIO_IOMMU_T_MAP: u8 = 3;
/// Request type UNMAP.
pub const VIRTIO_IOMMU_T_UNMAP: u8 = 4;
/// Request type PROBE.
pub const VIRTIO_IOMMU_T_PROBE: u8 = 5;

/// ATTACH flag: the domain is a bypass domain.
pub const VIRTIO_IOMMU_ATTACH_F_BYPASS: u32 = 1 << 0;

/// MAP flag: endpoints may read.
pub const VIRTIO_IOMMU_MAP_F_READ: u32 = 1 << 0;
/// MAP flag: endpoints may write.
pub const VIRTIO_IOMMU_MAP_F_WRITE: u32 = 1 << 1;
/// MAP flag: the target is device memory.
pub const VIRTIO_IOMMU_MAP_F_MMIO: u32 = 1 << 2;

/// First bytes of every request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqHead {
    /// `VIRTIO_IOMMU_T_*`.
    pub kind: u8,
    /// Ignored by the device.
    pub reserved: [u8; 3],
}

/// Last bytes of every request, written by the device.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqTail {
    /// `VIRTIO_IOMMU_S_*`.
    pub status: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// The device-readable part of ATTACH.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqAttach {
    /// Request head.
    pub head: ReqHead,
    /// Domain ID.
    pub domain: U32,
    /// Endpoint ID.
    pub endpoint: U32,
    /// `VIRTIO_IOMMU_ATTACH_F_*`.
    pub flags: U32,
    /// Must be zero.
    pub reserved: [u8; 4],
}

/// The device-readable part of DETACH.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqDetach {
    /// Request head.
    pub head: ReqHead,
    /// Domain ID.
    pub domain: U32,
    /// Endpoint ID.
    pub endpoint: U32,
    /// Ignored by the device.
    pub reserved: [u8; 8],
}

/// The device-readable part of MAP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqMap {
    /// Request head.
    pub head: ReqHead,
    /// Domain ID.
    pub domain: U32,
    /// First I/O virtual address.
    pub virt_start: U64,
    /// Last I/O virtual address, inclusive.
    pub virt_end: U64,
    /// First guest-physical address.
    pub phys_start: U64,
    /// `VIRTIO_IOMMU_MAP_F_*`.
    pub flags: U32,
}

/// The device-readable part of UNMAP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqUnmap {
    /// Request head.
    pub head: ReqHead,
    /// Domain ID.
    pub domain: U32,
    /// First I/O virtual address.
    pub virt_start: U64,
    /// Last I/O virtual address, inclusive.
    pub virt_end: U64,
    /// Ignored by this device; the specification allows either.
    pub reserved: [u8; 4],
}

/// The device-readable part of PROBE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqProbe {
    /// Request head.
    pub head: ReqHead,
    /// Endpoint ID.
    pub endpoint: U32,
    /// Ignored by the device.
    pub reserved: [u8; 64],
}

/// Property type RESV_MEM.
pub const VIRTIO_IOMMU_PROBE_T_RESV_MEM: u16 = 1;
/// RESV_MEM subtype: must not be mapped.
pub const VIRTIO_IOMMU_RESV_MEM_T_RESERVED: u8 = 0;
/// RESV_MEM subtype: doorbell of message signaled interrupts.
pub const VIRTIO_IOMMU_RESV_MEM_T_MSI: u8 = 1;

/// Head of a property in the answer to PROBE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ProbeProperty {
    /// `VIRTIO_IOMMU_PROBE_T_*` in bits 11:0; bits 15:12 are zero.
    pub kind: U16,
    /// Length of the value in bytes, without this head.
    pub length: U16,
}

/// The RESV_MEM property with its head.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ProbeResvMem {
    /// Property head.
    pub head: ProbeProperty,
    /// `VIRTIO_IOMMU_RESV_MEM_T_*`.
    pub subtype: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// First address of the region.
    pub start: U64,
    /// Last address of the region, inclusive.
    pub end: U64,
}

/// Fault reason: unknown.
pub const VIRTIO_IOMMU_FAULT_R_UNKNOWN: u8 = 0;
/// Fault reason: the endpoint is not attached to a domain.
pub const VIRTIO_IOMMU_FAULT_R_DOMAIN: u8 = 1;
/// Fault reason: the address is not mapped, or not for this access.
pub const VIRTIO_IOMMU_FAULT_R_MAPPING: u8 = 2;
/// Fault flag: the access was a read.
pub const VIRTIO_IOMMU_FAULT_F_READ: u32 = 1 << 0;
/// Fault flag: the access was a write.
pub const VIRTIO_IOMMU_FAULT_F_WRITE: u32 = 1 << 1;
/// Fault flag: `address` is valid.
pub const VIRTIO_IOMMU_FAULT_F_ADDRESS: u32 = 1 << 8;

/// A record on the event queue.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FaultRecord {
    /// `VIRTIO_IOMMU_FAULT_R_*`.
    pub reason: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// `VIRTIO_IOMMU_FAULT_F_*`.
    pub flags: U32,
    /// Endpoint ID.
    pub endpoint: U32,
    /// Zero.
    pub reserved1: U32,
    /// The faulting address.
    pub address: U64,
}

/// The device configuration space.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConfigLayout {
    /// Page sizes; the lowest bit is the granularity of mappings.
    pub page_size_mask: U64,
    /// First address that the IOMMU translates.
    pub input_start: U64,
    /// Last address that the IOMMU translates, inclusive.
    pub input_end: U64,
    /// First domain ID.
    pub domain_start: U32,
    /// Last domain ID, inclusive.
    pub domain_end: U32,
    /// Size of PROBE's property list in bytes.
    pub probe_size: U32,
    /// 1: endpoints without a domain are in bypass mode.
    pub bypass: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<ReqHead>() == 4);
const _: () = assert!(size_of::<ReqTail>() == 4);
const _: () = assert!(size_of::<ReqAttach>() == 20);
const _: () = assert!(size_of::<ReqDetach>() == 20);
const _: () = assert!(size_of::<ReqMap>() == 36);
const _: () = assert!(size_of::<ReqUnmap>() == 28);
const _: () = assert!(size_of::<ReqProbe>() == 72);
const _: () = assert!(size_of::<ProbeResvMem>() == 24);
const _: () = assert!(size_of::<FaultRecord>() == 24);
const _: () = assert!(size_of::<ConfigLayout>() == 40);
