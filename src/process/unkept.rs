//! The connections that end with this process, although somebody keeps its state.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the open connections that no later process can go on with.
#[derive(Debug, Default)]
pub struct UnkeptConnections(AtomicUsize);

impl UnkeptConnections {
    /// A connection cannot be kept any more. It counts until the returned value is dropped: the connection has ended then.
    pub fn count(self: &Arc<Self>) -> UnkeptConnection {
        self.0.fetch_add(1, Ordering::Relaxed);
        UnkeptConnection(self.clone())
    }

    /// No connection of a device can be kept: none that it has, and none that it will have. They count until this process
    /// ends.
    pub fn count_always(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether there is one.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// An open connection that is not kept.
#[derive(Debug)]
pub struct UnkeptConnection(Arc<UnkeptConnections>);

impl Drop for UnkeptConnection {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
