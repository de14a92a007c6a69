//! The thread that serves a VMM's vfio-user client: one at a time, one command after the other.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use zerocopy::IntoBytes;

use super::device::Offered;
use crate::metrics::Counter;
use crate::process::sandbox::{self, Role};
use crate::vfio_user::ClientWindows;
use crate::vfio_user::message::{
    Command, DmaMapBody, DmaUnmapBody, Header, IrqInfoBody, IrqSetBody, Kind, Malformed,
    RegionAccessBody, RegionInfoBody, WriteMultiBody, WriteOneBody, check_command, take,
};
use crate::vfio_user::socket::{Descriptor, Message, Outbox, Received, Receiver};
use crate::vfio_user::version::Version;
use crate::{info_limited, warn_limited};

/// How long a client may take to say VERSION, while others wait.
const FIRST_WORD_PATIENCE: Duration = Duration::from_secs(10);
/// How long it takes to try once more to accept a client, or to wait.
const RETRY: Duration = Duration::from_millis(100);

/// How an exported device is doing.
#[derive(Debug, Default)]
pub struct ExportState {
    connected: AtomicBool,
    /// Clients so far.
    pub clients: Counter,
    /// Those of them that were cut off for what they said.
    pub cut_offs: Counter,
}

impl ExportState {
    /// Whether a client is there.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }
}

/// A server of one device; dropping it ends it, and releases the device.
pub struct ExportServer {
    state: Arc<ExportState>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl ExportServer {
    /// Serves one client after the other at `listener`.
    ///
    /// # Errors
    /// Where the system has no descriptor or thread left.
    pub fn start(listener: UnixListener, device: Offered) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let state = Arc::new(ExportState::default());
        let mut server = Server {
            device,
            state: state.clone(),
            listener,
            stop: stop.clone(),
            client: None,
        };
        let thread = sandbox::spawn(Role::Export, move || server.run())?;
        Ok(Self {
            state,
            stop,
            thread: Some(thread),
        })
    }

    /// How it is doing, whoever owns the server.
    pub fn state(&self) -> Arc<ExportState> {
        self.state.clone()
    }
}

impl Drop for ExportServer {
    fn drop(&mut self) {
        if let Err(cause) = rustix::io::write(&*self.stop, &1u64.to_ne_bytes()) {
            warn!("the thread of an exported device cannot be ended: {cause}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread of an exported device has panicked");
        }
    }
}

/// All the thread has.
struct Server {
    device: Offered,
    state: Arc<ExportState>,
    listener: UnixListener,
    stop: Arc<OwnedFd>,
    client: Option<Client>,
}

struct Client {
    socket: UnixStream,
    receiver: Receiver,
    outbox: Outbox,
    /// Until when it has to have said VERSION, where it has not.
    silent_until: Option<Instant>,
    windows: ClientWindows,
}

/// Why a connection ends: words for the log.
type Reason = String;

/// What there is to reply.
struct Reply {
    body: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Server {
    fn run(&mut self) {
        loop {
            match self.wait() {
                Ok(Ready::Stop) => break,
                Ok(Ready::Listener) => self.accept(),
                Ok(Ready::Client) => self.serve_client(),
                Ok(Ready::Nothing) => {}
                Err(cause) => {
                    let name = self.device.name();
                    warn_limited!("{name}: cannot wait for messages: {cause}");
                    std::thread::sleep(RETRY);
                }
            }
        }
        if self.client.take().is_some() {
            self.device.release();
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
        let mut due = None;
        match &self.client {
            Some(client) if client.outbox.is_empty() => {
                due = client.silent_until;
                fds.push(PollFd::new(&client.socket, PollFlags::IN));
            }
            // Nothing more is taken in from a client that does not read.
            Some(client) => fds.push(PollFd::new(&client.socket, PollFlags::OUT)),
            None => fds.push(PollFd::new(&self.listener, PollFlags::IN)),
        }
        let timeout = due.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            // Rounded up, so as not to come back too early again and again.
            let left = left + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::Nothing),
            Err(cause) => return Err(cause.into()),
        }
        let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(if is_ready(0) {
            Ready::Stop
        } else if self.client.is_some() {
            Ready::Client
        } else if is_ready(1) {
            Ready::Listener
        } else {
            Ready::Nothing
        })
    }

