//! The one vocabulary for the outcomes of requests.

use thiserror::Error;

use crate::address::{Iova, IovaRange, Mapping};
use crate::backends::BackendError;
use crate::ids::{DomainId, EndpointId};
use crate::page_table::Levels;
use crate::topology::reserved::ReservedRegion;

/// A refused request. Nothing has changed, with one exception: [`RequestError::Quarantined`] blocks
/// endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// There is no such endpoint behind this IOMMU.
    #[error("no endpoint {0}")]
    NoSuchEndpoint(EndpointId),
    /// The domain does not exist.
    #[error("no domain {0}")]
    NoSuchDomain(DomainId),
    /// A driver runs whose domains the core does not have.
    #[error("all endpoints are blocked until a driver starts anew")]
    UnknownDriver,
    /// The guest may have another device at this address than the core.
    #[error(
        "endpoint {0} is blocked: the number of its bus in the guest is not that of the table, or not known"
    )]
    Misplaced(EndpointId),
    /// The domain ID lies outside `domain_range`.
    #[error("domain {id} is above {last}")]
    DomainOutOfRange {
        /// The ID.
        id: DomainId,
        /// The highest ID allowed.
        last: u32,
    },
    /// The endpoint is not attached to this domain.
    #[error("endpoint {endpoint} is not attached to domain {domain}")]
    NotAttached {
        /// The endpoint.
        endpoint: EndpointId,
        /// The domain the request names.
        domain: DomainId,
    },
    /// The bypass flag of ATTACH contradicts the existing domain.
    #[error("domain {domain} {}", if *.is_bypass { "is a bypass domain" } else { "is not a bypass domain" })]
    BypassMismatch {
        /// The domain.
        domain: DomainId,
        /// Whether the existing domain is a bypass domain.
        is_bypass: bool,
    },
    /// A bypass domain has no mappings.
    #[error("domain {0} is a bypass domain and takes no mappings")]
    BypassDomain(DomainId),
    /// Flag bits are set that are unknown or were not negotiated.
    #[error("unknown flags {0:#x}")]
    UnknownFlags(u32),
    /// A field that must be zero is not zero.
    #[error("reserved field is not zero")]
    ReservedNotZero,
    /// The last address is below the first.
    #[error("range ends at {last}, before its start {first}")]
    EmptyRange {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
    },
    /// The mapping's start, end or target is not a multiple of the granule.
    #[error("{mapping} is not aligned to {granule:#x}")]
    Misaligned {
        /// The requested mapping.
        mapping: Mapping,
        /// The granule in bytes.
        granule: u64,
    },
    /// The addresses lie outside `input_range`.
    #[error("{range} is outside the input range {input}")]
    OutsideInputRange {
        /// The requested range.
        range: IovaRange,
        /// The addresses that the IOMMU translates.
        input: IovaRange,
    },
    /// The last guest-physical address passes the largest that an entry of the page tables can hold.
    #[error("the target of {0} passes the last guest-physical address")]
    PhysOutOfRange(Mapping),
    /// The target has addresses at which hardware finds the page tables.
    #[error("the target of {0} has addresses of the page tables")]
    TargetsTables(Mapping),
    /// The format of the page tables has no tables of this depth.
    #[error("the format of the page tables has no {} levels; lower the address width", .0.count())]
    TableTooDeep(Levels),
    /// The range overlaps a mapping.
    #[error("{mapping} overlaps {existing}, which is mapped")]
    Overlap {
        /// The requested mapping.
        mapping: Mapping,
        /// The existing leaf.
        existing: IovaRange,
    },
    /// The range overlaps a reserved region.
    #[error("{range} overlaps the reserved region {region}")]
    Reserved {
        /// The requested range.
        range: IovaRange,
        /// The region.
        region: ReservedRegion,
    },
    /// UNMAP would split a mapping.
    #[error("unmapping {range} would split the mapping {existing}")]
    WouldSplit {
        /// The requested range.
        range: IovaRange,
        /// The mapping that would be split.
        existing: IovaRange,
    },
    /// Another endpoint of the host group is in another domain.
    #[error(
        "endpoint {endpoint} cannot be isolated from {other}, which is attached to domain \
         {other_domain}"
    )]
    GroupElsewhere {
        /// The endpoint of the request.
        endpoint: EndpointId,
        /// The other member.
        other: EndpointId,
        /// The domain of that member.
        other_domain: DomainId,
    },
    /// A mapping of the domain overlaps a reserved region of the endpoint.
    #[error("domain has {mapping} where endpoint {endpoint} has the reserved region {region}")]
    RegionClash {
        /// The endpoint of the request.
        endpoint: EndpointId,
        /// A mapping of the domain.
        mapping: Mapping,
        /// The region it overlaps.
        region: ReservedRegion,
    },
    /// The page-table arena, or this domain's share of it, has too few free frames.
    #[error("the page-table arena has {free} frames left and {needed} are needed")]
    OutOfFrames {
        /// Frames the request needs.
        needed: u64,
        /// Frames available to it.
        free: u64,
    },
    /// The buffer of a PROBE has less room for properties than `probe_size`.
    #[error("room for {have} bytes of properties instead of {need}")]
    ProbeTooSmall {
        /// `probe_size`, in bytes.
        need: usize,
        /// The room in the buffer, in bytes.
        have: usize,
    },
    /// A backend refused. Nothing has changed.
    #[error("{0}")]
    Backend(BackendError),
    /// A backend failed half-way. The endpoints behind it are quarantined.
    #[error("{cause}; {count} endpoints are quarantined")]
    Quarantined {
        /// The failure.
        cause: BackendError,
        /// How many endpoints were quarantined.
        count: usize,
    },
}
