//! Wiring: one core, one device, one frontend after the other, until a signal ends it.
#![expect(
    unsafe_code,
    reason = "adopts descriptors: an inherited socket, and those the backend crate gives up"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use log::{debug, error, info, warn};
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::config::{Config, Socket};
use crate::control::{ControlServer, Subjects, bind};
use crate::device::{Device, lock};
use crate::iommu::{Iommu, Settings};
use crate::metrics::Metrics;
use crate::page_table::ArenaError;

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
    socket_path: Option<PathBuf>,
    stop: StopSignal,
    /// Ends before the device goes.
    _control: Option<ControlServer>,
}

impl Daemon {
    /// Makes the core, the device and the sockets.
    ///
    /// # Errors
    /// See [`DaemonError`].
    pub fn new(config: &Config) -> Result<Self, DaemonError> {
        let (listener, socket_path) = listener(config.socket.as_ref())?;
        let stop = StopSignal::new().map_err(|source| DaemonError::System {
            what: "watch for signals",
            source,
        })?;
        let iommu = Iommu::new(
            Settings {
                address_width: config.address_width,
                page_sizes: config.page_mask,
                last_domain: config.max_domains.saturating_sub(1),
                bypass_at_boot: config.bypass_at_boot,
                arena_limit: config.arena_limit,
            },
            config.topology.clone(),
        )?;
        let iommu = Arc::new(Mutex::new(iommu));
        let metrics = Arc::new(Metrics::default());
        let device = Arc::new(Device::new(iommu.clone(), metrics.clone()));
        let control = config
            .control
            .as_deref()
            .map(|path| {
                let subjects = Subjects {
                    iommu: iommu.clone(),
                    device: device.clone(),
                    metrics: metrics.clone(),
                };
                ControlServer::start(path, subjects).map_err(DaemonError::Socket)
            })
            .transpose()?;
        Ok(Self {
            device,
            listener,
            socket_path,
            stop,
            _control: control,
        })
    }

    /// The device, to report faults through.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Ends [`Daemon::run`] from another thread, as SIGTERM does.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.stop.shared.clone())
    }

    /// Serves one frontend after the other until SIGTERM, SIGINT or a [`StopHandle`] ends it.
    ///
    /// # Errors
    /// Where the daemon cannot go on for a reason that is not the frontend's.
    pub fn run(&mut self) -> Result<(), DaemonError> {
        info!("waiting for a VMM to connect");
        while self.stop.wait_for(self.listener.as_raw_fd())? {
            self.serve_one()?;
        }
        info!("ended");
        Ok(())
    }

    /// Serves the frontend that is waiting in the backlog until it hangs up.
    ///
    /// A daemon object of the backend crate serves one connection, so each gets its own.
    fn serve_one(&mut self) -> Result<(), DaemonError> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("vhost-user".into(), self.device.clone(), memory)
            .map_err(DaemonError::VhostUser)?;
        self.device.connect();
        let result = daemon.start(&mut self.listener).and_then(|()| {
            info!("a VMM has connected");
            self.stop.shared.watch(daemon.shutdown_handle());
            daemon.wait()
        });
        self.stop.shared.watch(None);
        self.device.stop();
        drop(daemon);
        close_leaked(self.device.disconnect());
        match result {
            Ok(())
            | Err(BackendError::HandleRequest(
                VhostUserError::Disconnected | VhostUserError::PartialMessage,
            )) => info!("the VMM has disconnected"),
            Err(cause) => warn!("the connection was closed: {cause}"),
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(path) = &self.socket_path
            && let Err(cause) = std::fs::remove_file(path)
        {
            debug!("cannot remove {}: {cause}", path.display());
        }
    }
}

/// Ends a running daemon.
#[derive(Clone)]
pub struct StopHandle(Arc<StopShared>);

impl StopHandle {
    /// Makes [`Daemon::run`] return soon; the frontend's connection is closed.
    pub fn stop(&self) {
        self.0.stop();
    }
}

/// Turns signals into a readable descriptor and the end of the connection.
struct StopSignal {
    shared: Arc<StopShared>,
    /// Readable once the daemon is to end.
    ended: UnixStream,
}

struct StopShared {
    /// Held while the flag and the handle change together.
    state: Mutex<StopState>,
    end: UnixStream,
}

#[derive(Default)]
struct StopState {
    stopping: bool,
    connection: Option<ShutdownHandle>,
}

impl StopShared {
    fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopping = true;
        if let Some(connection) = state.connection.take() {
            connection.shutdown();
        }
        if let Err(cause) = self.end.shutdown(std::net::Shutdown::Write) {
            error!("cannot end the daemon: {cause}");
        }
    }

    /// The connection to shut down when the daemon is to end; at once where it is already.
    fn watch(&self, connection: Option<ShutdownHandle>) {
        let mut state = lock(&self.state);
        if state.stopping
            && let Some(connection) = connection
        {
            connection.shutdown();
        } else {
            state.connection = connection;
        }
    }
}

impl StopSignal {
    fn new() -> io::Result<Self> {
        let (end, ended) = UnixStream::pair()?;
        let shared = Arc::new(StopShared {
            state: Mutex::default(),
            end,
        });
        let (caught, catch) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, catch.try_clone()?)?;
        }
        let on_signal = shared.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let mut byte = [0];
                // Ends with the process, or when the last writer is gone.
                while io::Read::read(&mut &caught, &mut byte).is_ok_and(|n| n > 0) {
                    on_signal.stop();
                }
            })?;
        Ok(Self { shared, ended })
    }

    /// Waits until `fd` is readable (`true`) or the daemon is to end (`false`).
    fn wait_for(&self, fd: RawFd) -> Result<bool, DaemonError> {
        let failed = |source| DaemonError::System {
            what: "wait for a connection",
            source,
        };
        let epoll = Epoll::new().map_err(failed)?;
        for (fd, id) in [(fd, 0), (self.ended.as_raw_fd(), 1)] {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id))
                .map_err(failed)?;
        }
        let mut events = [EpollEvent::default(); 2];
        loop {
            match epoll.wait(-1, &mut events) {
                Ok(ready) => return Ok(!events.iter().take(ready).any(|e| e.data() == 1)),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(failed(cause)),
            }
        }
    }
}

fn listener(socket: Option<&Socket>) -> Result<(Listener, Option<PathBuf>), DaemonError> {
    match socket.ok_or(DaemonError::NoSocket)? {
        Socket::Path(path) => {
            let listener = bind(path).map_err(DaemonError::Socket)?;
            Ok((listener.into(), Some(path.clone())))
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
            if !matches!(socket_option(*fd, libc::SO_DOMAIN), Ok(libc::AF_UNIX)) {
                return Err(refuse("it is not a Unix socket"));
            }
            // SAFETY:
            // - the descriptor is open: it answered just now
            // - ownership: the operator handed it over with --fd, and nothing else here uses it
            let owned = unsafe { OwnedFd::from_raw_fd(*fd) };
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