    fn accept(&mut self) {
        let name = self.device.name();
        match self.listener.accept() {
            Ok((socket, _)) => {
                info_limited!("{name}: a client has connected");
                self.state.clients.inc();
                self.state.connected.store(true, Ordering::Relaxed);
                self.client = Some(Client {
                    socket,
                    receiver: Receiver::default(),
                    outbox: Outbox::default(),
                    silent_until: Some(Instant::now() + FIRST_WORD_PATIENCE),
                    windows: ClientWindows::default(),
                });
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
            Err(cause) => {
                warn_limited!("{name}: no client can be accepted: {cause}");
                std::thread::sleep(RETRY);
            }
        }
    }

    /// Takes one message at the most: the daemon may be told to end meanwhile.
    fn serve_client(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        let done = client.turn(&mut self.device);
        let (why, odd) = match done {
            Ok(true) => return,
            Ok(false) => ("it has hung up".to_owned(), false),
            Err(why) => (why, true),
        };
        let name = self.device.name();
        if odd {
            self.state.cut_offs.inc();
            warn_limited!("{name}: the client is cut off: {why}");
        } else {
            info_limited!("{name}: the client is gone: {why}");
        }
        // The next one finds the device as after a reset; this one is told last that it is gone.
        let gone = self.client.take();
        self.device.release();
        self.state.connected.store(false, Ordering::Relaxed);
        drop(gone);
    }
}

/// What is to be done.
enum Ready {
    Stop,
    Listener,
    Client,
    Nothing,
}

impl Client {
    /// Sends what waits, then takes one message. `false` where the client has hung up.
    fn turn(&mut self, device: &mut Offered) -> Result<bool, Reason> {
        self.flush()?;
        if !self.outbox.is_empty() {
            return Ok(true);
        }
        if self.silent_until.is_some_and(|at| at <= Instant::now()) {
            return Err("it says nothing".into());
        }
        match self.receiver.receive(&self.socket) {
            Ok(Received::Message(message)) => self.serve(device, message)?,
            Ok(Received::Nothing) => return Ok(true),
            Ok(Received::End) => return Ok(false),
            Err(cause) => return Err(cause.to_string()),
        }
        self.flush()?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), Reason> {
        self.outbox
            .flush(&self.socket)
            .map_err(|cause| cause.to_string())
    }

    fn serve(&mut self, device: &mut Offered, message: Message) -> Result<(), Reason> {
        let header = message.header;
        if !matches!(header.kind, Kind::Command { .. }) {
            return Err("it replies, and was asked nothing".into());
        }
        let command = Command::from_number(header.command);
        if let Some(command) = command {
            check_command(command, &message.body, message.descriptors.len())
                .map_err(|e| e.to_string())?;
        }
        if self.silent_until.is_some() {
            if command != Some(Command::Version) {
                return Err("its first word is not VERSION".into());
            }
            let version = Version::decode(&message.body).map_err(|e| e.to_string())?;
            let answer = version.server_answer().map_err(|e| e.to_string())?;
            self.silent_until = None;
            self.reply(&header, Ok(answer.encode().into()));
            return Ok(());
        }
        let done = match command {
            None => Err(libc::ENOTSUP),
            Some(Command::Version) => return Err("it says VERSION twice".into()),
            Some(command @ (Command::DmaRead | Command::DmaWrite)) => {
                return Err(format!("{command:?} is a server's command"));
            }
            Some(command) => self
                .obey(device, command, message)
                .map_err(|e| e.to_string())?,
        };
        self.reply(&header, done);
        Ok(())
    }

