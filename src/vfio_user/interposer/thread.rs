//! The thread: it waits for events, accepts clients and connects to the server.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::peers::{Buffers, ClientLeg, MAX_UNSENT, MESSAGES_PER_TURN, ServerLeg, Stage};
use super::proxy::{InterposerSettings, Proxy};
use crate::process::connector;
use crate::process::event_loop::{EventLoop, Events, Interest};
use crate::process::sandbox::{self, Role};
use crate::vfio_user::dma::{DmaTarget, Replies};
use crate::vfio_user::kept::{KeptConnections, KeptDevice, Leg};
use crate::vfio_user::link::Link;
use crate::{info_limited, warn_limited};

/// How long the thread waits before it tries again to connect to a server or to accept a client.
const RETRY: Duration = Duration::from_millis(100);

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
        kept: Option<KeptDevice>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let events = EventLoop::new()?;
        events.add(link.wake_fd().as_raw_fd(), WAKE)?;
        let mut proxy = Proxy {
            settings,
            listener: Arc::new(listener),
            events,
            link: link.clone(),
            target,
            client: None,
            server: None,
            replies: Replies::default(),
            accept_at: None,
            connect_at: Instant::now(),
            kept: None,
        };
        if let Some(kept) = kept {
            proxy.keep(kept);
        }
        let stopping = stop.clone();
        let thread = sandbox::spawn(Role::VfioUser, move || {
            while !stopping.load(Ordering::Acquire) {
                proxy.turn();
            }
            proxy.link.end();
            proxy.forget();
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
        // A server that has its second socket in common with this process can make the thread wait until it is shut down.
        self.link.shut_twin();
        self.link.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread of a vfio-user device panicked");
        }
    }
}

// The tokens of the descriptors that the thread waits for, in the order in which it handles them.
const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const CLIENT: u64 = 2;
const SERVER: u64 = 3;
const TWIN: u64 = 4;
const CLOSING: u64 = 5;

impl Proxy {
    /// Waits for events, and handles them.
    fn turn(&mut self) {
        let is_held = self.link.is_held();
        if !is_held {
            self.maintain_server();
        }
        let waited = if is_held {
            self.wait_to_go_on()
        } else {
            self.wait()
        };
        let ready = match waited {
            Ok(ready) => ready,
            Err(cause) => {
                warn_limited!("{}: cannot wait for messages: {cause}", self.settings.name);
                std::thread::sleep(RETRY);
                return;
            }
        };
        for (token, events) in ready {
            match token {
                WAKE => self.link.clear_wake(),
                LISTENER => self.accept(),
                CLIENT => self.client_ready(events),
                SERVER => self.server_ready(events),
                TWIN => self.twin_ready(events),
                _ => self.drain_closing_server(),
            }
        }
    }

    /// Waits until the endpoint has its target: an earlier process has left both peers.
    fn wait_to_go_on(&mut self) -> io::Result<Vec<(u64, Events)>> {
        self.events.wait_for(&[])?;
        let ready = self.events.wait(None)?;
        Ok(ready.iter().filter(|(token, _)| *token == WAKE).collect())
    }

