//! The readers' sockets: one thread serves all readers, another one delivers their faults.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, warn};

use super::peer::{Input, Peer, PeerState};
use super::registry::{Reader, Registry};
use super::wire::{FRAME_LEN, Frame, Refusal, access_of, endpoint_text, kind};
use crate::address::Iova;
use crate::faults::queue::{FaultDelivery, FaultQueue, FaultRateLimit};
use crate::faults::{Fault, FaultReason};
use crate::ids::EndpointId;
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::{self, Role};
use crate::process::socket::{SocketFile, SocketRights, bind_for};
use crate::warn_limited;

/// The longest time from a peer's connection to its greeting.
const GREETING: Duration = Duration::from_secs(2);
/// The most peers that are connected and have not greeted.
const MAX_UNREGISTERED: usize = 16;
/// The most frames read from one reader before the next reader's turn.
const FRAMES_PER_TURN: usize = 64;
/// The thread's pause after it failed to accept a peer.
const BACK_OFF: Duration = Duration::from_millis(100);

const STOP: u64 = 0;
/// The byte that makes the thread admit readers.
const ADMIT: u8 = 1;
const FIRST_LISTENER: u64 = 1;
const FIRST_PEER: u64 = 1 << 32;
/// Set in the token of a peer's process: its event is the end of the process.
const PROCESS_END: u64 = 1 << 63;

/// A socket, and the endpoints that readers may register for there.
#[derive(Debug)]
pub struct ShadowSocket<'a> {
    /// The socket's path.
    pub path: &'a Path,
    /// The rights of the socket's file.
    pub rights: SocketRights,
    /// The endpoints that the socket serves.
    pub endpoints: Vec<EndpointId>,
}

/// The running server. Dropping it ends its threads, disconnects every reader and removes the sockets.
pub struct ShadowServer {
    /// Shutting it down ends the thread.
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    /// Dropped after the thread that fills its queue has ended.
    _delivery: FaultDelivery,
    files: Vec<Arc<SocketFile>>,
}

impl ShadowServer {
    /// Starts a server for `sockets`. A thread of its own calls `faults` with each refused access, within the
    /// limit of the endpoint's rate. Readers send no reason: it is always [`FaultReason::Mapping`].
    ///
    /// # Errors
    /// A socket or a thread cannot be made.
    pub fn start(
        registry: Arc<Registry>,
        sockets: &[ShadowSocket<'_>],
        faults: impl FnMut(Fault) + Send + 'static,
    ) -> io::Result<Self> {
        let server = Self::start_held(registry, sockets, faults)?;
        server.admit()?;
        Ok(server)
    }

    /// As [`Self::start`], but readers wait until [`Self::admit`]: a daemon that takes over must have the state and the
    /// guest memory of the one before first. A reader would find its endpoint blocked, and no memory.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_held(
        registry: Arc<Registry>,
        sockets: &[ShadowSocket<'_>],
        faults: impl FnMut(Fault) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        stopped.set_nonblocking(true)?;
        let events = EventLoop::new()?;
        events.add(stopped.as_raw_fd(), STOP)?;
        let mut listeners = Vec::new();
        let mut files = Vec::new();
        for socket in sockets {
            let (listener, file) = bind_for(socket.path, socket.rights)?;
            listener.set_nonblocking(true)?;
            listeners.push((listener, socket.endpoints.clone()));
            files.push(Arc::new(file));
        }
        let queue = Arc::new(FaultQueue::default());
        let rate = FaultRateLimit::new(registry.limits().fault_rate);
        let mut server = ServerThread {
            registry,
            stopped,
            admits: false,
            events,
            listeners,
            peers: BTreeMap::new(),
            next: FIRST_PEER,
            faults: queue.clone(),
            rate,
        };
        let delivery = FaultDelivery::start(Role::ShadowFaults, queue, faults)?;
        let thread = sandbox::spawn(Role::Shadow, move || {
            server.run();
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
            _delivery: delivery,
            files,
        })
    }

    /// Admits readers from now on, also those that have connected already.
    ///
    /// # Errors
    /// The server has ended.
    pub fn admit(&self) -> io::Result<()> {
        (&self.stop).write_all(&[ADMIT])
    }

    /// The files of the sockets.
    pub fn files(&self) -> &[Arc<SocketFile>] {
        &self.files
    }
}

impl Drop for ShadowServer {
    fn drop(&mut self) {
        if let Err(cause) = self.stop.shutdown(Shutdown::Both) {
            warn!("cannot stop the thread that serves the readers: {cause}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that serves the readers has panicked");
        }
        for file in &self.files {
            file.remove();
        }
    }
}

/// The state of the thread that serves the readers.
struct ServerThread {
    registry: Arc<Registry>,
    /// Gets [`ADMIT`], and its end.
    stopped: UnixStream,
    /// The listeners are watched.
    admits: bool,
    events: EventLoop,
    listeners: Vec<(UnixListener, Vec<EndpointId>)>,
    peers: BTreeMap<u64, Peer>,
    next: u64,
    faults: Arc<FaultQueue>,
    /// By endpoint, not by connection: a process gets no new budget by connecting again.
    rate: FaultRateLimit,
}

impl ServerThread {
    fn run(&mut self) {
        loop {
            let ready = match self.events.wait(self.first_deadline()) {
                Ok(ready) => ready,
                Err(cause) => {
                    warn!(
                        "cannot wait for the readers' sockets, no reader is served any more: {cause}"
                    );
                    break;
                }
            };
            if ready.contains(STOP) && !self.handle_order() {
                break;
            }
            for (token, _) in ready.iter() {
                if token & PROCESS_END != 0 {
                    self.process_ended(token & !PROCESS_END);
                } else if token >= FIRST_PEER {
                    self.receive_frames(token);
                } else if token != STOP {
                    self.accept(token);
                }
            }
            self.refuse_silent_peers();
            self.registry.release_gone();
        }
        if self.registry.is_kept() {
            // The readers go on with these page tables, which nobody changes any more. The next daemon ends their
            // registrations; without one, the keeper closes the connections.
            return;
        }
        for (_, peer) in std::mem::take(&mut self.peers) {
            match peer.state {
                PeerState::Registered(reader) | PeerState::Leaving(reader) => {
                    self.registry.hang_up(&reader);
                }
                PeerState::Connected { .. } => {}
            }
        }
    }

