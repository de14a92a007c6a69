//! The thread between a client and a server. It waits for nobody: what cannot be sent is kept, and
//! where too much is kept nothing more is taken in from whoever caused it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::IntoBytes;

use super::client_windows::ClientWindows;
use super::irqs::Irqs;
use super::link::{Link, Pulse, Settled};
use super::message::{
    Command, DmaMapBody, DmaUnmapBody, FEATURE_INDEX, FEATURES_DMA_LOGGING, FeatureBody, Header,
    Kind, RegionAccessBody, check_command, check_reply, take,
};
use super::socket::{Descriptor, Message, Outbox, Received, Receiver, connect};
use super::version::{Terms, Version};
use super::{DmaTarget, dma};
use crate::{info_limited, warn_limited};

/// Messages taken from one peer before the others have their turn.
const TURN: usize = 16;
/// The most commands of the client's that wait for replies; the next ones wait unread.
const MAX_COMMANDS: usize = 64;
/// While this many bytes wait to be sent to a peer, nothing is taken in that adds to them.
const MAX_WAITING: usize = 4 << 20;
/// How long it takes to try once more to reach a server, or to accept a client.
const RETRY: Duration = Duration::from_millis(100);
/// How long a server may take to answer VERSION.
const VERSION_PATIENCE: Duration = Duration::from_secs(5);
/// How long a client may take to say VERSION, while others wait.
const FIRST_WORD_PATIENCE: Duration = Duration::from_secs(10);

