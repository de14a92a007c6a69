//! A fake kernel that does nothing, to time the daemon's own part.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::vfio::{AddressSpaces, Attach, Bar, DeviceMemory, DmaSource, Type1};
use vm_memory::MmapRegion;

pub struct NoKernel;

impl AddressSpaces for NoKernel {
    fn alloc(&self) -> io::Result<u32> {
        Ok(1)
    }

    fn destroy(&self, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn map(&self, _: u32, _: IovaRange, _: Access, _: DmaSource<'_>) -> io::Result<()> {
        Ok(())
    }

    fn copy(&self, _: u32, _: IovaRange, _: Access, _: u32, _: Iova) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, _: u32, range: IovaRange) -> io::Result<u64> {
        Ok(range.span() + 1)
    }
}

impl Type1 for NoKernel {
    fn map(&self, _: IovaRange, _: Access, _: &MmapRegion, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, range: IovaRange) -> io::Result<u64> {
        Ok(range.span() + 1)
    }

    fn unmap_all(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Attach for NoKernel {
    fn is_bound(&self) -> bool {
        true
    }

    fn attach(&self, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        Ok(())
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        Ok(())
    }
}

impl DeviceMemory for NoKernel {
    fn bars(&self) -> io::Result<Vec<Bar>> {
        Ok(Vec::new())
    }

    fn export(&self, _: u32, _: u64, _: u64) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn map(&self, _: u32) -> io::Result<Arc<MmapRegion>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
