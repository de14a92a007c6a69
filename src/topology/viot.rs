//! The ACPI Virtual I/O Translation table (VIOT), which tells the guest which endpoints are behind
//! the IOMMU (ACPI specification, section "Virtual I/O Translation (VIOT) Table").
//!
//! This file encodes the table itself. The `acpi_tables` crate omits the PCI segment from endpoint
//! IDs, so functions of two segments with the same bus, device and function number would become one
//! endpoint.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::{PciAddress, PciRange, Topology};

/// Length of the table up to its first node.
const HEAD_LEN: u16 = 48;
const NODE_PCI_RANGE: u8 = 1;
const NODE_VIRTIO_PCI: u8 = 3;

#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    signature: [u8; 4],
    length: U32,
    revision: u8,
    checksum: u8,
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: U32,
    creator_id: [u8; 4],
    creator_revision: U32,
    node_count: U16,
    node_offset: U16,
    reserved: [u8; 8],
}

#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PciRangeNode {
    kind: u8,
    reserved: u8,
    length: U16,
    endpoint_start: U32,
    segment_start: U16,
    segment_end: U16,
    bdf_start: U16,
    bdf_end: U16,
    output_node: U16,
    reserved_tail: [u8; 6],
}

#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct VirtioPciNode {
    kind: u8,
    reserved: u8,
    length: U16,
    segment: U16,
    bdf: U16,
    reserved_tail: [u8; 8],
}

const _: () = assert!(size_of::<Head>() == HEAD_LEN as usize);
const _: () = assert!(size_of::<PciRangeNode>() == 24);
const _: () = assert!(size_of::<VirtioPciNode>() == 16);

/// The table for `topology`: the IOMMU, then the ranges of its endpoints and those in which endpoints
/// may be added later, in ascending order, with adjacent ranges joined.
///
/// # Errors
///
/// There are more separate ranges than a table has room for.
pub fn table(topology: &Topology) -> Result<Vec<u8>, ViotError> {
    let ranges = topology.described();
    let node_count = u16::try_from(ranges.len() + 1).map_err(|source| ViotError {
        ranges: ranges.len(),
        source,
    })?;
    let node_lengths = size_of::<VirtioPciNode>() + ranges.len() * size_of::<PciRangeNode>();
    let length = usize::from(HEAD_LEN) + node_lengths;

    let head = Head {
        signature: *b"VIOT",
        // At most 65535 nodes of 24 bytes.
        length: U32::new(u32::try_from(length).unwrap_or(u32::MAX)),
        revision: 0,
        checksum: 0,
        oem_id: *b"VIOMMU",
        oem_table_id: *b"VHOSTDEV",
        oem_revision: U32::new(1),
        creator_id: *b"VDIO",
        creator_revision: U32::new(1),
        node_count: U16::new(node_count),
        node_offset: U16::new(HEAD_LEN),
        reserved: [0; 8],
    };
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(head.as_bytes());
    // The IOMMU comes first, so that every range can refer to it by the same offset.
    bytes.extend_from_slice(iommu_node(topology.iommu()).as_bytes());
    for range in ranges {
        bytes.extend_from_slice(range_node(range).as_bytes());
    }

    let sum = bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
    bytes[std::mem::offset_of!(Head, checksum)] = sum.wrapping_neg();
    Ok(bytes)
}

/// The endpoints form more separate ranges than one table has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{ranges} separate endpoint ranges do not fit an ACPI VIOT table, which takes 65534; \
     give adjacent ranges"
)]
pub struct ViotError {
    ranges: usize,
    source: std::num::TryFromIntError,
}

fn iommu_node(address: PciAddress) -> VirtioPciNode {
    VirtioPciNode {
        kind: NODE_VIRTIO_PCI,
        reserved: 0,
        length: U16::new(16),
        segment: U16::new(address.segment()),
        bdf: U16::new(address.bdf()),
        reserved_tail: [0; 8],
    }
}

fn range_node(range: PciRange) -> PciRangeNode {
    PciRangeNode {
        kind: NODE_PCI_RANGE,
        reserved: 0,
        length: U16::new(24),
        endpoint_start: U32::new(range.first().endpoint_id().0),
        segment_start: U16::new(range.first().segment()),
        segment_end: U16::new(range.last().segment()),
        bdf_start: U16::new(range.first().bdf()),
        bdf_end: U16::new(range.last().bdf()),
        output_node: U16::new(HEAD_LEN),
        reserved_tail: [0; 6],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{EndpointSpec, ReservedRegions};

    #[test]
    fn too_many_separate_ranges_for_a_table_are_refused() {
        // Every other function of two segments, so that none adjoin.
        let specs: Vec<_> = (0..=1u16)
            .flat_map(|segment| (0..=u16::MAX).step_by(2).map(move |bdf| (segment, bdf)))
            .map(|(segment, bdf)| {
                let id = u32::from(segment) << 16 | u32::from(bdf);
                EndpointSpec {
                    range: PciAddress::from_endpoint_id(crate::ids::EndpointId(id)).into(),
                    group: None,
                    reserved: Vec::new(),
                }
            })
            .collect();
        let iommu = "0002:00:00.0".parse().expect("an address");
        let none = ReservedRegions::default();
        let full = Topology::new(iommu, none.clone(), &specs).expect("as many as are possible");
        let error = table(&full).expect_err("65536 ranges and the IOMMU");
        assert!(error.to_string().contains("65536 separate"));
        let fits = Topology::new(iommu, none, &specs[..65534]).expect("fewer");
        let bytes = table(&fits).expect("65535 nodes");
        assert_eq!(bytes.len(), 48 + 16 + 65534 * 24);
        assert_eq!(bytes[36..38], [0xff, 0xff]);
    }
}
