//! Faults, as the event queue carries them.

use zerocopy::IntoBytes;

use super::wire::{
    FaultRecord, VIRTIO_IOMMU_FAULT_F_ADDRESS, VIRTIO_IOMMU_FAULT_F_READ,
    VIRTIO_IOMMU_FAULT_F_WRITE, VIRTIO_IOMMU_FAULT_R_DOMAIN, VIRTIO_IOMMU_FAULT_R_MAPPING,
    VIRTIO_IOMMU_FAULT_R_UNKNOWN,
};
use crate::address::{Access, Iova};
use crate::ids::EndpointId;

/// Length of a fault record in bytes.
pub const FAULT_LEN: usize = size_of::<FaultRecord>();

/// Why an access was refused (`VIRTIO_IOMMU_FAULT_R_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireReason {
    /// None of the others.
    Unknown,
    /// The endpoint is not attached to a domain.
    Domain,
    /// The address is not mapped, or not for this access.
    Mapping,
}

/// The bytes of a fault record; reserved fields and undefined flags are zero.
pub fn encode(
    reason: WireReason,
    access: Access,
    endpoint: EndpointId,
    address: Option<Iova>,
) -> [u8; FAULT_LEN] {
    let mut flags = 0;
    if access.read {
        flags |= VIRTIO_IOMMU_FAULT_F_READ;
    }
    if access.write {
        flags |= VIRTIO_IOMMU_FAULT_F_WRITE;
    }
    if address.is_some() {
        flags |= VIRTIO_IOMMU_FAULT_F_ADDRESS;
    }
    let record = FaultRecord {
        reason: match reason {
            WireReason::Unknown => VIRTIO_IOMMU_FAULT_R_UNKNOWN,
            WireReason::Domain => VIRTIO_IOMMU_FAULT_R_DOMAIN,
            WireReason::Mapping => VIRTIO_IOMMU_FAULT_R_MAPPING,
        },
        reserved: [0; 3],
        flags: flags.into(),
        endpoint: endpoint.0.into(),
        reserved1: 0.into(),
        address: address.map_or(0, |a| a.0).into(),
    };
    let mut bytes = [0; FAULT_LEN];
    bytes.copy_from_slice(record.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_the_format_of_the_specification() {
        let bytes = encode(
            WireReason::Mapping,
            Access::WRITE,
            EndpointId(0x1_0030),
            Some(Iova(0x1234_5678_9abc)),
        );
        assert_eq!(bytes[..4], [2, 0, 0, 0]);
        assert_eq!(bytes[4..8], 0x102u32.to_le_bytes());
        assert_eq!(bytes[8..12], 0x1_0030u32.to_le_bytes());
        assert_eq!(bytes[12..16], [0; 4]);
        assert_eq!(bytes[16..], 0x1234_5678_9abcu64.to_le_bytes());
        let bytes = encode(WireReason::Domain, Access::READ, EndpointId(1), None);
        assert_eq!(bytes[..8], [1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[16..], [0; 8]);
    }
}
