//! Safe handles over the kernel's VFIO and iommufd; they know no domains and no endpoints.
//!
//! `ioctl` makes the system calls. What is above it goes through the traits here, so that doubles
//! which obey the kernel's rules can stand in for the kernel and fail where they are told to.

mod access;
mod cdev;
mod container;
#[cfg(test)]
pub(crate) mod fake;
mod group;
mod ioctl;
mod iommufd;
mod regions;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::MmapRegion;

use crate::address::{Access, GpaRange, Iova, IovaRange};

pub use self::access::{
    Capability, DeviceAccess, DeviceInfo, IrqChange, IrqInfo, IrqWhat, RegionInfo,
};
pub use self::cdev::Cdev;
pub use self::container::{Container, Type1Info};
pub use self::group::Group;
pub use self::iommufd::{IommuFd, allowed_by_scratch};

/// Something that cannot be opened or prepared.
#[derive(Debug, Error)]
#[error("{what}: {source}; {cure}")]
pub struct VfioError {
    /// What was tried, with the path.
    pub what: String,
    /// What the system said.
    pub source: io::Error,
    /// What to do about it.
    pub cure: &'static str,
}

/// The numbers of the ioctls that open devices and groups.
pub fn ioctls_of_opening() -> Vec<u32> {
    numbers(ioctl::requests_of_opening())
}

/// The numbers of the ioctls that backends make, once their devices and groups are open.
pub fn ioctls_of_backends() -> Vec<u32> {
    numbers(ioctl::requests_of_backends())
}

/// The numbers of the ioctls that serving an exported device takes.
pub fn ioctls_of_exports() -> Vec<u32> {
    numbers(ioctl::requests_of_exports())
}

fn numbers(requests: Vec<libc::c_ulong>) -> Vec<u32> {
    // They have 32 bits, whatever the type.
    let numbers = requests.into_iter().map(u32::try_from);
    numbers.filter_map(Result::ok).collect()
}

/// Where the bytes behind I/O virtual addresses come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A file (memfd, shared or huge-page memory, or a DMA buffer), from this byte on.
    File(BorrowedFd<'a>, u64),
    /// Memory mapped into this process, from this byte of the mapping on.
    Host(&'a MmapRegion, u64),
}

/// What an I/O address space allows before anything is mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// The addresses that can be mapped, in ascending order and disjoint.
    pub ranges: Vec<IovaRange>,
    /// The smallest page in bytes, a power of two.
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

    /// `IOMMU_IOAS_MAP_FILE` or `IOMMU_IOAS_MAP` at fixed addresses.
    ///
    /// # Errors
    /// The kernel's; nothing is mapped then.
    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: Source<'_>,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_COPY`: what another address space maps from `first` on.
    ///
    /// # Errors
    /// The kernel's; nothing is mapped then.
    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_UNMAP` of all there is in `range`, which must not cut through one `map`.
    /// Answers the bytes that were mapped.
    ///
    /// # Errors
    /// The kernel's, among them `ENOENT` where nothing is mapped.
    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64>;
}

/// Which address space an open device obeys (`VFIO_DEVICE_*_IOMMUFD_PT` of `linux/vfio.h`).
pub trait Attach: Send {
    /// Whether somebody has bound the device to an iommufd through this open file.
    fn is_bound(&self) -> bool;

    /// Replaces the address space of the device, and of all devices of its group, under whatever
    /// it does.
    ///
    /// # Errors
    /// The kernel's; the device obeys what it obeyed before.
    fn attach(&self, ioas: u32) -> io::Result<()>;

    /// Takes the device out of every address space: its DMA is blocked, unless another device of
    /// its group is still attached.
    ///
    /// # Errors
    /// `EINVAL` where nobody has bound it.
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
    /// Where the guest has put it.
    pub range: GpaRange,
}

/// The memory of a device, which others may be let reach.
pub trait DeviceMemory: Send + Sync {
    /// The memory BARs the guest has given an address, while it has them switched on.
    ///
    /// # Errors
    /// The kernel's.
    fn bars(&self) -> io::Result<Vec<Bar>>;

    /// A DMA buffer of `len` bytes from `offset` of a BAR (`VFIO_DEVICE_FEATURE_DMA_BUF`).
    ///
    /// # Errors
    /// `ENOTTY` or `EOPNOTSUPP` where the kernel or the device has none.
    fn export(&self, bar: u32, offset: u64, len: u64) -> io::Result<OwnedFd>;

    /// The BAR mapped into this process, once for all who ask.
    ///
    /// # Errors
    /// The kernel's, or `EOPNOTSUPP` where the device does not let it be mapped.
    fn map(&self, bar: u32) -> io::Result<Arc<MmapRegion>>;
}

/// The one address space of a VFIO container with a type1 IOMMU.
pub trait Type1: Send {
    /// `VFIO_IOMMU_MAP_DMA`.
    ///
    /// # Errors
    /// The kernel's; nothing is mapped then.
    fn map(
        &self,
        range: IovaRange,
        access: Access,
        memory: &MmapRegion,
        offset: u64,
    ) -> io::Result<()>;

    /// `VFIO_IOMMU_UNMAP_DMA` of all there is in `range`, which must not cut through one `map`.
    /// Answers the bytes that were mapped.
    ///
    /// # Errors
    /// The kernel's.
    fn unmap(&self, range: IovaRange) -> io::Result<u64>;

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_ALL`.
    ///
    /// # Errors
    /// The kernel's.
    fn unmap_all(&self) -> io::Result<()>;
}
