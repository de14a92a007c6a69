//! The kernel's iommufd.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use iommufd_bindings::{
    iommu_ioas_alloc, iommu_ioas_copy, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap,
    iommu_iova_range, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use iommufd_ioctls::IommufdError;
use vfio_bindings::bindings::vfio::VFIO_DMA_CC_IOMMU;

use super::ioctl::size_of_u32;
use super::{AddressSpaces, AllowedIovas, DmaSource, VfioError, ioctl};
use crate::address::{Access, Iova, IovaRange};

/// The maximum number of ranges to read. A host with more is implausible.
const MAX_RANGES: usize = 1024;

/// An open `/dev/iommu`.
pub struct IommuFd {
    pub(super) kernel: iommufd_ioctls::IommuFd,
}

impl IommuFd {
    /// Opens the device node at `path`, `/dev/iommu` on a host.
    ///
    /// # Errors
    /// The node does not exist or this process may not open it.
    pub fn open(path: &Path) -> Result<Self, VfioError> {
        Self::open_node(path).map(Self::from)
    }

    /// Opens the device node at `path`, and returns the descriptor.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_node(path: &Path) -> Result<OwnedFd, VfioError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| VfioError {
            problem: format!("cannot open {}", path.display()),
            source,
            cure: "the kernel needs CONFIG_IOMMUFD and this process the right to open it; \
                   `vhost-device-iommu check` tells more",
        })?;
        Ok(OwnedFd::from(file))
    }

    /// The iommufd that `fd` is open on.
    ///
    /// # Errors
    /// `fd` is open on something else.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let iommufd = Self::from(fd);
        let ioas = iommufd.alloc()?;
        iommufd.destroy(ioas)?;
        Ok(iommufd)
    }

    /// Whether the host's IOMMU makes all DMA of the devices that are attached to an address space snoop the caches, also
    /// DMA that a device marks with No Snoop.
    ///
    /// Only iommufd's compatibility with VFIO containers answers this, for one address space at a time
    /// (`IOMMU_VFIO_IOAS`). `IOMMU_GET_HW_INFO` does not: its capabilities lack the bit, and its registers of VT-d say
    /// what the hardware has, but not what the kernel uses.
    ///
    /// # Errors
    /// The kernel's.
    pub fn enforces_coherency(&self, ioas: u32) -> io::Result<bool> {
        ioctl::set_compatibility_ioas(&self.kernel, Some(ioas))?;
        let answer = ioctl::check_extension(&self.kernel, VFIO_DMA_CC_IOMMU);
        ioctl::set_compatibility_ioas(&self.kernel, None)?;
        answer
    }

    /// `IOMMU_IOAS_IOVA_RANGES`: the addresses that an address space can map with the devices that are attached to it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn allowed_iovas(&self, ioas: u32) -> io::Result<AllowedIovas> {
        let mut room = 16;
        loop {
            let mut found = vec![iommu_iova_range::default(); room];
            let (count, granule) = ioctl::ioas_iova_ranges(&self.kernel, ioas, &mut found)?;
            if count <= found.len() || room == MAX_RANGES {
                found.truncate(count);
                return Ok(AllowedIovas {
                    ranges: found
                        .iter()
                        .filter_map(|r| IovaRange::new(Iova(r.start), Iova(r.last)))
                        .collect(),
                    granule,
                });
            }
            room = count.min(MAX_RANGES);
        }
    }
}

impl From<OwnedFd> for IommuFd {
    fn from(fd: OwnedFd) -> Self {
        Self {
            kernel: iommufd_ioctls::IommuFd::new_from_fd(fd.into()),
        }
    }
}

impl AsRawFd for IommuFd {
    fn as_raw_fd(&self) -> RawFd {
        self.kernel.as_raw_fd()
    }
}

impl fmt::Debug for IommuFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IommuFd").field(&self.as_raw_fd()).finish()
    }
}

