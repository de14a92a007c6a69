//! Nested translation by iommufd: the host's IOMMU walks a page table of ours as its first stage, below a second stage
//! that the kernel fills.

mod events;
mod smmu;

pub use self::events::{SmmuEvent, SmmuEventClass, SmmuEventFile, SmmuEventKind, SmmuEvents};
pub use self::smmu::{ContextDescriptor, SmmuCommand, StreamEntry};
