//! Waiting for accesses in progress, and killing the readers that do not end them.
//!
//! Each endpoint has a [`WaitBudget`], which all its readers share: a device gets no new budget by starting another
//! process. A reader that keeps requests waiting beyond it is killed like one that hangs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::reader::Reader;
use super::{Registry, RegistryState, Stuck};
use crate::ids::EndpointId;
use crate::page_table::EndpointWord;
use crate::page_table::epoch::GracePeriod;
use crate::process::wait_budget::{AllowedWait, WaitBudget};
use crate::{error_limited, warn_limited};

/// How often the writer checks the epoch words before it lets other threads run.
const SPINS: u32 = 2000;
/// The writer's sleep between two checks after that.
const NAP: Duration = Duration::from_micros(50);
/// How long a process that a killed reader was just starting may have the reader's connection: the time between `fork`
/// and `exec`.
const EXEC: Duration = Duration::from_millis(200);

/// A wait for the readers of several endpoints, each within the budget of its endpoint.
#[derive(Debug)]
pub(super) struct ReadersWait {
    began: Instant,
    patience: Duration,
    /// What each endpoint may have, and when one of its readers was last seen to be waited for.
    endpoints: BTreeMap<EndpointId, (AllowedWait, Instant)>,
}

impl ReadersWait {
    /// When the wait for the readers of `endpoint` ends.
    pub(super) fn until(&self, endpoint: EndpointId) -> Instant {
        let found = self.endpoints.get(&endpoint);
        found.map_or(self.began + self.patience, |(allowed, _)| allowed.until)
    }

    /// Notes that the daemon waits for a reader of `endpoint` at `now`.
    pub(super) fn note(&mut self, endpoint: EndpointId, now: Instant) {
        if let Some((_, last)) = self.endpoints.get_mut(&endpoint) {
            *last = now;
        }
    }

    fn is_shortened(&self, endpoint: EndpointId) -> bool {
        let found = self.endpoints.get(&endpoint);
        found.is_some_and(|(allowed, _)| allowed.is_shortened())
    }
}

impl RegistryState {
    /// Begins a wait for readers of these endpoints.
    pub(super) fn begin_wait(
        &mut self,
        endpoints: impl IntoIterator<Item = EndpointId>,
        patience: Duration,
    ) -> ReadersWait {
        let began = Instant::now();
        let mut waits = BTreeMap::new();
        for endpoint in endpoints {
            let budget = self.budgets.entry(endpoint);
            let budget = budget.or_insert_with(|| WaitBudget::new(patience, began));
            waits.insert(endpoint, (budget.allow(patience, began), began));
        }
        ReadersWait {
            began,
            patience,
            endpoints: waits,
        }
    }

    /// Takes a wait from the budgets that lasts until now for all its endpoints.
    pub(super) fn charge_until_now(&mut self, mut wait: ReadersWait) {
        let now = Instant::now();
        for (_, last) in wait.endpoints.values_mut() {
            *last = now;
        }
        self.charge(&wait);
    }

    /// Takes a wait from the budgets.
    pub(super) fn charge(&mut self, wait: &ReadersWait) {
        for (endpoint, (allowed, last)) in &wait.endpoints {
            if let Some(budget) = self.budgets.get_mut(endpoint) {
                budget.charge(allowed, *last);
            }
        }
    }
}

impl Registry {
    /// Sets an endpoint's slot. On success, no access that found the previous value is in progress.
    ///
    /// # Errors
    /// A reader stays inside an access and cannot be killed. The endpoint is blocked then.
    pub fn switch(&self, endpoint: EndpointId, to: EndpointWord) -> Result<(), Stuck> {
        let Some((slot, _)) = self.endpoints.get(&endpoint) else {
            return Ok(());
        };
        self.slots.set(*slot, to);
        let done = self.wait_for_readers(|e| e == endpoint);
        if done.is_err() {
            self.slots.set(*slot, EndpointWord::Blocked);
        }
        done
    }

