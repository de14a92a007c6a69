//! The registration behind a handle. It outlives the daemon: its thread notices the end of a connection, lets the old page
//! tables go, and registers again.
//!
//! ```text
//! registered --- the daemon revokes the epoch words, or the connection ends ---> accesses wait
//!     ^            1. revoke all epoch words: no access begins                        |
//!     |            2. wait for the accesses in progress, then empty the lanes         |
//!     |            3. hang up                                                         |
//!     +----------- 4. connect and register until it succeeds, then fill the lanes <---+
//! ```
//!
//! An access that begins within another one of its thread goes on, too: to get slices of guest memory under a guard is one.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};

use super::error::{AccessError, ConnectError};
use super::lane::{Lane, is_inside};
use super::memory::{AnnouncedMemory, Views};
use super::session::{NAP, Session};
use crate::ids::EndpointId;
use crate::locks::{Condvar, Mutex, MutexGuard, Rank};
use crate::shadow::sys;
use crate::shadow::wire::EPOCH_WORDS;

/// How long the first registration waits for a daemon whose backlog is full.
const FIRST_CONNECT: Duration = Duration::from_secs(10);
/// How long a later one does. The end of the handle may have to wait for it.
const NEXT_CONNECT: Duration = Duration::from_millis(100);
/// The pauses between attempts to register again: the first, the longest while the daemon was lost only recently, and those
/// afterwards.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
const LATE_PAUSE: Duration = Duration::from_secs(1);
/// How long "recently" is.
const RECENT: Duration = Duration::from_secs(10);
/// How long after the loss of the daemon an access waits, unless the device's author says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// A registration and its thread. Dropping it closes the connection and joins the thread.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// The process that is registered.
    process: u32,
}

/// What the accesses and the thread share.
#[derive(Debug)]
pub(super) struct Shared {
    path: PathBuf,
    pub(super) endpoint: EndpointId,
    /// One for each epoch word.
    pub(super) lanes: Vec<Mutex<Lane>>,
    pub(super) views: Views,
    pub(super) faults_unreported: AtomicU64,
    state: Mutex<State>,
    /// Signalled when the process is registered, and when the handle ends.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The number of the present session, or 0 while there is none.
    serial: u64,
    /// The number of sessions so far.
    registrations: u64,
    /// When the last session ended, if there is none now.
    lost: Option<Instant>,
    patience: Duration,
    /// The connection, also during the handshake.
    stream: Option<Arc<UnixStream>>,
    /// The handle is gone.
    ended: bool,
}

impl Registration {
    /// Registers with the daemon that listens at `path`, for `endpoint`.
    pub(super) fn connect(path: &Path, endpoint: EndpointId) -> Result<Self, ConnectError> {
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            endpoint,
            lanes: (0..EPOCH_WORDS)
                .map(|_| Mutex::new(Rank::ReaderCache, Lane::new()))
                .collect(),
            views: Views::new(),
            faults_unreported: AtomicU64::new(0),
            state: Mutex::new(
                Rank::ReaderState,
                State {
                    serial: 0,
                    registrations: 0,
                    lost: None,
                    patience: PATIENCE,
                    stream: None,
                    ended: false,
                },
            ),
            changed: Condvar::new(),
        });
        let mut announced = AnnouncedMemory::default();
        let session = shared.register(path, FIRST_CONNECT, &mut announced)?;
        let served = shared.clone();
        // The device may change its working directory before the next registration.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let thread = std::thread::Builder::new()
            .name("shadow".into())
            .spawn(move || served.run(&path, session, announced))?;
        Ok(Self {
            shared,
            thread: Some(thread),
            process: std::process::id(),
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // A child of the registered process. The connection and the thread are the parent's, and the mappings are
            // not in this process: other memory may have their addresses, and must not be unmapped.
            std::mem::forget(self.thread.take());
            std::mem::forget(self.shared.clone());
            return;
        }
        self.shared.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the shadow thread has panicked");
        }
    }
}

impl Shared {
    /// Whether the process is registered now.
    pub(super) fn is_registered(&self) -> bool {
        self.state.lock().serial != 0
    }

    /// How often the process has registered.
    pub(super) fn registrations(&self) -> u64 {
        self.state.lock().registrations
    }

    pub(super) fn set_patience(&self, patience: Duration) {
        self.state.lock().patience = patience;
        self.changed.notify_all();
    }

