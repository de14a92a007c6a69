//! A VFIO group: the way to a device without iommufd.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE};

use super::cdev::{GroupSource, token_cure};
use super::{Cdev, VfioError, ioctl};
use crate::ids::VfToken;

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
        let group = Self {
            file: Arc::new(file),
        };
        let flags = group
            .flags()
            .map_err(|e| failed(e, "the node is no VFIO group; see the kernel's log"))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(failed(
                io::Error::other("a device of the group has a driver that is not VFIO's"),
                "`vhost-device-iommu check` names it",
            ));
        }
        Ok(group)
    }

    /// The group that `fd` is open on. It must have a container already.
    ///
    /// # Errors
    /// `fd` is open on something else, or the group has no container.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let group = Self {
            file: Arc::new(fd.into()),
        };
        if group.flags()? & VFIO_GROUP_FLAGS_CONTAINER_SET == 0 {
            return Err(io::Error::other("the group has no container"));
        }
        Ok(group)
    }

    fn flags(&self) -> io::Result<u32> {
        ioctl::group_status(self.file.as_fd()).map(|status| status.flags)
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

    /// Opens a device of the group, by its name in sysfs. `token` is the secret that VFIO asks for, if it asks for one.
    ///
    /// # Errors
    /// The group has no such device, the device's driver cannot start it, or VFIO wants another token, one at all, or none.
    pub fn device(&self, name: &str, token: Option<VfToken>) -> Result<Cdev, VfioError> {
        let source = self.source_of(name, token)?;
        let opened = source.open();
        let fd = opened.map_err(|cause| no_device(name, cause, token.is_some()))?;
        Ok(Self::with_source(fd, source))
    }

    /// The device that `fd` is open on, which another process has opened through this group, by its name in sysfs.
    /// `token` is as for [`Self::device`].
    ///
    /// # Errors
    /// The name has a zero byte.
    pub fn adopt_device(
        &self,
        name: &str,
        token: Option<VfToken>,
        fd: OwnedFd,
    ) -> Result<Cdev, VfioError> {
        Ok(Self::with_source(fd, self.source_of(name, token)?))
    }

    fn source_of(&self, name: &str, token: Option<VfToken>) -> Result<GroupSource, VfioError> {
        Ok(GroupSource {
            group: self.file.clone(),
            name: CString::new(name).map_err(|cause| no_device(name, cause.into(), false))?,
            token,
        })
    }

    fn with_source(fd: OwnedFd, source: GroupSource) -> Cdev {
        let mut device = Cdev::adopt(fd);
        device.source = Some(source);
        device
    }
}

fn no_device(name: &str, source: io::Error, has_token: bool) -> VfioError {
    VfioError {
        problem: format!("cannot open the device {name} of its group"),
        cure: token_cure(&source, has_token).unwrap_or("see the kernel's log"),
        source,
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
