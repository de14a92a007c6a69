//! The kernel's iommufd.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use iommufd_bindings::{
    iommu_ioas_copy, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap, iommu_iova_range,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use log::warn;

use super::{AddressSpaces, Allowed, Attach, Cdev, Source, VfioError, ioctl};
use crate::address::{Access, Iova, IovaRange};

/// The most ranges asked for; more are an implausible host.
const MAX_RANGES: usize = 1024;

/// An open `/dev/iommu`.
#[derive(Debug)]
pub struct IommuFd {
    file: File,
}

impl IommuFd {
    /// Opens the device node at `path`, `/dev/iommu` on a host.
    ///
    /// # Errors
    /// Where it is not there or may not be opened.
    pub fn open(path: &Path) -> Result<Self, VfioError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| VfioError {
            what: format!("cannot open {}", path.display()),
            source,
            cure: "the kernel needs CONFIG_IOMMUFD and this process the right to open it; \
                   `vhost-device-iommu check` tells more",
        })?;
        Ok(Self { file })
    }

    /// The iommufd that is open as `fd`.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let iommufd = Self { file: fd.into() };
        let ioas = iommufd.alloc()?;
        iommufd.destroy(ioas)?;
        Ok(iommufd)
    }

    /// `IOMMU_IOAS_IOVA_RANGES`: what an address space allows, given the devices that are attached.
    ///
    /// # Errors
    /// The kernel's.
    pub fn allowed(&self, ioas: u32) -> io::Result<Allowed> {
        let mut room = 16;
        loop {
            let mut found = vec![iommu_iova_range::default(); room];
            let (count, granule) = ioctl::ioas_iova_ranges(self.as_fd(), ioas, &mut found)?;
            if count <= found.len() || room == MAX_RANGES {
                found.truncate(count);
                return Ok(Allowed {
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

impl AsFd for IommuFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AddressSpaces for IommuFd {
    fn alloc(&self) -> io::Result<u32> {
        ioctl::ioas_alloc(self.as_fd())
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        ioctl::destroy(self.as_fd(), ioas)
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: Source<'_>,
    ) -> io::Result<()> {
        let (flags, iova, length) = (flags(access), range.first().0, length(range)?);
        match source {
            Source::File(file, start) => {
                let argument = iommu_ioas_map_file {
                    flags,
                    ioas_id: ioas,
                    start,
                    length,
                    iova,
                    ..Default::default()
                };
                ioctl::ioas_map_file(self.as_fd(), file, argument)
            }
            Source::Host(memory, offset) => {
                let argument = iommu_ioas_map {
                    flags,
                    ioas_id: ioas,
                    length,
                    iova,
                    ..Default::default()
                };
                ioctl::ioas_map(self.as_fd(), memory, offset, argument)
            }
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
        let argument = iommu_ioas_copy {
            flags: flags(access),
            dst_ioas_id: ioas,
            src_ioas_id: from,
            length: length(range)?,
            dst_iova: range.first().0,
            src_iova: first.0,
            ..Default::default()
        };
        ioctl::ioas_copy(self.as_fd(), argument)
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        let argument = iommu_ioas_unmap {
            ioas_id: ioas,
            iova: range.first().0,
            // For the whole of it there is this number of its own.
            length: range.len_bytes().unwrap_or(u64::MAX),
            ..Default::default()
        };
        ioctl::ioas_unmap(self.as_fd(), argument)
    }
}

/// What a device's host IOMMU allows, found by binding the device to an iommufd of its own for a
/// moment. Both nodes are opened afresh and closed again, which resets the device; fails where
/// somebody uses it.
///
/// # Errors
/// Names the step.
pub fn allowed_by_scratch(iommu: &Path, cdev: &Path) -> Result<Allowed, VfioError> {
    let iommufd = IommuFd::open(iommu)?;
    let device = Cdev::open(cdev)?;
    device.bind(&iommufd)?;
    let step = |what: &str, source| VfioError {
        what: format!("cannot {what} for {}", cdev.display()),
        source,
        cure: "see the kernel's log",
    };
    let ioas = iommufd
        .alloc()
        .map_err(|e| step("make an address space", e))?;
    device
        .attach(ioas)
        .map_err(|e| step("attach an address space", e))?;
    let allowed = iommufd
        .allowed(ioas)
        .map_err(|e| step("ask for the allowed addresses", e));
    if let Err(cause) = device.detach() {
        warn!("{} cannot be detached: {cause}", cdev.display());
    }
    allowed
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
