//! What operators and their programs see of a running daemon: the control socket, and metrics at a
//! socket or in a file. The protocol is described in `docs/control.md`.
//!
//! One thread serves one client after the other. None of them can make it wait for long, and it keeps
//! the core locked for a moment only: long answers are made a piece at a time, and no client is waited
//! for meanwhile.

mod client;
mod commands;
mod figures;
mod hotplug;
mod http;
mod lists;
mod prometheus;
mod textfile;

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::backends::vfio_user::Watch;
use crate::device::Device;
use crate::endpoints::hotplug::Hotplug;
use crate::export::ServerStatus;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::locks::{Mutex, Rank};
use crate::metrics::{Counter, Metrics};
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::{self, Role};
use crate::process::socket::{Access, SocketFile, bind_for};
use crate::process::watchdog::Pulse;
use crate::shadow::Registry;
use crate::warn_limited;

use self::textfile::Textfile;

/// The thread's events beside clients, whose numbers are those of the listeners.
const END: u64 = 16;
const PULSE: u64 = 17;
/// How long the sockets rest where a client cannot be accepted.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Where the daemon is looked into.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// The control socket.
    pub control: Option<(PathBuf, Access)>,
    /// The socket that answers `GET /metrics`.
    pub metrics: Option<(PathBuf, Access)>,
    /// A file with metrics, and how often it is written.
    pub textfile: Option<(PathBuf, Duration)>,
}

/// What the answers are made from.
#[derive(Clone)]
pub struct Subjects {
    /// What the VM is called.
    pub name: String,
    /// The core.
    pub iommu: Arc<Mutex<Iommu>>,
    /// The device in front of it.
    pub device: Arc<Device>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Processes that follow the page tables, where there are such endpoints.
    pub readers: Option<Arc<Registry>>,
    /// The endpoints' devices, which may come and go.
    pub hotplug: Arc<Hotplug>,
    /// Limits that the configuration sets.
    pub limits: SetLimits,
    /// What clients of these sockets have done.
    pub clients: Arc<ClientCounters>,
}

impl Subjects {
    fn devices(&self) -> Devices {
        Devices {
            hosts: self.hotplug.hosts(),
            emulated: self.hotplug.watches(),
            exports: self.hotplug.export_states(),
        }
    }
}

/// Devices that are not the VMM's own, as they are at one time.
struct Devices {
    /// The host's names of endpoints that are its devices.
    hosts: BTreeMap<EndpointId, String>,
    /// Devices that other processes emulate.
    emulated: Vec<Watch>,
    /// Devices of the host that are offered to the VMM over vfio-user.
    exports: Vec<(EndpointId, Arc<ServerStatus>)>,
}

/// Limits that are known to nobody else here.
#[derive(Clone, Copy, Debug)]
pub struct SetLimits {
    /// Requests taken off the ring at a time.
    pub batch: usize,
    /// Faults of one endpoint that the guest is told of in a second.
    pub fault_rate: u32,
}

/// What has become of clients.
#[derive(Debug, Default)]
pub struct ClientCounters {
    /// Clients that got an answer.
    pub answered: Counter,
    /// Clients that did not: they were silent, did not read, or hung up.
    pub cut_off: Counter,
    /// Times the metrics could not be written to their file.
    pub unwritten: Counter,
}

/// The thread that answers; dropping it ends it and removes the sockets.
pub struct ControlServer {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    files: Vec<Arc<SocketFile>>,
    pulse: Arc<Pulse>,
}

/// What ends the thread, wherever it is.
struct Stop {
    event: EventFd,
    /// The client that is being answered.
    client: Mutex<Option<UnixStream>>,
}

/// What a client that connects gets.
#[derive(Clone, Copy)]
enum Service {
    Control,
    Metrics,
}

