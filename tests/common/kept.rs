//! A service manager in the test's own process: it keeps the daemon's descriptors, kills the daemon, and starts it again.

#![expect(
    unsafe_code,
    reason = "receives descriptors, and passes them to a child"
)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::daemon::{Daemon, PATIENCE};

/// What the names of kept descriptors begin with.
const PREFIX: &str = "viommu.";

/// The keeper's end.
pub struct Keeper {
    socket: UnixDatagram,
    /// The end that each daemon inherits.
    theirs: UnixDatagram,
    /// By name, without [`PREFIX`].
    pub files: BTreeMap<String, OwnedFd>,
}

impl Keeper {
    /// A keeper that has nothing.
    pub fn empty() -> Self {
        let (socket, theirs) = UnixDatagram::pair().expect("sockets");
        socket.set_nonblocking(true).expect("a socket");
        Self {
            socket,
            theirs,
            files: BTreeMap::new(),
        }
    }

    /// Takes what the daemon has sent.
    pub fn take(&mut self) {
        while let Some((text, file)) = receive(&self.socket) {
            let field = |name: &str| {
                text.lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            };
            let name = field("FDNAME").expect("a name").to_owned();
            let name = name.strip_prefix(PREFIX).expect("our prefix").to_owned();
            if field("FDSTOREREMOVE") == Some("1") {
                assert!(self.files.remove(&name).is_some(), "{name} is not kept");
            } else {
                assert_eq!(field("FDSTORE"), Some("1"), "{text}");
                assert_eq!(field("FDPOLL"), Some("0"), "{text}");
                let file = file.expect("a descriptor");
                assert!(
                    self.files.insert(name.clone(), file).is_none(),
                    "{name} twice"
                );
            }
        }
    }

    /// The arguments for the next daemon, and its descriptors.
    fn arguments(&self) -> (Vec<OsString>, Vec<RawFd>) {
        let mut words = vec!["--keeper-fd".into(), number(&self.theirs)];
        let mut inherited = vec![self.theirs.as_raw_fd()];
        for (name, file) in &self.files {
            words.push("--kept-fd".into());
            words.push(format!("{name}={}", file.as_raw_fd()).into());
            inherited.push(file.as_raw_fd());
        }
        (words, inherited)
    }

    /// Prepares the command of a daemon.
    pub fn prepare(&self, command: &mut Command) {
        let (words, inherited) = self.arguments();
        command.args(words);
        let inherit = move || {
            for fd in &inherited {
                // SAFETY: passes no pointer; the flags are the child's own.
                if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes one kind of system call, which is async-signal-safe.
        unsafe { command.pre_exec(inherit) };
    }
}

fn number(file: &impl AsRawFd) -> OsString {
    file.as_raw_fd().to_string().into()
}

/// Whether a daemon answers, and has taken over what there was.
fn has_taken_over(control: &Path) -> bool {
    let mut text = String::new();
    let answer = UnixStream::connect(control).and_then(|mut stream| {
        stream.write_all(b"stats\n")?;
        stream.read_to_string(&mut text)
    });
    answer.is_ok() && text.contains("\"life\"") && !text.contains("\"taking-over\"")
}

/// The next message, with its descriptor.
fn receive(socket: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
    let mut bytes = [0u8; 512];
    let mut control = [0u64; 8];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: an all-zero header is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header describes buffers that live for the call.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    if len < 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
        return None;
    }
    // SAFETY: recvmsg filled the header and its control buffer.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    let file = (!first.is_null()).then(|| {
        // SAFETY: `first` is a control message of that buffer, and its data follow it.
        let data = unsafe { libc::CMSG_DATA(first) }.cast::<RawFd>();
        // SAFETY: the data are one descriptor, which may be unaligned.
        let fd = unsafe { data.read_unaligned() };
        // SAFETY: the kernel has just made the descriptor, and nobody else owns it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    });
    let len = usize::try_from(len).expect("positive");
    Some((String::from_utf8_lossy(&bytes[..len]).into_owned(), file))
}

impl Daemon {
    /// Starts the daemon with these arguments and with `keeper`.
    pub fn kept(keeper: &Keeper, args: &[&str]) -> Self {
        let directory = tempfile::TempDir::new().expect("temporary directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
        command
            .arg("--socket-path")
            .arg(directory.path().join(super::daemon::SOCKET));
        Self::start_prepared(command, directory, args, |command| keeper.prepare(command))
    }

    /// Starts the daemon with a TOML configuration, more arguments, and `keeper`.
    pub fn kept_with_config(keeper: &Keeper, toml: &str, more: &[&str]) -> Self {
        let directory = tempfile::TempDir::new().expect("temporary directory");
        let path = directory.path().join("vm.toml");
        fs::write(&path, toml).expect("configuration written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
        command
            .arg("--socket-path")
            .arg(directory.path().join(super::daemon::SOCKET));
        let config = ["--config", path.to_str().expect("UTF-8")];
        let args = [&config, more].concat();
        Self::start_prepared(command, directory, &args, |command| keeper.prepare(command))
    }

    /// The same, and serves the VMM over vfio-user at [`Self::socket`].
    pub fn kept_over_vfio_user(keeper: &Keeper, toml: &str) -> Self {
        let directory = tempfile::TempDir::new().expect("temporary directory");
        let path = directory.path().join("vm.toml");
        let socket = directory.path().join(super::daemon::SOCKET);
        let text = format!("vfio-user-socket = \"{}\"\n{toml}", socket.display());
        fs::write(&path, text).expect("configuration written");
        let command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
        let config = ["--config", path.to_str().expect("UTF-8")];
        Self::start_prepared(command, directory, &config, |command| {
            keeper.prepare(command);
        })
    }

    /// Sends SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        let mut child = self.child.lock().expect("child");
        child.kill().expect("a child");
        child.wait().expect("a child");
    }

    fn spawn_again(&mut self, keeper: &mut Keeper) {
        keeper.take();
        let log = fs::OpenOptions::new()
            .append(true)
            .open(self.directory.path().join("stderr"))
            .expect("stderr file");
        let mut command = Command::new(&self.words[0]);
        command
            .args(&self.words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        keeper.prepare(&mut command);
        let child = command.spawn().expect("the daemon starts");
        drop(command);
        self.pid = child.id();
        *self.child.lock().expect("child") = child;
    }

    /// Starts the daemon as [`Self::start_again`] does, and kills it after a while.
    pub fn start_and_kill(&mut self, keeper: &mut Keeper, after: Duration) {
        self.spawn_again(keeper);
        std::thread::sleep(after);
        self.kill();
    }

    /// Starts the daemon again with all that `keeper` has. The one before must have ended. Returns when it has taken
    /// over.
    pub fn start_again(&mut self, keeper: &mut Keeper) {
        self.spawn_again(keeper);
        let deadline = Instant::now() + PATIENCE;
        // An error means that the watcher has killed the daemon.
        let _ = self.watch.send(());
        // The socket of the one that was killed may still be there.
        while !has_taken_over(&self.control_socket()) {
            self.assert_alive();
            // It may wait until the keeper has closed something.
            keeper.take();
            assert!(Instant::now() < deadline, "the control socket");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the daemon and starts it again.
    pub fn die(&mut self, keeper: &mut Keeper) {
        self.kill();
        self.start_again(keeper);
    }
}
