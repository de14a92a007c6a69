//! The bare system calls.

#![expect(
    unsafe_code,
    reason = "makes the bare ioctls that the bench compares with"
)]

use std::ffi::c_ulong;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_COPY, IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE,
    iommu_ioas_copy, iommu_ioas_map_file, iommu_ioas_unmap,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use vhost_device_iommu::address::{IovaRange, Mapping};
use vhost_device_iommu::backends::MemorySlot;

const MAP_DMA: c_ulong = number(VFIO_TYPE as u32, VFIO_BASE + 13);
const UNMAP_DMA: c_ulong = number(VFIO_TYPE as u32, VFIO_BASE + 14);
const IOAS_COPY: c_ulong = number(IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_COPY);
const IOAS_MAP_FILE: c_ulong = number(IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_MAP_FILE);
const IOAS_UNMAP: c_ulong = number(IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_UNMAP);
/// Fixed addresses, readable, writable.
const FLAGS: u32 = 7;

/// One address space.
pub struct Bare {
    /// The container or the iommufd.
    pub fd: OwnedFd,
    /// How it is filled, and its identifiers.
    pub kind: Kind,
    /// Guest RAM, which begins at guest-physical address 0.
    pub ram: Arc<MemorySlot>,
}

/// How the address space is filled.
pub enum Kind {
    Type1,
    /// Mapped from the file.
    Map {
        ioas: u32,
    },
    /// Copied from another address space.
    Copy {
        ioas: u32,
        from: u32,
    },
}

impl Bare {
    pub fn map(&self, mapping: &Mapping) {
        let (iova, len) = (mapping.range.first().0, mapping.range.span() + 1);
        match self.kind {
            Kind::Type1 => {
                let vaddr = self.ram.memory.as_ptr().expose_provenance() as u64 + mapping.gpa.0;
                let mut argument = vfio_iommu_type1_dma_map {
                    argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
                    // Readable and writable.
                    flags: 3,
                    vaddr,
                    iova,
                    size: len,
                };
                self.call(MAP_DMA, &mut argument);
            }
            Kind::Map { ioas } => {
                let mut argument = iommu_ioas_map_file {
                    size: size_of::<iommu_ioas_map_file>() as u32,
                    flags: FLAGS,
                    ioas_id: ioas,
                    fd: self.ram.file.as_raw_fd(),
                    start: mapping.gpa.0,
                    length: len,
                    iova,
                };
                self.call(IOAS_MAP_FILE, &mut argument);
            }
            Kind::Copy { ioas, from } => {
                let mut argument = iommu_ioas_copy {
                    size: size_of::<iommu_ioas_copy>() as u32,
                    flags: FLAGS,
                    dst_ioas_id: ioas,
                    src_ioas_id: from,
                    length: len,
                    dst_iova: iova,
                    src_iova: mapping.gpa.0,
                };
                self.call(IOAS_COPY, &mut argument);
            }
        }
    }

    /// Returns the number of bytes that were mapped.
    pub fn unmap(&self, range: IovaRange) -> u64 {
        let (iova, len) = (range.first().0, range.span() + 1);
        match self.kind {
            Kind::Type1 => {
                let mut argument = vfio_iommu_type1_dma_unmap {
                    argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
                    iova,
                    size: len,
                    ..Default::default()
                };
                self.call(UNMAP_DMA, &mut argument);
                argument.size
            }
            Kind::Map { ioas } | Kind::Copy { ioas, .. } => {
                let mut argument = iommu_ioas_unmap {
                    size: size_of::<iommu_ioas_unmap>() as u32,
                    ioas_id: ioas,
                    iova,
                    length: len,
                };
                self.call(IOAS_UNMAP, &mut argument);
                argument.length
            }
        }
    }

    fn call<T>(&self, request: c_ulong, argument: &mut T) {
        // SAFETY: each request number has its structure, which holds its own size. The mapped
        // memory is guest RAM; nothing borrows it, and it outlives the address space.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
}

const fn number(kind: u32, command: u32) -> c_ulong {
    (kind << 8 | command) as c_ulong
}
