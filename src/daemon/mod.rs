//! Wiring: one core, one device, one transport, until a signal ends it.

pub mod drop_in;
pub mod sandbox_needs;
pub mod signals;

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use thiserror::Error;

use crate::config::{Config, Socket, SocketAccess};
use crate::control::{ControlPaths, ControlServer, SetLimits, Subjects};
use crate::device::{Device, WorkerSettings};
use crate::endpoints::hotplug::{Files, Hotplug};
use crate::endpoints::start::{OpenedDevices, ServedDevices, StartError};
use crate::info_limited;
use crate::iommu::{Iommu, Settings};
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::page_table::ArenaError;
use crate::process::realtime::{Realtime, RealtimeError};
use crate::process::socket::{SocketFile, SocketRights, bind};
use crate::process::watchdog::Pulse;
use crate::qemu::qmp::Qmp;
use crate::shadow::ShadowServer;
use crate::transport::vhost_user::listener::inherit;
use crate::transport::vhost_user::serve::{ServeError, Stopper, VhostUserServer};

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
    /// The configured devices cannot be brought up.
    #[error(transparent)]
    Devices(#[from] StartError),
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
    /// The VMM cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// The daemon of one VM, ready to serve.
pub struct Daemon {
    device: Arc<Device>,
    server: VhostUserServer,
    sockets: Arc<Sockets>,
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
        let (topology, opened) = OpenedDevices::open(config)?;
        let realtime = config.realtime_priority.map(Realtime::new).transpose()?;
        let (listener, file) = listener(config.socket.as_ref())?;
        let no_events = |source| DaemonError::System {
            what: "make event descriptors",
            source,
        };
        let mut iommu = Iommu::new(
            Settings {
                address_width: config.address_width,
                page_sizes: config.page_mask,
                last_domain: config.max_domains.saturating_sub(1),
                bypass_at_boot: config.bypass_at_boot,
                arena_limit: config.arena_limit,
            },
            topology,
        )?;
        let metrics = Arc::new(Metrics::default());
        let attached = opened.attach(config, &mut iommu, metrics.clone())?;
        let iommu = Arc::new(Mutex::new(Rank::Core, iommu));
        let worker = WorkerSettings {
            longest_poll: config.longest_poll,
            max_batch: config.max_batch,
            realtime,
        };
        let device = Device::new(iommu.clone(), metrics.clone(), worker).map_err(no_events)?;
        let device = Arc::new(device);
        let server = VhostUserServer::new(device.clone(), listener).map_err(no_events)?;
        let ServedDevices {
            hotplug,
            readers,
            shadow,
        } = attached.serve(config, &iommu, &device)?;
        let shadow_files = shadow.iter().flat_map(ShadowServer::files).cloned();
        let subjects = Subjects {
            name: config.name.clone(),
            iommu: iommu.clone(),
            device: device.clone(),
            metrics: metrics.clone(),
            readers,
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
            server,
            sockets: Arc::new(Sockets {
                files: file
                    .map(Arc::new)
                    .into_iter()
                    .chain(control_files)
                    .chain(shadow_files)
                    .collect(),
                devices: hotplug.files(),
            }),
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
        StopHandle {
            server: self.server.stopper(),
            sockets: self.sockets.clone(),
        }
    }

    /// Serves one frontend after the other until a [`StopHandle`] ends it.
    ///
    /// # Errors
    /// Where the daemon cannot go on for a reason that is not the frontend's.
    pub fn run(&mut self) -> Result<(), DaemonError> {
        let (server, qmp) = (&mut self.server, &self.qmp);
        server.run(|present| {
            // The VMM says over QMP when it resets the VM.
            if let Some(qmp) = qmp {
                qmp.vmm_present(present);
            }
        })?;
        Ok(())
    }
}

/// Ends a running daemon.
#[derive(Clone)]
pub struct StopHandle {
    server: Stopper,
    sockets: Arc<Sockets>,
}

impl StopHandle {
    /// Makes [`Daemon::run`] return soon; the frontend's connection is closed.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Removes the files of the daemon's sockets, for an end without [`Drop`].
    pub fn remove_sockets(&self) {
        self.sockets.remove();
    }
}

/// The files of the daemon's sockets.
struct Sockets {
    /// Removed with the last owner.
    files: Vec<Arc<SocketFile>>,
    /// Those of devices, which come and go.
    devices: Files,
}

impl Sockets {
    fn remove(&self) {
        for file in &self.files {
            file.remove();
        }
        for file in self.devices.lock().values() {
            file.remove();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // First of all: it releases devices.
        self.hotplug.end_exports();
        // A handle may outlive the daemon.
        self.sockets.remove();
    }
}

/// Where the daemon is to be looked into, if anywhere.
fn places(config: &Config) -> Option<ControlPaths> {
    let access = |access: SocketAccess| SocketRights {
        mode: access.mode,
        group: access.group,
    };
    let metrics = &config.metrics;
    let places = ControlPaths {
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

fn listener(socket: Option<&Socket>) -> Result<(UnixListener, Option<SocketFile>), DaemonError> {
    match socket.ok_or(DaemonError::NoSocket)? {
        Socket::Path(path) => {
            let (listener, file) = bind(path).map_err(DaemonError::Socket)?;
            Ok((listener, Some(file)))
        }
        Socket::Fd(fd) => match inherit(*fd) {
            Ok(listener) => Ok((listener, None)),
            Err(why) => Err(DaemonError::InheritedFd { fd: *fd, why }),
        },
    }
}
