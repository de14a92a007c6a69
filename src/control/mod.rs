//! What operators and their programs see of a running daemon: the control socket, and metrics at a
//! socket or in a file. The protocol is described in `docs/control.md`.
//!
//! One thread serves one client after the other. None of them can make it wait for long, and it keeps
//! the core locked for a moment only: long answers are made a piece at a time, and no client is waited
//! for meanwhile.

mod answer;
mod client;
mod commands;
mod figures;
mod hotplug;
mod http;
mod lists;
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
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::locks::{Mutex, Rank};
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::{self, Role};
use crate::process::socket::{SocketFile, SocketRights, bind_for};
use crate::process::watchdog::Pulse;
use crate::warn_limited;

use self::textfile::TextfileWriter;

pub use self::subjects::{ClientCounters, SetLimits, Subjects};

/// The thread's events beside clients, whose numbers are those of the listeners.
const END: u64 = 16;
const PULSE: u64 = 17;
/// How long the sockets rest where a client cannot be accepted.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Where the daemon is looked into.
#[derive(Clone, Debug, Default)]
pub struct ControlPaths {
    /// The control socket.
    pub control: Option<(PathBuf, SocketRights)>,
    /// The socket that answers `GET /metrics`.
    pub metrics: Option<(PathBuf, SocketRights)>,
    /// A file with metrics, and how often it is written.
    pub textfile: Option<(PathBuf, Duration)>,
}

/// The thread that answers; dropping it ends it and removes the sockets.
pub struct ControlServer {
    stop: Arc<StopRequest>,
    thread: Option<JoinHandle<()>>,
    files: Vec<Arc<SocketFile>>,
    pulse: Arc<Pulse>,
}

/// What ends the thread, wherever it is.
struct StopRequest {
    event: EventFd,
    /// The client that is being answered.
    client: Mutex<Option<UnixStream>>,
}

/// What a client that connects gets.
#[derive(Clone, Copy)]
enum Protocol {
    Control,
    Metrics,
}

impl ControlServer {
    /// Serves at `paths` until dropped.
    ///
    /// # Errors
    /// Where a socket cannot be made.
    pub fn start(paths: &ControlPaths, subjects: Subjects) -> io::Result<Self> {
        let stop = Arc::new(StopRequest {
            event: EventFd::new(EFD_CLOEXEC)?,
            client: Mutex::new(Rank::ControlClient, None),
        });
        let pulse = Arc::new(Pulse::new("the control socket")?);
        let mut server = ControlThread {
            pulse: pulse.clone(),
            listeners: Vec::new(),
            textfile: None,
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
                // A client may be gone before it is accepted.
                listener.set_nonblocking(true)?;
                files.push(Arc::new(file));
                server.listeners.push((listener, protocol));
            }
        }
        let textfile = paths.textfile.clone();
        server.textfile = textfile.map(|(path, interval)| TextfileWriter::new(path, interval));
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
struct ControlThread {
    listeners: Vec<(UnixListener, Protocol)>,
    textfile: Option<TextfileWriter>,
    events: EventLoop,
    stop: Arc<StopRequest>,
    pulse: Arc<Pulse>,
    subjects: Subjects,
}

impl ControlThread {
    fn run(mut self) {
        loop {
            if let Some(file) = &mut self.textfile {
                file.write_if_due(Instant::now(), &self.subjects);
            }
            let ready = match self
                .events
                .wait(self.textfile.as_ref().map(TextfileWriter::due))
            {
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
