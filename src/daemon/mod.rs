//! Assembles a daemon from one core, one device and one transport, and runs it until a signal ends it.

mod changes;
pub mod drop_in;
mod handover;
mod left;
mod left_readers;
mod places;
pub mod sandbox_needs;
pub mod signals;
mod successor;
mod transport;
pub mod upgrade;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use log::{error, warn};
use thiserror::Error;

use self::changes::LeftEndpoints;
use self::left::{LeftMemory, discard_orphans, keep_state, release_unclaimed};
use self::left_readers::end_left_readers;
use self::places::{PlaceChecker, all_compared};
use self::successor::Successor;
use self::transport::{ServerStopper, VmmServer, listener};

use crate::config::{Config, VmmTransport};
use crate::control::places::PlaceReport;
use crate::control::{ControlPaths, ControlServer, MetricsFile, SetLimits, Subjects};
use crate::device::{Device, WorkerSettings};
use crate::endpoints::hotplug::{ChangedVm, Files, Hotplug};
use crate::endpoints::sockets::rights;
use crate::endpoints::start::{OpenedDevices, ServedDevices, StartError};
use crate::iommu::{Iommu, Settings};
use crate::locks::{Mutex, Rank};
use crate::metrics::Metrics;
use crate::page_table::{ArenaError, Encoding};
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::peer_event;
use crate::process::realtime::{Realtime, RealtimeError};
use crate::process::socket::SocketFile;
use crate::process::watchdog::Pulse;
use crate::qemu::qmp::{Asker, Qmp};
use crate::shadow::ShadowServer;
use crate::topology::viot;
use crate::transport::vhost_user::LeftVmm;
use crate::transport::vhost_user::serve::ServeError;
use crate::transport::virtio_pci::serve::VmmKeeping;

