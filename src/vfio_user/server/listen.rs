//! The thread that accepts clients and serves one after the other.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;

use super::client::{ClientChannel, ClientEnd, ServerSignal, serve_client};
use super::device::ServedDevice;
use super::kept::{ClientKeeping, KeptEnd, LeftPlace, serve_kept};
use super::respond::ClientError;
use crate::metrics::Counter;
use crate::process::event_loop::{EventLoop, Events, Interest};
use crate::process::sandbox::{self, Role};
use crate::{info_limited, warn_limited};

/// How long the server waits before it tries again to accept a client.
const RETRY: Duration = Duration::from_millis(100);
/// How long the server waits between two calls of [`ServedDevice::retry_release`].
const RETRY_RELEASE: Duration = Duration::from_secs(2);
/// The tokens of the descriptors that the server waits for.
const SIGNAL: u64 = 0;
const LISTENER: u64 = 1;

/// The state and the counters of a device's server.
#[derive(Debug, Default)]
pub struct ServerStatus {
    connected: AtomicBool,
    /// Clients that have connected so far.
    pub clients: Counter,
    /// Clients that the server cut off.
    pub cut_offs: Counter,
}

impl ServerStatus {
    /// Whether a client is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }
}

/// The running server of one device. Dropping it ends the connection and releases the device.
pub struct DeviceServer {
    status: Arc<ServerStatus>,
    signal: Arc<ServerSignal>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceServer {
    /// Serves one client after the other at `listener`, in a thread that is confined to what `role`
    /// needs.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn start(
        role: Role,
        listener: UnixListener,
        device: Box<dyn ServedDevice + Send>,
    ) -> io::Result<Self> {
        Self::start_kept(role, listener, device, None)
    }

    /// The same. With `keeping`, a client's connection outlives this process, and the server begins with the client that
    /// an earlier process has left. `device` must not send commands then.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn start_kept(
        role: Role,
        listener: UnixListener,
        device: Box<dyn ServedDevice + Send>,
        keeping: Option<ClientKeeping>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let signal = Arc::new(ServerSignal::new()?);
        let status = Arc::new(ServerStatus::default());
        let mut acceptor = Acceptor {
            device,
            status: status.clone(),
            listener: Arc::new(listener),
            signal: signal.clone(),
            events: EventLoop::new()?,
            keeping,
        };
        let thread = sandbox::spawn(role, move || acceptor.run())?;
        Ok(Self {
            status,
            signal,
            thread: Some(thread),
        })
    }

    /// The server's status, which may outlive the server.
    pub fn status(&self) -> Arc<ServerStatus> {
        self.status.clone()
    }
}

impl Drop for DeviceServer {
    fn drop(&mut self) {
        if let Err(cause) = self.signal.stop() {
            warn!("cannot stop the thread that serves a vfio-user client: {cause}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that serves a vfio-user client has panicked");
        }
    }
}

/// The state of the thread while no client is connected.
struct Acceptor {
    device: Box<dyn ServedDevice + Send>,
    status: Arc<ServerStatus>,
    listener: Arc<UnixListener>,
    signal: Arc<ServerSignal>,
    /// Made before the thread is confined, which may not make another one.
    events: EventLoop,
    keeping: Option<ClientKeeping>,
}

impl Acceptor {
    fn run(&mut self) {
        self.serve_left();
        while !self.signal.is_stopped() {
            match self.accept() {
                Ok(Some(stream)) => self.serve(stream),
                Ok(None) => {}
                Err(cause) => {
                    let name = self.device.name();
                    warn_limited!("{name}: cannot accept a client: {cause}");
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    /// Waits for a client. Returns `None` if there is none yet.
    fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        self.events.wait_for(&[
            Interest {
                source: self.signal.clone(),
                token: SIGNAL,
                events: Events::EPOLLIN,
            },
            Interest {
                source: self.listener.clone(),
                token: LISTENER,
                events: Events::EPOLLIN,
            },
        ])?;
        let is_waiting = self.device.is_waiting();
        let until = is_waiting.then(|| Instant::now() + RETRY_RELEASE);
        let ready = self.events.wait(until)?;
        if is_waiting && !ready.contains(SIGNAL) && !ready.contains(LISTENER) {
            self.device.retry_release();
            return Ok(None);
        }
        if ready.contains(SIGNAL) {
            // Sent to stop, or left over from the last client.
            if !self.signal.is_stopped() {
                self.signal.clear();
            }
            return Ok(None);
        }
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(cause) => Err(cause),
        }
    }

    /// Serves the client that an earlier process has left.
    fn serve_left(&mut self) {
        let keeping = self.keeping.as_mut();
        let Some(left) = keeping.and_then(|keeping| keeping.left.take()) else {
            return;
        };
        let name = self.device.name();
        info_limited!("{name}: going on with the client of the daemon before");
        let record = left.device.as_ref();
        let resumed = record.map_or(Ok(()), |record| self.device.resume(record, &left.files));
        // The device has its own copies.
        drop(left.files);
        if let Err(cause) = resumed {
            let name = self.device.name();
            let text = format!(
                "{name}: the client of the daemon before cannot be served: {cause}; its connection is closed, so the VM \
                 must be started anew"
            );
            warn_limited!("{text}");
            self.device.release();
            if let Some(keeping) = &mut self.keeping {
                keeping.lose(text);
                keeping.close(&left.socket);
            }
            return;
        }
        self.serve_kept(left.socket, Some(left.place));
    }

    fn serve(&mut self, stream: UnixStream) {
        info_limited!("{}: a client has connected", self.device.name());
        if let Some(keeping) = &mut self.keeping {
            keeping.open(&stream);
            self.serve_kept(stream, None);
            return;
        }
        self.begin();
        let channel = ClientChannel::new(stream, self.signal.clone());
        let outcome = serve_client(&mut self.events, &channel, &mut *self.device);
        self.end(outcome);
        // Last: a client that sees the end must find the device released.
        drop(channel);
    }

    /// Serves a client whose connection outlives this process.
    fn serve_kept(&mut self, stream: UnixStream, left: Option<LeftPlace>) {
        self.begin();
        let socket = Arc::new(stream);
        let Some(keeping) = &mut self.keeping else {
            return;
        };
        let outcome = serve_kept(
            &mut self.events,
            &socket,
            &self.signal,
            &mut *self.device,
            keeping,
            left,
        );
        let outcome = match outcome {
            Ok(KeptEnd::HungUp) => Ok(ClientEnd::HungUp),
            Ok(KeptEnd::Stopped) => Ok(ClientEnd::Stopped),
            #[cfg(test)]
            Ok(KeptEnd::Died) => return,
            Err(cause) => Err(cause),
        };
        self.end(outcome);
        if let Some(keeping) = &mut self.keeping {
            keeping.close(&socket);
        }
    }

    fn begin(&self) {
        self.status.clients.inc();
        self.status.connected.store(true, Ordering::Relaxed);
    }

    /// Releases the device.
    fn end(&mut self, outcome: Result<ClientEnd, ClientError>) {
        let name = self.device.name();
        match outcome {
            Ok(ClientEnd::Stopped) => {}
            Ok(ClientEnd::HungUp) => info_limited!("{name}: the client has hung up"),
            Err(cause) => {
                self.status.cut_offs.inc();
                warn_limited!("{name}: the client is cut off: {cause}");
            }
        }
        self.device.release();
        self.status.connected.store(false, Ordering::Relaxed);
    }
}
