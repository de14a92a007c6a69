//! Takes over what the daemon before has left.

use std::sync::Arc;

use log::error;

use super::left::{KeptMemory, LeftMemory};
use crate::device::Device;
use crate::endpoints::hotplug::Hotplug;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::shadow::ShadowServer;

/// The parts of a daemon that take over what the one before has left.
pub(super) struct Successor {
    pub(super) iommu: Arc<Mutex<Iommu>>,
    pub(super) device: Arc<Device>,
    pub(super) keeper: Arc<Keeper>,
    pub(super) kept: Option<KeptMemory>,
    pub(super) life: Arc<Life>,
    /// Admits shadow readers once there are tables for them.
    pub(super) shadow: Option<Arc<ShadowServer>>,
    /// Learns that endpoints which must be blocked are blocked.
    pub(super) hotplug: Arc<Hotplug>,
    /// Why the state is refused whatever it says.
    pub(super) refusal: Option<String>,
}

impl Successor {
    /// Restores the core. If the VM has a VMM, its memory must be set, and its rings must not run yet. If the state cannot be
    /// taken over, all endpoints are blocked until the driver starts anew.
    pub(super) fn take_over(&self, left: Option<&LeftMemory>) {
        let refusal = match left {
            Some(left) => self.restore(left),
            None => Some(
                "the daemon before has left a VMM, and no state of the guest's IOMMU that can be read; reset the VM"
                    .into(),
            ),
        };
        if let Some(cause) = refusal {
            error!("all endpoints are blocked until the driver starts anew: {cause}");
            self.life.refuse(cause);
            self.device.distrust_next_driver();
        }
        self.hotplug.taken_over();
        if let Some(kept) = &self.kept {
            kept.release_earlier(&self.keeper);
        }
        if let Some(shadow) = &self.shadow
            && let Err(cause) = shadow.admit()
        {
            error!("shadow readers are not admitted: {cause}");
        }
    }
    /// Restores the core, or returns why its state is refused.
    fn restore(&self, left: &LeftMemory) -> Option<String> {
        let mut iommu = self.iommu.lock();
        if let Some(cause) = &self.refusal {
            iommu.refuse(left.predecessor());
            return Some(cause.clone());
        }
        match iommu.restore(left.predecessor()) {
            Ok(restored) => {
                self.life.take_over(restored.generation);
                None
            }
            Err(cause) => Some(cause.to_string()),
        }
    }
}
