//! Wiring: one core, one device, one frontend after the other, until a signal ends it.
#![expect(
    unsafe_code,
    reason = "asks what an inherited socket is; closes what the backend crate gives up"
)]

pub mod drop_in;
pub mod sandbox_needs;
pub mod signals;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use log::{error, info};
use parking_lot::Mutex;
use thiserror::Error;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::config::{Config, Socket, SocketAccess};
use crate::control::{ControlServer, Places, SetLimits, Subjects};
use crate::device::{Device, WorkerSettings};
use crate::endpoints::emulated::{EmulatedSide, Refusals};
use crate::endpoints::exported::ExportSide;
use crate::endpoints::hotplug::{Files, Hotplug};
use crate::endpoints::passthrough::{HostSide, HostSideError};
use crate::endpoints::shadow::{self, ShadowSideError};
use crate::iommu::{Iommu, Settings};
use crate::metrics::Metrics;
use crate::page_table::ArenaError;
use crate::process::inherited::adopt;
use crate::process::realtime::{Realtime, RealtimeError};
use crate::process::socket::{Access, SocketFile, bind};
use crate::process::watchdog::Pulse;
use crate::qemu::qmp::Qmp;
use crate::shadow::ShadowServer;
use crate::{info_limited, warn_limited};

/// How long the daemon rests after a connection it could not serve, for want of descriptors say.
const BACK_OFF: Duration = Duration::from_millis(100);
/// After this many in a row it gives up.
const MAX_FAILURES: u32 = 50;

/// Events the daemon waits for: a frontend, its end, the watchdog's question.
const CLIENT: u64 = 0;
const END: u64 = 1;
const PULSE: u64 = 2;

