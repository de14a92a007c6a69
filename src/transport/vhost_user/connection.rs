//! The connection to one VMM, as seen by the parts that must end it.

use std::cell::RefCell;
use std::sync::Arc;

use vhost_user_backend::ShutdownHandle;

use crate::locks::{Mutex, Rank};

thread_local! {
    /// The connection whose daemon object this thread makes: the backend crate makes the rings, and passes them
    /// nothing of ours.
    static IN_THE_MAKING: RefCell<Option<Arc<Connection>>> = const { RefCell::new(None) };
    /// In the worker's thread: ends the connection together with the thread.
    static WORKER: RefCell<Option<WorkerEnd>> = const { RefCell::new(None) };
}

/// The connection to one VMM. Its rings and its worker end it if they cannot go on.
pub(super) struct Connection(Mutex<ConnectionState>);

#[derive(Default)]
struct ConnectionState {
    /// Shuts the socket down; `None` before the VMM has connected, and after the connection has ended.
    shutdown: Option<ShutdownHandle>,
    /// Why this side has ended the connection.
    reason: Option<String>,
    /// The connection has ended. Its worker may end, too.
    is_over: bool,
}

impl Default for Connection {
    fn default() -> Self {
        Self(Mutex::new(Rank::Connection, ConnectionState::default()))
    }
}

impl Connection {
    /// Calls `make`, which makes the rings of this connection in the calling thread.
    pub(super) fn during<T>(self: &Arc<Self>, make: impl FnOnce() -> T) -> T {
        IN_THE_MAKING.set(Some(self.clone()));
        let made = make();
        IN_THE_MAKING.set(None);
        made
    }

    /// The connection whose rings this thread makes. Outside [`Self::during`] it is a new one, without a socket.
    pub(super) fn in_the_making() -> Arc<Self> {
        IN_THE_MAKING.with_borrow(|connection| connection.clone().unwrap_or_default())
    }

    /// The VMM has connected; `shutdown` shuts its socket down. Shuts it down at once if [`Self::end`] was called.
    pub(super) fn open(&self, shutdown: Option<ShutdownHandle>) {
        let mut state = self.0.lock();
        match (shutdown, &state.reason) {
            (Some(shutdown), Some(_)) => shutdown.shutdown(),
            (shutdown, _) => state.shutdown = shutdown,
        }
    }

    /// Ends the connection. The log names the first `reason`.
    pub(super) fn end(&self, reason: String) {
        let mut state = self.0.lock();
        if state.is_over || state.reason.is_some() {
            return;
        }
        state.reason = Some(reason);
        if let Some(shutdown) = state.shutdown.take() {
            shutdown.shutdown();
        }
    }

    /// The connection has ended. Returns the reason if this side has ended it.
    pub(super) fn close(&self) -> Option<String> {
        let mut state = self.0.lock();
        state.is_over = true;
        state.shutdown = None;
        state.reason.take()
    }

    /// Ends the connection when the calling thread, which is its worker, ends: without the worker the VMM would wait
    /// for ever for answers.
    pub(super) fn end_with_this_thread(self: &Arc<Self>) {
        WORKER.with_borrow_mut(|worker| {
            worker.get_or_insert_with(|| WorkerEnd(self.clone()));
        });
    }
}

struct WorkerEnd(Arc<Connection>);

impl Drop for WorkerEnd {
    fn drop(&mut self) {
        self.0
            .end("the thread that serves the rings has ended".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_ends_ends_the_connection() {
        let connection = Arc::new(Connection::default());
        let worker = connection.clone();
        let thread = std::thread::spawn(move || {
            worker.end_with_this_thread();
            worker.end_with_this_thread();
        });
        thread.join().expect("ended");
        let reason = connection.close().expect("a reason");
        assert!(reason.contains("has ended"), "{reason}");
    }

    #[test]
    fn a_worker_that_ends_after_the_connection_changes_nothing() {
        let connection = Arc::new(Connection::default());
        assert_eq!(connection.close(), None);
        let worker = connection.clone();
        let thread = std::thread::spawn(move || worker.end_with_this_thread());
        thread.join().expect("ended");
        assert_eq!(connection.close(), None);
    }

    #[test]
    fn rings_belong_to_the_connection_that_makes_them() {
        let connection = Arc::new(Connection::default());
        let made = connection.during(Connection::in_the_making);
        assert!(Arc::ptr_eq(&made, &connection));
        assert!(!Arc::ptr_eq(&Connection::in_the_making(), &connection));
    }
}
