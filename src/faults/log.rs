//! A log of reported faults: the latest ones, and counts by endpoint.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use super::Fault;
use crate::ids::EndpointId;
use crate::locks::{Mutex, Rank};

/// The maximum number of faults in the log. A new fault replaces the oldest.
pub const MAX_RECENT: usize = 256;
/// The maximum number of endpoints with a count. Endpoints come and go while the daemon runs, so the number
/// must have a bound.
pub const MAX_ENDPOINTS: usize = 1024;

/// A fault that was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportedFault {
    /// Its number among all faults, from 1.
    pub number: u64,
    /// When it was reported.
    pub time: SystemTime,
    /// The fault.
    pub fault: Fault,
    /// Whether the driver got a record of it.
    pub delivered: bool,
}

/// The faults of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointFaults {
    /// The number of its faults.
    pub count: u64,
    /// Its last fault. It is kept even if faults of other endpoints have replaced it in the log.
    pub last: ReportedFault,
}

/// The log. Every method locks it for a moment.
#[derive(Debug)]
pub struct FaultLog {
    state: Mutex<LogState>,
}

impl Default for FaultLog {
    fn default() -> Self {
        Self {
            state: Mutex::new(Rank::FaultLog, LogState::default()),
        }
    }
}

#[derive(Debug, Default)]
struct LogState {
    count: u64,
    recent: VecDeque<ReportedFault>,
    endpoints: BTreeMap<EndpointId, EndpointFaults>,
}

impl FaultLog {
    /// Adds a fault that was reported just now.
    pub fn add(&self, fault: Fault, delivered: bool) {
        let mut state = self.state.lock();
        state.count += 1;
        let reported = ReportedFault {
            number: state.count,
            time: SystemTime::now(),
            fault,
            delivered,
        };
        if state.recent.len() >= MAX_RECENT {
            state.recent.pop_front();
        }
        state.recent.push_back(reported);
        let room = state.endpoints.len() < MAX_ENDPOINTS;
        if let Some(of) = state.endpoints.get_mut(&fault.endpoint) {
            of.count += 1;
            of.last = reported;
        } else if room {
            let first = EndpointFaults {
                count: 1,
                last: reported,
            };
            state.endpoints.insert(fault.endpoint, first);
        }
    }

    /// The last [`MAX_RECENT`] faults, the oldest first.
    pub fn recent(&self) -> Vec<ReportedFault> {
        self.state.lock().recent.iter().copied().collect()
    }

    /// The endpoints that had faults, in the order of their IDs; at most [`MAX_ENDPOINTS`].
    pub fn endpoints(&self) -> Vec<(EndpointId, EndpointFaults)> {
        let state = self.state.lock();
        state.endpoints.iter().map(|(&id, &of)| (id, of)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Access, Iova};
    use crate::faults::FaultReason;

    fn fault(endpoint: u32, address: u64) -> Fault {
        Fault {
            endpoint: EndpointId(endpoint),
            reason: FaultReason::Mapping,
            access: Access::READ,
            address: Iova(address),
        }
    }

    #[test]
    fn a_flood_of_one_endpoint_leaves_the_last_fault_of_another() {
        let log = FaultLog::default();
        log.add(fault(1, 7), true);
        for address in 0..1000 {
            log.add(fault(2, address), false);
        }
        let recent = log.recent();
        assert_eq!(recent.len(), MAX_RECENT);
        assert_eq!(recent[0].number, 1002 - MAX_RECENT as u64);
        assert_eq!(recent[MAX_RECENT - 1].fault, fault(2, 999));
        let endpoints = log.endpoints();
        assert_eq!(endpoints[0].1.last.fault, fault(1, 7));
        assert!(endpoints[0].1.last.delivered);
        assert_eq!(
            (endpoints[1].1.count, endpoints[1].1.last.delivered),
            (1000, false)
        );
    }

    #[test]
    fn the_number_of_counted_endpoints_is_bounded() {
        let log = FaultLog::default();
        for endpoint in 0..3000 {
            log.add(fault(endpoint, 0), true);
        }
        assert_eq!(log.endpoints().len(), MAX_ENDPOINTS);
        log.add(fault(5, 1), true);
        assert_eq!(log.endpoints()[5].1.count, 2);
        assert_eq!(log.recent().last().map(|last| last.number), Some(3001));
    }
}