impl AddressSpaces for IommuFd {
    fn alloc(&self) -> io::Result<u32> {
        let mut argument = iommu_ioas_alloc {
            size: size_of_u32::<iommu_ioas_alloc>(),
            ..Default::default()
        };
        let done = self.kernel.alloc_iommu_ioas(&mut argument);
        done.map_err(errno)?;
        Ok(argument.out_ioas_id)
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        self.kernel.destroy_iommu_object(ioas).map_err(errno)
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        match map_argument(ioas, range, access, source)? {
            MapArgument::File(argument) => {
                self.kernel.map_iommu_ioas_file(&argument).map_err(errno)
            }
            // The addresses lie in a mapping of memory that is shared with others and never borrowed as Rust memory, so
            // that a device may write there. The owner of the memory keeps it until this range is unmapped (see
            // `backends::MemorySlot`).
            MapArgument::Host(argument) => self.kernel.map_iommu_ioas(&argument).map_err(errno),
        }
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        ioctl::ioas_copy(
            &self.kernel,
            copy_argument(ioas, range, access, from, first)?,
        )
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        let mut argument = unmap_argument(ioas, range);
        let done = self.kernel.unmap_iommu_ioas(&mut argument);
        done.map_err(errno)?;
        Ok(argument.length)
    }
}

/// The argument of one of the requests that map.
pub(super) enum MapArgument {
    File(iommu_ioas_map_file),
    Host(iommu_ioas_map),
}

/// The argument of `IOMMU_IOAS_MAP_FILE` or `IOMMU_IOAS_MAP`.
pub(super) fn map_argument(
    ioas: u32,
    range: IovaRange,
    access: Access,
    source: DmaSource<'_>,
) -> io::Result<MapArgument> {
    let (flags, iova, length) = (flags(access), range.first().0, length(range)?);
    Ok(match source {
        DmaSource::File(file, start) => MapArgument::File(iommu_ioas_map_file {
            size: size_of_u32::<iommu_ioas_map_file>(),
            flags,
            ioas_id: ioas,
            fd: file.as_raw_fd(),
            start,
            length,
            iova,
        }),
        DmaSource::Host(memory, offset) => MapArgument::Host(iommu_ioas_map {
            size: size_of_u32::<iommu_ioas_map>(),
            flags,
            ioas_id: ioas,
            user_va: ioctl::address_in(memory, offset, length)?,
            length,
            iova,
            ..Default::default()
        }),
    })
}

/// The argument of `IOMMU_IOAS_COPY`.
pub(super) fn copy_argument(
    ioas: u32,
    range: IovaRange,
    access: Access,
    from: u32,
    first: Iova,
) -> io::Result<iommu_ioas_copy> {
    Ok(iommu_ioas_copy {
        size: size_of_u32::<iommu_ioas_copy>(),
        flags: flags(access),
        dst_ioas_id: ioas,
        src_ioas_id: from,
        length: length(range)?,
        dst_iova: range.first().0,
        src_iova: first.0,
    })
}

/// The argument of `IOMMU_IOAS_UNMAP`.
pub(super) fn unmap_argument(ioas: u32, range: IovaRange) -> iommu_ioas_unmap {
    iommu_ioas_unmap {
        size: size_of_u32::<iommu_ioas_unmap>(),
        ioas_id: ioas,
        iova: range.first().0,
        // `u64::MAX` stands for the whole address space, whose length does not fit into 64 bits.
        length: range.len_bytes().unwrap_or(u64::MAX),
    }
}

/// The system's error behind the crate's. Omits the crate's own message: the caller says what failed.
fn errno(error: IommufdError) -> io::Error {
    match error {
        IommufdError::IommuDestroy(cause)
        | IommufdError::IommuIoasAlloc(cause)
        | IommufdError::IommuIoasMap(cause)
        | IommufdError::IommuIoasMapFile(cause)
        | IommufdError::IommuIoasUnmap(cause) => io::Error::from_raw_os_error(cause.errno()),
        // Errors of requests that this module does not make.
        other => io::Error::other(other),
    }
}

fn flags(access: Access) -> u32 {
    let readable = if access.read { READABLE } else { 0 };
    let writeable = if access.write { WRITEABLE } else { 0 };
    FIXED_IOVA | readable | writeable
}

fn length(range: IovaRange) -> io::Result<u64> {
    range
        .len_bytes()
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}
