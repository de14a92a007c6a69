//! The daemon as a service: readiness, watchdog and socket activation. The test is the service
//! manager.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failure here is a failed test wherever it happens"
)]

mod common;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use common::daemon::{EP, connect};
use common::guest::{Guest, Setup};
use common::stopped_thread::StoppedThread;
use common::wire::OK;
use tempfile::TempDir;

/// The interval in which the daemon must send WATCHDOG=1.
const WATCHDOG: Duration = Duration::from_millis(400);
/// Longer than a healthy daemon is ever silent, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Start the daemon in place of the shell. `exec` keeps the shell's process ID, so the variables can name the process ID of
/// the daemon.
const OWN_SOCKET: &str = "exec \"$0\" \"$@\"";
const ACTIVATED: &str = "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0 </dev/null";
/// The daemon before has left a file.
const ACTIVATED_AGAIN: &str = "LISTEN_FDS=2 LISTEN_FDNAMES=viommu.stale:vm LISTEN_PID=$$ exec \"$0\" \"$@\" 4<&0 \
                               3</dev/null </dev/null";
/// What the log says without a keeper.
const NO_KEEPER: &str = "the VM's state ends with this daemon";

/// A daemon, started like a service manager starts it.
struct Service {
    child: Child,
    manager: UnixDatagram,
    folder: TempDir,
}

impl Service {
    /// Starts a daemon that makes its own socket.
    fn start() -> Self {
        Self::spawn(None, OWN_SOCKET, &[("LISTEN_FDS", "2")])
    }

    /// Starts a daemon that gets `listener` as descriptor 3, with the variables of socket
    /// activation.
    fn activated_by(listener: UnixListener) -> Self {
        Self::spawn(Some(listener), ACTIVATED, &[])
    }

    fn spawn(listener: Option<UnixListener>, script: &str, variables: &[(&str, &str)]) -> Self {
        Self::spawn_with_file(listener, script, variables, "")
    }

