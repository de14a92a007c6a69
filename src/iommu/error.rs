//! One vocabulary for the outcomes of requests.

use thiserror::Error;

use crate::address::{Iova, IovaRange, Mapping};
use crate::backends::BackendError;
use crate::ids::{DomainId, EndpointId};
use crate::topology::reserved::ReservedRegion;

/// Why a request was refused. Whatever it says, nothing has changed; the exceptions are
/// [`RequestError::Quarantined`], after which the named endpoints can reach nothing, and which
/// says so.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// No such endpoint behind this IOMMU.
    #[error("no endpoint {0}")]
    NoSuchEndpoint(EndpointId),
    /// The domain does not exist.
    #[error("no domain {0}")]
    NoSuchDomain(DomainId),
    /// The domain ID is outside `domain_range`.
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
    /// The bypass flag of ATTACH disagrees with the domain that exists.
    #[error("domain {domain} {}", if *.is_bypass { "is a bypass domain" } else { "is not a bypass domain" })]
    BypassMismatch {
        /// The domain.
        domain: DomainId,
        /// What the existing domain is.
        is_bypass: bool,
    },
    /// A bypass domain has no mappings.
    #[error("domain {0} is a bypass domain and takes no mappings")]
    BypassDomain(DomainId),
    /// Flag bits that are unknown or were not negotiated.
    #[error("unknown flags {0:#x}")]
    UnknownFlags(u32),
    /// A field that must be zero is not.
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
    /// The mapping's ends or target are not multiples of the granule.
    #[error("{mapping} is not aligned to {granule:#x}")]
    Misaligned {
        /// What was asked.
        mapping: Mapping,
        /// The granule in bytes.
        granule: u64,
    },
    /// The addresses are outside `input_range`.
    #[error("{range} is outside the input range {input}")]
    OutsideInputRange {
        /// What was asked.
        range: IovaRange,
        /// What can be translated.
        input: IovaRange,
    },
    /// The guest-physical end passes what an entry can hold (2^52 - 1).
    #[error("the target of {0} passes the last guest-physical address")]
    PhysOutOfRange(Mapping),
    /// A mapping is in the way.
    #[error("{mapping} overlaps {existing}, which is mapped")]
    Overlap {
        /// What was asked.
        mapping: Mapping,
        /// What is there.
        existing: IovaRange,
    },
    /// A reserved region is in the way.
    #[error("{range} overlaps the reserved region {region}")]
    Reserved {
        /// What was asked.
        range: IovaRange,
        /// The region.
        region: ReservedRegion,
    },
    /// UNMAP would split a mapping.
    #[error("unmapping {range} would split the mapping {existing}")]
    WouldSplit {
        /// What was asked.
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
        /// Where that one is.
        other_domain: DomainId,
    },
    /// The domain has a mapping where the endpoint has a reserved region.
    #[error("domain has {mapping} where endpoint {endpoint} has the reserved region {region}")]
    RegionClash {
        /// The endpoint of the request.
        endpoint: EndpointId,
        /// A mapping of the domain.
        mapping: Mapping,
        /// The region it overlaps.
        region: ReservedRegion,
    },
    /// The page-table arena is used up, or this domain's share of it.
    #[error("the page-table arena has {free} frames left and {needed} are needed")]
    OutOfFrames {
        /// Frames the request takes.
        needed: u64,
        /// Frames there are for it.
        free: u64,
    },
    /// PROBE's property list has less room than `probe_size`.
    #[error("room for {have} bytes of properties instead of {need}")]
    ProbeTooSmall {
        /// `probe_size`.
        need: usize,
        /// Room there is.
        have: usize,
    },
    /// A backend refused, and everything is as it was.
    #[error("{0}")]
    Backend(BackendError),
    /// A backend failed half-way; the endpoints behind it are blocked.
    #[error("{cause}; {count} endpoints are quarantined")]
    Quarantined {
        /// What failed.
        cause: BackendError,
        /// How many endpoints are blocked for it.
        count: usize,
    },
}
