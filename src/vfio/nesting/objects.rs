//! Guards: each owns an object of the iommufd, keeps the objects above it, and destroys it when dropped.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::{
    BoundDevice, FirstStage, InvalidationError, NestingError, NestingKernel, SmmuCommand,
    SmmuEventFile, SmmuEvents, StreamEntry, VtdInvalidation, VtdRoot,
};
use crate::warn_limited;

/// An object of the iommufd, by its ID.
struct Object {
    kernel: Arc<dyn NestingKernel>,
    kind: &'static str,
    id: u32,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.id)
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if let Err(cause) = self.kernel.destroy_object(self.id) {
            warn_limited!(
                "cannot destroy the {} {}: {cause}; it exists until the iommufd is closed",
                self.kind,
                self.id
            );
        }
    }
}

/// A second stage, the parent of first stages.
#[derive(Debug)]
pub struct NestParent(Object);

impl NestParent {
    /// Makes a second stage with the mappings of an address space; see [`NestingKernel::alloc_parent`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(
        kernel: Arc<dyn NestingKernel>,
        device: BoundDevice,
        ioas: u32,
    ) -> Result<Self, NestingError> {
        let id = kernel.alloc_parent(device, ioas)?;
        Ok(Self(Object {
            kernel,
            kind: "nest parent",
            id,
        }))
    }

    /// The ID. A device that is attached to it has one stage: its addresses are guest-physical.
    pub fn id(&self) -> u32 {
        self.0.id
    }
}

/// The part of an SMMU that first stages below one parent share.
#[derive(Debug)]
pub struct VirtualIommu {
    object: Object,
    // Dropped after the object.
    _parent: Arc<NestParent>,
}

impl VirtualIommu {
    /// Makes the vIOMMU; see [`NestingKernel::alloc_viommu`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(parent: Arc<NestParent>, device: BoundDevice) -> Result<Self, NestingError> {
        let kernel = parent.0.kernel.clone();
        let id = kernel.alloc_viommu(device, parent.id())?;
        Ok(Self {
            object: Object {
                kernel,
                kind: "vIOMMU",
                id,
            },
            _parent: parent,
        })
    }

    /// Invalidates cached translations and descriptors; they are gone on return. See [`NestingKernel::invalidate_smmu`].
    ///
    /// # Errors
    /// The kernel's. A part of the commands may be done.
    pub fn invalidate(&self, commands: &[SmmuCommand]) -> Result<(), InvalidationError> {
        self.object.kernel.invalidate_smmu(self.object.id, commands)
    }
}

/// A device's name in the commands and events of a vIOMMU.
///
/// Drop it before the device's file is closed. Otherwise the kernel removes it by force, and its ID stays taken until the iommufd
/// is closed.
#[derive(Debug)]
pub struct VirtualDevice {
    _object: Object,
    stream: u32,
    _viommu: Arc<VirtualIommu>,
}

impl VirtualDevice {
    /// Gives `device` the stream ID `stream`; see [`NestingKernel::alloc_vdevice`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(
        viommu: Arc<VirtualIommu>,
        device: BoundDevice,
        stream: u32,
    ) -> Result<Self, NestingError> {
        let kernel = viommu.object.kernel.clone();
        let id = kernel.alloc_vdevice(viommu.object.id, device, stream)?;
        Ok(Self {
            _object: Object {
                kernel,
                kind: "vDEVICE",
                id,
            },
            stream,
            _viommu: viommu,
        })
    }

    /// The stream ID.
    pub fn stream(&self) -> u32 {
        self.stream
    }
}

/// A first stage.
#[derive(Debug)]
pub struct NestedTable {
    object: Object,
    _above: Above,
}

/// What a nested table keeps.
#[derive(Debug)]
#[expect(dead_code, reason = "dropped after the table, and not read")]
enum Above {
    Viommu(Arc<VirtualIommu>),
    Parent(Arc<NestParent>),
}

impl NestedTable {
    /// Makes the first stage of an SMMUv3; see [`NestingKernel::alloc_nested`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn for_smmu(
        viommu: Arc<VirtualIommu>,
        device: BoundDevice,
        entry: StreamEntry,
    ) -> Result<Self, NestingError> {
        let (kernel, above) = (viommu.object.kernel.clone(), viommu.object.id);
        let stage = FirstStage::Smmu(entry);
        Self::new(kernel, device, above, stage, Above::Viommu(viommu))
    }

    /// Makes the first stage of a VT-d unit.
    ///
    /// # Errors
    /// The kernel's.
    pub fn for_vtd(
        parent: Arc<NestParent>,
        device: BoundDevice,
        root: VtdRoot,
    ) -> Result<Self, NestingError> {
        let (kernel, above) = (parent.0.kernel.clone(), parent.id());
        let stage = FirstStage::Vtd(root);
        Self::new(kernel, device, above, stage, Above::Parent(parent))
    }

    fn new(
        kernel: Arc<dyn NestingKernel>,
        device: BoundDevice,
        above: u32,
        stage: FirstStage,
        keeps: Above,
    ) -> Result<Self, NestingError> {
        let id = kernel.alloc_nested(device, above, stage)?;
        Ok(Self {
            object: Object {
                kernel,
                kind: "nested table",
                id,
            },
            _above: keeps,
        })
    }

    /// The ID, to which a device is attached ([`Attach::attach`](crate::vfio::Attach::attach)).
    pub fn id(&self) -> u32 {
        self.object.id
    }

    /// Invalidates translations that a VT-d unit has cached; they are gone on return. See
    /// [`NestingKernel::invalidate_vtd`].
    ///
    /// # Errors
    /// The kernel's. A part of the ranges may be done.
    pub fn invalidate_vtd(&self, ranges: &[VtdInvalidation]) -> Result<(), InvalidationError> {
        self.object.kernel.invalidate_vtd(self.object.id, ranges)
    }
}

/// The faults of the devices of a vIOMMU.
#[derive(Debug)]
pub struct EventQueue {
    /// Closed before the object is destroyed, which an open file keeps busy.
    file: SmmuEventFile,
    _object: Object,
    _viommu: Arc<VirtualIommu>,
}

impl EventQueue {
    /// Makes a queue of at most `depth` events; see [`NestingKernel::alloc_event_queue`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(viommu: Arc<VirtualIommu>, depth: u32) -> Result<Self, NestingError> {
        let kernel = viommu.object.kernel.clone();
        let (id, fd) = kernel.alloc_event_queue(viommu.object.id, depth)?;
        Ok(Self {
            file: SmmuEventFile::new(fd),
            _object: Object {
                kernel,
                kind: "vEVENTQ",
                id,
            },
            _viommu: viommu,
        })
    }

    /// Reads the waiting events; see [`SmmuEventFile::read`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&mut self) -> io::Result<SmmuEvents> {
        self.file.read()
    }

    /// The file, to wait on until it becomes readable.
    pub fn file(&self) -> &SmmuEventFile {
        &self.file
    }
}
