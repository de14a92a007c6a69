//! Safe handles over the kernel's VFIO and iommufd. They know neither domains nor endpoints.
//!
//! `ioctl` and the crate `iommufd-ioctls` make the system calls. Backends call them through the traits here, so
//! that tests can put `fake` in the kernel's place: it obeys the kernel's rules and fails on demand.

mod access;
mod cdev;
mod container;
mod device_mark;
#[cfg(test)]
pub(crate) mod fake;
mod group;
mod ioctl;
mod iommufd;
pub mod nesting;
mod probe;
mod regions;
mod vmm_files;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::MmapRegion;

use crate::address::{Access, GpaRange, Iova, IovaRange};

pub use self::access::{
    AffectedDevice, BusReset, Capability, DeviceAccess, DeviceInfo, GroupFile, HostFunction,
    HotResetScope, IrqChange, IrqInfo, IrqSelection, RegionInfo,
};
pub use self::cdev::Cdev;
pub use self::container::{Container, Type1Info};
pub use self::device_mark::{DeviceMark, MarkEvents};
pub use self::group::Group;
pub use self::iommufd::IommuFd;
pub use self::probe::probe_allowed_iovas;
pub use self::vmm_files::{VmmCdev, VmmFiles, VmmIommufd};

/// A node or device that cannot be opened or prepared.
#[derive(Debug, Error)]
#[error("{problem}: {source}; {cure}")]
pub struct VfioError {
    /// The step that failed, such as `cannot open PATH`.
    pub problem: String,
    /// The system's error.
    pub source: io::Error,
    /// What the operator can do about it.
    pub cure: &'static str,
}

/// The numbers of the ioctls that open devices and groups, for the sandbox.
pub fn ioctls_of_opening() -> Vec<u32> {
    numbers(ioctl::requests_of_opening())
}

/// The numbers of the ioctls that backends make once their devices and groups are open.
pub fn ioctls_of_backends() -> Vec<u32> {
    numbers(ioctl::requests_of_backends())
}

/// The numbers of the ioctls of [`nesting`], beside those of [`ioctls_of_backends`].
pub fn ioctls_of_nesting() -> Vec<u32> {
    numbers(ioctl::requests_of_nesting())
}

/// The numbers of the ioctls that the server of an exported device makes.
pub fn ioctls_of_exports() -> Vec<u32> {
    numbers(ioctl::requests_of_exports())
}

/// The numbers of the ioctls of [`BusReset`].
///
/// The number of `VFIO_DEVICE_PCI_HOT_RESET` is that of a container's `VFIO_IOMMU_MAP_DMA`, too. So a process that has
/// containers must not allow it to the threads that serve clients.
pub fn ioctls_of_bus_resets() -> Vec<u32> {
    numbers(ioctl::requests_of_bus_resets())
}

fn numbers(requests: Vec<libc::c_ulong>) -> Vec<u32> {
    // The kernel's numbers have 32 bits, though `c_ulong` may have more.
    let numbers = requests.into_iter().map(u32::try_from);
    numbers.filter_map(Result::ok).collect()
}

/// The memory that a mapping leads to.
#[derive(Clone, Copy, Debug)]
pub enum DmaSource<'a> {
    /// A file (memfd, shared or huge-page memory, or a DMA buffer), from this byte on.
    File(BorrowedFd<'a>, u64),
    /// Memory mapped into this process, from this byte of the mapping on.
    Host(&'a MmapRegion, u64),
}

/// The addresses that an empty I/O address space can map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedIovas {
    /// Closed ranges, in ascending order and disjoint.
    pub ranges: Vec<IovaRange>,
    /// The smallest page in bytes; a power of two.
    pub granule: u64,
}

/// I/O address spaces (IOAS) of an iommufd (`linux/iommufd.h`).
pub trait AddressSpaces: Send + Sync {
    /// `IOMMU_IOAS_ALLOC`: a new, empty address space.
    ///
    /// # Errors
    /// The kernel's.
    fn alloc(&self) -> io::Result<u32>;