    /// Does what a well-formed command asks for.
    fn obey(
        &mut self,
        device: &mut Offered,
        command: Command,
        message: Message,
    ) -> Result<Result<Reply, i32>, Malformed> {
        let body = &message.body[..];
        Ok(match command {
            // The RAM is known from the VMM's memory table, and what the device may reach of it from
            // the guest: see `docs/export.md`.
            Command::DmaMap => {
                let (map, _) = take::<DmaMapBody>(command, body)?;
                self.windows.map(&map).map(|()| Vec::new().into())
            }
            Command::DmaUnmap => {
                let (unmap, _) = take::<DmaUnmapBody>(command, body)?;
                let done = self.windows.unmap(&unmap);
                done.map(|()| unmap.as_bytes().to_vec().into())
            }
            Command::DeviceGetInfo => Ok(device.info().as_bytes().to_vec().into()),
            Command::DeviceGetRegionInfo => {
                let (asked, _) = take::<RegionInfoBody>(command, body)?;
                device.region(&asked).map(|reply| Reply {
                    body: reply.body,
                    descriptor: reply.descriptor,
                })
            }
            Command::DeviceGetIrqInfo => {
                let (asked, _) = take::<IrqInfoBody>(command, body)?;
                device
                    .irq(&asked)
                    .map(|info| info.as_bytes().to_vec().into())
            }
            Command::DeviceSetIrqs => {
                let (set, data) = take::<IrqSetBody>(command, body)?;
                let done = device.set_irqs(&set, data, message.descriptors);
                done.map(|()| Vec::new().into())
            }
            Command::RegionRead => {
                let (access, _) = take::<RegionAccessBody>(command, body)?;
                device.read(&access).map(|data| {
                    let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
                    let head = RegionAccessBody {
                        count: count.into(),
                        ..access
                    };
                    [head.as_bytes(), &data].concat().into()
                })
            }
            Command::RegionWrite => {
                let (access, data) = take::<RegionAccessBody>(command, body)?;
                device.write(&access, data).map(|count| {
                    let head = RegionAccessBody {
                        count: count.into(),
                        ..access
                    };
                    head.as_bytes().to_vec().into()
                })
            }
            Command::RegionWriteMulti => {
                let (multi, entries) = take::<WriteMultiBody>(command, body)?;
                write_multi(device, &multi, entries)?.map(|done| done.as_bytes().to_vec().into())
            }
            Command::DeviceReset => device.reset().map(|()| Vec::new().into()),
            Command::Version
            | Command::DmaRead
            | Command::DmaWrite
            | Command::DeviceGetRegionIoFds
            | Command::DirtyPages
            | Command::DeviceFeature
            | Command::MigDataRead
            | Command::MigDataWrite => Err(libc::ENOTSUP),
        })
    }

    fn reply(&mut self, header: &Header, done: Result<Reply, i32>) {
        if header.wants_no_reply() {
            return;
        }
        match done {
            Ok(reply) => {
                let bytes = header.reply_to(reply.body.len()).with_body(&reply.body);
                let descriptor = reply.descriptor.map(Descriptor::Owned);
                self.outbox.push(bytes, descriptor.into_iter().collect());
            }
            Err(error) => {
                let refusal = header.refusal_of(error).encode().to_vec();
                self.outbox.push(refusal, Vec::new());
            }
        }
    }
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self {
            body,
            descriptor: None,
        }
    }
}

/// Does one write after the other up to the first that fails: how many were done, or the errno of
/// the first.
fn write_multi(
    device: &Offered,
    multi: &WriteMultiBody,
    mut entries: &[u8],
) -> Result<Result<WriteMultiBody, i32>, Malformed> {
    let mut done = 0u64;
    while done < multi.count.get() {
        let (entry, rest) = take::<WriteOneBody>(Command::RegionWriteMulti, entries)?;
        entries = rest;
        let access = RegionAccessBody {
            offset: entry.offset,
            region: entry.region,
            count: entry.count,
        };
        match device.write(&access, &entry.data) {
            Ok(_) => done += 1,
            Err(error) if done == 0 => return Ok(Err(error)),
            Err(_) => break,
        }
    }
    Ok(Ok(WriteMultiBody { count: done.into() }))
}
