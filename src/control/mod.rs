//! The operator's interfaces to a running daemon: the control socket, and metrics at a socket or in a
//! file. `docs/control.md` describes the protocol.
//!
//! One thread serves the clients one after the other; another one writes the file. Deadlines bound the time of each
//! client. The thread locks the core for a moment at a time: it builds long answers in pieces, and never waits for a client
//! with the core locked.

mod answer;
mod client;
mod commands;
mod figures;
mod hotplug;
mod http;
mod lists;
pub mod places;
mod prometheus;
mod subjects;
mod textfile;

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::locks::{Mutex, Rank};
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::{self, Role};
use crate::process::socket::{SocketFile, SocketRights, bind_for};
use crate::process::watchdog::Pulse;
use crate::warn_limited;

pub use self::subjects::{ClientCounters, SetLimits, Subjects};
pub use self::textfile::MetricsFile;

/// Event numbers of the stop event and the watchdog. A listener has its index as number.
const END: u64 = 16;
const PULSE: u64 = 17;
/// The pause after a failed `accept`, so that the thread does not spin.
const BACK_OFF: Duration = Duration::from_millis(100);

/// The paths of the sockets.
#[derive(Clone, Debug, Default)]
pub struct ControlPaths {
    /// The path and the access rights of the control socket.
    pub control: Option<(PathBuf, SocketRights)>,
    /// The path and the access rights of the socket that answers `GET /metrics`.
    pub metrics: Option<(PathBuf, SocketRights)>,
}

/// The control thread. Dropping it ends the thread and removes the sockets.
pub struct ControlServer {
    stop: Arc<ThreadStop>,
    thread: Option<JoinHandle<()>>,
    files: Vec<Arc<SocketFile>>,
    pulse: Arc<Pulse>,
}

/// Ends the thread, whether it waits for events or for a client.
struct ThreadStop {
    event: EventFd,
    /// The client that the thread serves now. Shutting its socket down ends the wait for it.
    client: Mutex<Option<UnixStream>>,
}

/// The protocol of a listener.
#[derive(Clone, Copy)]
enum Protocol {
    Control,
    Metrics,
}

impl ControlServer {
    /// Serves at `paths` until dropped.
    ///
    /// # Errors
    /// A socket cannot be created.
    pub fn start(paths: &ControlPaths, subjects: Subjects) -> io::Result<Self> {
        let stop = Arc::new(ThreadStop {
            event: EventFd::new(EFD_CLOEXEC)?,
            client: Mutex::new(Rank::ControlClient, None),
        });
        let pulse = Arc::new(Pulse::new("the control socket")?);
        let mut server = ControlThread {
            pulse: pulse.clone(),
            listeners: Vec::new(),
            events: EventLoop::new()?,
            stop: stop.clone(),
            subjects,
        };
        let mut files = Vec::new();
        let sockets = [
            (&paths.control, Protocol::Control),
            (&paths.metrics, Protocol::Metrics),
        ];
        for (place, protocol) in sockets {
            if let Some((path, rights)) = place {
                let (listener, file) = bind_for(path, *rights)?;
                // A client may hang up before it is accepted: `accept` must not wait for the next one.
                listener.set_nonblocking(true)?;
                files.push(Arc::new(file));
                server.listeners.push((listener, protocol));
            }
        }
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

    /// The watchdog's pulse, which the thread answers between clients.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// The files of the sockets.
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
            // Ignored: `shutdown` fails only if the client has hung up, and then the wait for it ends, too.
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

/// The state of the thread.
struct ControlThread {
    listeners: Vec<(UnixListener, Protocol)>,
    events: EventLoop,
    stop: Arc<ThreadStop>,
    pulse: Arc<Pulse>,
    subjects: Subjects,
}

impl ControlThread {
    fn run(self) {
        loop {
            let ready = match self.events.wait(None) {
                Ok(ready) => ready,
                Err(cause) => {
                    warn!("the control thread cannot wait for clients, and ends: {cause}");
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
                        if let Some((listener, protocol)) = self.listeners.get(index) {
                            self.accept(listener, *protocol);
                        }
                    }
                }
            }
        }
    }

    fn accept(&self, listener: &UnixListener, protocol: Protocol) {
        let client = listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            *self.stop.client.lock() = Some(stream.try_clone()?);
            Ok(stream)
        });
        match client {
            Ok(stream) => {
                self.serve(&stream, protocol);
                *self.stop.client.lock() = None;
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
            Err(cause) => {
                warn_limited!("cannot accept a control client: {cause}");
                std::thread::sleep(BACK_OFF);
            }
        }
    }

    fn serve(&self, stream: &UnixStream, protocol: Protocol) {
        let served = match protocol {
            Protocol::Control => commands::answer(stream, &self.subjects),
            Protocol::Metrics => http::answer(stream, &self.subjects),
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