    /// `IOMMU_DESTROY`.
    ///
    /// # Errors
    /// `EBUSY` while a device is attached.
    fn destroy(&self, ioas: u32) -> io::Result<()>;

    /// `IOMMU_IOAS_MAP_FILE` or `IOMMU_IOAS_MAP`, at exactly the addresses of `range`.
    ///
    /// # Errors
    /// The kernel's; then nothing of `range` is mapped.
    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_COPY`: maps `range` to the memory that the address space `from` has mapped from `first` on.
    ///
    /// # Errors
    /// The kernel's; then nothing of `range` is mapped.
    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_UNMAP` of every mapping in `range`, which must not cut through one. Returns the number of bytes
    /// that were mapped.
    ///
    /// # Errors
    /// The kernel's, among them `ENOENT` if nothing was mapped.
    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64>;
}

/// The address space of an open device (`VFIO_DEVICE_*_IOMMUFD_PT` of `linux/vfio.h`).
pub trait Attach: Send {
    /// Whether the device is bound to an iommufd through this open file, by the VMM or by this process.
    fn is_bound(&self) -> bool;

    /// Replaces the address space of the device and of all devices of its group, while they may be doing DMA.
    ///
    /// # Errors
    /// The kernel's. The kernel then still records the device in its former address space.
    fn attach(&self, ioas: u32) -> io::Result<()>;

    /// Takes the device out of its address space, which blocks its DMA unless another device of its group is still
    /// attached.
    ///
    /// # Errors
    /// `EINVAL` if the device is not bound.
    fn detach(&self) -> io::Result<()>;

    /// Clears the device's bus-master bit.
    ///
    /// # Errors
    /// The kernel's.
    fn clear_bus_master(&self) -> io::Result<()>;
}

/// One of a device's memory BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number: `0..=5`.
    pub index: u32,
    /// The addresses that the guest has given it.
    pub range: GpaRange,
}

/// The memory of a device, to which mappings of other devices may lead.
pub trait DeviceMemory: Send + Sync {
    /// The memory BARs that have an address; none while the guest has memory decoding switched off.
    ///
    /// # Errors
    /// The kernel's.
    fn bars(&self) -> io::Result<Vec<Bar>>;

    /// A DMA buffer of `len` bytes from `offset` of a BAR (`VFIO_DEVICE_FEATURE_DMA_BUF`).
    ///
    /// # Errors
    /// `ENOTTY` or `EOPNOTSUPP` if the kernel or the device has no DMA buffers.
    fn export(&self, bar: u32, offset: u64, len: u64) -> io::Result<OwnedFd>;

    /// The BAR mapped into this process. Each BAR is mapped once and shared by all callers.
    ///
    /// # Errors
    /// The kernel's, or `EOPNOTSUPP` if the BAR cannot be mapped.
    fn map(&self, bar: u32) -> io::Result<Arc<MmapRegion>>;
}

/// The one address space of a VFIO container with a type1 IOMMU.
pub trait Type1: Send {
    /// `VFIO_IOMMU_MAP_DMA`.
    ///
    /// # Errors
    /// The kernel's; then nothing of `range` is mapped.
    fn map(
        &self,
        range: IovaRange,
        access: Access,
        memory: &MmapRegion,
        offset: u64,
    ) -> io::Result<()>;

    /// `VFIO_IOMMU_UNMAP_DMA` of every mapping in `range`, which must not cut through one. Returns the number of
    /// bytes that were mapped.
    ///
    /// # Errors
    /// The kernel's.
    fn unmap(&self, range: IovaRange) -> io::Result<u64>;

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_ALL`: unmaps everything.
    ///
    /// # Errors
    /// The kernel's.
    fn unmap_all(&self) -> io::Result<()>;

    /// The number of further mappings that the container has room for (`VFIO_IOMMU_GET_INFO`); `None` if the kernel does
    /// not say.
    ///
    /// # Errors
    /// The kernel's.
    fn available(&self) -> io::Result<Option<u32>> {
        Ok(None)
    }
}
