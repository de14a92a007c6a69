//! One client: its messages are received in order, and each is answered before the next is received.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::device::ServedDevice;
use super::respond::{ClientError, Response, respond};
use crate::locks::{Mutex, Rank};
use crate::process::event_loop::{EventLoop, Events, Interest};
use crate::vfio_user::message::{Kind, MAX_DATA};
use crate::vfio_user::socket::{Message, Outbox, OutgoingFd, Received, Receiver};
use crate::warn_limited;

/// How long a client may take to send VERSION: other clients wait meanwhile.
pub(super) const VERSION_DEADLINE: Duration = Duration::from_secs(10);
/// How long the server rests before it waits again after a wait has failed.
pub(super) const RETRY: Duration = Duration::from_millis(100);
/// The tokens of the descriptors that the server waits for.
const SIGNAL: u64 = 0;
const CLIENT: u64 = 1;
/// The server of a device that only answers receives nothing while replies wait to be sent.
const MAX_UNSENT_REPLIES: usize = 1;
/// The server of a device that sends commands receives nothing while this many bytes wait to be
/// sent. Not less: client and server could then wait for each other to receive.
const MAX_UNSENT_COMMANDS: usize = 4 << 20;

/// Why the connection to a client ended, if the server did not cut the client off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientEnd {
    /// The client hung up between two messages.
    HungUp,
    /// [`ServerSignal::stop`] was called.
    Stopped,
}

/// Interrupts the wait of a serving thread, so that it sends what another thread has queued, or
/// stops.
#[derive(Debug)]
pub struct ServerSignal {
    event: OwnedFd,
    stopped: AtomicBool,
}

