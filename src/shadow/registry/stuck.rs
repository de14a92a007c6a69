//! Readers that could neither be waited for nor killed.
//!
//! Their endpoint is blocked, but an access that began before may go on for ever. No request waits for such a reader a second
//! time: a request that depends on it fails at once, until the access has ended.

use std::sync::Arc;

use super::reader::Reader;
use super::{Registry, RegistryState, Stuck};
use crate::ids::EndpointId;
use crate::page_table::epoch::GracePeriod;

/// A reader with an access that nobody can end.
#[derive(Debug)]
pub(super) struct StuckReader {
    pub reader: Arc<Reader>,
    /// The accesses that were in progress at the last wait for it.
    accesses: GracePeriod,
    why: String,
}

impl StuckReader {
    fn is_over(&mut self) -> bool {
        self.reader.has_ended() || self.reader.has_left(&mut self.accesses)
    }

    fn report(&self) -> Stuck {
        self.reader.stuck(self.why.clone())
    }
}

impl RegistryState {
    /// Notes a reader that was waited for in vain, with the accesses that were in progress.
    pub(super) fn note_stuck(&mut self, reader: Arc<Reader>, accesses: GracePeriod, why: String) {
        self.stuck.retain(|s| !Arc::ptr_eq(&s.reader, &reader));
        self.stuck.push(StuckReader {
            reader,
            accesses,
            why,
        });
    }

    pub(super) fn is_stuck(&self, reader: &Arc<Reader>) -> bool {
        self.stuck.iter().any(|s| Arc::ptr_eq(&s.reader, reader))
    }

    /// Confirms that no reader of the concerned endpoints is stuck.
    ///
    /// # Errors
    /// One is. Its accesses that are in progress now count, too.
    pub(super) fn check_stuck(
        &mut self,
        concerned: impl Fn(EndpointId) -> bool,
    ) -> Result<(), Stuck> {
        if let Some(&endpoint) = self.lost.iter().find(|e| concerned(**e)) {
            return Err(Stuck {
                reader: 0,
                endpoint,
                why: "the daemon before has left too little of it to wait for it; end that process, and start \
                      this daemon again"
                    .into(),
            });
        }
        self.stuck.retain_mut(|stuck| !stuck.is_over());
        let mut outcome = Ok(());
        for stuck in self.stuck.iter_mut() {
            if concerned(stuck.reader.endpoint) {
                stuck.accesses = stuck.reader.begin_wait();
                outcome = Err(stuck.report());
            }
        }
        outcome
    }
}

impl Registry {
    /// Confirms that no reader of a blocked endpoint is inside an access that began before. Does not wait.
    ///
    /// # Errors
    /// A reader that could neither be waited for nor killed may be inside one.
    pub fn confirm_blocked(&self, endpoint: EndpointId) -> Result<(), Stuck> {
        self.state.lock().check_stuck(|e| e == endpoint)
    }
}
