//! Connects to the sockets of other processes, in a thread that reads nothing that such a process sends.
//!
//! The threads that parse messages may not call `connect`, nor create a socket. They ask the thread `connector`, which
//! connects only to the paths of the configuration and, with `hotplug`, to sockets in certain folders. It hands the
//! connected descriptor over.
//!
//! A thread that is not confined connects by itself: at the start, in tests, and with `--no-sandbox`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

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
struct ConnectRequest {
    path: PathBuf,
    answer: SyncSender<io::Result<OwnedFd>>,
}

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
        let (answer, answered) = sync_channel(1);
        let request = ConnectRequest {
            path: path.to_owned(),
            answer,
        };
        match self.requests.try_send(request) {
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
        let _ = request.answer.try_send(reachable.connect(&request.path));
    }
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
    use std::os::unix::net::UnixListener;

    use super::*;

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
