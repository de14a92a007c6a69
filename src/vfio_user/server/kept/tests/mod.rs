//! The server ends at each of its steps, as the process would, and the next one goes on.

mod bed;
mod books;
mod counts;
mod deaths;
mod limits;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the steps of a server, and ends it at one of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps(Arc<AtomicUsize>);

impl Steps {
    /// Ends the server at this step, counted from 1; 0 for none.
    pub(crate) fn until(step: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(step)))
    }

    /// Whether the server ends here.
    pub(in super::super) fn dies(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0 && self.0.fetch_sub(1, Ordering::Relaxed) == 1
    }
}
