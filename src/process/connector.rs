//! Connects to the sockets of other processes, in a thread that reads nothing that such a process sends.
//!
//! The threads that parse messages may not call `connect`, nor create a socket. They ask the thread `connector`, which
//! connects only to the paths of the configuration and, with `hotplug`, to sockets in certain folders. It hands the
//! connected descriptor over.
//!
//! A thread that is not confined connects by itself: at the start, in tests, and with `--no-sandbox`.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, socket_with,
};

use crate::process::sandbox::{self, Role};

/// The most requests that wait for the thread. A thread makes one at a time.
const WAITING: usize = 64;
/// How long a thread waits for its connection. The attempt itself waits for nothing, unless the file system of the
/// path does.
const PATIENCE: Duration = Duration::from_secs(5);

static CONNECTOR: OnceLock<Connector> = OnceLock::new();

/// The sockets to which a confined daemon may connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReachableSockets {
    /// Sockets of the configuration.
    pub paths: Vec<PathBuf>,
    /// Folders with sockets of endpoints that are added later. Symbolic links in them are not followed.
    pub folders: Vec<PathBuf>,
}

impl ReachableSockets {
    /// Whether the daemon may connect to the socket at `path`. Compares the texts of the paths: no part of `path` may
    /// lead out of its folder.
    fn allows(&self, path: &Path) -> bool {
        self.paths.iter().any(|allowed| allowed == path) || self.has_folder_of(path)
    }

    fn has_folder_of(&self, path: &Path) -> bool {
        let Some(parent) = path.parent().filter(|_| path.file_name().is_some()) else {
            return false;
        };
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        self.folders.iter().any(|folder| folder == parent)
    }

    /// Connects to the socket at `path` if that is allowed.
    fn connect(&self, path: &Path) -> io::Result<OwnedFd> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if !self.allows(path) {
            return refused("the file has no socket in its folder");
        }
        let is_configured = self.paths.iter().any(|allowed| allowed == path);
        if !is_configured && path.symlink_metadata()?.is_symlink() {
            return refused("it is a symbolic link, which is followed only if the file names it");
        }
        connect_here(path)
    }
}

/// A request to the thread.
enum ConnectRequest {
    /// Connects to the socket at `path`.
    Path {
        path: PathBuf,
        answer: SyncSender<io::Result<OwnedFd>>,
    },
    /// See [`private_connection`].
    Private(SyncSender<io::Result<PrivateConnection>>),
}

/// A listener whose queue has one connection, and that connection's other end.
pub type PrivateConnection = (UnixListener, UnixStream);

/// The way to the thread.
#[derive(Debug)]
struct Connector {
    reachable: ReachableSockets,
    requests: SyncSender<ConnectRequest>,
}

/// Starts the thread. Confined threads connect through it from now on.
///
/// # Errors
/// The system has no thread left, the thread cannot be confined, or it runs already.
pub fn start(reachable: ReachableSockets) -> io::Result<()> {
    let connector = Connector::start(reachable)?;
    let again = |_| io::Error::other("the thread `connector` runs already");
    CONNECTOR.set(connector).map_err(again)
}

/// Connects to the stream socket at `path`, without waiting for its owner. The descriptor is nonblocking, and closed on
/// exec.
///
/// # Errors
/// `WouldBlock`: too many clients wait to be accepted there. `PermissionDenied`: the calling thread is confined, and
/// the configuration has no such socket. Others: no process listens there.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    if !sandbox::is_confined() {
        return connect_here(path);
    }
    let connector = CONNECTOR.get().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the configuration has no socket to connect to",
        )
    })?;
    connector.connect(path)
}

