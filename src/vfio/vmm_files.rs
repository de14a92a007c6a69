//! Open files of a VMM: an iommufd and devices that come while the VMM runs, and go with it.
//!
//! Without its file, an iommufd answers each call with ENODEV, and a device is not bound.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::{AddressSpaces, Attach, Bar, Cdev, DeviceMemory, DmaSource, IommuFd};
use crate::address::{Access, Iova, IovaRange};
use crate::locks::{Mutex, Rank};

/// The open files of a VMM, for the backend that works with them while this process has them.
pub trait VmmFiles: Send {
    /// Whether the iommufd is open.
    fn is_open(&self) -> bool;

    /// Gets the files that this process lacks from the VMM. May wait for a moment. What comes, at whatever time, is not open
    /// before [`Self::accept`].
    fn fetch(&self);

    /// Opens what has come. The caller must move the devices to their targets before it lets anybody see them: each is where
    /// the VMM has put it.
    fn accept(&self);

    /// Gives all files up, because the VMM has gone.
    fn release(&self);
}

/// The iommufd of a VMM. Clones are the same one.
#[derive(Clone, Debug)]
pub struct VmmIommufd(Arc<Mutex<Option<Arc<IommuFd>>>>);

/// A device of a VMM. Clones are the same one.
#[derive(Clone, Debug)]
pub struct VmmCdev(Arc<Mutex<Option<Cdev>>>);

fn absent() -> io::Error {
    io::Error::from_raw_os_error(libc::ENODEV)
}

impl Default for VmmIommufd {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Rank::VmmFiles, None)))
    }
}

impl VmmIommufd {
    /// The open file; `None` without one.
    pub fn file(&self) -> Option<Arc<IommuFd>> {
        self.0.lock().clone()
    }

    /// Replaces the open file. Returns the former one.
    pub fn set(&self, iommufd: Option<IommuFd>) -> Option<Arc<IommuFd>> {
        std::mem::replace(&mut *self.0.lock(), iommufd.map(Arc::new))
    }

    fn get(&self) -> io::Result<Arc<IommuFd>> {
        self.file().ok_or_else(absent)
    }
}

impl AddressSpaces for VmmIommufd {
    fn alloc(&self) -> io::Result<u32> {
        self.get()?.alloc()
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        self.get()?.destroy(ioas)
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        self.get()?.map(ioas, range, access, source)
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        self.get()?.copy(ioas, range, access, from, first)
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        self.get()?.unmap(ioas, range)
    }
}

impl Default for VmmCdev {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Rank::VmmFiles, None)))
    }
}

impl VmmCdev {
    /// Whether this process has the open file.
    pub fn is_open(&self) -> bool {
        self.0.lock().is_some()
    }

    /// Replaces the open file. Returns the former one, which may take seconds to close: the kernel resets the device.
    pub fn set(&self, cdev: Option<Cdev>) -> Option<Cdev> {
        std::mem::replace(&mut *self.0.lock(), cdev)
    }

    fn get(&self) -> io::Result<Cdev> {
        self.0.lock().clone().ok_or_else(absent)
    }
}

impl Attach for VmmCdev {
    fn is_bound(&self) -> bool {
        self.get().is_ok_and(|cdev| cdev.is_bound())
    }

    fn attach(&self, ioas: u32) -> io::Result<()> {
        self.get()?.attach(ioas)
    }

    fn detach(&self) -> io::Result<()> {
        self.get()?.detach()
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        self.get()?.clear_bus_master()
    }
}

impl DeviceMemory for VmmCdev {
    fn bars(&self) -> io::Result<Vec<Bar>> {
        self.get()?.bars()
    }

    fn export(&self, bar: u32, offset: u64, len: u64) -> io::Result<OwnedFd> {
        self.get()?.export(bar, offset, len)
    }

    fn map(&self, bar: u32) -> io::Result<Arc<MmapRegion>> {
        self.get()?.map(bar)
    }
}
