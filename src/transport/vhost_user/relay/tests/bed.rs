//! The parts of the bed.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::RecvFlags;
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;

use super::super::message::{HEADER_LEN, MessageBytes, NEED_REPLY, send};
use super::Steps;
use crate::device::Device;
use crate::process::keeper::Keeper;
pub(super) use crate::process::keeper_testing::Manager;
use crate::transport::vhost_user::LeftVmm;
use crate::transport::vhost_user::serve::{Stopper, VhostUserServer};

/// Nothing that works takes so long.
pub(super) const HANG: Duration = Duration::from_secs(30);

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
        if let Some((left, restore)) = left {
            server.resume(left, restore);
        }
        Self::run(server, steps)
    }

    /// As [`Self::start`], but no relay can begin.
    pub(super) fn without_relays(socket: &Socket, device: Arc<Device>) -> Self {
        let listener = socket.listener.try_clone().expect("a copy");
        let keeper = Arc::new(Keeper::none());
        let mut server = VhostUserServer::new(device, listener, keeper).expect("a server");
        server.refuse_relays();
        Self::run(server, Steps::default())
    }

    fn run(mut server: VhostUserServer, steps: Steps) -> Self {
        let stopper = server.stopper();
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
