//! Readers of the daemon before that this one could not end.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Registry;
use super::reader::Reader;
use crate::ids::EndpointId;
use crate::page_table::epoch::GracePeriod;

/// What has become of the readers of the daemon before.
#[derive(Debug, Default)]
pub struct EndedReaders {
    /// Those whose registration has ended, also by a kill.
    pub ended: u64,
    /// Those that were killed.
    pub killed: u64,
    /// Those that may still use the old page tables, and cannot be killed.
    pub stuck: Vec<Arc<Reader>>,
    /// The endpoints of readers that may still run, and of which too little was kept to wait for them.
    pub lost: BTreeSet<EndpointId>,
}

impl EndedReaders {
    /// The endpoints whose readers have not ended.
    pub fn unended(&self) -> BTreeSet<EndpointId> {
        let stuck = self.stuck.iter().map(|reader| reader.endpoint);
        stuck.chain(self.lost.iter().copied()).collect()
    }
}

impl Registry {
    /// Whether readers may register for an endpoint.
    pub fn serves(&self, endpoint: EndpointId) -> bool {
        self.endpoints.contains_key(&endpoint)
    }

    /// Takes over what has become of the readers of the daemon before. While one of them may use the old page tables,
    /// UNMAP fails for its endpoint.
    pub fn take_over(&self, ended: EndedReaders) {
        self.counters.killed.add(ended.killed);
        let mut state = self.state.lock();
        for reader in ended.stuck {
            let why =
                "it has not let the page tables of the daemon before go, and cannot be killed";
            state.note_stuck(reader.clone(), GracePeriod::default(), why.into());
            state.readers.push(reader);
        }
        state.lost.extend(ended.lost);
    }
}
