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

use super::LeftVmm;
use super::backend::VhostUserDevice;
use super::connection::Connection;
use super::relay::{Relay, RelayEnd, Relays};
use crate::device::Device;
use crate::locks::{Mutex, Rank};
use crate::process::event_loop::EventLoop;
use crate::process::keeper::Keeper;
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
    /// The relay between the VMM and the backend crate did not start.
    #[error("cannot relay the VMM's connection: {0}")]
    Relay(io::Error),
}

/// Restores the core.
type Restore = Box<dyn FnOnce() + Send>;
/// The backend crate's daemon of one connection.
type ConnectionDaemon = VhostUserDaemon<Arc<VhostUserDevice>>;

/// Serves the device to the VMMs that connect to one socket.
pub struct VhostUserServer {
    device: Arc<Device>,
    backend: Arc<VhostUserDevice>,
    listener: Listener,
    /// Relays the connections if another process keeps descriptors, or if the device has a watcher.
    relays: Option<Relays>,
    /// The VMM of an earlier process, until it is served.
    left: Option<(LeftVmm, Restore)>,
    stop: Arc<StopRequest>,
    /// Readable once a [`Stopper`] has ended the server.
    ended: UnixStream,
    /// Number of connections in succession that could not be served.
    failures: u32,
}

impl VhostUserServer {
    /// Serves `device` to the VMMs that connect to `listener`. If there is a keeper, a VMM's connection outlives this
    /// process, and a [`Stopper`] leaves it to the next one.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(
        device: Arc<Device>,
        listener: UnixListener,
        keeper: Arc<Keeper>,
    ) -> io::Result<Self> {
        let (end, ended) = UnixStream::pair()?;
        // A watcher wants the VMM's socket, which the crate does not give away.
        let relays = (keeper.is_present() || device.has_watcher())
            .then(|| Relays::new(keeper, ended.try_clone()?));
        Ok(Self {
            backend: Arc::new(VhostUserDevice::new(device.clone())),
            device,
            listener: listener.into(),
            relays: relays.transpose()?,
            left: None,
            stop: Arc::new(StopRequest {
                state: Mutex::new(Rank::Stop, StopState::default()),
                end,
            }),
            ended,
            failures: 0,
        })
    }

    /// Lets [`Self::run`] go on with the VMM of an earlier process before it serves another one.
    ///
    /// `restore` restores the core. [`Self::run`] calls it once, when the VMM counts as present and the device has guest
    /// memory, and starts the rings afterwards. If the VMM cannot be served after all, it is called, too, and the VMM has
    /// gone afterwards. It is not called if a [`Stopper`] ends the server before.
    pub fn resume(&mut self, left: LeftVmm, restore: impl FnOnce() + Send + 'static) {
        self.left = Some((left, Box::new(restore)));
    }

    /// Ends the relay at a step, as a death of the process would.
    #[cfg(test)]
    pub(super) fn end_at(&mut self, steps: super::relay::tests::Steps) {
        if let Some(relays) = &mut self.relays {
            relays.steps = steps;
        }
    }

    /// Lets no relay begin.
    #[cfg(test)]
    pub(super) fn refuse_relays(&mut self) {
        if let Some(relays) = &mut self.relays {
            relays.lose_book();
        }
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
        if let Some((left, restore)) = self.left.take() {
            self.serve_left(left, restore, &vmm_present);
        }
        info!("waiting for a VMM to connect");
        while self.wait_for_connection()? {
            match self.serve_next(&vmm_present) {
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
    fn serve_next(&mut self, vmm_present: impl Fn(bool)) -> Result<(), ServeError> {
        if let Some(reason) = self.device.vmm_refusal() {
            let refused = self.listener.accept();
            refused.map_err(|cause| ServeError::Wait(io::Error::other(cause)))?;
            warn_limited!("the connection was closed: {reason}");
            return Ok(());
        }
        let (mut daemon, connection) = self.make_daemon()?;
        let Some(relays) = &mut self.relays else {
            let started = daemon.start(&mut self.listener);
            return self.serve(daemon, &connection, started, None, vmm_present);
        };
        let accepted = loop {
            match self.listener.accept() {
                Ok(Some(vmm)) => break Ok(vmm),
                Ok(None) => {}
                Err(cause) => break Err(ServeError::Wait(io::Error::other(cause))),
            }
        };
        let begun = accepted.and_then(|vmm| relays.begin(vmm).map_err(ServeError::Relay));
        match begun {
            Ok((relay, listener)) => {
                // Not before: a watcher keeps the socket until the VMM has gone, and a VMM without a relay must see its
                // connection end.
                self.device.tell_connection(relay.vmm());
                let started = daemon.start(&mut listener.into());
                self.serve(
                    daemon,
                    &connection,
                    started,
                    Some((relay, None)),
                    vmm_present,
                )
            }
            Err(cause) => {
                drop(daemon);
                close_leaked(self.backend.take_leaked());
                Err(cause)
            }
        }
    }

    /// Serves the VMM of an earlier process until it disconnects.
    fn serve_left(&mut self, left: LeftVmm, restore: Restore, vmm_present: impl Fn(bool)) {
        let Some(relays) = &mut self.relays else {
            left.refuse();
            restore();
            self.device.disconnect();
            return;
        };
        self.device.tell_connection(left.socket());
        let served = match relays.resume(left) {
            Err(cause) => Err((ServeError::Relay(cause), Some(restore))),
            Ok((relay, listener)) => match self.make_daemon() {
                Ok((mut daemon, connection)) => {
                    let started = daemon.start(&mut listener.into());
                    let relay = Some((relay, Some(restore)));
                    self.serve(daemon, &connection, started, relay, vmm_present)
                        .map_err(|cause| (cause, None))
                }
                Err(cause) => {
                    self.abandon(relay);
                    Err((cause, Some(restore)))
                }
            },
        };
        if let Err((cause, restore)) = served {
            warn_limited!("the VMM of the daemon before cannot be served: {cause}");
            if let Some(restore) = restore {
                restore();
                self.device.disconnect();
            }
        }
    }

    /// Makes a daemon object of the backend crate. It serves one connection, so each connection gets its own.
    fn make_daemon(&self) -> Result<(ConnectionDaemon, Arc<Connection>), ServeError> {
        // Must come before the daemon object, which starts the worker's thread.
        self.device.prepare();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let connection = Arc::new(Connection::default());
        let made = connection
            .during(|| VhostUserDaemon::new("vhost-user".into(), self.backend.clone(), memory));
        let daemon = match made {
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
        Ok((daemon, connection))
    }

    /// Serves the VMM of a connection that the daemon object has accepted, until it disconnects. With a relay, the other end
    /// of that connection is the relay's. An earlier process has left the VMM if there is a [`Restore`].
    fn serve(
        &mut self,
        mut daemon: ConnectionDaemon,
        connection: &Connection,
        started: Result<(), BackendError>,
        relay: Option<(Relay, Option<Restore>)>,
        vmm_present: impl Fn(bool),
    ) -> Result<(), ServeError> {
        let mut end = RelayEnd::Closed;
        let result = match (started, relay) {
            (Ok(()), None) => {
                info_limited!("a VMM has connected");
                self.begin(&daemon, connection, &vmm_present);
                self.stop.watch(daemon.shutdown_handle());
                Ok(daemon.wait())
            }
            (Ok(()), Some((relay, restore))) => {
                match restore {
                    Some(_) => info_limited!("going on with the VMM of the daemon before"),
                    None => info_limited!("a VMM has connected"),
                }
                self.begin(&daemon, connection, &vmm_present);
                let (ended, result) = self.relay(relay, restore, || daemon.wait());
                end = ended;
                Ok(result)
            }
            (Err(cause), relay) => {
                if let Some((relay, restore)) = relay {
                    self.abandon(relay);
                    if let Some(restore) = restore {
                        restore();
                    }
                }
                Err(cause)
            }
        };
        let has_memory = self.device.has_memory();
        let reason = connection.close();
        self.stop.watch(None);
        vmm_present(false);
        self.device.stop();
        drop(daemon);
        close_leaked(self.backend.take_leaked());
        if end != RelayEnd::Closed {
            info_limited!("the VMM is left to the next daemon");
            return Ok(());
        }
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

    /// Relays until the connection ends. `wait` waits until the crate has ended it.
    fn relay(
        &mut self,
        mut relay: Relay,
        restore: Option<Restore>,
        wait: impl FnOnce() -> Result<(), BackendError>,
    ) -> (RelayEnd, Result<(), BackendError>) {
        let taken_over = restore.map_or(Ok(()), |restore| self.take_over(&mut relay, restore));
        if let Err(cause) = taken_over {
            let mut end = RelayEnd::Closed;
            if relay.is_stopped()
                && let Some(relays) = &mut self.relays
            {
                end = relays.leave(relay);
            } else {
                warn_limited!("the VMM of the daemon before cannot be served: {cause}");
                self.abandon(relay);
            }
            return (end, wait());
        }
        match relay.start() {
            Ok(running) => {
                let result = wait();
                let relays = self.relays.as_mut();
                let end = relays.map_or(RelayEnd::Closed, |relays| relays.end(&running));
                (end, result)
            }
            Err(refused) => {
                let (relay, cause) = *refused;
                warn_limited!("the VMM's connection cannot be relayed: {cause}");
                self.abandon(relay);
                (RelayEnd::Closed, wait())
            }
        }
    }

    /// Brings the new crate and the core into the state of the process before.
    fn take_over(&self, relay: &mut Relay, restore: Restore) -> io::Result<()> {
        let told = relay.tell_before_restore();
        if relay.is_stopped() {
            return told;
        }
        // Even if the crate refuses the VMM: the core is then restored without one.
        restore();
        told?;
        relay.tell_after_restore(&self.device)
    }

    fn abandon(&mut self, relay: Relay) {
        if let Some(relays) = &mut self.relays {
            relays.abandon(relay);
        }
    }

    /// The VMM counts as connected.
    fn begin(
        &self,
        daemon: &ConnectionDaemon,
        connection: &Connection,
        vmm_present: impl Fn(bool),
    ) {
        self.device.connect();
        vmm_present(true);
        connection.open(daemon.shutdown_handle());
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
