//! Adding an endpoint: its device is opened, the addition is recorded, the core adds the endpoint, and the device is served.

use log::info;

use super::{Hotplug, HotplugError};
use crate::config::{Config, DeviceKind};
use crate::endpoints::changes::ChangeRecord;
use crate::endpoints::kind::{OpenDevice, Plug, PlugError, PlugKeeping, PlugOrigin};
use crate::endpoints::kinds;
use crate::iommu::{Iommu, NewEndpoints};
use crate::topology::{PciAddress, PciRange};

/// An endpoint that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its functions.
    pub range: PciRange,
    /// Whether the guest's VIOT table lists the functions: without it, the guest's driver does not know that
    /// the IOMMU translates for them.
    pub is_described: bool,
}

impl Hotplug {
    /// Adds the endpoint that `text` describes, see [`Config::with_endpoint`].
    ///
    /// # Errors
    /// See [`HotplugError`].
    pub fn add(&self, text: &str) -> Result<Added, HotplugError> {
        let mut vm = self.vm.lock();
        self.check_settled()?;
        let (with, range) = vm.config.with_endpoint(text)?;
        let kind = with.devices.kind_of(range.first());
        let mut opened = self.open(&with, range.first(), kind)?;
        if let Err(cause) = self.publish(&mut vm.record, text, &with, range, &mut opened) {
            let names = std::mem::take(&mut opened.kept);
            drop(opened);
            self.forget_names(range, names);
            return Err(cause);
        }
        self.take_into_service(range.first(), kind, opened);
        let is_described = with.topology.is_expected(range);
        vm.config = with;
        vm.record.finish_addition();
        info!("endpoint {range} is added");
        Ok(Added {
            range,
            is_described,
        })
    }

    /// Records that an endpoint is being added, has the core add it, and serves its device. On an error, it is not there.
    fn publish(
        &self,
        record: &mut ChangeRecord,
        text: &str,
        with: &Config,
        range: PciRange,
        opened: &mut OpenDevice,
    ) -> Result<(), HotplugError> {
        let (group, reserved) = opened.take_facts(&with.topology, range.first());
        let new = NewEndpoints {
            range,
            group: group.as_ref(),
            reserved,
            room: self.device.probe_room(),
        };
        self.forgo_unrecorded(record);
        record.begin_addition(text, range)?;
        // If the core refuses the backend, the error returns it, so that it is dropped after the core is unlocked:
        // dropping it waits for its threads.
        let added = match (opened.backend.take(), &opened.bound) {
            // An exported device does no DMA before its server accepts a client, so its backend can be filled before
            // the core has it. Another device may do DMA as soon as its backend lets it.
            (Some(backend), Some(_)) => {
                Iommu::add_filled(&self.iommu, &new, backend).map_err(|(cause, _)| cause)
            }
            (backend, _) => {
                let added = self.iommu.lock().add_endpoints(new, backend);
                added.map_err(|(cause, _)| cause)
            }
        };
        if let Err(cause) = added {
            record.abandon_addition(range);
            return Err(cause.into());
        }
        if let Err(cause) = opened.serve() {
            // The device has no client yet, so nobody uses the endpoint.
            let unused = self.iommu.lock().remove_endpoints(range);
            drop(unused);
            record.abandon_addition(range);
            return Err(PlugError::System(cause).into());
        }
        Ok(())
    }

    /// Opens the device of an endpoint, if it has one.
    fn open(
        &self,
        config: &Config,
        endpoint: PciAddress,
        kind: Option<DeviceKind>,
    ) -> Result<OpenDevice, PlugError> {
        let Some(kind) = kind else {
            return Ok(OpenDevice::default());
        };
        let opened = kinds::of(kind).plug(&Plug {
            config,
            endpoint,
            faults: &self.reporter,
            hot_resets: &self.hot_resets,
            keeping: PlugKeeping {
                keeper: &self.keeper,
                life: &self.life,
                origin: PlugOrigin::Here,
                forgo_restart: &|| self.device.forgo_restart(),
            },
        })?;
        if opened.reports_faults {
            self.deliver_faults()?;
        }
        Ok(opened)
    }
}
