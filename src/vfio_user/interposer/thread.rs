//! The thread itself: what it waits for, and whom it accepts and connects to.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::peers::{ClientLeg, MAX_WAITING, ServerLeg, Stage, TURN};
use super::proxy::{InterposerSettings, Proxy};
use crate::process::sandbox::{self, Role};
use crate::vfio_user::dma::DmaTarget;
use crate::vfio_user::link::Link;
use crate::vfio_user::socket::{Receiver, connect};
use crate::{info_limited, warn_limited};

/// How long it takes to try once more to reach a server, or to accept a client.
const RETRY: Duration = Duration::from_millis(100);
/// How long a server may take to answer VERSION.
const VERSION_PATIENCE: Duration = Duration::from_secs(5);

/// A running interposer; dropping it ends it and closes both connections.
pub struct Interposer {
    link: Arc<Link>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Interposer {
    /// Serves one client after the other at `listener`, each with a connection to the server of
    /// its own. The server is told what `link` is given orders for, and reaches memory through
    /// `target`.
    ///
    /// # Errors
    /// Where the thread cannot be started.
    pub fn start(
        settings: InterposerSettings,
        listener: UnixListener,
        link: Arc<Link>,
        target: Arc<dyn DmaTarget>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut proxy = Proxy {
            settings,
            listener,
            link: link.clone(),
            target,
            client: None,
            server: None,
            accept_at: None,
            connect_at: Instant::now(),
        };
        let stopping = stop.clone();
        let thread = sandbox::spawn(Role::VfioUser, move || {
            while !stopping.load(Ordering::Acquire) {
                proxy.turn();
            }
            proxy.link.end();
        })?;
        Ok(Self {
            link,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Interposer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.link.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread of a vfio-user device has panicked");
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EventSource {
    Wake,
    Listener,
    ClientLeg,
    ServerLeg,
    Twin,
    Parting,
}

impl Proxy {
    /// Waits for something to do, and does it.
    fn turn(&mut self) {
        self.look_after_server();
        let ready = match self.wait() {
            Ok(ready) => ready,
            Err(cause) => {
                warn_limited!("{}: cannot wait for messages: {cause}", self.settings.name);
                std::thread::sleep(RETRY);
                return;
            }
        };
        for (source, flags) in ready {
            match source {
                EventSource::Wake => self.link.awake(),
                EventSource::Listener => self.accept(),
                EventSource::ClientLeg => self.client_ready(flags),
                EventSource::ServerLeg => self.server_ready(flags),
                EventSource::Twin => self.twin_ready(flags),
                EventSource::Parting => self.parting_ready(),
            }
        }
    }

    /// Which descriptors have something, after no longer than until something is due.
    fn wait(&self) -> io::Result<Vec<(EventSource, PollFlags)>> {
        let pulse = self.link.status();
        let parting = self.link.parting();
        let now = Instant::now();
        let mut sources = vec![EventSource::Wake];
        let mut fds = vec![PollFd::from_borrowed_fd(self.link.woken(), PollFlags::IN)];
        let mut due: Vec<Instant> = Vec::new();
        match &self.client {
            Some(client) => {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, client.may_speak(&pulse));
                flags.set(PollFlags::OUT, !client.outbox.is_empty());
                sources.push(EventSource::ClientLeg);
                fds.push(PollFd::new(&client.socket, flags));
                match client.stage {
                    Stage::Fresh(until) => due.push(until),
                    Stage::Asked { .. } | Stage::Agreed { .. }
                        if self.server.is_none() && !pulse.parting =>
                    {
                        due.push(self.connect_at);
                    }
                    Stage::Asked { .. } | Stage::Agreed { .. } => {}
                }
            }
            None => match self.accept_at.filter(|at| *at > now) {
                Some(at) => due.push(at),
                None => {
                    sources.push(EventSource::Listener);
                    fds.push(PollFd::new(&self.listener, PollFlags::IN));
                }
            },
        }
        if let Some(server) = &self.server {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, pulse.bytes < MAX_WAITING);
            flags.set(PollFlags::OUT, pulse.bytes > 0);
            sources.push(EventSource::ServerLeg);
            fds.push(PollFd::new(&server.socket, flags));
            due.extend(server.answer_until);
            if let Some(twin) = &server.twin {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, twin.outbox.len_bytes() < MAX_WAITING);
                flags.set(PollFlags::OUT, !twin.outbox.is_empty());
                sources.push(EventSource::Twin);
                fds.push(PollFd::new(&twin.socket, flags));
            }
        }
        if let Some(socket) = &parting {
            sources.push(EventSource::Parting);
            fds.push(PollFd::new(socket, PollFlags::IN));
        }
        let timeout = due.into_iter().min().map(|at| {
            let left = at.saturating_duration_since(now);
            // Rounded up, so as not to come back too early again and again.
            let left = left + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(cause) => return Err(cause.into()),
        }
        let events = sources.into_iter().zip(&fds);
        let ready = events.map(|(source, fd)| (source, fd.revents()));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((socket, _)) => {
                info_limited!("{}: a client has connected", self.settings.name);
                self.client = Some(ClientLeg::new(socket));
                self.link.set_client(true);
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
            Err(cause) => {
                warn_limited!("{}: no client can be accepted: {cause}", self.settings.name);
                self.accept_at = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Lets go of a server that is gone, and looks for one where one is needed.
    fn look_after_server(&mut self) {
        let pulse = self.link.status();
        if let Some(server) = &self.server {
            if pulse.connected && pulse.session == server.session {
                if server.answer_until.is_some_and(|at| at < Instant::now()) {
                    self.end_server("it does not answer VERSION");
                }
            } else {
                self.server_lost();
            }
        }
        let now = Instant::now();
        if self.server.is_some() || now < self.connect_at {
            return;
        }
        let Some(client) = &self.client else { return };
        let version = match &client.stage {
            Stage::Fresh(until) if *until < now => return self.end_client("it says nothing"),
            Stage::Fresh(_) => return,
            Stage::Asked { .. } | Stage::Agreed { .. } if pulse.parting => return,
            Stage::Asked { version, .. } | Stage::Agreed { version, .. } => version,
        };
        let proposal = match version.proposal() {
            Ok(proposal) => proposal,
            Err(cause) => return self.end_client(&cause.to_string()),
        };
        self.connect_at = now + RETRY;
        match connect(&self.settings.server) {
            Ok(socket) => {
                let socket = Arc::new(socket);
                let session = self.link.begin(socket.clone(), &proposal.encode());
                self.server = Some(ServerLeg {
                    session,
                    socket,
                    receiver: Receiver::default(),
                    twin: None,
                    answer_until: Some(now + VERSION_PATIENCE),
                });
            }
            Err(cause) => warn_limited!(
                "{}: no server listens on {}: {cause}; it is tried again",
                self.settings.name,
                self.settings.server.display()
            ),
        }
    }

    /// What a server still says whose client is gone is not heard.
    fn parting_ready(&self) {
        let Some(socket) = self.link.parting() else {
            return;
        };
        let mut heard = [0; 4096];
        for _ in 0..TURN {
            match rustix::net::recv(&*socket, &mut heard, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return self.link.parted(),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // It has hung up without hearing us out.
                Err(_) => return self.link.parted(),
            }
        }
    }
}