/// Makes a listener and connects to it: the next `accept` of the listener gives the other end of the returned stream.
///
/// For a library that serves nothing but the clients of a listener. The listener has an abstract address that the kernel
/// chooses, so any process of the host's network namespace can try to connect. Its queue takes one connection. Once ours
/// is in it, no other one is, and none gets in before ours is accepted. If another process is faster, another listener
/// is made.
///
/// # Errors
/// Other processes were faster each time, the system has no descriptor left, or the calling thread is confined and the
/// thread `connector` does not run.
pub fn private_connection() -> io::Result<PrivateConnection> {
    if !sandbox::is_confined() {
        return connect_privately(|_| {});
    }
    let connector = CONNECTOR.get().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the thread `connector` does not run; report this as a defect",
        )
    })?;
    connector.ask(ConnectRequest::Private)
}

/// Whether confined threads may connect to the socket at `path`.
pub fn may_connect(path: &Path) -> bool {
    let connector = CONNECTOR.get();
    connector.is_none_or(|connector| connector.reachable.allows(path))
}

impl Connector {
    fn start(reachable: ReachableSockets) -> io::Result<Self> {
        let (requests, asked) = sync_channel(WAITING);
        let allowed = reachable.clone();
        sandbox::spawn(Role::Connector, move || serve(&allowed, &asked))?;
        Ok(Self {
            reachable,
            requests,
        })
    }

    fn connect(&self, path: &Path) -> io::Result<OwnedFd> {
        self.ask(|answer| ConnectRequest::Path {
            path: path.to_owned(),
            answer,
        })
    }

    fn ask<T>(
        &self,
        request: impl FnOnce(SyncSender<io::Result<T>>) -> ConnectRequest,
    ) -> io::Result<T> {
        let (answer, answered) = sync_channel(1);
        match self.requests.try_send(request(answer)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(io::ErrorKind::WouldBlock.into()),
            Err(TrySendError::Disconnected(_)) => {
                return Err(io::Error::other("the thread `connector` has ended"));
            }
        }
        match answered.recv_timeout(PATIENCE) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the file system of the path does not answer",
            )),
            Err(RecvTimeoutError::Disconnected) => {
                Err(io::Error::other("the thread `connector` has ended"))
            }
        }
    }
}

/// Answers requests until nobody can make one any more.
fn serve(reachable: &ReachableSockets, asked: &Receiver<ConnectRequest>) {
    while let Ok(request) = asked.recv() {
        // Nobody waits any more after the time for it. The connection ends then.
        match request {
            ConnectRequest::Path { path, answer } => {
                let _ = answer.try_send(reachable.connect(&path));
            }
            ConnectRequest::Private(answer) => {
                let _ = answer.try_send(connect_privately(|_| {}));
            }
        }
    }
}

/// The most listeners that [`private_connection`] makes.
const PRIVATE_TRIES: usize = 16;

/// Makes the listener and the connection in the calling thread. Calls `listens` with the address of each listener.
fn connect_privately(mut listens: impl FnMut(&SocketAddrAny)) -> io::Result<PrivateConnection> {
    for _ in 0..PRIVATE_TRIES {
        let flags = SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The kernel chooses an abstract address.
        rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
        rustix::net::listen(&listener, 0)?;
        let address = rustix::net::getsockname(&listener)?;
        listens(&address);
        let flags = flags | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok((listener.into(), socket.into())),
            // Another process has connected first.
            Err(Errno::AGAIN) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::WouldBlock,
        "another process connects to each private socket of the daemon; give the daemon a network namespace of its own \
         (PrivateNetwork=yes)",
    ))
}

