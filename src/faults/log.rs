//! The faults there were: the last ones, and how many each endpoint had.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use super::Fault;
use crate::ids::EndpointId;
use crate::locks::{Mutex, Rank};

/// The most faults that are remembered one by one; the oldest is forgotten first.
pub const MAX_RECENT: usize = 256;
/// The most endpoints whose faults are counted apart: endpoints come and go while the daemon runs.
pub const MAX_ENDPOINTS: usize = 1024;

/// A fault that was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportedFault {
    /// Which of all of them, counted from 1.
    pub number: u64,
    /// When it was reported.
    pub when: SystemTime,
    /// What it was.
    pub fault: Fault,
    /// Whether the guest was told of it.
    pub delivered: bool,
}

/// The faults of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointFaults {
    /// How many there were.
    pub count: u64,
    /// The last one, whatever other endpoints have had since.
    pub last: ReportedFault,
}

/// What is remembered.
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
    /// Remembers a fault.
    pub fn add(&self, fault: Fault, delivered: bool) {
        let mut state = self.state.lock();
        state.count += 1;
        let seen = ReportedFault {
            number: state.count,
            when: SystemTime::now(),
            fault,
            delivered,
        };
        if state.recent.len() >= MAX_RECENT {
            state.recent.pop_front();
        }
        state.recent.push_back(seen);
        let room = state.endpoints.len() < MAX_ENDPOINTS;
        if let Some(of) = state.endpoints.get_mut(&fault.endpoint) {
            of.count += 1;
            of.last = seen;
        } else if room {
            let first = EndpointFaults {
                count: 1,
                last: seen,
            };
            state.endpoints.insert(fault.endpoint, first);
        }
    }

    /// The last faults, the oldest first.
    pub fn recent(&self) -> Vec<ReportedFault> {
        self.state.lock().recent.iter().copied().collect()
    }

    /// Endpoints that had faults, in the order of their IDs.
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
    fn endpoints_beyond_all_measure_are_not_counted_apart() {
        let log = FaultLog::default();
        for endpoint in 0..3000 {
            log.add(fault(endpoint, 0), true);
        }
        assert_eq!(log.endpoints().len(), MAX_ENDPOINTS);
        log.add(fault(5, 1), true);
        assert_eq!(log.endpoints()[5].1.count, 2);
        assert_eq!(log.recent().last().map(|seen| seen.number), Some(3001));
    }
}
