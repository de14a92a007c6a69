//! The registration sockets: one thread that lets readers in and hears what they say, and one that
//! passes faults on.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, warn};

use super::registry::{Reader, Registry};
use super::sys::receive;
use super::wire::{FRAME_LEN, Frame, Refusal, access_of, kind};
use crate::address::Iova;
use crate::faults::queue::{FaultDelivery, FaultQueue, FaultRateLimit};
use crate::faults::{Fault, FaultReason};
use crate::ids::EndpointId;
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::{self, Role};
use crate::process::socket::{SocketFile, bind};
use crate::warn_limited;

/// How long a process may take to say its greeting.
const GREETING: Duration = Duration::from_secs(2);
/// The most processes that are connected and have not said it.
const MAX_STRANGERS: usize = 16;
/// Frames read from one reader before another one gets its turn.
const FRAMES_PER_TURN: usize = 64;
/// How long the sockets rest where a process cannot be accepted.
const BACK_OFF: Duration = Duration::from_millis(100);

const STOP: u64 = 0;
const FIRST_LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 1 << 32;
/// Set in the number of the event that says that a connection's process is gone.
const EXIT: u64 = 1 << 63;

/// A socket and the endpoints that readers may register for there.
#[derive(Debug)]
pub struct ShadowSocket<'a> {
    /// The path.
    pub path: &'a Path,
    /// The endpoints.
    pub endpoints: Vec<EndpointId>,
}

/// The threads; dropping it ends them, hangs up on every reader and removes the sockets.
pub struct ShadowServer {
    /// Shut down to end the thread.
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    /// Ended after the thread that feeds it.
    _delivery: FaultDelivery,
    files: Vec<Arc<SocketFile>>,
}

impl ShadowServer {
    /// Listens at the paths. A thread of its own calls `faults` with each refused access, up to the rate
    /// that is passed on. Readers send no reason: it is always [`FaultReason::Mapping`].
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn start(
        registry: Arc<Registry>,
        sockets: &[ShadowSocket<'_>],
        faults: impl FnMut(Fault) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let events = EventLoop::new()?;
        events.add(stopped.as_raw_fd(), STOP)?;
        let mut listeners = Vec::new();
        let mut files = Vec::new();
        for (number, socket) in (FIRST_LISTENER..).zip(sockets) {
            let (listener, file) = bind(socket.path)?;
            listener.set_nonblocking(true)?;
            events.add(listener.as_raw_fd(), number)?;
            listeners.push((listener, socket.endpoints.clone()));
            files.push(Arc::new(file));
        }
        let queue = Arc::new(FaultQueue::default());
        let rate = FaultRateLimit::new(registry.limits().fault_rate);
        let mut served = Served {
            registry,
            events,
            listeners,
            connections: BTreeMap::new(),
            next: FIRST_CONNECTION,
            faults: queue.clone(),
            rate,
        };
        let delivery = FaultDelivery::start(Role::ShadowFaults, queue, faults)?;
        let thread = sandbox::spawn(Role::Shadow, move || {
            served.run();
            drop(stopped);
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
            _delivery: delivery,
            files,
        })
    }

    /// The sockets' files.
    pub fn files(&self) -> &[Arc<SocketFile>] {
        &self.files
    }
}

impl Drop for ShadowServer {
    fn drop(&mut self) {
        if let Err(cause) = self.stop.shutdown(Shutdown::Both) {
            warn!("cannot stop the shadow thread: {cause}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the shadow thread has panicked");
        }
        for file in &self.files {
            file.remove();
        }
    }
}

/// What the thread works on.
struct Served {
    registry: Arc<Registry>,
    events: EventLoop,
    listeners: Vec<(UnixListener, Vec<EndpointId>)>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    faults: Arc<FaultQueue>,
    /// A process that comes anew finds what its endpoint has left.
    rate: FaultRateLimit,
}

struct Connection {
    who: Who,
    /// The frame that is coming in, and how much of it is there.
    frame: [u8; FRAME_LEN],
    filled: usize,
}

enum Who {
    Stranger {
        stream: UnixStream,
        listener: usize,
        until: Instant,
    },
    Reader(Arc<Reader>),
    /// A reader that has hung up inside an access.
    Leaving(Arc<Reader>),
}

/// What came in on a connection.
enum Input {
    Frame(Frame),
    /// Nothing more for now.
    Nothing,
    /// The other end is closed.
    Closed,
    /// Something that must not be.
    Garbage(&'static str),
}

impl Connection {
    fn stream(&self) -> Option<&UnixStream> {
        match &self.who {
            Who::Stranger { stream, .. } => Some(stream),
            Who::Reader(reader) => Some(reader.stream()),
            Who::Leaving(_) => None,
        }
    }