/// Connects in the calling thread.
fn connect_here(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn nonblocking_client() -> OwnedFd {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket")
    }

    /// Whether `ours` is the other end of `accepted`.
    fn are_connected(ours: &UnixStream, accepted: &UnixStream) -> bool {
        rustix::io::write(ours, b"ours").expect("written");
        accepted.set_nonblocking(true).expect("set");
        let mut bytes = [0; 4];
        rustix::io::read(accepted, &mut bytes) == Ok(4) && bytes == *b"ours"
    }

    #[test]
    fn a_private_listener_accepts_our_connection_and_no_stranger() {
        let mut address = None;
        let (listener, ours) =
            connect_privately(|at| address = Some(at.clone())).expect("a connection");
        let stranger = nonblocking_client();
        let refused = rustix::net::connect(&stranger, &address.expect("an address"));
        assert_eq!(refused, Err(Errno::AGAIN), "the queue takes one connection");
        let (accepted, _) = listener.accept().expect("our connection");
        assert!(are_connected(&ours, &accepted));
    }

    #[test]
    fn a_stranger_who_is_faster_is_never_accepted() {
        let mut strangers = Vec::new();
        let (listener, ours) = connect_privately(|at| {
            if strangers.len() < 3 {
                let stranger = nonblocking_client();
                rustix::net::connect(&stranger, at).expect("first in the queue");
                strangers.push(stranger);
            }
        })
        .expect("a connection");
        assert_eq!(strangers.len(), 3);
        let (accepted, _) = listener.accept().expect("our connection");
        assert!(are_connected(&ours, &accepted));

        strangers.clear();
        let refused = connect_privately(|at| {
            let stranger = nonblocking_client();
            rustix::net::connect(&stranger, at).expect("first in the queue");
            strangers.push(stranger);
        });
        let cause = refused.expect_err("always too late").to_string();
        assert!(cause.contains("PrivateNetwork=yes"), "{cause}");
    }

    #[test]
    fn the_thread_hands_private_connections_over() {
        let connector = Connector::start(ReachableSockets::default()).expect("a thread");
        let (listener, ours) = connector
            .ask(ConnectRequest::Private)
            .expect("a connection");
        let (accepted, _) = listener.accept().expect("our connection");
        assert!(are_connected(&ours, &accepted));
    }

    #[test]
    fn only_the_configured_paths_and_folders_are_reached() {
        let reachable = ReachableSockets {
            paths: ["/run/qemu/qmp.sock", "qmp.sock"].map(PathBuf::from).into(),
            folders: vec!["/run/vm1".into(), ".".into()],
        };
        for allowed in [
            "/run/qemu/qmp.sock",
            "/run/vm1/nvme.sock",
            "/run//vm1/./x",
            "beside",
        ] {
            assert!(reachable.allows(Path::new(allowed)), "{allowed}");
        }
        for refused in [
            "/run/qemu/other.sock",
            "/run/vm1",
            "/run/vm1/..",
            "/run/vm1/../qemu/x",
            "/run/vm1/deeper/x",
            "/run/vm10/x",
            "/run/x",
            "sub/x",
            "../x",
            "..",
            "/",
            "",
        ] {
            assert!(!reachable.allows(Path::new(refused)), "{refused}");
        }
        let nothing = ReachableSockets::default();
        assert!(!nothing.allows(Path::new("x")));
    }

    #[test]
    fn descriptors_are_handed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let other = tempfile::tempdir().expect("a folder");
        let elsewhere = other.path().join("socket");
        let listener = UnixListener::bind(at("socket")).expect("a socket");
        let _other = UnixListener::bind(&elsewhere).expect("a socket");
        symlink(&elsewhere, at("link")).expect("a link");
        symlink(&elsewhere, at("configured")).expect("a link");
        let reachable = ReachableSockets {
            paths: vec![at("configured")],
            folders: vec![folder.path().to_owned()],
        };
        let connector = Connector::start(reachable).expect("a thread");
        connector.connect(&at("socket")).expect("connected");
        listener.accept().expect("a client");
        connector.connect(&at("configured")).expect("connected");
        let refused = |path: &Path| connector.connect(path).expect_err("refused").kind();
        for path in [&elsewhere, &at("link")] {
            assert_eq!(refused(path), io::ErrorKind::PermissionDenied, "{path:?}");
        }
        assert_eq!(refused(&at("missing")), io::ErrorKind::NotFound);
        drop(listener);
        assert_eq!(refused(&at("socket")), io::ErrorKind::ConnectionRefused);
    }
}