impl ServerSignal {
    /// A signal that was not sent yet.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stopped: AtomicBool::new(false),
        })
    }

    /// Makes the serving thread return after the command that it executes.
    ///
    /// # Errors
    /// The signal cannot be sent; the thread then goes on.
    pub fn stop(&self) -> io::Result<()> {
        self.stopped.store(true, Ordering::Release);
        self.wake()
    }

    /// Whether [`Self::stop`] was called.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn wake(&self) -> io::Result<()> {
        match rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            // A counter that is full is readable, too.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Makes the signal unreadable until it is sent again.
    pub(super) fn clear(&self) {
        // The count does not matter, nor whether another thread has read it.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl AsFd for ServerSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The connection to one client, which any thread may send messages through.
#[derive(Debug)]
pub struct ClientChannel {
    stream: Arc<UnixStream>,
    outbox: Mutex<Outbox>,
    signal: Arc<ServerSignal>,
}

impl ClientChannel {
    /// The connection `stream`; `signal` interrupts the thread that serves the client.
    pub fn new(stream: UnixStream, signal: Arc<ServerSignal>) -> Self {
        Self {
            stream: Arc::new(stream),
            outbox: Mutex::new(Rank::ClientOutbox, Outbox::default()),
            signal,
        }
    }

    /// Sends a message, header and body, or queues it for the serving thread to send. If the
    /// connection has failed, the serving thread finds out, too.
    pub fn send(&self, message: Vec<u8>) {
        let mut outbox = self.outbox.lock();
        outbox.push(message, Vec::new());
        if outbox.flush(&*self.stream).is_err() || !outbox.is_empty() {
            // It fails only if the descriptor is gone, which this object owns.
            let _ = self.signal.wake();
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.outbox.lock().flush(&*self.stream)
    }

    fn unsent_bytes(&self) -> usize {
        self.outbox.lock().len_bytes()
    }
}

/// Serves a client until it hangs up, violates the protocol, or the server is stopped. `events` must wait for nothing
/// else meanwhile, and waits for nothing afterwards.
///
/// The caller must call [`ServedDevice::release`] before it serves the next client.
///
/// # Errors
/// The client has to be cut off: the caller closes the connection.
pub fn serve_client(
    events: &mut EventLoop,
    channel: &ClientChannel,
    device: &mut dyn ServedDevice,
) -> Result<ClientEnd, ClientError> {
    let mut connection = ClientConnection {
        events,
        channel,
        receiver: Receiver::default(),
        version_until: Some(Instant::now() + VERSION_DEADLINE),
        max_unsent: if device.sends_commands() {
            MAX_UNSENT_COMMANDS
        } else {
            MAX_UNSENT_REPLIES
        },
    };
    let end = connection.serve(device);
    // `events` holds a reference to the stream. This call drops the reference, so that the caller closes the
    // connection by dropping `channel`. It fails only if the descriptor is gone.
    let _ = events.wait_for(&[]);
    end
}

/// The state of the connection to one client.
struct ClientConnection<'a> {
    events: &'a mut EventLoop,
    channel: &'a ClientChannel,
    receiver: Receiver,
    /// When the server cuts the client off, unless VERSION is received before.
    version_until: Option<Instant>,
    /// The server receives while fewer bytes than this wait to be sent.
    max_unsent: usize,
}

impl ClientConnection<'_> {
    fn serve(&mut self, device: &mut dyn ServedDevice) -> Result<ClientEnd, ClientError> {
        while !self.channel.signal.is_stopped() {
            match self.wait() {
                Ok(()) => {}
                Err(cause) => {
                    let name = device.name();
                    warn_limited!("{name}: cannot wait for messages: {cause}");
                    std::thread::sleep(RETRY);
                    continue;
                }
            }
            if self.channel.signal.is_stopped() {
                break;
            }
            if let Some(end) = self.serve_message(device)? {
                return Ok(end);
            }
        }
        Ok(ClientEnd::Stopped)
    }

    /// Waits until there is something to receive, to send or to stop for.
    fn wait(&mut self) -> io::Result<()> {
        let unsent = self.channel.unsent_bytes();
        let mut events = Events::empty();
        events.set(Events::EPOLLIN, unsent < self.max_unsent);
        events.set(Events::EPOLLOUT, unsent > 0);
        let signal = &self.channel.signal;
        self.events.wait_for(&[
            Interest {
                source: signal.clone(),
                token: SIGNAL,
                events: Events::EPOLLIN,
            },
            Interest {
                source: self.channel.stream.clone(),
                token: CLIENT,
                events,
            },
        ])?;
        let ready = self.events.wait(self.version_until)?;
        if ready.contains(SIGNAL) && !signal.is_stopped() {
            signal.clear();
        }
        Ok(())
    }

    /// Sends what waits, then receives and answers at most one message: the server may be stopped
    /// after each. Returns how the client ended, if it did.
    fn serve_message(
        &mut self,
        device: &mut dyn ServedDevice,
    ) -> Result<Option<ClientEnd>, ClientError> {
        self.channel.flush()?;
        if self.channel.unsent_bytes() >= self.max_unsent {
            return Ok(None);
        }
        if self.version_until.is_some_and(|at| at <= Instant::now()) {
            return Err(ClientError::Protocol("the client sent no VERSION in time"));
        }
        match self.receiver.receive(&*self.channel.stream)? {
            Received::Message(message) => self.handle_message(device, message)?,
            Received::Nothing => return Ok(None),
            Received::End => return Ok(Some(ClientEnd::HungUp)),
        }
        self.channel.flush()?;
        device.replied();
        Ok(None)
    }

    fn handle_message(
        &mut self,
        device: &mut dyn ServedDevice,
        message: Message,
    ) -> Result<(), ClientError> {
        let is_command = matches!(message.header.kind, Kind::Command { .. });
        let response = respond(device, self.version_until.is_none(), MAX_DATA, message)?;
        if is_command {
            self.version_until = None;
        }
        if let Some(Response { bytes, descriptor }) = response {
            let descriptors = descriptor.map(OutgoingFd::Owned).into_iter().collect();
            self.channel.outbox.lock().push(bytes, descriptors);
        }
        Ok(())
    }
}
