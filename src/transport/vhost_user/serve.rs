//! Serves one VMM after the other until the daemon ends.
#![expect(
    unsafe_code,
    reason = "closes descriptors that the backend crate leaks"
)]

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use log::{error, info};

use thiserror::Error;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::backend::VhostUserDevice;
use super::connection::Connection;
use crate::device::Device;
use crate::locks::{Mutex, Rank};
use crate::process::event_loop::EventLoop;
use crate::{info_limited, warn_limited};

/// How long the server waits after a connection that it could not serve, for example for lack of descriptors.
const BACK_OFF: Duration = Duration::from_millis(100);
/// After this many failed connections in succession the server gives up.
const MAX_FAILURES: u32 = 50;

/// Events that the server waits for: a connection, its own end, the watchdog's question.
const CLIENT: u64 = 0;
const END: u64 = 1;
const PULSE: u64 = 2;

/// Why the server cannot serve VMMs any more.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The server cannot wait for a connection.
    #[error("cannot wait for a connection: {0}")]
    Wait(io::Error),
    /// The worker cannot wait for the device's own events.
    #[error("cannot watch the device's own events: {0}")]
    Watch(io::Error),
    /// The backend crate did not start.
    #[error("cannot serve vhost-user: {0}")]
    VhostUser(BackendError),
}

/// Serves the device to the VMMs that connect to one socket.
pub struct VhostUserServer {
    device: Arc<Device>,
    backend: Arc<VhostUserDevice>,
    listener: Listener,
    stop: Arc<StopRequest>,
    /// Readable once a [`Stopper`] has ended the server.
    ended: UnixStream,
    /// Number of connections in succession that could not be served.
    failures: u32,
}

impl VhostUserServer {
    /// Serves `device` to the VMMs that connect to `listener`.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(device: Arc<Device>, listener: UnixListener) -> io::Result<Self> {
        let (end, ended) = UnixStream::pair()?;
        Ok(Self {
            backend: Arc::new(VhostUserDevice::new(device.clone())),
            device,
            listener: listener.into(),
            stop: Arc::new(StopRequest {
                state: Mutex::new(Rank::Stop, StopState::default()),
                end,
            }),
            ended,
            failures: 0,
        })
    }

    /// A handle that ends [`VhostUserServer::run`] from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Serves one VMM after the other until a [`Stopper`] ends it. Calls `vmm_present(true)` when a VMM has
    /// connected and `vmm_present(false)` when it has gone.
    ///
    /// # Errors
    /// The server cannot continue, and the VMM is not the cause.
    pub fn run(&mut self, vmm_present: impl Fn(bool)) -> Result<(), ServeError> {
        info!("waiting for a VMM to connect");
        while self.wait_for_connection()? {
            match self.serve_connection(&vmm_present) {
                Ok(()) => self.failures = 0,
                Err(cause) if self.failures < MAX_FAILURES => {
                    warn_limited!("a connection cannot be served: {cause}");
                    self.failures += 1;
                    std::thread::sleep(BACK_OFF);
                }
                Err(cause) => return Err(cause),
            }
        }
        info!("ended");
        Ok(())
    }

    /// Serves the VMM that waits in the listener's backlog until it disconnects.
    ///
    /// A daemon object of the backend crate serves one connection, so each connection gets its own.
    fn serve_connection(&mut self, vmm_present: impl Fn(bool)) -> Result<(), ServeError> {
        // Must come before the daemon object, which starts the worker's thread.
        self.device.prepare();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let connection = Arc::new(Connection::default());
        let made = connection
            .during(|| VhostUserDaemon::new("vhost-user".into(), self.backend.clone(), memory));
        let mut daemon = match made {
            Ok(daemon) => daemon,
            Err(cause) => {
                close_leaked(self.backend.take_leaked());
                return Err(ServeError::VhostUser(cause));
            }
        };
        for worker in daemon.get_epoll_handlers() {
            for (fd, event) in self.backend.own_events() {
                worker
                    .register_listener(fd, EventSet::IN, u64::from(event))
                    .map_err(ServeError::Watch)?;
            }
        }
        let started = daemon.start(&mut self.listener);
        let result = started.map(|()| {
            info_limited!("a VMM has connected");
            self.device.connect();
            vmm_present(true);
            connection.open(daemon.shutdown_handle());
            self.stop.watch(daemon.shutdown_handle());
            daemon.wait()
        });
        let has_memory = self.device.has_memory();
        let reason = connection.close();
        self.stop.watch(None);
        vmm_present(false);
        self.device.stop();
        drop(daemon);
        close_leaked(self.backend.take_leaked());
        self.device.disconnect();
        match (reason, result.map_err(ServeError::VhostUser)?) {
            (Some(reason), _) => warn_limited!("the connection was closed: {reason}"),
            (
                None,
                Ok(())
                | Err(BackendError::HandleRequest(
                    VhostUserError::Disconnected | VhostUserError::PartialMessage,
                )),
            ) => info_limited!("the VMM has disconnected"),
            (None, Err(cause)) => {
                let hint = hint(&cause, has_memory);
                warn_limited!("the connection was closed: {cause}{hint}");
            }
        }
        Ok(())
    }

    /// Waits until a VMM connects (`true`) or a [`Stopper`] ends the server (`false`).
    fn wait_for_connection(&self) -> Result<bool, ServeError> {
        let events = EventLoop::new().map_err(ServeError::Wait)?;
        let pulse = self.device.pulse();
        for (fd, token) in [
            (self.listener.as_raw_fd(), CLIENT),
            (self.ended.as_raw_fd(), END),
            (pulse.event(), PULSE),
        ] {
            events.add(fd, token).map_err(ServeError::Wait)?;
        }
        loop {
            let ready = events.wait(None).map_err(ServeError::Wait)?;
            if ready.contains(END) || ready.contains(CLIENT) {
                return Ok(!ready.contains(END));
            }
            // Without a VMM there is no worker. This thread answers instead, because it would serve the next VMM.
            pulse.answer();
        }
    }
}

