//! Waiting for accesses in progress, and killing the readers that do not end them.

use std::time::{Duration, Instant};

use super::reader::Reader;
use super::{Registry, Stuck};
use crate::error_limited;
use crate::ids::EndpointId;
use crate::page_table::EndpointWord;

/// How often the writer checks the epoch words before it lets other threads run.
const SPINS: u32 = 2000;
/// The writer's sleep between two checks after that.
const NAP: Duration = Duration::from_micros(50);

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
    /// returns true. Kills a reader whose access outlasts the patience.
    ///
    /// # Errors
    /// A reader stays inside an access and cannot be killed. It may still reach memory that was unmapped
    /// before this call.
    pub fn wait_for_readers(&self, concerned: impl Fn(EndpointId) -> bool) -> Result<(), Stuck> {
        // A reader that registers later finds every store made before this thread takes the lock.
        let readers: Vec<_> = {
            let state = self.state.lock();
            let concerned = state.readers.iter().filter(|r| concerned(r.endpoint));
            concerned.cloned().collect()
        };
        let mut left: Vec<_> = readers
            .into_iter()
            .map(|reader| (reader.begin_wait(), reader))
            .collect();
        left.retain_mut(|(grace, reader)| !reader.has_left(grace));
        if left.is_empty() {
            return Ok(());
        }
        for _ in 0..SPINS {
            std::hint::spin_loop();
            left.retain_mut(|(grace, reader)| !reader.has_left(grace));
            if left.is_empty() {
                return Ok(());
            }
        }
        let deadline = Instant::now() + self.limits.patience;
        while !left.is_empty() && Instant::now() < deadline {
            if let Some((_, reader)) = left.first() {
                reader.process.wait_until_gone(NAP);
            }
            left.retain_mut(|(grace, reader)| !reader.has_left(grace) && !reader.process.is_gone());
        }
        left.iter()
            .try_for_each(|(_, reader)| self.kill(reader, "stays inside an access"))
    }

    /// Kills a reader. On success it accesses nothing any more.
    pub(super) fn kill(&self, reader: &Reader, why: &str) -> Result<(), Stuck> {
        if reader.is_gone() {
            return Ok(());
        }
        error_limited!(
            "reader {} of endpoint {} {why}: its process is killed",
            reader.number,
            reader.endpoint
        );
        let stuck = |why| Stuck {
            reader: reader.number,
            endpoint: reader.endpoint,
            why,
        };
        reader.process.kill().map_err(|e| stuck(e.to_string()))?;
        if !reader.process.wait_until_gone(self.limits.exit) {
            return Err(stuck("its process does not end".into()));
        }
        self.counters.killed.inc();
        self.remove(reader);
        Ok(())
    }
}