/// Why the daemon could not run.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The configuration names no socket.
    #[error(
        "no socket for the VMM to connect to; give --socket-path, --fd or `socket` in the file"
    )]
    NoSocket,
    /// The page-table arena cannot be made.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The configured devices cannot be brought up.
    #[error(transparent)]
    Devices(#[from] StartError),
    /// The worker is not allowed its realtime priority.
    #[error(transparent)]
    Realtime(#[from] RealtimeError),
    /// A socket cannot be made or taken over.
    #[error("{0}")]
    Socket(io::Error),
    /// The inherited descriptor is not a listening Unix socket.
    #[error("descriptor {fd} cannot be used: {why}; pass a listening Unix stream socket with --fd")]
    InheritedFd {
        /// The descriptor.
        fd: RawFd,
        /// Why it cannot be used.
        why: String,
    },
    /// The system refused something that the daemon needs.
    #[error("cannot {step}: {source}")]
    System {
        /// The failed step: a verb and its object.
        step: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The VMM cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// The daemon of one VM: all its parts, ready to serve.
pub struct Daemon {
    device: Arc<Device>,
    keeper: Arc<Keeper>,
    /// Takes over what the daemon before has left, unless the server does so, until [`Daemon::run`] has done so.
    successor: Option<Successor>,
    left: Option<LeftMemory>,
    left_vmm: Option<LeftVmm>,
    server: VmmServer,
    sockets: Arc<Sockets>,
    hotplug: Arc<Hotplug>,
    _qmp: Option<Arc<Qmp>>,
    control: Option<ControlServer>,
    _metrics_file: Option<MetricsFile>,
    _shadow: Option<Arc<ShadowServer>>,
}

impl Daemon {
    /// Makes the core, the device and the sockets. If the daemon before has left its state with `keeper`, [`Self::run`]
    /// takes it over.
    ///
    /// # Errors
    /// See [`DaemonError`].
    pub fn new(config: &Config, keeper: Arc<Keeper>) -> Result<Self, DaemonError> {
        let life = Life::new(keeper.is_present()).with_connections(keeper.unkept().clone());
        let life = Arc::new(life);
        discard_orphans(&keeper);
        let mut left_endpoints = LeftEndpoints::find(config, &keeper, &life);
        // First: a file opened earlier could get the number of a descriptor that the configuration names.
        let (topology, opened) = loop {
            match OpenedDevices::open(&left_endpoints.file, &keeper) {
                Ok(opened) => break opened,
                // One endpoint less with each round.
                Err(cause) => left_endpoints.leave_out(cause, &keeper, &life)?,
            }
        };
        let config = &left_endpoints.file.clone();
        let realtime = config.realtime_priority.map(Realtime::new).transpose()?;
        let (listener, file) = listener(config)?;
        let no_events = |source| DaemonError::System {
            step: "make event descriptors",
            source,
        };
        peer_event::prepare().map_err(|source| DaemonError::System {
            step: "set up asynchronous I/O, which signals the VMM's eventfds (raise fs.aio-max-nr if the \
                   host has reached it)",
            source,
        })?;
        if keeper.is_present() {
            keeper
                .start_closer()
                .map_err(|source| DaemonError::System {
                    step: "start a thread",
                    source,
                })?;
        }
        let settings = Settings {
            address_width: config.address_width,
            page_sizes: config.page_mask,
            last_domain: config.max_domains.saturating_sub(1),
            bypass_at_boot: config.bypass_at_boot,
            arena_limit: config.arena_limit,
            encoding: Encoding::default(),
        };
        let left = LeftMemory::find(&keeper);
        let mut iommu = if left.is_some() {
            // Before the control socket answers.
            life.await_take_over();
            Iommu::successor(settings, topology)?
        } else {
            Iommu::new(settings, topology)?
        };
        let kept = keep_state(&keeper, &mut iommu);
        if kept.is_none() {
            life.forgo();
        }
        let metrics = Arc::new(Metrics::default());
        let mut attached = opened.attach(config, &mut iommu, metrics.clone(), &keeper, &life)?;
        let mut late = left_endpoints.tell(&mut iommu);
        attached.add_late(&mut late, &mut iommu, &life);
        attached.end_strays(&life);
        let iommu = Arc::new(Mutex::new(Rank::Core, iommu));
        let worker = WorkerSettings {
            longest_poll: config.longest_poll,
            max_batch: config.max_batch,
            realtime,
        };
        let device = Device::new(iommu.clone(), metrics.clone(), worker).map_err(no_events)?;
        let device = Arc::new(device);
        device.record_life(life.clone());
        let LeftEndpoints {
            mut record,
            refusal,
            suspects,
            ..
        } = left_endpoints;
        let offer = iommu.lock().guest_offer();
        if let Err(cause) = record.settled(late.changes, &suspects, offer) {
            warn!("a later daemon may find other endpoints: {cause}");
        }
        let vm = ChangedVm {
            config: late.config,
            record,
        };
        let ServedDevices {
            hotplug,
            readers,
            shadow,
            adoption,
        } = attached.serve(vm, &iommu, &device, &keeper, &life)?;
        // Before any request is served.
        end_left_readers(&keeper, config.readers.patience, readers.as_deref(), &life);
        let shadow = shadow.map(Arc::new);
        let shadow_files = shadow.iter().flat_map(|shadow| shadow.files()).cloned();
        let is_compared = !config.ports.is_empty() || !config.named.is_empty();
        let places = (config.qmp.is_some() && is_compared).then(Arc::<PlaceReport>::default);
        let subjects = Subjects {
            places: places.clone(),
            name: config.name.clone(),
            iommu: iommu.clone(),
            device: device.clone(),
            metrics: metrics.clone(),
            readers,
            adoption,
            hotplug: hotplug.clone(),
            life: life.clone(),
            handover: Arc::new(handover::describer(hotplug.clone(), offer)),
            keeper: keeper.clone(),
            limits: SetLimits {
                batch: config.max_batch,
                fault_rate: config.fault_rate,
            },
            clients: Arc::default(),
        };
        let no_thread = |source| DaemonError::System {
            step: "start a thread",
            source,
        };
        let metrics_file = config
            .metrics
            .textfile
            .as_ref()
            .map(|file| MetricsFile::start(file.path.clone(), file.interval, subjects.clone()));
        let metrics_file = metrics_file.transpose().map_err(no_thread)?;
        let control = control_paths(config)
            .map(|paths| ControlServer::start(&paths, subjects).map_err(DaemonError::Socket))
            .transpose()?;
        let control_files: Vec<_> = control
            .iter()
            .flat_map(ControlServer::files)
            .cloned()
            .collect();
        let asker = Asker::new().map_err(no_events)?;
        if places.is_some() {
            let of_device = asker.clone();
            device.check_starts(move || of_device.ask());
            if left.is_none() {
                // Until the VMM has said that each of them is the device at its address.
                let named = config.named.iter().map(|device| device.endpoint.into());
                iommu.lock().withhold(named.collect());
            } else {
                // The daemon before has let the guest attach what it has found in place. It may have withheld the rest.
                let compared = all_compared(&config.ports, &config.named);
                iommu.lock().withhold_unattached(compared);
                asker.ask_when_connected();
            }
        }
        let qmp = config.qmp.clone().map(|path| {
            let checker = PlaceChecker {
                ports: config.ports.clone(),
                named: config.named.clone(),
                iommu: iommu.clone(),
                device: device.clone(),
                report: places.unwrap_or_default(),
            };
            Qmp::start(path, &asker, checker)
        });
        let qmp = qmp.transpose().map_err(no_thread)?.map(Arc::new);
        let successor = Successor {
            iommu,
            device: device.clone(),
            keeper: keeper.clone(),
            kept,
            life: life.clone(),
            shadow: shadow.clone(),
            hotplug: hotplug.clone(),
            refusal,
        };
        let mut successor = Some(successor);
        let mut left = left;
        let keeping = kept_vmm(config.transport, &keeper, &life).map_err(no_events)?;
        let keeping = keeping.map(|keeping| {
            if keeping.has_left_vmm()
                && let Some(successor) = successor.take()
            {
                let left = left.take();
                // In the thread of the server below, which goes on with the VMM.
                return keeping.restore(move || successor.take_over(left.as_ref()));
            }
            keeping
        });
        if config.transport == VmmTransport::VirtioPci
            && let (Some(successor), Some(left)) = (&successor, left.take())
        {
            // Its VMM's connection has ended with the daemon before. The server below accepts the next one at once.
            successor.take_over(Some(&left));
            device.disconnect();
        }
        // Before the sandbox, which does not allow reading the record.
        let left_vmm = match config.transport {
            VmmTransport::VhostUser => LeftVmm::find(&keeper).transpose(),
            VmmTransport::VirtioPci => Ok(None),
        };
        let left_vmm = left_vmm.unwrap_or_else(|cause| {
            error!("{cause}");
            life.lose(cause.to_string());
            None
        });
        let present = qmp.clone();
        let server = VmmServer::new(
            config.transport,
            device.clone(),
            listener,
            keeper.clone(),
            viot::table(&config.topology).ok(),
            keeping,
            move |present_now| {
                // While a VMM is connected, it reports resets of the VM over QMP.
                if let Some(qmp) = &present {
                    qmp.set_vmm_present(present_now);
                }
            },
        );
        let server = server.map_err(no_events)?;
        Ok(Self {
            device,
            keeper,
            successor,
            left,
            left_vmm,
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
            _qmp: qmp,
            control,
            _metrics_file: metrics_file,
            _shadow: shadow,
        })
    }

    /// The device, through which faults are reported.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The pulses of the loops that the daemon depends on: the worker's, which [`Daemon::run`] answers while no VMM
    /// is connected, and that of the control socket's server.
    pub fn pulses(&self) -> Vec<Arc<Pulse>> {
        let control = self.control.as_ref().map(ControlServer::pulse);
        std::iter::once(self.device.pulse())
            .chain(control)
            .cloned()
            .collect()
    }

    /// A handle that ends [`Daemon::run`] from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle {
            server: self.server.stopper(),
            device: self.device.clone(),
            is_kept: self.keeper.is_present(),
            sockets: self.sockets.clone(),
        }
    }

    /// Serves one VMM after the other until a [`StopHandle`] ends it. Begins with the VMM that the daemon before has left.
    ///
    /// # Errors
    /// The daemon cannot continue, and the VMM is not the cause.
    pub fn run(&mut self) -> Result<(), DaemonError> {
        if let Some(successor) = self.successor.take() {
            self.take_over(successor);
        }
        release_unclaimed(&self.keeper);
        self.server.run()
    }

    /// Takes over what the daemon before has left. With a VMM, the server restores the core once it has told the new backend
    /// about the VM's memory.
    fn take_over(&mut self, successor: Successor) {
        match (self.left_vmm.take(), self.left.take()) {
            (Some(vmm), left) => self
                .server
                .resume(vmm, move || successor.take_over(left.as_ref())),
            (None, Some(left)) => {
                successor.take_over(Some(&left));
                // No VMM is left: its domains end, as they do when it disconnects.
                self.device.disconnect();
            }
            // There is nothing to block.
            (None, None) => successor.hotplug.taken_over(),
        }
    }
}

/// Ends a running daemon.
#[derive(Clone)]
pub struct StopHandle {
    server: ServerStopper,
    device: Arc<Device>,
    is_kept: bool,
    sockets: Arc<Sockets>,
}

impl StopHandle {
    /// Whether the next daemon can go on where this one ends.
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Finishes the batch in progress, up to `patience`, and begins no other one. Closes nothing and undoes nothing. The
    /// caller must end the process: the next one takes over what the keeper has, and if there is no next one, the keeper
    /// closes it. Returns whether the batch was finished.
    pub fn leave(&self, patience: Duration) -> bool {
        self.device.hold(patience)
    }

    /// Makes [`Daemon::run`] return soon, and closes the VMM's connection.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Removes the files of the daemon's sockets. For an exit that does not drop the [`Daemon`].
    pub fn remove_sockets(&self) {
        self.sockets.remove();
    }
}

/// The files of the daemon's sockets.
struct Sockets {
    /// The sockets of the daemon itself.
    files: Vec<Arc<SocketFile>>,
    /// The sockets of endpoints, which hotplug adds and removes.
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
        // End the exports before the fields are dropped: this releases the devices.
        self.hotplug.end_exports();
        // Remove the files explicitly: a `StopHandle` that outlives the daemon owns them, too.
        self.sockets.remove();
    }
}

/// Where the control socket and the metrics socket are; `None` if none is configured.
fn control_paths(config: &Config) -> Option<ControlPaths> {
    let metrics = &config.metrics;
    let paths = ControlPaths {
        control: config
            .control
            .clone()
            .map(|path| (path, rights(config.control_access))),
        metrics: metrics
            .socket
            .clone()
            .map(|path| (path, rights(metrics.access))),
    };
    let any = paths.control.is_some() || paths.metrics.is_some();
    any.then_some(paths)
}

/// Keeps the connections of VMMs to the daemon's own virtio-pci device, if there is a keeper.
fn kept_vmm(
    transport: VmmTransport,
    keeper: &Arc<Keeper>,
    life: &Arc<Life>,
) -> io::Result<Option<VmmKeeping>> {
    let is_kept = keeper.is_present() && transport == VmmTransport::VirtioPci;
    is_kept
        .then(|| VmmKeeping::find(keeper.clone(), life.clone()))
        .transpose()
}
