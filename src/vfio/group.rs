//! A VFIO group: the way to a device without iommufd.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

use super::cdev::GroupSource;
use super::{Cdev, VfioError, ioctl};

/// An open group, `/dev/vfio/N`. The kernel allows one open file of a group at a time.
#[derive(Debug)]
pub struct Group {
    file: Arc<File>,
}

impl Group {
    /// Opens the group at `path`.
    ///
    /// # Errors
    /// The node does not exist, this process may not open it, another process has it open, or a device of the group
    /// has a driver other than VFIO's.
    pub fn open(path: &Path) -> Result<Self, VfioError> {
        let failed = |source, cure| VfioError {
            problem: format!("cannot use the group {}", path.display()),
            source,
            cure,
        };
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|e| {
            failed(
                e,
                "bind the group's devices to vfio-pci, let this process open the node, and end \
                 the process that has it open; `vhost-device-iommu check` tells more",
            )
        })?;
        let status = ioctl::group_status(file.as_fd())
            .map_err(|e| failed(e, "the node is no VFIO group; see the kernel's log"))?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(failed(
                io::Error::other("a device of the group has a driver that is not VFIO's"),
                "`vhost-device-iommu check` names it",
            ));
        }
        Ok(Self {
            file: Arc::new(file),
        })
    }

    /// Puts the group into a container.
    pub(super) fn set_container(&self, container: BorrowedFd<'_>) -> Result<(), VfioError> {
        ioctl::group_set_container(self.file.as_fd(), container.as_raw_fd()).map_err(|source| {
            VfioError {
                problem: "cannot put the group into its container".into(),
                source,
                cure: "end the process that uses the group, and see the kernel's log",
            }
        })
    }

    /// Opens a device of the group, by its name in sysfs.
    ///
    /// # Errors
    /// The group has no such device, or the device's driver cannot start it.
    pub fn device(&self, name: &str) -> Result<Cdev, VfioError> {
        let failed = |source| VfioError {
            problem: format!("cannot open the device {name} of its group"),
            source,
            cure: "see the kernel's log",
        };
        let name = CString::new(name).map_err(|e| failed(e.into()))?;
        let fd = ioctl::group_device(self.file.as_fd(), &name).map_err(failed)?;
        let mut device = Cdev::adopt(fd);
        device.source = Some(GroupSource {
            group: self.file.clone(),
            name,
        });
        Ok(device)
    }
}