    /// Reads from [`ShadowServer`]. Returns whether the thread goes on.
    fn handle_order(&mut self) -> bool {
        let mut order = [0];
        match self.stopped.read(&mut order) {
            Ok(1..) => {
                if std::mem::replace(&mut self.admits, true) {
                    return true;
                }
                for (token, (listener, _)) in (FIRST_LISTENER..).zip(&self.listeners) {
                    if let Err(cause) = self.events.add(listener.as_raw_fd(), token) {
                        warn!("no reader can connect: {cause}");
                    }
                }
                true
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => true,
            Ok(0) | Err(_) => false,
        }
    }

    /// The earliest deadline of the peers that have not greeted.
    fn first_deadline(&self) -> Option<Instant> {
        let first = self.peers.values().filter_map(|c| match c.state {
            PeerState::Connected { deadline, .. } => Some(deadline),
            PeerState::Registered(_) | PeerState::Leaving(_) => None,
        });
        first.min()
    }

    /// Accepts a connection at the socket with this token.
    fn accept(&mut self, token: u64) {
        let index = usize::try_from(token - FIRST_LISTENER).unwrap_or(usize::MAX);
        let Some((listener, _)) = self.listeners.get(index) else {
            return;
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => return,
            Err(cause) => {
                warn_limited!("cannot accept a reader: {cause}");
                std::thread::sleep(BACK_OFF);
                return;
            }
        };
        let unregistered = self.peers.values();
        let unregistered = unregistered.filter(|c| matches!(c.state, PeerState::Connected { .. }));
        if unregistered.count() >= MAX_UNREGISTERED {
            self.registry
                .refuse(&stream, Refusal::Full, MAX_UNREGISTERED as u64);
            return;
        }
        let token = self.next;
        if let Err(cause) = self.events.add(stream.as_raw_fd(), token) {
            warn_limited!("cannot watch the socket of a reader: {cause}");
            return;
        }
        self.next += 1;
        let peer = Peer {
            state: PeerState::Connected {
                stream,
                listener: index,
                deadline: Instant::now() + GREETING,
            },
            frame: [0; FRAME_LEN],
            filled: 0,
        };
        self.peers.insert(token, peer);
    }

    /// Receives a peer's frames, up to the most of one turn.
    fn receive_frames(&mut self, token: u64) {
        for _ in 0..FRAMES_PER_TURN {
            let Some(peer) = self.peers.get_mut(&token) else {
                return;
            };
            match peer.receive() {
                Input::Incomplete => return,
                Input::Closed => return self.disconnect(token),
                Input::Breach(why) => return self.expel(token, why),
                Input::Frame(frame) => match &peer.state {
                    PeerState::Connected { .. } => return self.register(token, &frame),
                    PeerState::Registered(reader) => {
                        let reader = reader.clone();
                        if let Err(why) = self.handle_frame(&reader, &frame) {
                            return self.expel(token, why);
                        }
                    }
                    PeerState::Leaving(_) => return,
                },
            }
        }
    }

    /// Registers a peer that has sent its first frame.
    fn register(&mut self, token: u64, greeting: &Frame) {
        let Some(peer) = self.peers.remove(&token) else {
            return;
        };
        let PeerState::Connected {
            stream, listener, ..
        } = peer.state
        else {
            return;
        };
        let served = self.listeners.get(listener).map(|(_, served)| served);
        let served = served.map(Vec::as_slice).unwrap_or_default();
        match self.registry.register(stream, greeting, served) {
            Ok(reader) => {
                let process = reader.process().as_raw_fd();
                if let Err(cause) = self.events.add(process, token | PROCESS_END) {
                    // A wait for its accesses notices the end of the process, too.
                    debug!("cannot watch the process of a reader: {cause}");
                }
                let peer = Peer {
                    state: PeerState::Registered(reader),
                    frame: [0; FRAME_LEN],
                    filled: 0,
                };
                self.peers.insert(token, peer);
            }
            Err(refusal) => {
                let [_, wanted, ..] = greeting.numbers;
                let wanted = endpoint_text(wanted);
                warn_limited!("a reader is refused: {refusal:?} ({wanted})");
            }
        }
    }

    /// Removes a peer that has closed the connection.
    fn disconnect(&mut self, token: u64) {
        let Some(peer) = self.peers.remove(&token) else {
            return;
        };
        match peer.state {
            PeerState::Connected { .. } => {}
            PeerState::Registered(reader) | PeerState::Leaving(reader) => {
                self.registry.hang_up(&reader);
                self.stop_reading(token, reader, false);
            }
        }
    }

    /// Refuses, or kills, a peer that breaks the protocol.
    fn expel(&mut self, token: u64, why: &'static str) {
        let Some(peer) = self.peers.remove(&token) else {
            return;
        };
        match peer.state {
            PeerState::Connected { stream, .. } => {
                warn_limited!("a process that wants to be a reader {why}");
                self.registry.refuse(&stream, Refusal::NoGreeting, 0);
            }
            PeerState::Registered(reader) | PeerState::Leaving(reader) => {
                let dying = self.registry.expel(&reader, why);
                self.stop_reading(token, reader, dying);
            }
        }
    }

    /// Stops reading from a reader. If its process is `dying` or inside an access, the thread still waits for the
    /// end of the process.
    fn stop_reading(&mut self, token: u64, reader: Arc<Reader>, dying: bool) {
        if let Err(cause) = self.events.remove(reader.stream().as_raw_fd()) {
            debug!(
                "cannot stop watching the socket of reader {}: {cause}",
                reader.number()
            );
        }
        if dying || reader.is_inside() {
            let peer = Peer {
                state: PeerState::Leaving(reader),
                frame: [0; FRAME_LEN],
                filled: 0,
            };
            self.peers.insert(token, peer);
        }
    }

    /// Removes a reader whose process has ended.
    fn process_ended(&mut self, token: u64) {
        if let Some(peer) = self.peers.remove(&token) {
            match peer.state {
                PeerState::Connected { .. } => {}
                PeerState::Registered(reader) => {
                    // Another process may have the connection. Its frames are not read any more.
                    self.stop_reading(token, reader.clone(), false);
                    self.peers.remove(&token);
                    self.registry.process_ended(&reader);
                }
                PeerState::Leaving(reader) => self.registry.process_ended(&reader),
            }
        }
    }

    /// Refuses the peers whose deadline for the greeting has passed.
    fn refuse_silent_peers(&mut self) {
        let now = Instant::now();
        let registry = &self.registry;
        self.peers.retain(|_, peer| match &peer.state {
            PeerState::Connected {
                stream, deadline, ..
            } if *deadline <= now => {
                registry.refuse(stream, Refusal::NoGreeting, 0);
                false
            }
            PeerState::Connected { .. } | PeerState::Registered(_) | PeerState::Leaving(_) => true,
        });
    }

    /// Handles a frame of a registered reader.
    ///
    /// # Errors
    /// The breach of the protocol, as the rest of a sentence about the reader.
    fn handle_frame(&mut self, reader: &Reader, frame: &Frame) -> Result<(), &'static str> {
        match frame.kind {
            kind::MEMORY_ACK => {
                let [generation, ..] = frame.numbers;
                self.registry.acknowledge(reader, generation);
                Ok(())
            }
            kind::FAULT => {
                let access =
                    access_of(frame.value).ok_or("reports a fault of an unknown access")?;
                let [address, ..] = frame.numbers;
                let fault = Fault {
                    endpoint: reader.endpoint(),
                    reason: FaultReason::Mapping,
                    access,
                    address: Iova(address),
                };
                let counters = self.registry.counters();
                let allowed = self.rate.allow(fault.endpoint, Instant::now());
                if allowed && self.faults.push(fault) {
                    counters.faults.inc();
                } else {
                    counters.faults_suppressed.inc();
                }
                Ok(())
            }
            _ => Err("sends a frame of an unknown kind"),
        }
    }
}
