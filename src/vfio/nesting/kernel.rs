//! The kernel's calls about nested translation.

use std::io;
use std::os::fd::OwnedFd;

use iommufd_bindings::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 as INFO_SMMU,
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD as INFO_VTD, iommu_hw_info_vtd,
    iommu_hwpt_data_type_IOMMU_HWPT_DATA_ARM_SMMUV3 as DATA_SMMU,
    iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1 as DATA_VTD,
    iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 as INVALIDATE_VTD,
    iommu_hwpt_invalidate_data_type_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 as INVALIDATE_SMMU,
    iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING as CAP_DIRTY,
    iommufd_hw_capabilities_IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED as CAP_NO_ATS,
};

use super::arguments::{
    event_queue_argument, invalidate_argument, nested_argument, outcome, parent_argument, refused,
    smmu_data, smmu_invalidation, vdevice_argument, viommu_argument, vtd_data, vtd_invalidation,
};
use super::{
    BoundDevice, FirstStage, HardwareInfo, HardwareKind, InvalidationError, NestingError,
    NestingKernel, SmmuCommand, SmmuHardware, VtdHardware, VtdInvalidation,
};
use crate::vfio::ioctl;
use crate::vfio::{AddressSpaces, IommuFd};

/// The cure if there is no second stage to nest below.
const NO_PARENT: &str = "the host's IOMMU has no second stage below which it nests tables, or its driver does not nest: use \
     the device without nested translation";
/// The cure if an SMMU does not keep the guest from bypassing the caches.
const NO_VIOMMU: &str = "the SMMU has no S2FWB, and the firmware's IORT does not set CANWBS for the device's root complex; or \
     the kernel lacks CONFIG_ARM_SMMU_V3_IOMMUFD: use the device without nested translation";

impl NestingKernel for IommuFd {
    fn hardware_info(&self, device: BoundDevice) -> Result<HardwareInfo, NestingError> {
        let failed = |source| refused("IOMMU_GET_HW_INFO", device.to_string(), source, None);
        let answer = ioctl::hw_info(&self.kernel, device.0, &mut ()).map_err(failed)?;
        let kind = match answer.data_type {
            INFO_SMMU => {
                let mut raw = iommu_hw_info_arm_smmuv3::default();
                ioctl::hw_info(&self.kernel, device.0, &mut raw).map_err(failed)?;
                HardwareKind::Smmu(SmmuHardware::decode(&raw))
            }
            INFO_VTD => {
                let mut raw = iommu_hw_info_vtd::default();
                ioctl::hw_info(&self.kernel, device.0, &mut raw).map_err(failed)?;
                HardwareKind::Vtd(VtdHardware::decode(&raw))
            }
            other => HardwareKind::Other(other),
        };
        Ok(HardwareInfo {
            kind,
            tracks_dirty_pages: answer.capabilities & u64::from(CAP_DIRTY) != 0,
            may_use_ats: answer.capabilities & u64::from(CAP_NO_ATS) == 0,
            pasid_bits: answer.pasid_bits,
        })
    }

    fn alloc_parent(&self, device: BoundDevice, ioas: u32) -> Result<u32, NestingError> {
        let made = ioctl::hwpt_alloc(&self.kernel, parent_argument(device, ioas), &());
        made.map_err(|source| {
            let object = format!("the nest parent for {device} in address space {ioas}");
            refused("IOMMU_HWPT_ALLOC", object, source, Some(NO_PARENT))
        })
    }

    fn alloc_viommu(&self, device: BoundDevice, parent: u32) -> Result<u32, NestingError> {
        let made = ioctl::viommu_alloc(&self.kernel, viommu_argument(device, parent));
        made.map_err(|source| {
            let object = format!("the vIOMMU for {device} below nest parent {parent}");
            refused("IOMMU_VIOMMU_ALLOC", object, source, Some(NO_VIOMMU))
        })
    }

    fn alloc_vdevice(
        &self,
        viommu: u32,
        device: BoundDevice,
        stream: u32,
    ) -> Result<u32, NestingError> {
        let made = ioctl::vdevice_alloc(&self.kernel, vdevice_argument(viommu, device, stream));
        made.map_err(|source| {
            let object = format!("stream {stream:#x} for {device} in vIOMMU {viommu}");
            refused("IOMMU_VDEVICE_ALLOC", object, source, None)
        })
    }

    fn alloc_nested(
        &self,
        device: BoundDevice,
        parent: u32,
        stage: FirstStage,
    ) -> Result<u32, NestingError> {
        let made = match stage {
            FirstStage::Smmu(entry) => {
                let argument = nested_argument(device, parent, DATA_SMMU);
                ioctl::hwpt_alloc(&self.kernel, argument, &smmu_data(entry))
            }
            FirstStage::Vtd(root) => {
                let argument = nested_argument(device, parent, DATA_VTD);
                ioctl::hwpt_alloc(&self.kernel, argument, &vtd_data(root))
            }
        };
        made.map_err(|source| {
            let object = format!("the nested table for {device} below {parent}");
            refused("IOMMU_HWPT_ALLOC", object, source, None)
        })
    }

    fn invalidate_smmu(
        &self,
        viommu: u32,
        commands: &[SmmuCommand],
    ) -> Result<(), InvalidationError> {
        // The SMMU's driver refuses a call without commands.
        if commands.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> = commands.iter().copied().map(smmu_invalidation).collect();
        let argument = invalidate_argument(viommu, INVALIDATE_SMMU);
        let (answer, done) = ioctl::hwpt_invalidate(&self.kernel, argument, &entries);
        outcome(answer, done, commands.len(), || format!("vIOMMU {viommu}"))
    }

    fn invalidate_vtd(
        &self,
        nested: u32,
        ranges: &[VtdInvalidation],
    ) -> Result<(), InvalidationError> {
        let entries: Vec<_> = ranges.iter().copied().map(vtd_invalidation).collect();
        let argument = invalidate_argument(nested, INVALIDATE_VTD);
        let (answer, done) = ioctl::hwpt_invalidate(&self.kernel, argument, &entries);
        outcome(answer, done, ranges.len(), || {
            format!("nested table {nested}")
        })
    }

    fn alloc_event_queue(&self, viommu: u32, depth: u32) -> Result<(u32, OwnedFd), NestingError> {
        let made = ioctl::veventq_alloc(&self.kernel, event_queue_argument(viommu, depth));
        made.map_err(|source| {
            let object = format!("a queue of {depth} events for vIOMMU {viommu}");
            refused("IOMMU_VEVENTQ_ALLOC", object, source, None)
        })
    }

    fn destroy_object(&self, object: u32) -> io::Result<()> {
        self.destroy(object)
    }
}