    /// Waits until there is a session other than `stale`.
    ///
    /// # Errors
    /// [`AccessError::Disconnected`] if the daemon was lost too long ago, or if this thread is inside an access of another
    /// handle: nobody may wait there.
    #[cold]
    pub(super) fn wait_for_session(&self, stale: u64) -> Result<(), AccessError> {
        if is_inside() {
            return Err(AccessError::Disconnected);
        }
        let begun = Instant::now();
        let mut state = self.state.lock();
        loop {
            if state.serial != 0 && state.serial != stale {
                return Ok(());
            }
            // The thread may not have noticed the loss yet.
            let until = state.lost.unwrap_or(begun).checked_add(state.patience);
            match until {
                Some(until) if until <= Instant::now() => return Err(AccessError::Disconnected),
                Some(until) => {
                    self.changed.wait_until(&mut state, until);
                }
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// The thread: follows the session, and registers again when it ends.
    fn run(&self, path: &Path, mut session: Arc<Session>, mut announced: AnnouncedMemory) {
        loop {
            let cause = session.listen(&mut announced, &self.views);
            self.let_go(&session);
            drop(session);
            if self.state.lock().ended {
                return;
            }
            info!(
                "the connection for endpoint {} has ended: {cause}; registering again",
                self.endpoint
            );
            let Some(next) = self.register_again(path) else {
                return;
            };
            (session, announced) = next;
        }
    }

    /// Ends a session: on return no access uses its page tables, and none will.
    fn let_go(&self, session: &Session) {
        let mut state = self.state.lock();
        state.serial = 0;
        state.lost = Some(Instant::now());
        drop(state);
        session.revoke();
        session.wait_until_idle();
        for lane in &self.lanes {
            let old = self.wait_for_lane(lane).session.take();
            drop(old);
        }
        session.hang_up();
        self.state.lock().stream = None;
    }

    /// Makes `session` that of all accesses.
    fn adopt(&self, session: &Arc<Session>) {
        for lane in &self.lanes {
            let mut lane = self.wait_for_lane(lane);
            lane.tlb.clear();
            lane.session = Some(session.clone());
        }
        let mut state = self.state.lock();
        state.serial = session.serial;
        state.lost = None;
        drop(state);
        self.changed.notify_all();
    }

    /// Takes a lane that an access may just look at. Not `lock`: the access would have to wake this thread, with a system
    /// call.
    fn wait_for_lane<'a>(&self, lane: &'a Mutex<Lane>) -> MutexGuard<'a, Lane> {
        loop {
            match lane.try_lock() {
                Some(lane) => return lane,
                None => std::thread::sleep(NAP),
            }
        }
    }

    /// Connects to the daemon at `path`, registers, and makes the session that of all accesses.
    fn register(
        &self,
        path: &Path,
        patience: Duration,
        announced: &mut AnnouncedMemory,
    ) -> Result<Arc<Session>, ConnectError> {
        let stream = sys::connect(path, patience).map_err(|source| ConnectError::Connect {
            path: self.path.display().to_string(),
            source,
        })?;
        let stream = Arc::new(stream);
        let mut state = self.state.lock();
        let serial = state.registrations + 1;
        if state.ended {
            return Err(ConnectError::System(std::io::ErrorKind::Interrupted.into()));
        }
        state.stream = Some(stream.clone());
        drop(state);
        let registered = Session::register(stream, self.endpoint, serial, announced, &self.views);
        let mut state = self.state.lock();
        match registered {
            Ok(session) => {
                state.registrations = serial;
                drop(state);
                let session = Arc::new(session);
                self.adopt(&session);
                Ok(session)
            }
            Err(cause) => {
                state.stream = None;
                Err(cause)
            }
        }
    }

    /// Registers again, however long it takes; `None` if the handle ends meanwhile.
    fn register_again(&self, path: &Path) -> Option<(Arc<Session>, AnnouncedMemory)> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut said = String::new();
        loop {
            let mut announced = AnnouncedMemory::default();
            match self.register(path, NEXT_CONNECT, &mut announced) {
                Ok(session) => {
                    info!(
                        "endpoint {} is registered again, {:?} after the loss",
                        self.endpoint,
                        begun.elapsed()
                    );
                    return Some((session, announced));
                }
                Err(cause @ ConnectError::Connect { .. }) => debug!("{cause}"),
                Err(cause) => {
                    let text = cause.to_string();
                    if text != said {
                        warn!(
                            "endpoint {} cannot be registered again yet: {text}",
                            self.endpoint
                        );
                        said = text;
                    }
                }
            }
            let until = Instant::now() + pause;
            let mut state = self.state.lock();
            while !state.ended && Instant::now() < until {
                self.changed.wait_until(&mut state, until);
            }
            if state.ended {
                return None;
            }
            drop(state);
            pause = if begun.elapsed() < RECENT {
                (pause * 2).min(LONGEST_PAUSE)
            } else {
                LATE_PAUSE
            };
        }
    }

    /// Counts a refused access that the daemon does not learn of.
    pub(super) fn count_unreported(&self) {
        self.faults_unreported.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the thread.
    fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        if let Some(stream) = &state.stream {
            // Fails if the connection is closed already.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }
}
