//! The addresses that a device's host IOMMU allows, asked before the VMM binds the device.

use std::path::Path;

use log::warn;

use super::{AddressSpaces, AllowedIovas, Attach, Cdev, IommuFd, VfioError};

/// The addresses that a device's host IOMMU can map. To find them, this binds the device for a moment to an iommufd
/// opened for the purpose. Closing both nodes again resets the device.
///
/// # Errors
/// Names the step that failed; binding fails if the device is in use.
pub fn probe_allowed_iovas(iommu: &Path, cdev: &Path) -> Result<AllowedIovas, VfioError> {
    let iommufd = IommuFd::open(iommu)?;
    let device = Cdev::open(cdev)?;
    // The VMM binds the device without a token, too.
    device.bind(&iommufd, None)?;
    let failed = |step: &str, source| VfioError {
        problem: format!("cannot {step} for {}", cdev.display()),
        source,
        cure: "see the kernel's log",
    };
    let ioas = iommufd
        .alloc()
        .map_err(|e| failed("make an address space", e))?;
    device
        .attach(ioas)
        .map_err(|e| failed("attach an address space", e))?;
    let allowed = iommufd
        .allowed_iovas(ioas)
        .map_err(|e| failed("ask for the allowed addresses", e));
    if let Err(cause) = device.detach() {
        warn!("{} cannot be detached: {cause}", cdev.display());
    }
    allowed
}