    fn next(&mut self) -> Input {
        let mut frame = self.frame;
        let filled = self.filled;
        let Some(stream) = self.stream() else {
            return Input::Nothing;
        };
        let received = receive(stream, frame.get_mut(filled..).unwrap_or_default(), false);
        self.frame = frame;
        match received {
            Ok((_, fds)) if !fds.is_empty() => Input::Garbage("sends descriptors"),
            Ok((0, _)) if filled > 0 => Input::Garbage("hangs up within a frame"),
            Ok((0, _)) => Input::Closed,
            Ok((got, _)) => {
                self.filled += got;
                if self.filled < FRAME_LEN {
                    return Input::Nothing;
                }
                self.filled = 0;
                Input::Frame(Frame::from_wire(&self.frame))
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => Input::Nothing,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => Input::Nothing,
            Err(_) => Input::Closed,
        }
    }
}

impl Served {
    fn run(&mut self) {
        loop {
            let ready = match self.events.wait(self.first_deadline()) {
                Ok(ready) => ready,
                Err(cause) => {
                    warn!("the shadow sockets are closed: {cause}");
                    break;
                }
            };
            if ready.contains(STOP) {
                break;
            }
            for (number, _) in ready.iter() {
                if number & EXIT != 0 {
                    self.exited(number & !EXIT);
                } else if number >= FIRST_CONNECTION {
                    self.hear(number);
                } else {
                    self.accept(number);
                }
            }
            self.drop_silent_strangers();
        }
        for (_, connection) in std::mem::take(&mut self.connections) {
            match connection.who {
                Who::Reader(reader) | Who::Leaving(reader) => self.registry.hang_up(&reader),
                Who::Stranger { .. } => {}
            }
        }
    }

    /// When the first stranger will have been silent for too long.
    fn first_deadline(&self) -> Option<Instant> {
        let first = self.connections.values().filter_map(|c| match c.who {
            Who::Stranger { until, .. } => Some(until),
            Who::Reader(_) | Who::Leaving(_) => None,
        });
        first.min()
    }

    fn accept(&mut self, number: u64) {
        let index = usize::try_from(number - FIRST_LISTENER).unwrap_or(usize::MAX);
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
        let strangers = self.connections.values();
        let strangers = strangers.filter(|c| matches!(c.who, Who::Stranger { .. }));
        if strangers.count() >= MAX_STRANGERS {
            self.registry
                .refuse(&stream, Refusal::Full, MAX_STRANGERS as u64);
            return;
        }
        let number = self.next;
        if let Err(cause) = self.events.add(stream.as_raw_fd(), number) {
            warn_limited!("cannot listen to a reader: {cause}");
            return;
        }
        self.next += 1;
        let connection = Connection {
            who: Who::Stranger {
                stream,
                listener: index,
                until: Instant::now() + GREETING,
            },
            frame: [0; FRAME_LEN],
            filled: 0,
        };
        self.connections.insert(number, connection);
    }

    fn hear(&mut self, number: u64) {
        for _ in 0..FRAMES_PER_TURN {
            let Some(connection) = self.connections.get_mut(&number) else {
                return;
            };
            match connection.next() {
                Input::Nothing => return,
                Input::Closed => return self.closed(number),
                Input::Garbage(why) => return self.broken(number, why),
                Input::Frame(frame) => match &connection.who {
                    Who::Stranger { .. } => return self.greeted(number, &frame),
                    Who::Reader(reader) => {
                        let reader = reader.clone();
                        if let Err(why) = self.heard(&reader, &frame) {
                            return self.broken(number, why);
                        }
                    }
                    Who::Leaving(_) => return,
                },
            }
        }
    }

