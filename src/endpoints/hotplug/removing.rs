//! Removing endpoints: the servers of their devices end, the core blocks and forgets the endpoints, and the keeper closes what
//! only they had.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use log::info;

use super::{Hotplug, HotplugError};
use crate::endpoints::bound::ServedExport;
use crate::endpoints::kinds;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::topology::{PciAddress, PciRange};

impl Hotplug {
    /// Removes endpoints. When this returns, their devices reach no memory.
    ///
    /// # Errors
    /// See [`HotplugError`].
    pub fn remove(&self, range: PciRange) -> Result<(), HotplugError> {
        let mut vm = self.vm.lock();
        self.check_settled()?;
        let without = vm.config.without_endpoints(range)?;
        let devices = vm.config.devices.iter();
        for device in devices.filter(|device| range.contains(device.endpoint())) {
            kinds::of(device.kind()).check_unplug(&vm.config)?;
        }
        // The lock of `vm` excludes other changes, so the removal below cannot fail.
        self.iommu.lock().check_removal(range)?;
        self.forgo_unrecorded(&vm.record);
        vm.record.begin_removal(range)?;
        let silent = self.end_servers(range);
        let unused = match Iommu::remove_emptied(&self.iommu, range, &silent) {
            Ok(unused) => unused,
            Err(cause) => {
                vm.record.abandon_removal();
                return Err(cause.into());
            }
        };
        vm.config = without;
        let (reports, files, kept);
        {
            let mut parts = self.parts.lock();
            kept = take_range(&mut parts.kept, range).concat();
            reports = take_range(&mut parts.reports, range);
            files = take_range(&mut self.files.lock(), range);
        }
        // A device that the VMM has brought stays open in the backend, whose other devices go on. The VMM may still have it.
        let brought = reports.iter().flat_map(|report| &report.vmm_file);
        brought.for_each(|file| drop(file.end()));
        // Drops wait for threads, so `parts` must not be locked here.
        drop((unused, reports, files));
        vm.record.finish_removal(range);
        self.forget_names(range, kept);
        info!("endpoint {range} is removed");
        Ok(())
    }

    /// Ends the servers of exported devices. Returns the endpoints whose devices do no DMA any more.
    fn end_servers(&self, range: PciRange) -> BTreeSet<EndpointId> {
        let servers = {
            let mut parts = self.parts.lock();
            let within = parts.servers.range(range.first()..=range.last());
            let addresses: Vec<_> = within.map(|(at, _)| *at).collect();
            addresses
                .into_iter()
                .zip(take_range(&mut parts.servers, range))
        };
        let mut silent = BTreeSet::new();
        for (address, ServedExport { server, is_silent }) in servers {
            // Waits for the server's thread, which releases the device.
            drop(server);
            if is_silent.load(Ordering::Acquire) {
                silent.insert(address.endpoint_id());
            }
        }
        silent
    }
}

/// Takes out the values of the endpoints in `range`.
fn take_range<T>(map: &mut BTreeMap<PciAddress, T>, range: PciRange) -> Vec<T> {
    let keys: Vec<_> = map.range(range.first()..=range.last()).collect();
    let keys: Vec<_> = keys.into_iter().map(|(at, _)| *at).collect();
    keys.iter().filter_map(|at| map.remove(at)).collect()
}
