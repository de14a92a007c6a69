//! Nested translation by iommufd: the host's IOMMU walks a page table of ours as its first stage, below a second stage
//! that the kernel fills.
//!
//! ```text
//!   IOAS: guest RAM, and our table read-only (SMMUv3)
//!     |
//!   NestParent             second stage (IOMMU_HWPT_ALLOC with NEST_PARENT)
//!     |            \
//!   VirtualIommu    NestedTable (VT-d): the root of a first stage
//!     |   |   |
//!     |   |   VirtualDevice (SMMUv3): a device and its stream ID in events and commands
//!     |   EventQueue (SMMUv3): faults of the first stage
//!   NestedTable (SMMUv3): a stream table entry, which names a context descriptor, which names the root
//! ```
//!
//! Each object is owned by a guard that destroys it when dropped, and keeps the objects above it. A device is attached to
//! a [`NestedTable`] by its ID, with [`Attach`](super::Attach). The kernel destroys no table while a device is attached to
//! it; a guard then logs the refusal, and the object lives until the iommufd is closed.
//!
//! For an SMMUv3 a device needs its [`VirtualDevice`] before it is attached to a translating entry, and as long as it is.

pub(in crate::vfio) mod arguments;
mod events;
mod hardware;
mod kernel;
mod objects;
mod smmu;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

use crate::address::{Gpa, Iova};

pub use self::events::{SmmuEvent, SmmuEventClass, SmmuEventFile, SmmuEventKind, SmmuEvents};
pub use self::hardware::{Granules, HardwareInfo, HardwareKind, SmmuHardware, VtdHardware};
pub use self::objects::{EventQueue, NestParent, NestedTable, VirtualDevice, VirtualIommu};
pub use self::smmu::{ContextDescriptor, SmmuCommand, StreamEntry};

/// A device that is bound to the iommufd, by the ID that the kernel gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BoundDevice(pub u32);

impl fmt::Display for BoundDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// The first stage of a nested table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstStage {
    /// An entry of an SMMUv3's stream table. Its parent is a vIOMMU.
    Smmu(StreamEntry),
    /// The root of a VT-d first stage. Its parent is the second stage itself.
    Vtd(VtdRoot),
}

/// The root of a VT-d first stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdRoot {
    /// The address of the root table: a multiple of 4 KiB.
    pub table: Gpa,
    /// The width of an input address in bits: 48 (four levels) or 57 (five).
    pub input_bits: u8,
}

/// A range of pages whose translations a VT-d unit forgets, in the device's own cache as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdInvalidation {
    /// The first address: a multiple of 4 KiB.
    pub first: Iova,
    /// The number of pages of 4 KiB; `u64::MAX`, with the first address 0, stands for all.
    pub pages: u64,
    /// Whether the unit may keep what it knows of upper tables.
    pub only_leaves: bool,
}

impl VtdInvalidation {
    /// Everything.
    pub const ALL: Self = Self {
        first: Iova(0),
        pages: u64::MAX,
        only_leaves: false,
    };
}

/// A call about nested translation that the kernel has refused. Nothing has changed.
#[derive(Debug, Error)]
#[error("{call} of {object}: {source}{}", cure_clause(.cure))]
pub struct NestingError {
    /// The call, such as `IOMMU_VIOMMU_ALLOC`.
    pub call: &'static str,
    /// The object that was to be made or used, and its parent.
    pub object: String,
    /// The system's error.
    pub source: io::Error,
    /// What the operator can do about it, if the error tells.
    pub cure: Option<&'static str>,
}

fn cure_clause(cure: &Option<&'static str>) -> String {
    cure.map(|cure| format!("; {cure}")).unwrap_or_default()
}

impl NestingError {
    /// The kernel's number for the error; 0 if it has none.
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }
}

