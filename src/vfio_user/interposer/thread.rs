//! The thread: it polls, accepts clients and connects to the server.

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

use super::peers::{ClientLeg, MAX_UNSENT, MESSAGES_PER_TURN, ServerLeg, Stage};
use super::proxy::{InterposerSettings, Proxy};
use crate::process::sandbox::{self, Role};
use crate::vfio_user::dma::DmaTarget;
use crate::vfio_user::link::Link;
use crate::vfio_user::socket::{Receiver, connect};
use crate::{info_limited, warn_limited};

/// How long the thread waits before it tries again to connect to a server or to accept a client.
const RETRY: Duration = Duration::from_millis(100);
/// How long a server may take to answer VERSION.
const VERSION_DEADLINE: Duration = Duration::from_secs(5);

/// A running interposer. Dropping it stops the thread and closes both connections.
pub struct Interposer {
    link: Arc<Link>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Interposer {
    /// Serves one client after the other at `listener`, and connects to the server for each of them.
    /// The server gets the updates of `link`, and reaches memory through `target`.
    ///
    /// # Errors
    /// The thread cannot be started.
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
            warn!("the thread of a vfio-user device panicked");
        }
    }
}

/// What the thread polls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EventSource {
    Wake,
    Listener,
    ClientLeg,
    ServerLeg,
    Twin,
    Closing,
}

impl Proxy {
    /// Waits for events, and handles them.
    fn turn(&mut self) {
        self.maintain_server();
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
                EventSource::Wake => self.link.clear_wake(),
                EventSource::Listener => self.accept(),
                EventSource::ClientLeg => self.client_ready(flags),
                EventSource::ServerLeg => self.server_ready(flags),
                EventSource::Twin => self.twin_ready(flags),
                EventSource::Closing => self.drain_closing_server(),
            }
        }
    }

    /// Waits until a descriptor is ready or a deadline has passed. Returns the ready descriptors.
    fn wait(&self) -> io::Result<Vec<(EventSource, PollFlags)>> {
        let status = self.link.status();
        let closing = self.link.closing();
        let now = Instant::now();
        let mut sources = vec![EventSource::Wake];
        let mut fds = vec![PollFd::from_borrowed_fd(self.link.wake_fd(), PollFlags::IN)];
        let mut due: Vec<Instant> = Vec::new();
        match &self.client {
            Some(client) => {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, client.may_receive(&status));
                flags.set(PollFlags::OUT, !client.outbox.is_empty());
                sources.push(EventSource::ClientLeg);
                fds.push(PollFd::new(&client.socket, flags));
                match client.stage {
                    Stage::Connected(until) => due.push(until),
                    Stage::Negotiating { .. } | Stage::Negotiated { .. }
                        if self.server.is_none() && !status.closing =>
                    {
                        due.push(self.connect_at);
                    }
                    Stage::Negotiating { .. } | Stage::Negotiated { .. } => {}
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
            flags.set(PollFlags::IN, status.bytes < MAX_UNSENT);
            flags.set(PollFlags::OUT, status.bytes > 0);
            sources.push(EventSource::ServerLeg);
            fds.push(PollFd::new(&server.socket, flags));
            due.extend(server.version_until);
            if let Some(twin) = &server.twin {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, twin.outbox.len_bytes() < MAX_UNSENT);
                flags.set(PollFlags::OUT, !twin.outbox.is_empty());
                sources.push(EventSource::Twin);
                fds.push(PollFd::new(&twin.socket, flags));
            }
        }
        if let Some(socket) = &closing {
            sources.push(EventSource::Closing);
            fds.push(PollFd::new(socket, PollFlags::IN));
        }
        let timeout = due.into_iter().min().map(|at| {
            let left = at.saturating_duration_since(now);
            // Rounded up: rounded down, the thread would poll again and again in the last moment.
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
                warn_limited!("{}: cannot accept a client: {cause}", self.settings.name);
                self.accept_at = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Drops a server that is gone, and connects to the server if the client needs one.
    fn maintain_server(&mut self) {
        let status = self.link.status();
        if let Some(server) = &self.server {
            if status.connected && status.session == server.session {
                if server.version_until.is_some_and(|at| at < Instant::now()) {
                    self.cut_server_off("it did not answer VERSION in time");
                }
            } else {
                self.drop_server();
            }
        }
        let now = Instant::now();
        if self.server.is_some() || now < self.connect_at {
            return;
        }
        let Some(client) = &self.client else { return };
        let version = match &client.stage {
            Stage::Connected(until) if *until < now => {
                return self.end_client("it sent no VERSION in time");
            }
            Stage::Connected(_) => return,
            Stage::Negotiating { .. } | Stage::Negotiated { .. } if status.closing => return,
            Stage::Negotiating { version, .. } | Stage::Negotiated { version, .. } => version,
        };
        let proposal = match version.proposal() {
            Ok(proposal) => proposal,
            Err(cause) => return self.end_client(&cause.to_string()),
        };
        self.connect_at = now + RETRY;
        match connect(&self.settings.server) {
            Ok(socket) => {
                let socket = Arc::new(socket);
                let session = self.link.start_session(socket.clone(), &proposal.encode());
                self.server = Some(ServerLeg {
                    session,
                    socket,
                    receiver: Receiver::default(),
                    twin: None,
                    version_until: Some(now + VERSION_DEADLINE),
                });
            }
            Err(cause) => warn_limited!(
                "{}: cannot connect to the server at {}: {cause}; trying again",
                self.settings.name,
                self.settings.server.display()
            ),
        }
    }

    /// Discards the messages of a closing server until it hangs up.
    fn drain_closing_server(&self) {
        let Some(socket) = self.link.closing() else {
            return;
        };
        let mut discarded = [0; 4096];
        for _ in 0..MESSAGES_PER_TURN {
            match rustix::net::recv(&*socket, &mut discarded, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return self.link.closed(),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // It has hung up with unread bytes.
                Err(_) => return self.link.closed(),
            }
        }
    }
}
