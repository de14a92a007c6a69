//! The parts of the bed.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;

use super::super::message::{HEADER_LEN, MessageBytes, NEED_REPLY, send};
use super::Steps;
use crate::device::Device;
use crate::process::inherited::is_same_file;
use crate::process::keeper::{Keeper, PREFIX};
use crate::transport::vhost_user::LeftVmm;
use crate::transport::vhost_user::serve::{Stopper, VhostUserServer};

/// Nothing that works takes so long.
pub(super) const HANG: Duration = Duration::from_secs(30);

pub(super) type Files = BTreeMap<String, OwnedFd>;

/// A service manager: keeps descriptors from one life of the daemon to the next.
pub(super) struct Manager {
    files: Arc<Mutex<Files>>,
    /// The daemon's end of each life.
    lives: Vec<UnixDatagram>,
    settled: (mpsc::Sender<()>, mpsc::Receiver<()>),
}

impl Manager {
    pub(super) fn new() -> Self {
        Self {
            files: Arc::default(),
            lives: Vec::new(),
            settled: mpsc::channel(),
        }
    }

    /// The keeper of the next life, with all that the one before has left.
    pub(super) fn keeper(&mut self) -> Arc<Keeper> {
        if !self.lives.is_empty() {
            self.settle();
        }
        let (ours, theirs) = UnixDatagram::pair().expect("sockets");
        let files = self.files.clone();
        let settled = self.settled.0.clone();
        std::thread::spawn(move || {
            while let Some((message, file)) = receive(&ours) {
                if message == "settle" {
                    let _ = settled.send(());
                } else {
                    store(&mut files.lock().expect("files"), &message, file);
                }
            }
        });
        self.lives.push(theirs.try_clone().expect("a copy"));
        let left: Vec<_> = self
            .files
            .lock()
            .expect("files")
            .iter()
            .map(|(name, file)| (name.clone(), file.try_clone().expect("a copy")))
            .collect();
        Arc::new(Keeper::new(theirs, left).expect("a keeper"))
    }

    /// Waits until all messages of the present life are read.
    pub(super) fn settle(&self) {
        let life = self.lives.last().expect("a life");
        life.send(b"settle").expect("sent");
        self.settled.1.recv_timeout(HANG).expect("settled");
    }

    /// The names of what is kept.
    pub(super) fn names(&self) -> Vec<String> {
        self.settle();
        self.files.lock().expect("files").keys().cloned().collect()
    }

    /// Changes what is kept.
    pub(super) fn with_files<T>(&self, change: impl FnOnce(&mut Files) -> T) -> T {
        self.settle();
        change(&mut self.files.lock().expect("files"))
    }
}

fn receive(socket: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
    let mut bytes = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let len = rustix::net::recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC);
    let len = len.ok()?.bytes;
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last();
        }
    }
    Some((String::from_utf8_lossy(&bytes[..len]).into(), file))
}

/// Handles a message as systemd does.
fn store(files: &mut Files, message: &str, file: Option<OwnedFd>) {
    let name = message
        .lines()
        .find_map(|line| line.strip_prefix("FDNAME="));
    let name = name
        .and_then(|name| name.strip_prefix(PREFIX))
        .expect("a name");
    match file {
        Some(file) => {
            assert!(message.starts_with("FDSTORE=1\n"), "{message}");
            let is_there = |kept: &OwnedFd| is_same_file(kept.as_fd(), file.as_fd()) == Some(true);
            if !files.values().any(is_there) {
                files.insert(name.into(), file);
            }
        }
        None => {
            assert!(message.starts_with("FDSTOREREMOVE=1\n"), "{message}");
            files.remove(name);
        }
    }
}

/// The socket that all lives serve.
pub(super) struct Socket {
    listener: UnixListener,
    folder: TempDir,
}

impl Socket {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("socket")).expect("a socket");
        Self { listener, folder }
    }

    pub(super) fn connect(&self) -> Vmm {
        let stream = UnixStream::connect(self.folder.path().join("socket")).expect("connected");
        stream.set_read_timeout(Some(HANG)).expect("set");
        Vmm(stream)
    }
}

