//! Reports refused accesses of emulated devices to the guest.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{FaultDelivery, FaultQueue, FaultRateLimit};
use super::{Fault, FaultSink};
use crate::address::Access;
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::process::sandbox::Role;
use crate::warn_limited;

/// Queues faults, limits their rate, and delivers them on a thread of its own.
pub struct FaultReporter {
    queue: Arc<FaultQueue>,
    rate: Mutex<FaultRateLimit>,
    metrics: Arc<Metrics>,
}

impl FaultReporter {
    /// A reporter with an empty queue. It passes on up to `rate` faults of one endpoint in a second, and
    /// counts dropped faults in `metrics`.
    pub fn new(metrics: Arc<Metrics>, rate: u32) -> Self {
        Self {
            queue: Arc::default(),
            rate: Mutex::new(Rank::FaultBudgets, FaultRateLimit::new(rate)),
            metrics,
        }
    }

    /// Starts the thread that logs each fault and calls `deliver` with it.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(&self, deliver: impl Fn(&Fault) + Send + 'static) -> io::Result<FaultDelivery> {
        FaultDelivery::start(Role::Faults, self.queue.clone(), move |fault| {
            warn_limited!(
                "endpoint {} is refused access {} at {}: {}",
                fault.endpoint,
                fault.access,
                fault.address,
                fault.reason.name()
            );
            deliver(&fault);
        })
    }
}

impl FaultSink for FaultReporter {
    fn report(&self, fault: Fault) {
        // The rate limit applies to accesses only. The stop of an endpoint is a single fault, and always
        // passes the limit.
        let allowed =
            fault.access == Access::NONE || self.rate.lock().allow(fault.endpoint, Instant::now());
        if !(allowed && self.queue.push(fault)) {
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
    use crate::faults::FaultReason;
    use crate::faults::queue::MAX_WAITING;
    use crate::ids::EndpointId;

    fn fault(endpoint: u32, address: u64, reason: FaultReason) -> Fault {
        Fault {
            endpoint: EndpointId(endpoint),
            reason,
            access: Access::READ,
            address: Iova(address),
        }
    }

    #[test]
    fn faults_are_delivered_in_order_and_those_without_room_are_counted() {
        let metrics = Arc::new(Metrics::default());
        let reporter = FaultReporter::new(metrics.clone(), 100);
        let reasons = [
            FaultReason::Mapping,
            FaultReason::Domain,
            FaultReason::Unknown,
        ];
        let each = || (0..MAX_WAITING as u64).zip(reasons.into_iter().cycle());
        for (number, reason) in each() {
            // Eight endpoints, so that no rate limit applies.
            let endpoint = u32::try_from(number % 8).expect("small");
            reporter.report(fault(endpoint, number, reason));
        }
        assert_eq!(metrics.faults_dropped.get(), 0);
        reporter.report(fault(9, 0, FaultReason::Mapping));
        assert_eq!(metrics.faults_dropped.get(), 1);
        let (sender, delivered) = sync_channel(MAX_WAITING);
        let deliver = move |fault: &Fault| sender.send(*fault).expect("room");
        let delivery = reporter.start(deliver).expect("a thread");
        for (number, reason) in each() {
            let fault = delivered.recv().expect("a fault");
            assert_eq!((fault.address, fault.reason), (Iova(number), reason));
            assert_eq!(u64::from(fault.endpoint.0), number % 8);
            assert_eq!(fault.access, Access::READ);
        }
        drop(delivery);
        assert!(delivered.recv().is_err(), "nothing else");
    }

    #[test]
    fn one_endpoint_does_not_take_the_room_of_the_others() {
        let metrics = Arc::new(Metrics::default());
        let reporter = FaultReporter::new(metrics.clone(), 100);
        for number in 0..1000 {
            reporter.report(fault(1, number, FaultReason::Mapping));
        }
        let dropped = metrics.faults_dropped.get();
        assert!(dropped > 800, "{dropped}");
        reporter.report(fault(2, 0, FaultReason::Mapping));
        reporter.report(Fault {
            access: Access::NONE,
            ..fault(1, 0, FaultReason::Unknown)
        });
        assert_eq!(metrics.faults_dropped.get(), dropped);
    }
}