    /// Waits until a descriptor is ready or a deadline has passed. Returns the ready descriptors in the order of their
    /// tokens.
    fn wait(&mut self) -> io::Result<Vec<(u64, Events)>> {
        let status = self.link.status();
        let closing = self.link.closing();
        let now = Instant::now();
        let mut interests = Vec::new();
        let mut due: Vec<Instant> = Vec::new();
        // Peers with messages that were read ahead, which no event reports.
        let mut ahead = Vec::new();
        match &self.client {
            Some(client) => {
                let mut events = Events::empty();
                events.set(Events::EPOLLIN, client.may_receive(&status));
                if events.contains(Events::EPOLLIN) && client.receiver.has_message() {
                    ahead.push(CLIENT);
                }
                events.set(Events::EPOLLOUT, !client.outbox.is_empty());
                interests.push(Interest {
                    source: client.socket.clone(),
                    token: CLIENT,
                    events,
                });
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
                None => interests.push(Interest {
                    source: self.listener.clone(),
                    token: LISTENER,
                    events: Events::EPOLLIN,
                }),
            },
        }
        if let Some(server) = &self.server {
            let mut events = Events::empty();
            events.set(Events::EPOLLIN, status.reply_bytes < MAX_UNSENT);
            events.set(Events::EPOLLOUT, status.bytes > 0);
            // Another thread may have ended the link since. Then this socket is that of the closing server, which
            // joins the interests below. An epoll set holds each descriptor only once.
            let is_closing = closing
                .as_ref()
                .is_some_and(|closing| Arc::ptr_eq(closing, &server.socket));
            if !is_closing {
                if events.contains(Events::EPOLLIN) && server.receiver.has_message() {
                    ahead.push(SERVER);
                }
                interests.push(Interest {
                    source: server.socket.clone(),
                    token: SERVER,
                    events,
                });
            }
            due.extend(status.answer_until);
            if let Some(twin) = &server.twin {
                let mut events = Events::empty();
                events.set(Events::EPOLLIN, twin.outbox.len_bytes() < MAX_UNSENT);
                events.set(Events::EPOLLOUT, !twin.outbox.is_empty());
                if events.contains(Events::EPOLLIN) && twin.receiver.has_message() {
                    ahead.push(TWIN);
                }
                interests.push(Interest {
                    source: twin.socket.clone(),
                    token: TWIN,
                    events,
                });
            }
        }
        if let Some(socket) = closing {
            interests.push(Interest {
                source: socket,
                token: CLOSING,
                events: Events::EPOLLIN,
            });
        }
        if !ahead.is_empty() {
            due.push(now);
        }
        self.events.wait_for(&interests)?;
        let ready = self.events.wait(due.into_iter().min())?;
        let mut ready: Vec<_> = ready.iter().collect();
        for token in ahead {
            if !ready.iter().any(|(there, _)| *there == token) {
                ready.push((token, Events::EPOLLIN));
            }
        }
        ready.sort_unstable_by_key(|(token, _)| *token);
        Ok(ready)
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((socket, _)) => {
                info_limited!("{}: a client has connected", self.settings.name);
                self.welcome(socket);
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
                if status.answer_until.is_some_and(|at| at <= Instant::now()) {
                    self.link.end_unanswered();
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
        let connected = connector::connect(&self.settings.server).and_then(|socket| {
            let buffers = self.buffers(Leg::Server, socket.as_fd(), true)?;
            Ok((socket, buffers))
        });
        match connected {
            Ok((socket, buffers)) => {
                let socket = Arc::new(socket);
                let proposal = proposal.encode();
                let session = self
                    .link
                    .start_session(socket.clone(), buffers.outbox, &proposal);
                self.server = Some(ServerLeg {
                    session,
                    socket,
                    receiver: buffers.receiver,
                    handled: 0,
                    recorded: 0,
                    kept: buffers.kept,
                    twin: None,
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
                Ok((0, _)) => return self.closed(),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // It has hung up with unread bytes.
                Err(_) => return self.closed(),
            }
        }
    }

    fn closed(&self) {
        self.link.closed();
        if let Some(kept) = &self.kept {
            kept.release(Leg::Server);
        }
    }

    /// Serves a client that has just connected.
    pub(super) fn welcome(&mut self, socket: UnixStream) {
        let buffers = self.buffers(Leg::Client, socket.as_fd(), false);
        let buffers = buffers.unwrap_or_else(|cause| {
            warn_limited!(
                "{}: the client's connection will end with this daemon: {cause}",
                self.settings.name
            );
            Buffers {
                unkept: self.kept.as_ref().map(KeptConnections::count_unkept),
                ..Buffers::default()
            }
        });
        if let Some(cookie) = buffers.kept {
            self.link.begin_client(cookie);
        }
        let takes_no_refusal = self.settings.answers_all_accesses;
        self.client = Some(ClientLeg::new(socket, buffers, takes_no_refusal));
        self.link.set_client(true);
    }
}