    fn greeted(&mut self, number: u64, greeting: &Frame) {
        let Some(connection) = self.connections.remove(&number) else {
            return;
        };
        let Who::Stranger {
            stream, listener, ..
        } = connection.who
        else {
            return;
        };
        let served = self.listeners.get(listener).map(|(_, served)| served);
        let served = served.map(Vec::as_slice).unwrap_or_default();
        match self.registry.register(stream, greeting, served) {
            Ok(reader) => {
                let process = reader.process().as_raw_fd();
                if let Err(cause) = self.events.add(process, number | EXIT) {
                    // It is noticed all the same whenever it is waited for.
                    debug!("the end of a reader is not watched: {cause}");
                }
                let connection = Connection {
                    who: Who::Reader(reader),
                    frame: [0; FRAME_LEN],
                    filled: 0,
                };
                self.connections.insert(number, connection);
            }
            Err(refusal) => {
                let [_, wanted, ..] = greeting.numbers;
                warn_limited!("a reader is refused: {refusal:?} (endpoint {wanted:#x})");
            }
        }
    }

    /// The other end is closed.
    fn closed(&mut self, number: u64) {
        let Some(connection) = self.connections.remove(&number) else {
            return;
        };
        match connection.who {
            Who::Stranger { .. } => {}
            Who::Reader(reader) | Who::Leaving(reader) => {
                self.registry.hang_up(&reader);
                self.leave(number, reader, false);
            }
        }
    }

    /// Something came in that must not be.
    fn broken(&mut self, number: u64, why: &'static str) {
        let Some(connection) = self.connections.remove(&number) else {
            return;
        };
        match connection.who {
            Who::Stranger { stream, .. } => {
                warn_limited!("a process that wants to be a reader {why}");
                self.registry.refuse(&stream, Refusal::NoGreeting, 0);
            }
            Who::Reader(reader) | Who::Leaving(reader) => {
                let dying = self.registry.expel(&reader, why);
                self.leave(number, reader, dying);
            }
        }
    }

    /// Nothing is heard from a reader any more. Its process is watched on if it is `dying` or inside
    /// an access.
    fn leave(&mut self, number: u64, reader: Arc<Reader>, dying: bool) {
        if let Err(cause) = self.events.remove(reader.stream().as_raw_fd()) {
            debug!("reader {} cannot be left alone: {cause}", reader.number());
        }
        if dying || reader.is_inside() {
            let connection = Connection {
                who: Who::Leaving(reader),
                frame: [0; FRAME_LEN],
                filled: 0,
            };
            self.connections.insert(number, connection);
        }
    }

    /// A reader's process is gone.
    fn exited(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            match connection.who {
                Who::Stranger { .. } => {}
                Who::Reader(reader) | Who::Leaving(reader) => self.registry.remove(&reader),
            }
        }
    }

    fn drop_silent_strangers(&mut self) {
        let now = Instant::now();
        let registry = &self.registry;
        self.connections
            .retain(|_, connection| match &connection.who {
                Who::Stranger { stream, until, .. } if *until <= now => {
                    registry.refuse(stream, Refusal::NoGreeting, 0);
                    false
                }
                Who::Stranger { .. } | Who::Reader(_) | Who::Leaving(_) => true,
            });
    }

    /// A reader has said something.
    fn heard(&mut self, reader: &Reader, frame: &Frame) -> Result<(), &'static str> {
        match frame.kind {
            kind::MEMORY_TAKEN => {
                let [generation, ..] = frame.numbers;
                self.registry.acknowledge(reader, generation);
                Ok(())
            }
            kind::FAULT => {
                let access = access_of(frame.value).ok_or("reports a fault of no known kind")?;
                let [address, ..] = frame.numbers;
                let fault = Fault {
                    endpoint: reader.endpoint(),
                    reason: FaultReason::Mapping,
                    access,
                    address: Iova(address),
                };
                let counters = self.registry.counters();
                let may = self.rate.allow(fault.endpoint, Instant::now());
                if may && self.faults.push(fault) {
                    counters.faults.inc();
                } else {
                    counters.faults_suppressed.inc();
                }
                Ok(())
            }
            _ => Err("says what no reader says"),
        }
    }
}