/// A server that runs.
pub(super) struct Life {
    pub(super) steps: Steps,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Life {
    /// Serves `device`. Goes on with the VMM that an earlier life has left; `restore` is called then.
    pub(super) fn start(
        socket: &Socket,
        device: Arc<Device>,
        keeper: Arc<Keeper>,
        steps: Steps,
        left: Option<(LeftVmm, Box<dyn FnOnce() + Send>)>,
    ) -> Self {
        let listener = socket.listener.try_clone().expect("a copy");
        let mut server = VhostUserServer::new(device, listener, keeper).expect("a server");
        server.end_at(steps.clone());
        let stopper = server.stopper();
        if let Some((left, restore)) = left {
            server.resume(left, restore);
        }
        let thread = std::thread::spawn(move || server.run(|_| {}).expect("an orderly end"));
        Self {
            steps,
            stopper,
            thread: Some(thread),
        }
    }

    /// Ends the server, as SIGTERM does.
    pub(super) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stopper.stop();
            let ended = thread.join();
            assert!(
                std::thread::panicking() || ended.is_ok(),
                "the server has panicked"
            );
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits until `done` holds.
pub(super) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + HANG;
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A VMM's end of the connection.
pub(super) struct Vmm(pub(super) UnixStream);

/// A message of the VMM.
#[derive(Clone)]
pub(super) struct Sent {
    pub(super) bytes: MessageBytes,
    pub(super) files: Vec<Arc<OwnedFd>>,
    has_reply: bool,
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.bytes.body().chunks(8).map(|word| {
            let mut all = [0; 8];
            all[..word.len()].copy_from_slice(word);
            format!("{:x}", u64::from_ne_bytes(all))
        });
        let words = words.collect::<Vec<_>>().join(" ");
        write!(
            f,
            "{:?} {words}, {} files",
            self.bytes.request(),
            self.files.len()
        )
    }
}

impl Sent {
    pub(super) fn new(request: FrontendReq, body: &[u8]) -> Self {
        let has_reply = matches!(
            request,
            FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_VRING_BASE
                | FrontendReq::GET_CONFIG
                | FrontendReq::GET_MAX_MEM_SLOTS
        );
        Self {
            bytes: MessageBytes::new(request, body),
            files: Vec::new(),
            has_reply,
        }
    }

    pub(super) fn words(request: FrontendReq, words: &[u64]) -> Self {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Self::new(request, &body)
    }

    pub(super) fn ring(request: FrontendReq, index: u32, value: u32) -> Self {
        Self::new(
            request,
            &[index.to_ne_bytes(), value.to_ne_bytes()].concat(),
        )
    }

    pub(super) fn with(mut self, files: &[&Arc<OwnedFd>]) -> Self {
        self.files = files.iter().map(|file| Arc::clone(file)).collect();
        self
    }

    /// Asks for a reply.
    pub(super) fn acked(mut self) -> Self {
        self.bytes.0[4] |= u8::try_from(NEED_REPLY).expect("a low bit");
        self.has_reply = true;
        self
    }
}

impl Vmm {
    /// Sends a message, and returns the reply if there is one.
    ///
    /// # Errors
    /// The connection has ended.
    pub(super) fn tell(&mut self, sent: &Sent) -> io::Result<Option<Vec<u8>>> {
        self.send(sent)?;
        sent.has_reply.then(|| self.reply()).transpose()
    }

    pub(super) fn send(&self, sent: &Sent) -> io::Result<()> {
        let files: Vec<BorrowedFd<'_>> = sent.files.iter().map(AsFd::as_fd).collect();
        let count = send(&self.0, &sent.bytes.0, &files)?;
        assert_eq!(count, sent.bytes.0.len());
        Ok(())
    }

    pub(super) fn reply(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; HEADER_LEN];
        self.0.read_exact(&mut bytes)?;
        let whole = MessageBytes(bytes.clone())
            .whole_len()
            .expect("a valid header");
        bytes.resize(whole, 0);
        self.0.read_exact(&mut bytes[HEADER_LEN..])?;
        Ok(bytes)
    }

    /// Whether nothing has come that was not read.
    pub(super) fn is_idle(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        rustix::net::recv(&self.0, &mut byte[..], flags) == Err(rustix::io::Errno::AGAIN)
    }

    /// Whether the other end has closed the connection, and nothing has come before.
    pub(super) fn has_ended(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(cause) => cause.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

pub(super) fn memfd(len: u64) -> Arc<OwnedFd> {
    let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&file, len).expect("a size");
    Arc::new(file)
}

pub(super) fn event() -> Arc<OwnedFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Arc::new(eventfd(0, flags).expect("an eventfd"))
}
