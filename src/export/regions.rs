//! The regions of an exported device.

use crate::vfio::RegionInfo;
use crate::vfio_user::server::{RegionCapability, ServedRegion};

/// A region that the kernel has a number for and the device lacks.
pub(super) const ABSENT: &ServedRegion = &ServedRegion {
    flags: 0,
    size: 0,
    capabilities: Vec::new(),
};

/// A region that the device has.
pub(super) struct ExportedRegion {
    pub(super) vfio: RegionInfo,
    pub(super) served: ServedRegion,
}

/// `vfio` as the client sees it.
pub(super) fn exported_region(vfio: RegionInfo) -> ExportedRegion {
    let capabilities = vfio.capabilities.iter().map(|c| RegionCapability {
        id: c.id,
        version: c.version,
        data: c.data.clone(),
    });
    let served = ServedRegion {
        flags: vfio.flags,
        size: vfio.size,
        capabilities: capabilities.collect(),
    };
    ExportedRegion { vfio, served }
}
