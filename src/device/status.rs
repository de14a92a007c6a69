//! Maps each refusal of the core to its status on the wire.

use crate::backends::BackendErrorKind;
use crate::iommu::RequestError;
use crate::protocol::reply::Status;

impl From<&RequestError> for Status {
    fn from(error: &RequestError) -> Self {
        match error {
            RequestError::NoSuchEndpoint(_) | RequestError::NoSuchDomain(_) => Self::NoEnt,
            RequestError::DomainOutOfRange { .. }
            | RequestError::Misaligned { .. }
            | RequestError::OutsideInputRange { .. }
            | RequestError::PhysOutOfRange(_)
            | RequestError::TargetsTables(_)
            | RequestError::WouldSplit { .. } => Self::Range,
            RequestError::NotAttached { .. }
            | RequestError::BypassMismatch { .. }
            | RequestError::BypassDomain(_)
            | RequestError::UnknownFlags(_)
            | RequestError::ReservedNotZero
            | RequestError::EmptyRange { .. }
            | RequestError::Overlap { .. }
            | RequestError::Reserved { .. }
            | RequestError::ProbeTooSmall { .. } => Self::Inval,
            RequestError::GroupElsewhere { .. } | RequestError::RegionClash { .. } => Self::Unsupp,
            RequestError::OutOfFrames { .. } => Self::NoMem,
            RequestError::Backend(cause) => match cause.kind {
                BackendErrorKind::NoMem => Self::NoMem,
                BackendErrorKind::Fault => Self::Fault,
                BackendErrorKind::Range => Self::Range,
                BackendErrorKind::Unsupp => Self::Unsupp,
                BackendErrorKind::DevErr => Self::DevErr,
            },
            RequestError::Quarantined { .. }
            | RequestError::UnknownDriver
            | RequestError::TableTooDeep(_)
            | RequestError::Misplaced(_) => Self::DevErr,
        }
    }
}
