//! Readers of the daemon before that this one could not end.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Registry;
use super::reader::Reader;
use crate::ids::EndpointId;

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

impl Registry {
    /// Takes over what has become of the readers of the daemon before. While one of them may use the old page tables,
    /// UNMAP fails for its endpoint.
    pub fn take_over(&self, ended: EndedReaders) {
        self.counters.killed.add(ended.killed);
        let mut state = self.state.lock();
        state.readers.extend(ended.stuck);
        state.lost.extend(ended.lost);
    }
}
