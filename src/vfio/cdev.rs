//! An open VFIO device.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_BUS_MASTER, VFIO_DEVICE_FEATURE_CLEAR_MASTER, VFIO_DEVICE_FEATURE_DMA_BUF,
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET, vfio_region_dma_range,
};
use vm_memory::MmapRegion;

use super::nesting::BoundDevice;
use super::{Attach, Bar, DeviceMemory, IommuFd, VfioError, ioctl, regions};
use crate::ids::VfToken;
use crate::locks::{Mutex, Rank};

/// The feature with which a device's bus-master bit is cleared.
pub(super) const CLEAR_MASTER: u32 = VFIO_DEVICE_FEATURE_BUS_MASTER | VFIO_DEVICE_FEATURE_SET;

/// An open device: `/dev/vfio/devices/vfioN`, or a descriptor from a group. Clones share the open file.
#[derive(Clone, Debug)]
pub struct Cdev {
    pub(super) file: Arc<File>,
    /// The group that has opened the device; `None` for a device node, and for a descriptor from another process.
    pub(super) source: Option<GroupSource>,
    /// The BARs that are mapped. They stay mapped, because DMA mappings lead to them by address.
    mapped: Arc<Mutex<BTreeMap<u32, Arc<MmapRegion>>>>,
}

/// The group through which a device was opened, and can be opened again.
#[derive(Clone, Debug)]
pub(super) struct GroupSource {
    pub group: Arc<File>,
    /// The device's name in sysfs.
    pub name: CString,
    /// The secret that VFIO asks for, if it asks for one.
    pub token: Option<VfToken>,
}

impl GroupSource {
    /// Opens the device.
    pub fn open(&self) -> io::Result<OwnedFd> {
        ioctl::group_device(self.group.as_fd(), &self.request())
    }

    /// The argument of `VFIO_GROUP_GET_DEVICE_FD`: the device's name, and behind it the token.
    pub fn request(&self) -> CString {
        let Some(token) = self.token else {
            return self.name.clone();
        };
        let mut request = self.name.clone().into_bytes();
        request.extend(format!(" vf_token={}", token.to_secret_text()).into_bytes());
        // Neither part has a zero.
        CString::new(request).unwrap_or_else(|_| self.name.clone())
    }
}

impl Cdev {
    /// Opens the device node at `path`.
    ///
    /// # Errors
    /// The node does not exist or this process may not open it.
    pub fn open(path: &Path) -> Result<Self, VfioError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| VfioError {
            problem: format!("cannot open {}", path.display()),
            source,
            cure: "bind the device to vfio-pci and let this process open its node; \
                   `vhost-device-iommu check` tells how",
        })?;
        Ok(Self::adopt(file.into()))
    }

    /// The device that `fd` is open on.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self {
            file: Arc::new(fd.into()),
            source: None,
            mapped: Arc::new(Mutex::new(Rank::DeviceRegions, BTreeMap::new())),
        }
    }

    /// See [`BusReset::close`](super::BusReset::close).
    ///
    /// The descriptor keeps its number and names another file meanwhile, so that the clones need no lock for each call.
    pub(super) fn close_file(&self) -> io::Result<()> {
        if self.source.is_none() || !self.mapped.lock().is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let placeholder = eventfd(0, EventfdFlags::CLOEXEC)?;
        ioctl::replace_file(self.as_fd(), placeholder.as_fd())
    }

    /// See [`BusReset::open_again`](super::BusReset::open_again).
    pub(super) fn open_file_again(&self) -> io::Result<()> {
        let unsupported = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        let source = self.source.as_ref().ok_or_else(unsupported)?;
        let opened = source.open()?;
        ioctl::replace_file(self.as_fd(), opened.as_fd())
    }

    /// The number of the device node that the file was opened through; for a descriptor from a group, a number that no
    /// device node has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn node_number(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.rdev())
    }

    /// Binds the device to `iommufd` (`VFIO_DEVICE_BIND_IOMMUFD`), which also starts it. `token` is the secret that VFIO
    /// asks for, if it asks for one. Returns the device's ID in the iommufd.
    ///
    /// # Errors
    /// The device is bound already, its group is in use, or VFIO wants another token, one at all, or none.
    pub fn bind(
        &self,
        iommufd: &IommuFd,
        token: Option<&VfToken>,
    ) -> Result<BoundDevice, VfioError> {
        let bound = ioctl::bind_iommufd(self.as_fd(), iommufd, token);
        bound.map(BoundDevice).map_err(|source| VfioError {
            problem: "cannot bind the device to iommufd".into(),
            cure: token_cure(&source, token.is_some()).unwrap_or(
                "end the process that uses the device or its group, and see the kernel's log",
            ),
            source,
        })
    }
}

/// The cure if VFIO refuses to open a device because of the VF token; `None` if the error has another cause.
pub(super) fn token_cure(refusal: &io::Error, has_token: bool) -> Option<&'static str> {
    match (refusal.raw_os_error()?, has_token) {
        (libc::EACCES, false) => Some(
            "VFIO asks for a VF token: set `vf-token` to that of the process which drives the physical function, or, for \
             the physical function itself, to that of its virtual functions in use",
        ),
        (libc::EACCES, true) => Some(
            "the physical function has another VF token: start the process that drives it first, and give both the same \
             `vf-token`",
        ),
        (libc::EINVAL, true) => Some(
            "perhaps VFIO takes no VF token here: remove `vf-token` if no VFIO driver holds the physical function, or if \
             `host-iommu` is \"iommufd\" and the kernel is older than Linux 6.17",
        ),
        _ => None,
    }
}

impl AsFd for Cdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Attach for Cdev {
    fn is_bound(&self) -> bool {
        // Only EINVAL says that the device is not bound. A device that does not wake up answers EIO, and is bound.
        match ioctl::device_info(self.as_fd()) {
            Ok(_) => true,
            Err(cause) => cause.raw_os_error() != Some(libc::EINVAL),
        }
    }

    fn attach(&self, ioas: u32) -> io::Result<()> {
        ioctl::attach_iommufd_pt(self.as_fd(), ioas)
    }

    fn detach(&self) -> io::Result<()> {
        ioctl::detach_iommufd_pt(self.as_fd())
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        ioctl::set_bus_master(self.as_fd(), CLEAR_MASTER, VFIO_DEVICE_FEATURE_CLEAR_MASTER)
            .or_else(|_| regions::clear_bus_master(&self.file))
    }
}

impl DeviceMemory for Cdev {
    fn bars(&self) -> io::Result<Vec<Bar>> {
        regions::bars(&self.file)
    }

    fn export(&self, bar: u32, offset: u64, len: u64) -> io::Result<OwnedFd> {
        let feature = VFIO_DEVICE_FEATURE_DMA_BUF | VFIO_DEVICE_FEATURE_GET;
        let range = vfio_region_dma_range {
            offset,
            length: len,
        };
        ioctl::dma_buf(self.as_fd(), feature, bar, range)
    }

    fn map(&self, bar: u32) -> io::Result<Arc<MmapRegion>> {
        let mut mapped = self.mapped.lock();
        if let Some(memory) = mapped.get(&bar) {
            return Ok(memory.clone());
        }
        let memory = Arc::new(regions::map(&self.file, bar)?);
        mapped.insert(bar, memory.clone());
        Ok(memory)
    }
}