    /// The same; a daemon with a file has its endpoints from these lines, if there are any.
    fn spawn_with_file(
        listener: Option<UnixListener>,
        script: &str,
        variables: &[(&str, &str)],
        lines: &str,
    ) -> Self {
        let folder = TempDir::new().expect("a folder");
        let manager = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        manager.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_vhost-device-iommu")]);
        if listener.is_some() {
            // A descriptor that is passed overrides this path.
            let file = folder.path().join("vm.toml");
            let text = format!("socket = \"/nonexistent/vm.sock\"\n{lines}");
            fs::write(&file, text).expect("a file");
            command.arg("--config").arg(file);
        } else {
            command
                .arg("--socket-path")
                .arg(folder.path().join("vhost.sock"));
        }
        if lines.is_empty() {
            command.args(["--iommu", "00:05.0", "--endpoint", "00:06.0"]);
        }
        command
            .arg("--control-path")
            .arg(folder.path().join("control.sock"))
            .env("NOTIFY_SOCKET", folder.path().join("notify"))
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
            .envs(variables.iter().copied())
            .stdin(listener.map_or_else(Stdio::null, |listener| OwnedFd::from(listener).into()))
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("log")).expect("a file"));
        Self {
            child: command.spawn().expect("the daemon starts"),
            manager,
            folder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).expect("its log")
    }

    /// Receives the next notification.
    fn receive(&self) -> String {
        let mut bytes = [0; 128];
        let len = self.manager.recv(&mut bytes);
        let len =
            len.unwrap_or_else(|e| panic!("no notification is received: {e}; {}", self.log()));
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    /// Receives all notifications for `time`.
    fn receive_for(&self, time: Duration) -> Vec<String> {
        let until = Instant::now() + time;
        let mut received = Vec::new();
        self.manager.set_nonblocking(true).expect("a socket");
        while Instant::now() < until {
            let mut bytes = [0; 128];
            match self.manager.recv(&mut bytes) {
                Ok(len) => received.push(String::from_utf8_lossy(&bytes[..len]).into_owned()),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
        self.manager.set_nonblocking(false).expect("a socket");
        received
    }

    #[expect(unsafe_code, reason = "the standard library sends SIGKILL only")]
    fn end(&mut self) -> ExitStatus {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id");
        // SAFETY: no pointer is passed, and the child is not reaped yet, so the process ID is its
        // own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0, "SIGTERM");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn guest(socket: &Path) -> Guest {
    let mut guest = Guest::connect_to(socket, Setup::default());
    guest.driver_ok();
    guest
}

#[test]
fn the_manager_is_notified_of_start_liveness_and_end() {
    let mut service = Service::start();
    assert_eq!(service.receive(), "READY=1");
    assert!(
        service.path("vhost.sock").exists() && service.path("control.sock").exists(),
        "a daemon that is ready must listen"
    );
    assert_eq!(service.receive(), "WATCHDOG=1", "waiting for a VMM");
    let mut guest = guest(&service.path("vhost.sock"));
    service.receive_for(WATCHDOG);
    assert_eq!(service.receive(), "WATCHDOG=1", "an idle guest");
    let hangs_at = Instant::now() + PATIENCE;
    let mut received = Vec::new();
    while received.len() < 5 {
        assert!(Instant::now() < hangs_at, "a busy guest: {received:?}");
        for round in 0..100 {
            assert_eq!(guest.attach(1 + round % 2, EP), OK);
        }
        received.extend(service.receive_for(Duration::from_millis(1)));
    }
    drop(guest);
    service.receive_for(WATCHDOG);
    assert_eq!(service.receive(), "WATCHDOG=1", "waiting again");
    assert_eq!(service.end().code(), Some(0));
    let last = service.receive_for(Duration::from_millis(50));
    assert_eq!(last.last().map(String::as_str), Some("STOPPING=1"));
}

#[test]
fn a_hanging_worker_stops_the_watchdog_notifications() {
    let service = Service::start();
    assert_eq!(service.receive(), "READY=1");
    let mut guest = guest(&service.path("vhost.sock"));
    assert_eq!(guest.attach(1, EP), OK);
    // No message of a VMM makes the worker hang, so the test stops it.
    let worker = StoppedThread::new(service.child.id(), "vring_worker");
    // One notification may be under way.
    service.receive_for(WATCHDOG);
    let received = service.receive_for(WATCHDOG * 3);
    assert!(received.is_empty(), "{received:?}");
    let log = service.log();
    assert!(
        log.contains("no answer to the watchdog from: the worker;"),
        "{log}"
    );
    worker.resume();
    assert_eq!(service.receive(), "WATCHDOG=1");
}

#[test]
fn a_silent_control_client_only_delays_watchdog_notifications() {
    let service = Service::start();
    assert_eq!(service.receive(), "READY=1");
    let _silent = UnixStream::connect(service.path("control.sock")).expect("a connection");
    // The daemon gives the client two seconds.
    assert_eq!(service.receive(), "WATCHDOG=1");
}

#[test]
fn an_activation_socket_is_served_and_not_removed() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("vm.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let kept = listener.try_clone().expect("a descriptor");
    // A connection made before the daemon starts is served once the daemon runs.
    let early = connect(&path);
    let mut service = Service::activated_by(listener);
    assert_eq!(service.receive(), "READY=1", "{}", service.log());
    drop(early);
    assert_eq!(guest(&path).attach(1, EP), OK);
    assert_eq!(service.end().code(), Some(0));
    assert!(
        path.exists(),
        "the daemon must not remove the manager's socket"
    );
    // The next daemon serves the same socket.
    let again = Service::activated_by(kept);
    assert_eq!(again.receive(), "READY=1", "{}", again.log());
    assert_eq!(guest(&path).attach(1, EP), OK);
}

#[test]
fn kept_files_are_told_from_the_activation_socket() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("vm.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut service = Service::spawn(Some(listener), ACTIVATED_AGAIN, &[("FDSTORE", "1024")]);
    while service.receive() != "READY=1" {}
    assert_eq!(guest(&path).attach(1, EP), OK);
    assert_eq!(service.end().code(), Some(0));
    let log = service.log();
    assert!(!log.contains(NO_KEEPER), "{log}");
    assert!(!log.contains("closed"), "the file was taken over: {log}");
}

/// The manager has room for the VM's state, and not for the memory of an emulated device.
#[test]
fn a_daemon_says_that_a_device_is_not_kept() {
    for (room, is_kept) in [("1024", true), ("4", false)] {
        let folder = TempDir::new().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("vm.sock")).expect("a socket");
        let [listen, connect] = ["listen", "connect"].map(|name| folder.path().join(name));
        let device = format!(
            "address = \"00:05.0\"\n[[endpoint]]\naddress = \"00:07.0\"\nvfio-user = {{ listen = {listen:?}, connect = {connect:?} }}\n"
        );
        let variables = [("FDSTORE", room)];
        let service = Service::spawn_with_file(Some(listener), ACTIVATED, &variables, &device);
        while service.receive() != "READY=1" {}
        let mut control = UnixStream::connect(service.path("control.sock")).expect("connected");
        control.write_all(b"status\n").expect("asked");
        let mut answer = String::new();
        control.read_to_string(&mut answer).expect("an answer");
        let status: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(status["life"]["kept"], is_kept, "{}", service.log());
    }
}

#[test]
fn the_log_says_what_ends_with_the_daemon() {
    let service = Service::start();
    assert_eq!(service.receive(), "READY=1");
    let log = service.log();
    assert!(log.contains(NO_KEEPER), "{log}");
    assert!(log.contains("FileDescriptorStoreMax="), "{log}");

    // The manager has kept a file, and keeps files no longer.
    let folder = TempDir::new().expect("a folder");
    let listener = UnixListener::bind(folder.path().join("vm.sock")).expect("a socket");
    let service = Service::spawn(Some(listener), ACTIVATED_AGAIN, &[]);
    assert_eq!(service.receive(), "FDSTOREREMOVE=1\nFDNAME=viommu.stale");
    assert_eq!(service.receive(), "READY=1");
    let log = service.log();
    assert!(log.contains(NO_KEEPER) && log.contains(": stale"), "{log}");
}

#[test]
fn an_invalid_environment_is_refused() {
    for (name, value, cure) in [
        (
            "WATCHDOG_USEC",
            OsString::from("soon"),
            "set WatchdogSec= in the unit",
        ),
        (
            "NOTIFY_SOCKET",
            OsString::from("/nonexistent/notify"),
            "Type=notify",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
            .args(["--socket-path", "/nonexistent/s", "--iommu", "00:05.0"])
            .env(name, value)
            .output()
            .expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(cure), "{text}");
    }
}