/// Whom an interposer stands between.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The device's name, for messages.
    pub name: String,
    /// Where the device's server listens.
    pub server: PathBuf,
}

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
        settings: Settings,
        listener: UnixListener,
        link: Arc<Link>,
        target: Arc<dyn DmaTarget>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut between = Between {
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
        let thread = std::thread::Builder::new()
            .name("vfio-user".into())
            .spawn(move || {
                while !stopping.load(Ordering::Acquire) {
                    between.turn();
                }
                between.link.end(None);
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

/// All the thread has.
struct Between {
    settings: Settings,
    listener: UnixListener,
    link: Arc<Link>,
    target: Arc<dyn DmaTarget>,
    client: Option<Client>,
    server: Option<Server>,
    /// Not before this is a client accepted.
    accept_at: Option<Instant>,
    /// Not before this is the server tried.
    connect_at: Instant,
}

struct Client {
    socket: Arc<UnixStream>,
    receiver: Receiver,
    outbox: Outbox,
    stage: Stage,
    windows: ClientWindows,
    irqs: Irqs,
    /// It has descriptors of the server's, which lead nowhere when that is gone.
    holds_descriptors: bool,
}

/// How far a client has come.
enum Stage {
    /// It has said nothing yet, and is to until this.
    Fresh(Instant),
    /// It waits for the answer to its VERSION.
    Asked { header: Header, version: Version },
    /// It was answered.
    Agreed {
        version: Version,
        answer: Box<Version>,
        terms: Terms,
    },
}

struct Server {
    session: u64,
    socket: Arc<OwnedFd>,
    receiver: Receiver,
    /// The socket of the server's commands.
    twin: Option<Twin>,
    /// When VERSION has to be answered, where it is not.
    answer_until: Option<Instant>,
}

struct Twin {
    socket: Arc<OwnedFd>,
    receiver: Receiver,
    outbox: Outbox,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Wake,
    Listener,
    Client,
    Server,
    Twin,
}

/// Why a connection ends: words for the log.
type Reason = String;

impl Between {
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
                Source::Wake => self.link.awake(),
                Source::Listener => self.accept(),
                Source::Client => self.client_ready(flags),
                Source::Server => self.server_ready(flags),
                Source::Twin => self.twin_ready(flags),
            }
        }
    }

    /// Which descriptors have something, after no longer than until something is due.
    fn wait(&self) -> io::Result<Vec<(Source, PollFlags)>> {
        let pulse = self.link.pulse();
        let now = Instant::now();
        let mut sources = vec![Source::Wake];
        let mut fds = vec![PollFd::from_borrowed_fd(self.link.woken(), PollFlags::IN)];
        let mut due: Vec<Instant> = Vec::new();
        match &self.client {
            Some(client) => {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, client.may_speak(&pulse));
                flags.set(PollFlags::OUT, !client.outbox.is_empty());
                sources.push(Source::Client);
                fds.push(PollFd::new(&client.socket, flags));
                match client.stage {
                    Stage::Fresh(until) => due.push(until),
                    Stage::Asked { .. } | Stage::Agreed { .. } if self.server.is_none() => {
                        due.push(self.connect_at);
                    }
                    Stage::Asked { .. } | Stage::Agreed { .. } => {}
                }
            }
            None => match self.accept_at.filter(|at| *at > now) {
                Some(at) => due.push(at),
                None => {
                    sources.push(Source::Listener);
                    fds.push(PollFd::new(&self.listener, PollFlags::IN));
                }
            },
        }
        if let Some(server) = &self.server {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, pulse.bytes < MAX_WAITING);
            flags.set(PollFlags::OUT, pulse.bytes > 0);
            sources.push(Source::Server);
            fds.push(PollFd::new(&server.socket, flags));
            due.extend(server.answer_until);
            if let Some(twin) = &server.twin {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, twin.outbox.len_bytes() < MAX_WAITING);
                flags.set(PollFlags::OUT, !twin.outbox.is_empty());
                sources.push(Source::Twin);
                fds.push(PollFd::new(&twin.socket, flags));
            }
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
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
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
                self.client = Some(Client {
                    socket: Arc::new(socket),
                    receiver: Receiver::default(),
                    outbox: Outbox::default(),
                    stage: Stage::Fresh(Instant::now() + FIRST_WORD_PATIENCE),
                    windows: ClientWindows::default(),
                    irqs: Irqs::default(),
                    holds_descriptors: false,
                });
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
        let pulse = self.link.pulse();
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
                self.server = Some(Server {
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

    /// The link has ended, whoever ended it.
    fn server_lost(&mut self) {
        self.server = None;
        let orphans = self.link.take_orphans();
        let Some(client) = &mut self.client else {
            return;
        };
        if client.holds_descriptors {
            let why = "its server is gone, and it has descriptors of that one's";
            return self.end_client(why);
        }
        for header in orphans {
            client.refuse(&header, libc::EIO);
        }
        self.flush_client();
    }

    /// The server is to blame for something.
    fn end_server(&mut self, why: &str) {
        warn_limited!("{}: the server is cut off: {why}", self.settings.name);
        self.link.end(Some(why));
        self.server_lost();
    }

    /// The client is gone, or is to go: so is the connection to its server.
    fn end_client(&mut self, why: &str) {
        info_limited!("{}: the client is gone: {why}", self.settings.name);
        self.client = None;
        self.link.end(None);
        self.server = None;
        drop(self.link.take_orphans());
        self.connect_at = Instant::now();
    }

    fn flush_client(&mut self) {
        if let Some(client) = &mut self.client
            && let Err(cause) = client.outbox.flush(&*client.socket)
        {
            self.end_client(&cause.to_string());
        }
    }

    fn client_ready(&mut self, flags: PollFlags) {
        if flags.contains(PollFlags::OUT) {
            self.flush_client();
        }
        for _ in 0..TURN {
            let pulse = self.link.pulse();
            let Some(client) = &mut self.client else {
                return;
            };
            if !client.may_speak(&pulse) {
                if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                    self.end_client("it has hung up");
                }
                return;
            }
            let done = match client.receiver.receive(&*client.socket) {
                Ok(Received::Message(message)) => self.client_says(message),
                Ok(Received::Nothing) => return,
                Ok(Received::End) => return self.end_client("it has hung up"),
                Err(cause) => Err(cause.to_string()),
            };
            match done {
                Ok(()) => self.flush_client(),
                Err(why) => {
                    warn_limited!("{}: the client is cut off: {why}", self.settings.name);
                    return self.end_client(&why);
                }
            }
        }
    }

    fn client_says(&mut self, message: Message) -> Result<(), Reason> {
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let header = message.header;
        if !matches!(header.kind, Kind::Command { .. }) {
            return Err("it replies, and was asked nothing".into());
        }
        let command = Command::from_number(header.command);
        if let Some(command) = command {
            check_command(command, &message.body, message.descriptors.len())
                .map_err(|e| e.to_string())?;
        }
        let terms = match &client.stage {
            Stage::Agreed { terms, .. } => terms,
            Stage::Fresh(_) | Stage::Asked { .. } => {
                if command != Some(Command::Version) {
                    return Err("its first word is not VERSION".into());
                }
                let version = Version::decode(&message.body).map_err(|e| e.to_string())?;
                version.proposal().map_err(|e| e.to_string())?;
                client.stage = Stage::Asked { header, version };
                self.connect_at = Instant::now();
                return Ok(());
            }
        };
        let Some(command) = command else {
            client.refuse(&header, libc::ENOTSUP);
            return Ok(());
        };
        match command {
            Command::Version => return Err("it says VERSION twice".into()),
            Command::DmaRead | Command::DmaWrite => {
                return Err(format!("{command:?} is a server's command"));
            }
            Command::DmaMap => {
                let (body, _) =
                    take::<DmaMapBody>(command, &message.body).map_err(|e| e.to_string())?;
                let done = client.windows.map(&body);
                client.answer(&header, done, &[]);
                return Ok(());
            }
            Command::DmaUnmap => {
                let (body, _) =
                    take::<DmaUnmapBody>(command, &message.body).map_err(|e| e.to_string())?;
                let done = client.windows.unmap(&body);
                client.answer(&header, done, body.as_bytes());
                return Ok(());
            }
            // The client counts guest-physical pages, the server IOVAs: a log of those would have
            // a client overlook what was written.
            Command::DirtyPages => {
                client.refuse(&header, libc::ENOTSUP);
                return Ok(());
            }
            Command::DeviceFeature => {
                let (body, _) =
                    take::<FeatureBody>(command, &message.body).map_err(|e| e.to_string())?;
                if FEATURES_DMA_LOGGING.contains(&(body.flags.get() & FEATURE_INDEX)) {
                    client.refuse(&header, libc::ENOTSUP);
                    return Ok(());
                }
            }
            Command::RegionRead | Command::RegionWrite => {
                let (body, _) =
                    take::<RegionAccessBody>(command, &message.body).map_err(|e| e.to_string())?;
                if body.count.get() > terms.server_data {
                    client.refuse(&header, libc::E2BIG);
                    return Ok(());
                }
            }
            Command::DeviceGetInfo
            | Command::DeviceGetRegionInfo
            | Command::DeviceGetRegionIoFds
            | Command::DeviceGetIrqInfo
            | Command::DeviceSetIrqs
            | Command::DeviceReset
            | Command::RegionWriteMulti
            | Command::MigDataRead
            | Command::MigDataWrite => {}
        }
        if message.descriptors.len() > terms.server_descriptors {
            client.refuse(&header, libc::E2BIG);
            return Ok(());
        }
        let files = message.descriptors.into_iter().map(File::from);
        let files: Vec<Arc<File>> = files.map(Arc::new).collect();
        if command == Command::DeviceSetIrqs {
            client.irqs.note(&message.body, &files);
        }
        let descriptors = files.into_iter().map(Descriptor::Shared).collect();
        if !self
            .link
            .forward(header, command, &message.body, descriptors)
        {
            client.refuse(&header, libc::EIO);
        }
        Ok(())
    }

    fn server_ready(&mut self, flags: PollFlags) {
        if flags.contains(PollFlags::OUT) {
            self.link.flush();
        }
        for _ in 0..TURN {
            let pulse = self.link.pulse();
            let Some(server) = &mut self.server else {
                return;
            };
            if !pulse.connected || pulse.session != server.session {
                return self.server_lost();
            }
            if pulse.bytes >= MAX_WAITING {
                if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                    self.link.end(None);
                }
                return;
            }
            let done = match server.receiver.receive(&server.socket) {
                Ok(Received::Message(message)) => self.server_says(message),
                Ok(Received::Nothing) => break,
                Ok(Received::End) => {
                    warn_limited!("{}: the server has hung up", self.settings.name);
                    self.link.end(None);
                    return self.server_lost();
                }
                Err(cause) => Err(cause.to_string()),
            };
            if let Err(why) = done {
                return self.end_server(&why);
            }
        }
        self.flush_client();
    }

    fn server_says(&mut self, message: Message) -> Result<(), Reason> {
        if matches!(message.header.kind, Kind::Command { .. }) {
            if let Some(reply) = self.serve(&message)? {
                self.link.reply(reply);
            }
            return Ok(());
        }
        let client_header = match self.link.settle(&message.header) {
            Settled::Done => return Ok(()),
            Settled::Wrong(what) => return Err(what.into()),
            Settled::Version => return self.agree(message),
            Settled::Client(header) => header,
        };
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        if message.header.kind == Kind::Reply
            && let Some(command) = Command::from_number(client_header.command)
        {
            check_reply(command, &message.body, message.descriptors.len())
                .map_err(|e| e.to_string())?;
        }
        let takes = match &client.stage {
            Stage::Agreed { terms, .. } => terms.client_descriptors,
            Stage::Fresh(_) | Stage::Asked { .. } => 0,
        };
        if message.descriptors.len() > takes
            || (message.header.kind != Kind::Reply && !message.descriptors.is_empty())
        {
            let have = message.descriptors.len();
            return Err(format!(
                "a reply with {have} descriptors; the client takes {takes}"
            ));
        }
        client.holds_descriptors |= !message.descriptors.is_empty();
        let reply = Header {
            id: client_header.id,
            ..message.header
        };
        let descriptors = message.descriptors.into_iter().map(Descriptor::Owned);
        client
            .outbox
            .push(reply.with_body(&message.body), descriptors.collect());
        Ok(())
    }

    /// The server has answered VERSION.
    fn agree(&mut self, message: Message) -> Result<(), Reason> {
        let (Some(client), Some(server)) = (&mut self.client, &mut self.server) else {
            return Ok(());
        };
        let asked = match &client.stage {
            Stage::Fresh(_) => return Ok(()),
            Stage::Asked { version, .. } | Stage::Agreed { version, .. } => version,
        };
        let agreed = match message.header.kind {
            Kind::Refusal(error) => Err(format!("it refuses VERSION: errno {error}")),
            Kind::Command { .. } | Kind::Reply => Version::decode(&message.body)
                .and_then(|said| asked.answer(&said, message.descriptors.len()))
                .map_err(|e| e.to_string()),
        };
        let (answer, terms) = match agreed {
            Ok(agreed) => agreed,
            Err(why) => {
                self.end_client("there is no server for it");
                return Err(why);
            }
        };
        server.answer_until = None;
        let twin = terms.twin.and_then(|at| {
            let mut descriptors = message.descriptors;
            (at < descriptors.len()).then(|| descriptors.swap_remove(at))
        });
        server.twin = twin.map(|socket| Twin {
            socket: Arc::new(socket),
            receiver: Receiver::default(),
            outbox: Outbox::default(),
        });
        let most = terms.server_descriptors;
        match &client.stage {
            Stage::Agreed { answer: before, .. } if **before != answer => {
                self.end_client("its server has come back another one");
                return Ok(());
            }
            Stage::Agreed { .. } | Stage::Fresh(_) => {}
            Stage::Asked { header, version } => {
                let body = answer.encode();
                let reply = header.reply_to(body.len());
                client.outbox.push(reply.with_body(&body), Vec::new());
                client.stage = Stage::Agreed {
                    version: version.clone(),
                    answer: Box::new(answer),
                    terms: terms.clone(),
                };
            }
        }
        let again = client.irqs.messages(most);
        info_limited!("{}: the server has connected", self.settings.name);
        self.link.come_up(terms, || self.target.windows(), again);
        Ok(())
    }

    fn twin_ready(&mut self, flags: PollFlags) {
        for _ in 0..TURN {
            let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
                return;
            };
            if let Err(cause) = twin.outbox.flush(&twin.socket) {
                return self.end_server(&cause.to_string());
            }
            if twin.outbox.len_bytes() >= MAX_WAITING {
                if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                    self.end_server("it has closed the socket of its commands");
                }
                return;
            }
            let received = twin.receiver.receive(&twin.socket);
            let done = match received {
                Ok(Received::Message(message)) => {
                    if matches!(message.header.kind, Kind::Command { .. }) {
                        self.serve(&message)
                    } else {
                        Err("a reply on the socket of its commands".into())
                    }
                }
                Ok(Received::Nothing) => return,
                Ok(Received::End) => Err("it has closed the socket of its commands".into()),
                Err(cause) => Err(cause.to_string()),
            };
            match done {
                Ok(None) => {}
                Ok(Some(reply)) => {
                    let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
                        return;
                    };
                    twin.outbox.push(reply, Vec::new());
                    if let Err(cause) = twin.outbox.flush(&twin.socket) {
                        return self.end_server(&cause.to_string());
                    }
                }
                Err(why) => return self.end_server(&why),
            }
        }
    }

    /// Does what a command of the server's asks for. Returns the reply, if one is wanted.
    fn serve(&self, message: &Message) -> Result<Option<Vec<u8>>, Reason> {
        let header = &message.header;
        let reply = match Command::from_number(header.command) {
            Some(command @ (Command::DmaRead | Command::DmaWrite)) => {
                check_command(command, &message.body, message.descriptors.len())
                    .map_err(|e| e.to_string())?;
                dma::serve(&*self.target, header, command, &message.body)
                    .map_err(|e| e.to_string())?
            }
            Some(_) | None => header.refusal_of(libc::ENOTSUP).encode().to_vec(),
        };
        Ok((!header.wants_no_reply()).then_some(reply))
    }
}

impl Client {
    /// Whether its next message is taken in.
    fn may_speak(&self, pulse: &Pulse) -> bool {
        if self.outbox.len_bytes() >= MAX_WAITING {
            return false;
        }
        match self.stage {
            Stage::Fresh(_) => true,
            Stage::Asked { .. } => false,
            // What the server is to know already when it gets a command has to go first.
            Stage::Agreed { .. } => {
                !pulse.connected
                    || (pulse.up
                        && pulse.told
                        && pulse.commands < MAX_COMMANDS
                        && pulse.bytes < MAX_WAITING)
            }
        }
    }

    fn answer(&mut self, header: &Header, done: Result<(), i32>, body: &[u8]) {
        match done {
            Ok(()) if header.wants_no_reply() => {}
            Ok(()) => {
                let reply = header.reply_to(body.len()).with_body(body);
                self.outbox.push(reply, Vec::new());
            }
            Err(error) => self.refuse(header, error),
        }
    }

    fn refuse(&mut self, header: &Header, error: i32) {
        if !header.wants_no_reply() {
            let reply = header.refusal_of(error).encode().to_vec();
            self.outbox.push(reply, Vec::new());
        }
    }
}