/// An invalidation that the kernel has not done, or not as a whole.
///
/// The caller must treat all translations of the request as still cached, whatever `done` says: the SMMU's driver also
/// counts commands that it has checked and not yet issued when it finds a command that it refuses.
#[derive(Debug, Error)]
#[error("IOMMU_HWPT_INVALIDATE of {object}: the kernel took {done} of {wanted} commands: {source}")]
pub struct InvalidationError {
    /// The vIOMMU or nested table.
    pub object: String,
    /// The number of commands that the kernel took, from the first one on. It refused the next one.
    pub done: usize,
    /// The number of commands of the request.
    pub wanted: usize,
    /// The system's error.
    pub source: io::Error,
}

/// The calls of an iommufd about nested translation (`linux/iommufd.h`). An ID names an object of the iommufd.
///
/// The guards of this module make the calls; a backend holds guards and no IDs.
pub trait NestingKernel: Send + Sync {
    /// `IOMMU_GET_HW_INFO`.
    ///
    /// # Errors
    /// The kernel's.
    fn hardware_info(&self, device: BoundDevice) -> Result<HardwareInfo, NestingError>;

    /// `IOMMU_HWPT_ALLOC` with `IOMMU_HWPT_ALLOC_NEST_PARENT`: a second stage with the mappings of the address space `ioas`,
    /// also with those that it gets later. Returns its ID.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the IOMMU has only one stage. With VT-d `EINVAL` if a mapping is read-only.
    fn alloc_parent(&self, device: BoundDevice, ioas: u32) -> Result<u32, NestingError>;

    /// `IOMMU_VIOMMU_ALLOC` for an SMMUv3: the part of the device's SMMU that tables below `parent` use. Returns its ID.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the guest's tables could make the device's accesses bypass the caches: the SMMU lacks S2FWB, and the
    /// firmware does not promise CANWBS for the device. `EINVAL` if `parent` is that of another SMMU.
    fn alloc_viommu(&self, device: BoundDevice, parent: u32) -> Result<u32, NestingError>;

    /// `IOMMU_VDEVICE_ALLOC`: names a device by `stream` in the commands and events of a vIOMMU. Returns the object's ID.
    ///
    /// # Errors
    /// `EEXIST` if the device has a stream ID, or the stream ID a device.
    fn alloc_vdevice(
        &self,
        viommu: u32,
        device: BoundDevice,
        stream: u32,
    ) -> Result<u32, NestingError>;

    /// `IOMMU_HWPT_ALLOC` below `parent`: a vIOMMU for [`FirstStage::Smmu`], a second stage for [`FirstStage::Vtd`]. Returns
    /// the table's ID.
    ///
    /// # Errors
    /// `EIO` if the SMMU driver does not take a bit of the entry.
    fn alloc_nested(
        &self,
        device: BoundDevice,
        parent: u32,
        stage: FirstStage,
    ) -> Result<u32, NestingError>;

    /// `IOMMU_HWPT_INVALIDATE` of a vIOMMU. All commands are done when it returns.
    ///
    /// # Errors
    /// `EIO` for a command that the kernel does not take. See [`InvalidationError`] for those before it.
    fn invalidate_smmu(
        &self,
        viommu: u32,
        commands: &[SmmuCommand],
    ) -> Result<(), InvalidationError>;

    /// `IOMMU_HWPT_INVALIDATE` of a nested table of VT-d.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not one of pages. The ranges before it are done.
    fn invalidate_vtd(
        &self,
        nested: u32,
        ranges: &[VtdInvalidation],
    ) -> Result<(), InvalidationError>;

    /// `IOMMU_VEVENTQ_ALLOC` for an SMMUv3: a queue of at most `depth` events of a vIOMMU. Returns its ID and the open file,
    /// for [`SmmuEventFile`].
    ///
    /// # Errors
    /// `EEXIST` if the vIOMMU has a queue. `EINVAL` unless `depth` is 1 to 2^19.
    fn alloc_event_queue(&self, viommu: u32, depth: u32) -> Result<(u32, OwnedFd), NestingError>;

    /// `IOMMU_DESTROY` of an object that one of the calls above has made.
    ///
    /// # Errors
    /// `EBUSY` while another object or a device uses it.
    fn destroy_object(&self, object: u32) -> io::Result<()>;
}
