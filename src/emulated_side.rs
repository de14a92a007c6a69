//! The devices that a configuration says other processes emulate: their sockets, their backends,
//! and the way of refused accesses to the guest.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use log::{info, warn};
use parking_lot::{Condvar, Mutex};

use crate::backends::DmaBackend;
use crate::backends::vfio_user::{
    EmulatedDevice, FaultSink, Isolation, Refusal, RefusedAccess, VfioUser,
};
use crate::config::{self, Config};
use crate::ids::EndpointId;
use crate::iommu::{Fault, FaultReason};
use crate::metrics::Metrics;
use crate::socket::{SocketFile, bind};
use crate::topology::Topology;
use crate::warn_limited;

/// Refused accesses that wait to be told of; more are counted and dropped.
const MAX_WAITING: usize = 256;

/// What there is for emulated devices.
pub struct EmulatedSide {
    /// The backends and the endpoint each of them has.
    pub backends: Vec<(Box<dyn DmaBackend>, EndpointId)>,
    /// The files of the sockets that the VMM connects to.
    pub files: Vec<Arc<SocketFile>>,
}

impl EmulatedSide {
    /// Listens for the VMM's clients.
    ///
    /// # Errors
    /// Where a socket cannot be made, or the system has no descriptor or thread left.
    pub fn open(
        config: &Config,
        topology: &Topology,
        faults: &Arc<FaultQueue>,
    ) -> io::Result<Self> {
        let mut side = Self {
            backends: Vec::new(),
            files: Vec::new(),
        };
        for device in &config.emulated {
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
            side.backends.push((Box::new(backend), endpoint));
            side.files.push(Arc::new(file));
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

/// Refused accesses on their way to the guest. Whoever reports one does not wait.
pub struct FaultQueue {
    state: Mutex<Waiting>,
    changed: Condvar,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Waiting {
    faults: VecDeque<Fault>,
    ended: bool,
}

impl FaultQueue {
    /// An empty queue. What it drops is counted in `metrics`.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            metrics,
        }
    }

    /// The next one, as soon as there is one; `None` in the end.
    fn next(&self) -> Option<Fault> {
        let mut state = self.state.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(fault) = state.faults.pop_front() {
                return Some(fault);
            }
            self.changed.wait(&mut state);
        }
    }
}

impl FaultSink for FaultQueue {
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
        let mut state = self.state.lock();
        if state.faults.len() < MAX_WAITING {
            state.faults.push_back(fault);
            self.changed.notify_one();
        } else {
            self.metrics.faults_dropped.inc();
        }
    }
}

/// The thread that tells of refused accesses; dropping it ends it.
pub struct FaultDelivery {
    queue: Arc<FaultQueue>,
    thread: Option<JoinHandle<()>>,
}

impl FaultDelivery {
    /// Calls `tell` for each refused access, in their order.
    ///
    /// # Errors
    /// Where the system has no thread left.
    pub fn start(
        queue: Arc<FaultQueue>,
        tell: impl Fn(&Fault) + Send + 'static,
    ) -> io::Result<Self> {
        let source = queue.clone();
        let thread = std::thread::Builder::new()
            .name("faults".into())
            .spawn(move || {
                while let Some(fault) = source.next() {
                    warn_limited!(
                        "endpoint {} is refused access {} at {}: {}",
                        fault.endpoint,
                        fault.access,
                        fault.address,
                        fault.reason.name()
                    );
                    tell(&fault);
                }
            })?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }
}

impl Drop for FaultDelivery {
    fn drop(&mut self) {
        self.queue.state.lock().ended = true;
        self.queue.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that reports faults has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::address::{Access, Iova};

    fn refused(address: u64) -> RefusedAccess {
        RefusedAccess {
            endpoint: EndpointId(8),
            why: Refusal::NotMapped,
            access: Access::READ,
            address: Iova(address),
        }
    }

    #[test]
    fn faults_that_nobody_takes_are_dropped_and_counted() {
        let metrics = Arc::new(Metrics::default());
        let queue = Arc::new(FaultQueue::new(metrics.clone()));
        for n in 0..MAX_WAITING as u64 + 3 {
            queue.refused(&refused(n));
        }
        assert_eq!(metrics.faults_dropped.get(), 3);
        let (sender, told) = sync_channel(MAX_WAITING);
        let delivery = FaultDelivery::start(queue.clone(), move |fault| {
            sender.send(*fault).expect("room");
        });
        let delivery = delivery.expect("a thread");
        for n in 0..MAX_WAITING as u64 {
            let fault = told.recv().expect("told");
            assert_eq!(
                (fault.address, fault.reason),
                (Iova(n), FaultReason::Mapping)
            );
        }
        queue.refused(&refused(7));
        assert_eq!(told.recv().expect("told").address, Iova(7));
        drop(delivery);
        assert!(told.recv().is_err(), "the thread has ended");
    }
}
