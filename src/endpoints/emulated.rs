//! The devices that a configuration says other processes emulate: their sockets, their backends,
//! and the way of refused accesses to the guest.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use log::info;

use crate::address::Access;
use crate::backends::DmaBackend;
use crate::backends::vfio_user::{
    EmulatedDevice, FaultSink, Isolation, Refusal, RefusedAccess, VfioUser, Watch,
};
use crate::config::{self, Emulated};
use crate::faults::queue::{Budgets, FaultDelivery, FaultQueue};
use crate::ids::EndpointId;
use crate::iommu::{Fault, FaultReason};
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::process::sandbox::Role;
use crate::process::socket::{SocketFile, bind};
use crate::topology::{PciAddress, Topology};
use crate::warn_limited;

/// What there is for emulated devices.
pub struct EmulatedSide {
    /// The backends and the endpoint each of them has.
    pub backends: Vec<(Box<dyn DmaBackend>, EndpointId)>,
    /// What tells how they are doing.
    pub watches: Vec<(PciAddress, Watch)>,
    /// The files of the sockets that the VMM connects to.
    pub files: Vec<(PciAddress, Arc<SocketFile>)>,
}

impl EmulatedSide {
    /// Listens for the VMM's clients of these devices.
    ///
    /// # Errors
    /// Where a socket cannot be made, or the system has no descriptor or thread left.
    pub fn open(
        devices: &[Emulated],
        topology: &Topology,
        faults: &Arc<Refusals>,
    ) -> io::Result<Self> {
        let mut side = Self {
            backends: Vec::new(),
            watches: Vec::new(),
            files: Vec::new(),
        };
        for device in devices {
            let (listener, file) = bind(&device.listen)?;
            let endpoint = device.endpoint.endpoint_id();
            let info = topology.endpoint(endpoint);
            let regions = info.iter().flat_map(|info| info.reserved.iter());
            let emulated = EmulatedDevice {
                endpoint,
                name: format!("endpoint {}", device.endpoint),
                server: device.connect.clone(),
                isolation: match device.isolation {
                    config::Isolation::Messages => Isolation::Messages,
                    config::Isolation::Mappings => Isolation::Mappings,
                },
                reserved: regions.map(|region| region.range).collect(),
                deadline: device.deadline,
            };
            let backend = VfioUser::start(emulated, listener, faults.clone())?;
            side.watches.push((device.endpoint, backend.watch()));
            side.backends.push((Box::new(backend), endpoint));
            side.files.push((device.endpoint, Arc::new(file)));
            info!(
                "endpoint {} is the device at {}, isolation {}",
                device.endpoint,
                device.connect.display(),
                device.isolation.name()
            );
        }
        Ok(side)
    }
}

/// Where the interposers leave what they have refused.
pub struct Refusals {
    queue: Arc<FaultQueue<Fault>>,
    /// No device keeps the others' faults from the guest.
    budgets: Mutex<Budgets>,
    metrics: Arc<Metrics>,
}

impl Refusals {
    /// None so far. Up to `rate` of one endpoint are passed on in a second; what is dropped is counted
    /// in `metrics`.
    pub fn new(metrics: Arc<Metrics>, rate: u32) -> Self {
        Self {
            queue: Arc::default(),
            budgets: Mutex::new(Rank::FaultBudgets, Budgets::new(rate)),
            metrics,
        }
    }

    /// Starts the thread that calls `tell` for each of them.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn deliver(&self, tell: impl Fn(&Fault) + Send + 'static) -> io::Result<FaultDelivery> {
        FaultDelivery::start(Role::Faults, self.queue.clone(), move |fault| {
            warn_limited!(
                "endpoint {} is refused access {} at {}: {}",
                fault.endpoint,
                fault.access,
                fault.address,
                fault.reason.name()
            );
            tell(&fault);
        })
    }
}

impl FaultSink for Refusals {
    fn refused(&self, refused: &RefusedAccess) {
        let fault = Fault {
            endpoint: refused.endpoint,
            reason: match refused.why {
                Refusal::NotAttached => FaultReason::Domain,
                Refusal::NotMapped => FaultReason::Mapping,
                Refusal::Stopped => FaultReason::Unknown,
            },
            access: refused.access,
            address: refused.address,
        };
        // That an endpoint is stopped is no access of the device's, and is always said.
        let may = refused.access == Access::NONE
            || self.budgets.lock().take(fault.endpoint, Instant::now());
        if !(may && self.queue.push(fault)) {
            self.metrics.faults_dropped.inc();
            self.metrics.faults_suppressed.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::address::Iova;
    use crate::faults::queue::MAX_WAITING;

    fn refused(endpoint: u32, address: u64, why: Refusal) -> RefusedAccess {
        RefusedAccess {
            endpoint: EndpointId(endpoint),
            why,
            access: Access::READ,
            address: Iova(address),
        }
    }

    #[test]
    fn refusals_become_faults_and_those_nobody_takes_are_counted() {
        let metrics = Arc::new(Metrics::default());
        let refusals = Refusals::new(metrics.clone(), 100);
        let reasons = [
            (Refusal::NotMapped, FaultReason::Mapping),
            (Refusal::NotAttached, FaultReason::Domain),
            (Refusal::Stopped, FaultReason::Unknown),
        ];
        let each = || (0..MAX_WAITING as u64).zip(reasons.into_iter().cycle());
        for (number, (why, _)) in each() {
            // Each endpoint has a few.
            let endpoint = u32::try_from(number % 8).expect("small");
            refusals.refused(&refused(endpoint, number, why));
        }
        assert_eq!(metrics.faults_dropped.get(), 0);
        refusals.refused(&refused(9, 0, Refusal::NotMapped));
        assert_eq!(metrics.faults_dropped.get(), 1);
        let (sender, told) = sync_channel(MAX_WAITING);
        let tell = move |fault: &Fault| sender.send(*fault).expect("room");
        let delivery = refusals.deliver(tell).expect("a thread");
        for (number, (_, reason)) in each() {
            let fault = told.recv().expect("told");
            assert_eq!((fault.address, fault.reason), (Iova(number), reason));
            assert_eq!(u64::from(fault.endpoint.0), number % 8);
            assert_eq!(fault.access, Access::READ);
        }
        drop(delivery);
        assert!(told.recv().is_err(), "nothing else");
    }

    #[test]
    fn one_endpoint_does_not_take_the_room_of_the_others() {
        let metrics = Arc::new(Metrics::default());
        let refusals = Refusals::new(metrics.clone(), 100);
        for number in 0..1000 {
            refusals.refused(&refused(1, number, Refusal::NotMapped));
        }
        let dropped = metrics.faults_dropped.get();
        assert!(dropped > 800, "{dropped}");
        refusals.refused(&refused(2, 0, Refusal::NotMapped));
        refusals.refused(&RefusedAccess {
            access: Access::NONE,
            ..refused(1, 0, Refusal::Stopped)
        });
        assert_eq!(metrics.faults_dropped.get(), dropped);
    }
}
