//! The record of a fault on the event queue.

use super::wire::{
    FaultRecord, VIRTIO_IOMMU_FAULT_F_ADDRESS, VIRTIO_IOMMU_FAULT_F_READ,
    VIRTIO_IOMMU_FAULT_F_WRITE, VIRTIO_IOMMU_FAULT_R_DOMAIN, VIRTIO_IOMMU_FAULT_R_MAPPING,
    VIRTIO_IOMMU_FAULT_R_UNKNOWN,
};
use crate::faults::{Fault, FaultReason};

/// Length of a fault record in bytes.
pub const FAULT_LEN: usize = size_of::<FaultRecord>();

/// Reserved fields and undefined flags are zero; the record always has the address.
impl From<&Fault> for FaultRecord {
    fn from(fault: &Fault) -> Self {
        let mut flags = VIRTIO_IOMMU_FAULT_F_ADDRESS;
        if fault.access.read {
            flags |= VIRTIO_IOMMU_FAULT_F_READ;
        }
        if fault.access.write {
            flags |= VIRTIO_IOMMU_FAULT_F_WRITE;
        }
        Self {
            reason: match fault.reason {
                FaultReason::Unknown => VIRTIO_IOMMU_FAULT_R_UNKNOWN,
                FaultReason::Domain => VIRTIO_IOMMU_FAULT_R_DOMAIN,
                FaultReason::Mapping => VIRTIO_IOMMU_FAULT_R_MAPPING,
            },
            reserved: [0; 3],
            flags: flags.into(),
            endpoint: fault.endpoint.0.into(),
            reserved1: 0.into(),
            address: fault.address.0.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;
    use crate::address::{Access, Iova};
    use crate::ids::EndpointId;

    #[test]
    fn a_fault_has_the_format_of_the_specification() {
        let record = FaultRecord::from(&Fault {
            endpoint: EndpointId(0x1_0030),
            reason: FaultReason::Mapping,
            access: Access::WRITE,
            address: Iova(0x1234_5678_9abc),
        });
        let bytes = record.as_bytes();
        assert_eq!(bytes.len(), FAULT_LEN);
        assert_eq!(bytes[..4], [2, 0, 0, 0]);
        assert_eq!(bytes[4..8], 0x102u32.to_le_bytes());
        assert_eq!(bytes[8..12], 0x1_0030u32.to_le_bytes());
        assert_eq!(bytes[12..16], [0; 4]);
        assert_eq!(bytes[16..], 0x1234_5678_9abcu64.to_le_bytes());
        let record = FaultRecord::from(&Fault {
            endpoint: EndpointId(1),
            reason: FaultReason::Domain,
            access: Access::READ,
            address: Iova(0),
        });
        let bytes = record.as_bytes();
        assert_eq!(bytes[..8], [1, 0, 0, 0, 1, 1, 0, 0]);
        assert_eq!(bytes[8..16], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..], [0; 8]);
        for (reason, number) in [(FaultReason::Unknown, 0), (FaultReason::Mapping, 2)] {
            let record = FaultRecord::from(&Fault {
                endpoint: EndpointId(1),
                reason,
                access: Access::NONE,
                address: Iova(0),
            });
            assert_eq!(record.as_bytes()[..8], [number, 0, 0, 0, 0, 1, 0, 0]);
        }
    }
}