impl ControlServer {
    /// Serves at `places` until dropped.
    ///
    /// # Errors
    /// Where a socket cannot be made.
    pub fn start(places: &Places, subjects: Subjects) -> io::Result<Self> {
        let stop = Arc::new(Stop {
            event: EventFd::new(EFD_CLOEXEC)?,
            client: Mutex::new(Rank::ControlClient, None),
        });
        let pulse = Arc::new(Pulse::new("the control socket")?);
        let mut server = Server {
            pulse: pulse.clone(),
            listeners: Vec::new(),
            textfile: None,
            events: EventLoop::new()?,
            stop: stop.clone(),
            subjects,
        };
        let mut files = Vec::new();
        let sockets = [
            (&places.control, Service::Control),
            (&places.metrics, Service::Metrics),
        ];
        for (place, service) in sockets {
            if let Some((path, access)) = place {
                let (listener, file) = bind_for(path, *access)?;
                // A client may be gone before it is accepted.
                listener.set_nonblocking(true)?;
                files.push(Arc::new(file));
                server.listeners.push((listener, service));
            }
        }
        let textfile = places.textfile.clone();
        server.textfile = textfile.map(|(path, interval)| Textfile::new(path, interval));
        let listeners = server.listeners.iter().map(|(l, _)| l.as_raw_fd());
        let others = [(stop.event.as_raw_fd(), END), (pulse.event(), PULSE)];
        for (fd, id) in listeners.zip(0..).chain(others) {
            server.events.add(fd, id)?;
        }
        let thread = sandbox::spawn(Role::Control, move || server.run())?;
        Ok(Self {
            stop,
            thread: Some(thread),
            files,
            pulse,
        })
    }

    /// What its thread answers the watchdog with, between clients.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// The sockets' files.
    pub fn files(&self) -> &[Arc<SocketFile>] {
        &self.files
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        if let Err(cause) = self.stop.event.write(1) {
            warn!("cannot stop the control thread: {cause}");
            return;
        }
        if let Some(client) = &*self.stop.client.lock() {
            // It may be gone already.
            let _ = client.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the control thread has panicked");
        }
        for file in &self.files {
            file.remove();
        }
    }
}

/// All the thread has.
struct Server {
    listeners: Vec<(UnixListener, Service)>,
    textfile: Option<Textfile>,
    events: EventLoop,
    stop: Arc<Stop>,
    pulse: Arc<Pulse>,
    subjects: Subjects,
}

impl Server {
    fn run(mut self) {
        loop {
            if let Some(file) = &mut self.textfile {
                file.write_if_due(Instant::now(), &self.subjects);
            }
            let ready = match self.events.wait(self.textfile.as_ref().map(Textfile::due)) {
                Ok(ready) => ready,
                Err(cause) => {
                    warn!("the control socket is closed: {cause}");
                    return;
                }
            };
            self.pulse.answer();
            for (id, _) in ready.iter() {
                match id {
                    END => return,
                    PULSE => {}
                    id => {
                        let index = usize::try_from(id).unwrap_or(usize::MAX);
                        if let Some((listener, service)) = self.listeners.get(index) {
                            self.accept(listener, *service);
                        }
                    }
                }
            }
        }
    }

    fn accept(&self, listener: &UnixListener, service: Service) {
        let client = listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            *self.stop.client.lock() = Some(stream.try_clone()?);
            Ok(stream)
        });
        match client {
            Ok(stream) => {
                self.serve(&stream, service);
                *self.stop.client.lock() = None;
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
            Err(cause) => {
                warn_limited!("cannot accept a control client: {cause}");
                std::thread::sleep(BACK_OFF);
            }
        }
    }

    fn serve(&self, stream: &UnixStream, service: Service) {
        let served = match service {
            Service::Control => commands::answer(stream, &self.subjects),
            Service::Metrics => http::answer(stream, &self.subjects),
        };
        let clients = &self.subjects.clients;
        match served {
            Ok(()) => clients.answered.inc(),
            Err(cause) => {
                clients.cut_off.inc();
                warn_limited!("a control client got no answer: {cause}");
            }
        }
    }
}