/// Why the daemon could not run.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The configuration says nothing of a socket.
    #[error(
        "no socket for the VMM to connect to; give --socket-path, --fd or `socket` in the file"
    )]
    NoSocket,
    /// The page-table arena could not be made.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A device of the host cannot be used.
    #[error(transparent)]
    HostSide(#[from] HostSideError),
    /// Devices that follow the page tables cannot be served.
    #[error(transparent)]
    Shadow(#[from] ShadowSideError),
    /// The backends cannot do what the configuration asks for.
    #[error("{0}")]
    Backend(String),
    /// The worker may not have the priority it is to have.
    #[error(transparent)]
    Realtime(#[from] RealtimeError),
    /// A socket could not be made or adopted.
    #[error("{0}")]
    Socket(io::Error),
    /// The inherited descriptor is no listening Unix socket.
    #[error("descriptor {fd} cannot be used: {why}; pass a listening Unix stream socket with --fd")]
    InheritedFd {
        /// The descriptor.
        fd: RawFd,
        /// What is wrong with it.
        why: String,
    },
    /// Something the daemon needs from the system failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The vhost-user machinery did not start.
    #[error("cannot serve vhost-user: {0}")]
    VhostUser(BackendError),
}

/// The daemon of one VM, ready to serve.
pub struct Daemon {
    device: Arc<Device>,
    listener: Listener,
    stop: Arc<Stop>,
    /// Readable once the daemon is to end.
    ended: UnixStream,
    /// Connections in a row that could not be served.
    failures: u32,
    hotplug: Arc<Hotplug>,
    qmp: Option<Qmp>,
    control: Option<ControlServer>,
    _shadow: Option<ShadowServer>,
}

impl Daemon {
    /// Makes the core, the device and the sockets.
    ///
    /// # Errors
    /// See [`DaemonError`].
    pub fn new(config: &Config) -> Result<Self, DaemonError> {
        // First, before anything is opened that could get the number of a descriptor.
        let host = HostSide::open(config)?;
        let realtime = config.realtime_priority.map(Realtime::new).transpose()?;
        let (listener, file) = listener(config.socket.as_ref())?;
        let no_events = |source| DaemonError::System {
            what: "make event descriptors",
            source,
        };
        let (end, ended) = UnixStream::pair().map_err(no_events)?;
        let mut iommu = Iommu::new(
            Settings {
                address_width: config.address_width,
                page_sizes: config.page_mask,
                last_domain: config.max_domains.saturating_sub(1),
                bypass_at_boot: config.bypass_at_boot,
                arena_limit: config.arena_limit,
            },
            host.topology,
        )?;
        for (backend, endpoints) in host.backends {
            iommu
                .add_backend(backend, &endpoints)
                .map_err(DaemonError::Backend)?;
        }
        let readers = shadow::add_backend(config, &mut iommu)?;
        let metrics = Arc::new(Metrics::default());
        let refusals = Arc::new(Refusals::new(metrics.clone(), config.fault_rate));
        let mut emulated = EmulatedSide::open(&config.emulated, iommu.topology(), &refusals)
            .map_err(DaemonError::Socket)?;
        for (backend, endpoint) in emulated.backends.drain(..) {
            iommu
                .add_backend(backend, &[endpoint])
                .map_err(DaemonError::Backend)?;
        }
        let iommu = Arc::new(Mutex::new(iommu));
        let worker = WorkerSettings {
            longest_poll: config.longest_poll,
            max_batch: config.max_batch,
            realtime,
        };
        let device = Device::new(iommu.clone(), metrics.clone(), worker).map_err(no_events)?;
        let device = Arc::new(device);
        let hotplug = Hotplug::new(config, iommu.clone(), device.clone(), refusals, emulated);
        let hotplug = Arc::new(hotplug.map_err(|source| DaemonError::System {
            what: "start a thread",
            source,
        })?);
        let shadow = readers
            .clone()
            .map(|registry| {
                shadow::serve(config, registry, iommu.clone(), device.clone())
                    .map_err(DaemonError::Socket)
            })
            .transpose()?;
        let shadow_files = shadow.iter().flat_map(ShadowServer::files).cloned();
        // Late: the clients that connect find all that they need there.
        hotplug.adopt(ExportSide::open(config, host.exports).map_err(DaemonError::Socket)?);
        let subjects = Subjects {
            name: config.name.clone(),
            iommu: iommu.clone(),
            device: device.clone(),
            metrics: metrics.clone(),
            readers: readers.clone(),
            hotplug: hotplug.clone(),
            limits: SetLimits {
                batch: config.max_batch,
                fault_rate: config.fault_rate,
            },
            clients: Arc::default(),
        };
        let control = places(config)
            .map(|places| ControlServer::start(&places, subjects).map_err(DaemonError::Socket))
            .transpose()?;
        let control_files: Vec<_> = control
            .iter()
            .flat_map(ControlServer::files)
            .cloned()
            .collect();
        let qmp = config.qmp.clone().map(|path| {
            let device = device.clone();
            Qmp::start(path, move || {
                if device.reset_vm() {
                    info_limited!("the VM was reset: all domains are gone");
                }
            })
        });
        let qmp = qmp.transpose().map_err(|source| DaemonError::System {
            what: "start a thread",
            source,
        })?;
        Ok(Self {
            device,
            listener,
            stop: Arc::new(Stop {
                state: Mutex::default(),
                end,
                files: file
                    .map(Arc::new)
                    .into_iter()
                    .chain(control_files)
                    .chain(shadow_files)
                    .collect(),
                devices: hotplug.files(),
            }),
            ended,
            failures: 0,
            hotplug,
            qmp,
            control,
            _shadow: shadow,
        })
    }

    /// The device, to report faults through.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What the loops answer with that the daemon cannot do without: the worker's, which is that of
    /// [`Daemon::run`] while there is no frontend, and the control socket's.
    pub fn pulses(&self) -> Vec<Arc<Pulse>> {
        let control = self.control.as_ref().map(ControlServer::pulse);
        std::iter::once(self.device.pulse())
            .chain(control)
            .cloned()
            .collect()
    }

    /// What ends [`Daemon::run`] from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.stop.clone())
    }

    /// Serves one frontend after the other until a [`StopHandle`] ends it.
    ///
    /// # Errors
    /// Where the daemon cannot go on for a reason that is not the frontend's.
    pub fn run(&mut self) -> Result<(), DaemonError> {
        info!("waiting for a VMM to connect");
        while self.wait_for_connection()? {
            match self.serve_one() {
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

    /// Serves the frontend that is waiting in the backlog until it hangs up.
    ///
    /// A daemon object of the backend crate serves one connection, so each gets its own.
    fn serve_one(&mut self) -> Result<(), DaemonError> {
        // Before there is a thread that could miss a kick by it.
        self.device.prepare();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let made = VhostUserDaemon::new("vhost-user".into(), self.device.clone(), memory);
        let mut daemon = match made {
            Ok(daemon) => daemon,
            Err(cause) => {
                close_leaked(self.device.take_leaked());
                return Err(DaemonError::VhostUser(cause));
            }
        };
        for worker in daemon.get_epoll_handlers() {
            for (fd, event) in [self.device.wake_event(), self.device.pulse_event()] {
                worker
                    .register_listener(fd, EventSet::IN, event)
                    .map_err(|source| DaemonError::System {
                        what: "watch the device's own events",
                        source,
                    })?;
            }
        }
        let started = daemon.start(&mut self.listener);
        let result = started.map(|()| {
            info_limited!("a VMM has connected");
            self.device.connect();
            self.listen_for_resets(true);
            self.stop.watch(daemon.shutdown_handle());
            daemon.wait()
        });
        self.stop.watch(None);
        self.listen_for_resets(false);
        self.device.stop();
        drop(daemon);
        close_leaked(self.device.take_leaked());
        self.device.disconnect();
        match result.map_err(DaemonError::VhostUser)? {
            Ok(())
            | Err(BackendError::HandleRequest(
                VhostUserError::Disconnected | VhostUserError::PartialMessage,
            )) => info_limited!("the VMM has disconnected"),
            Err(cause) => warn_limited!("the connection was closed: {cause}"),
        }
        Ok(())
    }

    /// A VMM is there, which says when it resets the VM, or gone.
    fn listen_for_resets(&self, present: bool) {
        if let Some(qmp) = &self.qmp {
            qmp.vmm_present(present);
        }
    }

    /// Waits until a frontend is there (`true`) or the daemon is to end (`false`).
    fn wait_for_connection(&self) -> Result<bool, DaemonError> {
        let failed = |source| DaemonError::System {
            what: "wait for a connection",
            source,
        };
        let epoll = Epoll::new().map_err(failed)?;
        let pulse = self.device.pulse();
        for (fd, id) in [
            (self.listener.as_raw_fd(), CLIENT),
            (self.ended.as_raw_fd(), END),
            (pulse.event(), PULSE),
        ] {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id))
                .map_err(failed)?;
        }
        let mut events = [EpollEvent::default(); 3];
        loop {
            match epoll.wait(-1, &mut events) {
                Ok(ready) => {
                    let is_there = |id| events.iter().take(ready).any(|event| event.data() == id);
                    if is_there(END) || is_there(CLIENT) {
                        return Ok(!is_there(END));
                    }
                    // There is no worker now, and a frontend would be served.
                    pulse.answer();
                }
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(failed(cause)),
            }
        }
    }
}

/// Ends a running daemon.
#[derive(Clone)]
pub struct StopHandle(Arc<Stop>);

impl StopHandle {
    /// Makes [`Daemon::run`] return soon; the frontend's connection is closed.
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

    /// Removes the files of the daemon's sockets, for an end without [`Drop`].
    pub fn remove_sockets(&self) {
        for file in &self.0.files {
            file.remove();
        }
        for file in self.0.devices.lock().values() {
            file.remove();
        }
    }
}

struct Stop {
    state: Mutex<StopState>,
    end: UnixStream,
    /// Removed with the last owner.
    files: Vec<Arc<SocketFile>>,
    /// Those of devices, which come and go.
    devices: Files,
}

#[derive(Default)]
struct StopState {
    stopping: bool,
    connection: Option<ShutdownHandle>,
}

impl Stop {
    /// The connection to shut down when the daemon is to end; at once where it is already.
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

impl Drop for Daemon {
    fn drop(&mut self) {
        // First of all: it releases devices.
        self.hotplug.end_exports();
        // A handle may outlive the daemon.
        StopHandle(self.stop.clone()).remove_sockets();
    }
}

/// Where the daemon is to be looked into, if anywhere.
fn places(config: &Config) -> Option<Places> {
    let access = |access: SocketAccess| Access {
        mode: access.mode,
        group: access.group,
    };
    let metrics = &config.metrics;
    let places = Places {
        control: config
            .control
            .clone()
            .map(|path| (path, access(config.control_access))),
        metrics: metrics
            .socket
            .clone()
            .map(|path| (path, access(metrics.access))),
        textfile: metrics
            .textfile
            .as_ref()
            .map(|file| (file.path.clone(), file.interval)),
    };
    let any = places.control.is_some() || places.metrics.is_some() || places.textfile.is_some();
    any.then_some(places)
}

fn listener(socket: Option<&Socket>) -> Result<(Listener, Option<SocketFile>), DaemonError> {
    match socket.ok_or(DaemonError::NoSocket)? {
        Socket::Path(path) => {
            let (listener, file) = bind(path).map_err(DaemonError::Socket)?;
            Ok((listener.into(), Some(file)))
        }
        Socket::Fd(fd) => {
            let refuse = |why: &str| DaemonError::InheritedFd {
                fd: *fd,
                why: why.into(),
            };
            match socket_option(*fd, libc::SO_ACCEPTCONN) {
                Ok(1) => {}
                Ok(_) => return Err(refuse("it does not listen")),
                Err(cause) => return Err(refuse(&cause.to_string())),
            }
            if !matches!(socket_option(*fd, libc::SO_DOMAIN), Ok(libc::AF_UNIX))
                || !matches!(socket_option(*fd, libc::SO_TYPE), Ok(libc::SOCK_STREAM))
            {
                return Err(refuse("it is not a Unix stream socket"));
            }
            let owned = adopt(*fd).map_err(|e| refuse(&e.to_string()))?;
            let listener = UnixListener::from(owned);
            // A non-blocking listener would make the backend crate spin.
            listener
                .set_nonblocking(false)
                .map_err(|e| refuse(&e.to_string()))?;
            Ok((listener.into(), None))
        }
    }
}

fn socket_option(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len: libc::socklen_t = 4;
    // SAFETY:
    // - value and len: valid for writes for the whole call; len is the size of value
    // - any descriptor number may be asked; a closed one gives an error
    let done = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if done == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Closes what the backend crate has taken out of its owners and left open: the consumer side of
/// each worker's exit event.
fn close_leaked(descriptors: Vec<RawFd>) {
    for fd in descriptors {
        // SAFETY:
        // - ownership: `VringEpollHandler::new` turned the consumer into a bare descriptor and
        //   keeps only its number in an epoll set
        // - nobody uses it any more: that epoll set was closed with the connection's daemon
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}