    /// Waits for the accesses that are in progress at this call, of all readers for whose endpoint `concerned`
    /// returns true. Kills a reader whose access outlasts the patience, or the rest of its endpoint's budget.
    ///
    /// # Errors
    /// A reader stays inside an access and cannot be killed. It may still reach memory that was unmapped
    /// before this call.
    pub fn wait_for_readers(&self, concerned: impl Fn(EndpointId) -> bool) -> Result<(), Stuck> {
        // A reader that registers later finds every store made before this thread takes the lock.
        let (readers, outcome) = {
            let mut state = self.state.lock();
            let outcome = state.check_stuck(&concerned);
            let readers = state.readers.iter().filter(|r| concerned(r.endpoint));
            let readers: Vec<_> = readers.filter(|r| !state.is_stuck(r)).cloned().collect();
            (readers, outcome)
        };
        let mut left: Vec<_> = readers
            .into_iter()
            .map(|reader| (reader.begin_wait(), reader))
            .collect();
        left.retain_mut(|(grace, reader)| !reader.has_left(grace));
        if left.is_empty() {
            return outcome;
        }
        for _ in 0..SPINS {
            std::hint::spin_loop();
            left.retain_mut(|(grace, reader)| !reader.has_left(grace));
            if left.is_empty() {
                return outcome;
            }
        }
        let mut wait = {
            let endpoints: Vec<_> = left.iter().map(|(_, reader)| reader.endpoint).collect();
            let mut state = self.state.lock();
            state.begin_wait(endpoints, self.limits.patience)
        };
        let mut late = Vec::new();
        while let Some((_, first)) = left.first() {
            first.wait_for_end(NAP);
            left.retain_mut(|(grace, reader)| !reader.has_left(grace) && !reader.has_ended());
            let now = Instant::now();
            for (_, reader) in &left {
                wait.note(reader.endpoint, now);
            }
            late.extend(left.extract_if(.., |(_, reader)| now >= wait.until(reader.endpoint)));
        }
        self.state.lock().charge(&wait);
        outcome.and(self.kill_late(late, &wait))
    }

    /// Kills readers that were waited for in vain, all of them before it waits for their ends.
    ///
    /// # Errors
    /// As [`Self::kill`], for one of them.
    fn kill_late(
        &self,
        late: Vec<(GracePeriod, Arc<Reader>)>,
        wait: &ReadersWait,
    ) -> Result<(), Stuck> {
        let signal = |(accesses, reader): (GracePeriod, Arc<Reader>)| {
            let why = if wait.is_shortened(reader.endpoint) {
                self.counters.killed_slow.inc();
                "stays inside an access, and its endpoint has used its budget for waits up"
            } else {
                "stays inside an access"
            };
            let sent = self.signal(&reader, why);
            (accesses, reader, sent)
        };
        let signalled: Vec<_> = late.into_iter().map(signal).collect();
        let until = Instant::now() + self.limits.exit;
        let mut outcome = Ok(());
        for (accesses, reader, sent) in signalled {
            if let Err(stuck) = sent.and_then(|()| self.await_end(&reader, until)) {
                let why = stuck.why.clone();
                self.state.lock().note_stuck(reader, accesses, why);
                outcome = Err(stuck);
            }
        }
        outcome
    }

    /// Kills a reader. On success it accesses nothing any more. A reader that has died by itself meanwhile counts as
    /// gone.
    ///
    /// # Errors
    /// The process cannot be killed, does not end, or another process has its connection.
    pub fn kill(&self, reader: &Reader, why: &str) -> Result<(), Stuck> {
        self.signal(reader, why)?;
        self.await_end(reader, Instant::now() + self.limits.exit)
    }

    /// Sends the signal that kills a reader, unless its process has ended.
    fn signal(&self, reader: &Reader, why: &str) -> Result<(), Stuck> {
        if reader.is_gone() || reader.process.is_gone() {
            return Ok(());
        }
        error_limited!(
            "reader {} of endpoint {} {why}: its process is killed",
            reader.number,
            reader.endpoint
        );
        match reader.process.kill() {
            Ok(()) => self.counters.killed.inc(),
            // It may have died, and its parent waited for it, since the check above.
            Err(_) if reader.process.is_gone() => {}
            Err(cause) => {
                return Err(reader.stuck(format!("its process cannot be killed: {cause}")));
            }
        }
        Ok(())
    }

    /// Waits for the end of a killed reader, and removes it.
    fn await_end(&self, reader: &Reader, until: Instant) -> Result<(), Stuck> {
        if reader.is_gone() {
            return Ok(());
        }
        let patience = until.saturating_duration_since(Instant::now());
        if !reader.process.is_gone() && !reader.process.wait_until_gone(patience) {
            return Err(reader.stuck("its killed process does not end".into()));
        }
        let deadline = Instant::now() + EXEC;
        while !reader.is_inherited() && !reader.has_ended() && Instant::now() < deadline {
            std::thread::sleep(NAP);
        }
        self.process_ended(reader);
        if reader.is_gone() {
            return Ok(());
        }
        Err(reader.stuck("its process has ended, but another process has its connection".into()))
    }

    /// The process of a reader has ended. The reader is removed, unless another process has its connection: a process
    /// that inherited the connection may have inherited guest memory, too, and the daemon cannot kill it.
    pub fn process_ended(&self, reader: &Reader) {
        if reader.has_ended() {
            self.remove(reader);
        } else if reader.process.is_gone() && !reader.set_inherited() {
            self.counters.inherited.inc();
            warn_limited!(
                "the process of reader {} of endpoint {} has ended, but another process has its connection and may \
                 use guest memory: UNMAP fails until that process ends; end it",
                reader.number,
                reader.endpoint
            );
            self.wake();
        }
    }
}
