//! An open VFIO device, whoever has opened it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_BUS_MASTER, VFIO_DEVICE_FEATURE_CLEAR_MASTER, VFIO_DEVICE_FEATURE_DMA_BUF,
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET, vfio_region_dma_range,
};
use vm_memory::MmapRegion;

use super::{Attach, Bar, DeviceMemory, IommuFd, VfioError, ioctl, regions};

/// An open device: `/dev/vfio/devices/vfioN`, or what a group gave for it. Clones are the same
/// open file.
#[derive(Clone, Debug)]
pub struct Cdev {
    pub(super) file: Arc<File>,
    /// BARs that are mapped: a mapping of a device's memory stays.
    mapped: Arc<Mutex<BTreeMap<u32, Arc<MmapRegion>>>>,
}

impl Cdev {
    /// Opens the device node at `path`.
    ///
    /// # Errors
    /// Where it is not there or may not be opened.
    pub fn open(path: &Path) -> Result<Self, VfioError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| VfioError {
            what: format!("cannot open {}", path.display()),
            source,
            cure: "bind the device to vfio-pci and let this process open its node; \
                   `vhost-device-iommu check` tells how",
        })?;
        Ok(Self::adopt(file.into()))
    }

    /// The device that is open as `fd`.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self {
            file: Arc::new(fd.into()),
            mapped: Arc::default(),
        }
    }

    /// The number of the device node it was opened by, or of nothing that another node has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn node_number(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.rdev())
    }

    /// Binds it to `iommufd` (`VFIO_DEVICE_BIND_IOMMUFD`), which starts it.
    ///
    /// # Errors
    /// Where somebody else has, or its group is in use otherwise.
    pub fn bind(&self, iommufd: &IommuFd) -> Result<(), VfioError> {
        ioctl::bind_iommufd(self.as_fd(), iommufd).map_err(|source| VfioError {
            what: "cannot bind the device to iommufd".into(),
            source,
            cure: "end whoever uses the device or its group, and see the kernel's log",
        })
    }
}

impl AsFd for Cdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Attach for Cdev {
    fn is_bound(&self) -> bool {
        // Other errors come from the device: a device that does not wake up is bound all the same.
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
        let feature = VFIO_DEVICE_FEATURE_BUS_MASTER | VFIO_DEVICE_FEATURE_SET;
        ioctl::set_bus_master(self.as_fd(), feature, VFIO_DEVICE_FEATURE_CLEAR_MASTER)
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
