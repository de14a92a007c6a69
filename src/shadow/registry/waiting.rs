//! Waiting for accesses to end, and the end of readers that do not end them.

use std::time::{Duration, Instant};

use super::reader::Reader;
use super::{Registry, Stuck};
use crate::error_limited;
use crate::ids::EndpointId;
use crate::page_table::EndpointWord;

/// How often a writer that waits looks whether readers have left, before it lets other threads run.
const SPINS: u32 = 2000;
/// How long a writer that still waits then sleeps between two looks.
const NAP: Duration = Duration::from_micros(50);

impl Registry {
    /// Switches an endpoint over. When this returns `Ok`, no access is in progress that found where
    /// it went before.
    ///
    /// # Errors
    /// A reader cannot be made to leave; the endpoint is blocked.
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

    /// Waits for every access that was in progress before this call, by readers of the endpoints that
    /// are `concerned`. A reader that does not leave in time is killed.
    ///
    /// # Errors
    /// A reader cannot be made to leave: what was unmapped before this call may still be reached.
    pub fn wait_for_readers(&self, concerned: impl Fn(EndpointId) -> bool) -> Result<(), Stuck> {
        // Readers that come later find what was stored before this lock.
        let readers: Vec<_> = {
            let state = self.state.lock();
            let concerned = state.readers.iter().filter(|r| concerned(r.endpoint));
            concerned.cloned().collect()
        };
        let mut left: Vec<_> = readers
            .into_iter()
            .map(|reader| (reader.begin_wait(), reader))
            .collect();
        left.retain_mut(|(waiting, reader)| !reader.has_left(waiting));
        if left.is_empty() {
            return Ok(());
        }
        for _ in 0..SPINS {
            std::hint::spin_loop();
            left.retain_mut(|(waiting, reader)| !reader.has_left(waiting));
            if left.is_empty() {
                return Ok(());
            }
        }
        let until = Instant::now() + self.limits.patience;
        while !left.is_empty() && Instant::now() < until {
            if let Some((_, reader)) = left.first() {
                reader.process.wait_until_gone(NAP);
            }
            left.retain_mut(|(waiting, reader)| {
                !reader.has_left(waiting) && !reader.process.is_gone()
            });
        }
        left.iter()
            .try_for_each(|(_, reader)| self.end(reader, "stays inside an access"))
    }

    /// Kills a reader. When this returns `Ok` it accesses nothing any more.
    pub(super) fn end(&self, reader: &Reader, why: &str) -> Result<(), Stuck> {
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
        self.forget(reader);
        Ok(())
    }
}
