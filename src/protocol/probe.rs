//! The answer to PROBE: a list of properties.

use zerocopy::IntoBytes;

use super::wire::{
    ProbeProperty, ProbeResvMem, VIRTIO_IOMMU_PROBE_T_RESV_MEM, VIRTIO_IOMMU_RESV_MEM_T_MSI,
    VIRTIO_IOMMU_RESV_MEM_T_RESERVED,
};
use crate::address::IovaRange;

/// Length of one RESV_MEM property in bytes, including its head.
pub const RESV_MEM_LEN: usize = size_of::<ProbeResvMem>();

/// Appends a RESV_MEM property to a property list.
pub fn push_resv_mem(list: &mut Vec<u8>, range: IovaRange, msi: bool) {
    const VALUE_LEN: u16 = 20;
    const _: () = assert!(VALUE_LEN as usize == RESV_MEM_LEN - size_of::<ProbeProperty>());
    let property = ProbeResvMem {
        head: ProbeProperty {
            kind: VIRTIO_IOMMU_PROBE_T_RESV_MEM.into(),
            length: VALUE_LEN.into(),
        },
        subtype: if msi {
            VIRTIO_IOMMU_RESV_MEM_T_MSI
        } else {
            VIRTIO_IOMMU_RESV_MEM_T_RESERVED
        },
        reserved: [0; 3],
        start: range.first().0.into(),
        end: range.last().0.into(),
    };
    list.extend_from_slice(property.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Iova;

    #[test]
    fn the_length_of_a_property_excludes_its_head() {
        let mut list = Vec::new();
        let range = IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("a range");
        push_resv_mem(&mut list, range, true);
        push_resv_mem(&mut list, IovaRange::ALL, false);
        assert_eq!(list.len(), 48);
        assert_eq!(list[..8], [1, 0, 20, 0, 1, 0, 0, 0]);
        assert_eq!(list[8..16], 0xfee0_0000u64.to_le_bytes());
        assert_eq!(list[16..24], 0xfeef_ffffu64.to_le_bytes());
        assert_eq!(list[24..32], [1, 0, 20, 0, 0, 0, 0, 0]);
        assert_eq!(list[40..48], u64::MAX.to_le_bytes());
    }
}