/// The likely reason for a message that could not be served, and its cure; empty if there is none.
///
/// A VMM with RAM of its own process only sends the RAM's place without a descriptor, which the backend crate calls
/// invalid parameters. A descriptor that cannot be mapped for reading and writing fails in another way; in both cases
/// the device has no memory.
fn hint(cause: &BackendError, has_memory: bool) -> &'static str {
    let BackendError::HandleRequest(cause) = cause else {
        return "";
    };
    let unshared = match cause {
        VhostUserError::InvalidParam => true,
        VhostUserError::InvalidMessage
        | VhostUserError::IncorrectFds
        | VhostUserError::ReqHandlerError(_) => !has_memory,
        _ => false,
    };
    if !unshared {
        return "";
    }
    "; the daemon has not got all of the guest's memory as files that it can map: give the VMM's RAM share=on \
     (QEMU: `-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram`)"
}

/// Ends a running server. Clones end the same one.
#[derive(Clone)]
pub struct Stopper(Arc<StopRequest>);

impl Stopper {
    /// Makes [`VhostUserServer::run`] return soon, and closes the VMM's connection.
    pub fn stop(&self) {
        let mut state = self.0.state.lock();
        state.stopping = true;
        if let Some(connection) = state.connection.take() {
            connection.shutdown();
        }
        if let Err(cause) = self.0.end.shutdown(Shutdown::Write) {
            error!("cannot end the daemon: {cause}");
        }
    }
}

struct StopRequest {
    state: Mutex<StopState>,
    end: UnixStream,
}

#[derive(Default)]
struct StopState {
    stopping: bool,
    connection: Option<ShutdownHandle>,
}

impl StopRequest {
    /// Registers the connection that [`Stopper::stop`] shuts down. If [`Stopper::stop`] was called before, shuts the
    /// connection down at once.
    fn watch(&self, connection: Option<ShutdownHandle>) {
        let mut state = self.state.lock();
        if state.stopping
            && let Some(connection) = connection
        {
            connection.shutdown();
        } else {
            state.connection = connection;
        }
    }
}

/// Closes descriptors that the backend crate has leaked: the consumer of each worker's exit event.
fn close_leaked(descriptors: Vec<RawFd>) {
    for fd in descriptors {
        // SAFETY:
        // - ownership: `VringEpollHandler::new` turned the consumer into a bare descriptor and
        //   keeps only its number in an epoll set
        // - no other user: that epoll set was closed with the connection's daemon
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}
