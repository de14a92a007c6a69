//! Refused accesses on their way to the guest.
//!
//! A thread that notices a fault must not wait: it moves messages that the core may be waiting for, or it
//! holds the core's lock. Delivering a fault takes locks. So the thread only enqueues the fault, and a
//! delivery thread takes it off the queue.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;

use super::Fault;
use crate::ids::EndpointId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::process::sandbox::{self, Role};

/// The maximum number of waiting faults. The queue refuses more.
pub const MAX_WAITING: usize = 256;

/// The number of faults of one endpoint that may pass at once.
const BURST: u32 = 64;
/// The number of faults of one endpoint that may pass in each second after a burst, by default.
const DEFAULT_RATE: u32 = 100;

/// Faults that wait for delivery, first in, first out.
#[derive(Debug)]
pub struct FaultQueue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    waiting: VecDeque<Fault>,
    ended: bool,
}

impl Default for FaultQueue {
    fn default() -> Self {
        Self {
            state: Mutex::new(Rank::FaultQueue, QueueState::default()),
            changed: Condvar::new(),
        }
    }
}

impl FaultQueue {
    /// Adds a fault, without blocking. If [`MAX_WAITING`] faults wait already, drops the fault and returns
    /// `false`; the caller must count it.
    #[must_use = "the caller counts dropped faults"]
    pub fn push(&self, fault: Fault) -> bool {
        let mut state = self.state.lock();
        let room = state.waiting.len() < MAX_WAITING;
        if room {
            state.waiting.push_back(fault);
            self.changed.notify_one();
        }
        room
    }

    /// Waits for the next fault; `None` after [`Self::end`].
    fn next(&self) -> Option<Fault> {
        let mut state = self.state.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(fault) = state.waiting.pop_front() {
                return Some(fault);
            }
            self.changed.wait(&mut state);
        }
    }

    fn end(&self) {
        self.state.lock().ended = true;
        self.changed.notify_all();
    }
}

/// The thread that empties a queue. Dropping this ends the thread without delivering the waiting faults.
pub struct FaultDelivery {
    queue: Arc<FaultQueue>,
    thread: Option<JoinHandle<()>>,
}

impl FaultDelivery {
    /// Starts a thread of this role that calls `deliver` with each fault of `queue`, in order.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(
        role: Role,
        queue: Arc<FaultQueue>,
        mut deliver: impl FnMut(Fault) + Send + 'static,
    ) -> io::Result<Self> {
        let source = queue.clone();
        let thread = sandbox::spawn(role, move || {
            while let Some(fault) = source.next() {
                deliver(fault);
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
        self.queue.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("a thread that delivers faults has panicked");
        }
    }
}

/// Limits the faults of each endpoint: a burst of 64, then a fixed number in a second. One endpoint that
/// floods the queue must not keep the faults of another one from the guest.
#[derive(Debug)]
pub struct FaultRateLimit {
    /// The time after which an endpoint may report one more fault.
    refill: Duration,
    /// The endpoints that have had faults.
    endpoints: BTreeMap<EndpointId, TokenBucket>,
}

impl Default for FaultRateLimit {
    fn default() -> Self {
        Self::new(DEFAULT_RATE)
    }
}

impl FaultRateLimit {
    /// A limit of `rate` faults in a second; 0 counts as 1.
    pub fn new(rate: u32) -> Self {
        Self {
            refill: Duration::from_secs(1) / rate.max(1),
            endpoints: BTreeMap::new(),
        }
    }

    /// Whether a fault of `endpoint` at `now` may pass.
    pub fn allow(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let bucket = self.endpoints.entry(endpoint);
        let bucket = bucket.or_insert(TokenBucket::new(now));
        bucket.take(now, self.refill)
    }
}

/// The tokens of one endpoint. Each token is a fault that may pass.
#[derive(Debug)]
struct TokenBucket {
    tokens: u32,
    /// When the last token came in.
    refilled: Instant,
}

impl TokenBucket {
    fn new(now: Instant) -> Self {
        Self {
            tokens: BURST,
            refilled: now,
        }
    }

    fn take(&mut self, now: Instant, refill: Duration) -> bool {
        let elapsed = now.saturating_duration_since(self.refilled).as_nanos();
        let earned = u32::try_from(elapsed / refill.as_nanos().max(1)).unwrap_or(u32::MAX);
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(BURST);
            self.refilled = now;
        }
        let taken = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::address::{Access, Iova};
    use crate::faults::FaultReason;

    fn fault(address: usize) -> Fault {
        Fault {
            endpoint: EndpointId(1),
            reason: FaultReason::Mapping,
            access: Access::READ,
            address: Iova(address as u64),
        }
    }

    #[test]
    fn an_endpoint_has_a_burst_of_faults_and_then_a_fixed_rate() {
        let mut limit = FaultRateLimit::default();
        let (one, other) = (EndpointId(1), EndpointId(2));
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let passed = (0..1000).filter(|_| limit.allow(one, start)).count();
        assert_eq!(passed, 64);
        assert!(!limit.allow(one, at(9)));
        assert!(limit.allow(other, at(9)), "it has its own");
        assert!(limit.allow(one, at(10)));
        assert!(!limit.allow(one, at(11)));
    }

    #[test]
    fn a_queue_delivers_in_order_until_its_delivery_is_dropped() {
        let queue = Arc::new(FaultQueue::default());
        for number in 0..MAX_WAITING {
            assert!(queue.push(fault(number)));
        }
        assert!(!queue.push(fault(MAX_WAITING)));
        let (sender, delivered) = sync_channel(MAX_WAITING);
        let delivery = FaultDelivery::start(Role::Faults, queue.clone(), move |fault| {
            sender.send(fault).expect("room");
        });
        let delivery = delivery.expect("a thread");
        for number in 0..MAX_WAITING {
            assert_eq!(delivered.recv(), Ok(fault(number)));
        }
        assert!(queue.push(fault(7)));
        assert_eq!(delivered.recv(), Ok(fault(7)));
        drop(delivery);
        assert!(delivered.recv().is_err(), "the thread has ended");
        assert!(queue.push(fault(8)), "no thread is left to take it");
    }
}
