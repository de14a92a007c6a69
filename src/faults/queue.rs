//! Refused accesses on their way to the guest.
//!
//! Who notices one must not wait: it moves messages that the core may be waiting for, or holds the core
//! itself. Delivering one takes locks. So it is left here, and a thread of its own delivers it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;

use crate::ids::EndpointId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::process::sandbox::{self, Role};

/// The most that wait; what comes then is not taken.
pub const MAX_WAITING: usize = 256;

/// Faults of one endpoint that are passed on at once.
const BURST: u32 = 64;
/// And after that so many in a second, unless told otherwise.
const USUAL_RATE: u32 = 100;

/// What waits for being delivered, first in, first out.
#[derive(Debug)]
pub struct FaultQueue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    waiting: VecDeque<T>,
    ended: bool,
}

impl<T> FaultQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(
                Rank::FaultQueue,
                State {
                    waiting: VecDeque::new(),
                    ended: false,
                },
            ),
            changed: Condvar::new(),
        }
    }

    /// Leaves one here. Returns `false`, at once too, where [`MAX_WAITING`] wait already: it is dropped,
    /// and for the caller to count.
    #[must_use = "what is dropped is counted"]
    pub fn push(&self, fault: T) -> bool {
        let mut state = self.state.lock();
        let room = state.waiting.len() < MAX_WAITING;
        if room {
            state.waiting.push_back(fault);
            self.changed.notify_one();
        }
        room
    }

    /// The next one, as soon as there is one; `None` in the end.
    fn next(&self) -> Option<T> {
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

impl<T> Default for FaultQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// The thread that empties a queue; dropping it ends it, and what still waits is not delivered.
pub struct FaultDelivery {
    end: Box<dyn Fn() + Send + Sync>,
    thread: Option<JoinHandle<()>>,
}

impl FaultDelivery {
    /// Calls `deliver` with what comes into `queue`, in its order, in a thread of this role.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start<T: Send + 'static>(
        role: Role,
        queue: Arc<FaultQueue<T>>,
        mut deliver: impl FnMut(T) + Send + 'static,
    ) -> io::Result<Self> {
        let source = queue.clone();
        let thread = sandbox::spawn(role, move || {
            while let Some(fault) = source.next() {
                deliver(fault);
            }
        })?;
        Ok(Self {
            end: Box::new(move || queue.end()),
            thread: Some(thread),
        })
    }
}

impl Drop for FaultDelivery {
    fn drop(&mut self) {
        (self.end)();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("a thread that delivers faults has panicked");
        }
    }
}

/// How many faults of each endpoint are passed on: 64 at once, and after that so many in a second.
#[derive(Debug)]
pub struct Budgets {
    /// How long it takes until there may be one more.
    refill: Duration,
    /// Of endpoints that have had faults.
    endpoints: BTreeMap<EndpointId, Budget>,
}

impl Default for Budgets {
    fn default() -> Self {
        Self::new(USUAL_RATE)
    }
}

impl Budgets {
    /// Up to `rate` in a second, which is at least 1.
    pub fn new(rate: u32) -> Self {
        Self {
            refill: Duration::from_secs(1) / rate.max(1),
            endpoints: BTreeMap::new(),
        }
    }

    /// Whether a fault of `endpoint` at `now` is passed on.
    pub fn take(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let budget = self.endpoints.entry(endpoint);
        budget.or_insert(Budget::new(now)).take(now, self.refill)
    }
}

#[derive(Debug)]
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
        }
    }

    fn take(&mut self, now: Instant, refill: Duration) -> bool {
        let elapsed = now.saturating_duration_since(self.since).as_nanos();
        let earned = u32::try_from(elapsed / refill.as_nanos().max(1)).unwrap_or(u32::MAX);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = now;
        }
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn an_endpoint_has_a_burst_of_faults_and_then_some() {
        let mut budgets = Budgets::default();
        let (one, other) = (EndpointId(1), EndpointId(2));
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let passed = (0..1000).filter(|_| budgets.take(one, start)).count();
        assert_eq!(passed, 64);
        assert!(!budgets.take(one, at(9)));
        assert!(budgets.take(other, at(9)), "it has its own");
        assert!(budgets.take(one, at(10)));
        assert!(!budgets.take(one, at(11)));
    }

    #[test]
    fn what_there_is_room_for_is_delivered_in_order_until_the_end() {
        let queue = Arc::new(FaultQueue::new());
        for number in 0..MAX_WAITING {
            assert!(queue.push(number));
        }
        assert!(!queue.push(MAX_WAITING));
        let (sender, delivered) = sync_channel(MAX_WAITING);
        let delivery = FaultDelivery::start(Role::Faults, queue.clone(), move |number| {
            sender.send(number).expect("room");
        });
        let delivery = delivery.expect("a thread");
        for number in 0..MAX_WAITING {
            assert_eq!(delivered.recv(), Ok(number));
        }
        assert!(queue.push(7));
        assert_eq!(delivered.recv(), Ok(7));
        drop(delivery);
        assert!(delivered.recv().is_err(), "the thread has ended");
        assert!(queue.push(8), "nobody is left to take it");
    }
}
