//! One SMMU of the host: its second stage, and the first stages of domains whose devices are behind it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::refused_object;
use crate::address::Gpa;
use crate::backends::{BackendError, BackendErrorKind};
use crate::ids::{DomainId, EndpointId};
use crate::vfio::nesting::{
    BoundDevice, HardwareKind, NestParent, NestedTable, NestingKernel, SmmuCommand, SmmuHardware,
    StreamEntry, VirtualDevice, VirtualIommu,
};

/// The SMMU. The fields are dropped in their order, which is that of the kernel: tables before the vIOMMU.
pub(super) struct Instance {
    /// The first stage of each domain that has, or had, a device here.
    tables: BTreeMap<DomainId, NestedTable>,
    devices: Vec<(EndpointId, VirtualDevice)>,
    viommu: Arc<VirtualIommu>,
    hardware: SmmuHardware,
    /// One of its devices: the kernel finds the SMMU by it.
    any: BoundDevice,
}

/// The properties of the SMMU above a device.
///
/// # Errors
/// The kernel's, or the SMMU cannot walk the page tables.
pub(super) fn suitable_hardware(
    kernel: &dyn NestingKernel,
    device: BoundDevice,
) -> Result<SmmuHardware, BackendError> {
    let found = kernel.hardware_info(device).map_err(refused_object)?;
    let missing = match &found.kind {
        HardwareKind::Smmu(smmu) => {
            let needed = [
                (smmu.walks_aarch64, "tables in the format of AArch64"),
                (smmu.walks_little_endian, "little-endian tables"),
                (smmu.granules.has_4k, "pages of 4 KiB"),
                // The device's cache would need invalidations of its own.
                (!found.may_use_ats, "devices without ATS"),
            ];
            match needed.into_iter().find(|(has, _)| !has) {
                None => return Ok(*smmu),
                Some((_, missing)) => missing,
            }
        }
        HardwareKind::Vtd(_) | HardwareKind::Other(_) => "an SMMUv3",
    };
    Err(BackendError {
        kind: BackendErrorKind::Unsupp,
        message: format!(
            "the IOMMU above {device} cannot walk the page tables: they need {missing}"
        ),
    })
}

impl Instance {
    /// Prepares an SMMU for `devices`, all of which are behind it. `ioas` becomes its second stage.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(
        kernel: &Arc<dyn NestingKernel>,
        hardware: SmmuHardware,
        ioas: u32,
        any: BoundDevice,
    ) -> Result<Self, BackendError> {
        let parent = NestParent::new(kernel.clone(), any, ioas).map_err(refused_object)?;
        let viommu = VirtualIommu::new(Arc::new(parent), any).map_err(refused_object)?;
        Ok(Self {
            tables: BTreeMap::new(),
            devices: Vec::new(),
            viommu: Arc::new(viommu),
            hardware,
            any,
        })
    }

    /// Adds a device, whose events and commands name it by its endpoint.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn add(
        &mut self,
        endpoint: EndpointId,
        device: BoundDevice,
    ) -> Result<(), BackendError> {
        let made = VirtualDevice::new(self.viommu.clone(), device, endpoint.0);
        self.devices.push((endpoint, made.map_err(refused_object)?));
        Ok(())
    }

    /// The properties.
    pub(super) fn hardware(&self) -> SmmuHardware {
        self.hardware
    }

    /// The first stage with the context descriptor at `context`, by its ID. Makes it if there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn table(&mut self, domain: DomainId, context: Gpa) -> Result<u32, BackendError> {
        if let Some(table) = self.tables.get(&domain) {
            return Ok(table.id());
        }
        let entry = StreamEntry::translated(context).ok_or_else(|| BackendError {
            kind: BackendErrorKind::Range,
            message: format!("no SMMU reads a context descriptor at {context}"),
        })?;
        let table = NestedTable::for_smmu(self.viommu.clone(), self.any, entry);
        let table = table.map_err(refused_object)?;
        let id = table.id();
        self.tables.insert(domain, table);
        Ok(id)
    }

    /// Whether there is a first stage for a domain.
    pub(super) fn has(&self, domain: DomainId) -> bool {
        self.tables.contains_key(&domain)
    }

    /// Destroys the first stage of a domain. Returns whether there was one.
    pub(super) fn destroy(&mut self, domain: DomainId) -> bool {
        self.tables.remove(&domain).is_some()
    }

    /// Invalidates cached translations. They are gone on return.
    ///
    /// # Errors
    /// The kernel's. A part of the translations may be cached still.
    pub(super) fn invalidate(&self, commands: &[SmmuCommand]) -> Result<(), BackendError> {
        let times = if self.hardware.repeats_invalidations {
            2
        } else {
            1
        };
        for _ in 0..times {
            self.viommu
                .invalidate(commands)
                .map_err(|cause| BackendError {
                    kind: BackendErrorKind::DevErr,
                    message: cause.to_string(),
                })?;
        }
        Ok(())
    }

    /// The commands that invalidate the context descriptors of all devices here.
    pub(super) fn forget_contexts(&self) -> impl Iterator<Item = SmmuCommand> + '_ {
        let streams = self.devices.iter().map(|(_, device)| device.stream());
        streams.map(SmmuCommand::invalidate_context)
    }
}
