//! The daemon as a child process with sockets in a temporary directory. A test that hangs or fails leaves no
//! daemon behind.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vhost::vhost_user::Frontend;

use super::relayed::Relayed;

/// If the test asks the control socket nothing for this long, a watcher kills the daemon. Every test call that waits for
/// the daemon then returns. Not a limit for the whole test, which a busy machine exceeds.
const SILENCE: Duration = Duration::from_secs(240);
/// Longer than a daemon that works takes for anything, even on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The name of the VMM's socket.
pub(super) const SOCKET: &str = "vhost.sock";
/// The name of guest memory in `/proc/PID/smaps`.
const GUEST_MEMORY: &str = "/memfd:guest-ram";

/// Endpoint 00:06.0.
pub const EP: u32 = 0x30;
/// Endpoint 00:07.0.
pub const EP2: u32 = 0x38;
/// Endpoint 00:08.0.
pub const EP3: u32 = 0x40;
/// 00:09.0, an address without an endpoint.
pub const NO_EP: u32 = 0x48;

/// A running daemon.
pub struct Daemon {
    pub(super) child: Arc<Mutex<Child>>,
    pub(super) pid: u32,
    pub(super) directory: TempDir,
    /// The program and its arguments, without those of a keeper.
    pub(super) words: Vec<OsString>,
    /// A message shows the watcher that the test goes on.
    pub(super) watch: Sender<()>,
    /// Makes the daemon relay its VMMs' connections.
    _relayed: Option<Relayed>,
}

impl Daemon {
    /// Starts the daemon with three endpoints and defaults for everything else.
    pub fn start() -> Self {
        Self::with_args(&[])
    }

    /// Starts the daemon with three endpoints and more arguments.
    pub fn with_args(more: &[&str]) -> Self {
        let mut args = vec!["--iommu", "00:05.0"];
        for endpoint in ["00:06.0", "00:07.0", "00:08.0"] {
            args.extend(["--endpoint", endpoint]);
        }
        args.extend(more);
        Self::spawn(&args)
    }

    /// Starts the daemon with a TOML configuration. The arguments still name the sockets.
    pub fn with_config(toml: &str) -> Self {
        Self::with_config_and(toml, &[])
    }

    /// Starts the daemon with a TOML configuration and more arguments.
    pub fn with_config_and(toml: &str, more: &[&str]) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let path = directory.path().join("vm.toml");
        fs::write(&path, toml).expect("configuration written");
        let config = ["--config", path.to_str().expect("UTF-8")];
        Self::launch(directory, &[&config, more].concat())
    }

    /// Starts the daemon with a TOML configuration, and serves the VMM over vfio-user at [`Self::socket`].
    pub fn over_vfio_user(toml: &str) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let path = directory.path().join("vm.toml");
        let socket = directory.path().join(SOCKET);
        let text = format!("vfio-user-socket = \"{}\"\n{toml}", socket.display());
        fs::write(&path, text).expect("configuration written");
        let command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
        let path = path.to_str().expect("UTF-8");
        Self::start_command(command, directory, &["--config", path])
    }

    /// Starts the daemon with a TOML configuration. `prepare` changes how the program starts, such as its standard
    /// error.
    pub fn with_config_prepared(toml: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let path = directory.path().join("vm.toml");
        fs::write(&path, toml).expect("configuration written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
        command
            .arg("--socket-path")
            .arg(directory.path().join(SOCKET));
        let path = path.to_str().expect("UTF-8");
        Self::start_prepared(command, directory, &["--config", path], prepare)
    }

    /// Starts the daemon with the flags of the sockets and these arguments.
    pub fn spawn(args: &[&str]) -> Self {
        Self::launch(TempDir::new().expect("temporary directory"), args)
    }

    /// Starts the daemon with a TOML configuration, as another user and with this limit of locked memory (bytes or
    /// `unlimited`). Only root can do so.
    pub fn with_config_as(user: u32, memlock: &str, toml: &str) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let path = directory.path().join("vm.toml");
        fs::write(&path, toml).expect("configuration written");
        // The folders above the program may be closed to the user.
        let program = directory.path().join("vhost-device-iommu");
        fs::copy(env!("CARGO_BIN_EXE_vhost-device-iommu"), &program).expect("copied");
        std::os::unix::fs::chown(directory.path(), Some(user), Some(user)).expect("root");
        // The shell's units are KiB.
        let limit = memlock
            .parse::<u64>()
            .map(|bytes| (bytes >> 10).to_string());
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "ulimit -l \"$0\" && exec \"$@\""])
            .arg(limit.unwrap_or_else(|_| memlock.to_owned()))
            .arg(program);
        // Without the groups of root, too.
        command.uid(user).gid(user);
        let path = path.to_str().expect("UTF-8");
        Self::launch_with(command, directory, &["--config", path])
    }

    fn launch(directory: TempDir, args: &[&str]) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
        Self::launch_with(command, directory, args)
    }

    fn launch_with(mut command: Command, directory: TempDir, args: &[&str]) -> Self {
        command
            .arg("--socket-path")
            .arg(directory.path().join(SOCKET));
        Self::start_command(command, directory, args)
    }

    fn start_command(command: Command, directory: TempDir, args: &[&str]) -> Self {
        Self::start_prepared(command, directory, args, |_| {})
    }

    pub(super) fn start_prepared(
        mut command: Command,
        directory: TempDir,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let stderr = fs::File::create(directory.path().join("stderr")).expect("stderr file");
        command
            .arg("--control-path")
            .arg(directory.path().join("control.sock"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words = words.map(OsString::from).collect();
        prepare(&mut command);
        let relayed = Relayed::prepare(&mut command);
        let child = command.spawn().expect("the daemon starts");
        // It holds standard error open.
        drop(command);
        let pid = child.id();
        let child = Arc::new(Mutex::new(child));
        let watched = Arc::clone(&child);
        let (watch, over) = channel::<()>();
        thread::spawn(move || {
            let waited = loop {
                match over.recv_timeout(SILENCE) {
                    Ok(()) => {}
                    Err(why) => break why,
                }
            };
            if waited == RecvTimeoutError::Timeout {
                eprintln!("the watcher kills the daemon: the test asks nothing for {SILENCE:?}");
                let _ = watched.lock().expect("child").kill();
            }
        });
        let daemon = Self {
            child,
            pid,
            directory,
            words,
            watch,
            _relayed: relayed,
        };
        let sockets = [daemon.socket(), daemon.control_socket()];
        daemon.wait_for("its sockets", || sockets.iter().all(|path| path.exists()));
        daemon
    }

    /// The VMM's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }

    /// The folder of its sockets, and of its configuration if it has one.
    pub fn folder(&self) -> &Path {
        self.directory.path()
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    /// Sends SIGTERM.
    #[expect(unsafe_code, reason = "the standard library sends SIGKILL only")]
    pub fn terminate(&self) {
        let pid = libc::pid_t::try_from(self.pid).expect("a process id");
        // SAFETY: no pointer is passed. The child is not reaped yet, so no other process has its number.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0, "SIGTERM");
    }

    /// The context switches of all threads so far.
    pub fn context_switches(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("its threads");
        tasks
            .map(|task| {
                let status = task.expect("a thread").path().join("status");
                let text = fs::read_to_string(status).expect("its status");
                text.lines()
                    .filter(|line| line.contains("ctxt_switches"))
                    .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
                    .sum::<u64>()
            })
            .sum()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Connects to the vhost-user socket.
    pub fn stream(&self) -> UnixStream {
        connect(&self.socket())
    }

    /// Connects a vhost-user frontend, which has sent nothing yet.
    pub fn frontend(&self) -> Frontend {
        Frontend::from_stream(self.stream(), 2)
    }

    /// Waits until `done` holds, up to [`PATIENCE`]. Fails the test if the daemon ends meanwhile.
    pub fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            self.assert_alive();
            assert!(Instant::now() < deadline, "waited too long for {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the worker has seen the ring of the connection's first driver run. Bypass mode begins then.
    pub fn wait_for_driver(&self) {
        self.wait_for("the driver", || self.status()["driver_awaited"] == false);
    }

    /// Waits until the daemon ends, up to [`PATIENCE`].
    pub fn wait_for_end(&self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.exit_status() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "waited too long for the daemon's end"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The daemon's exit status, or `None` while it runs.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.child.lock().expect("child").try_wait().expect("wait")
    }

    /// Fails the test if the daemon has ended.
    pub fn assert_alive(&self) {
        if let Some(status) = self.exit_status() {
            panic!("the daemon ended: {status}");
        }
    }

    /// Sends a request to the control socket. Returns the answer.
    pub fn control(&self, request: &str) -> Value {
        let text = self.control_text(request);
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{request}: {error} in the answer {text:?}"))
    }

    /// Sends a request to the control socket. Returns the text of the answer.
    pub fn control_text(&self, request: &str) -> String {
        let text = ask(&self.control_socket(), request);
        // An error means that the watcher has killed the daemon.
        let _ = self.watch.send(());
        text
    }

    /// The status document.
    pub fn status(&self) -> Value {
        self.control("status")
    }

    /// The daemon's answer to `translate` for an address of an endpoint.
    pub fn translate(&self, endpoint: u32, iova: u64) -> Value {
        self.control(&format!("translate {endpoint} {iova:#x}"))
    }

    /// The guest-physical address of an IOVA, or `None` if an access would fault.
    pub fn gpa_of(&self, endpoint: u32, iova: u64) -> Option<u64> {
        let answer = self.translate(endpoint, iova);
        (answer["result"] == "ok").then(|| number(&answer["gpa"]))
    }

    /// The mappings of a domain as (first, last, gpa, access, mmio), by address. Empty if the domain does not
    /// exist.
    pub fn mappings(&self, domain: u32) -> Vec<(u64, u64, u64, String, bool)> {
        let answer = self.control(&format!("mappings {domain}"));
        let Some(entry) = answer["domains"]
            .as_array()
            .and_then(|domains| domains.iter().find(|entry| entry["id"] == domain))
        else {
            return Vec::new();
        };
        let list = entry["mappings"].as_array().expect("mappings");
        list.iter()
            .map(|mapping| {
                (
                    number(&mapping["first"]),
                    number(&mapping["last"]),
                    number(&mapping["gpa"]),
                    mapping["access"].as_str().expect("access").to_owned(),
                    mapping["mmio"].as_bool().expect("mmio"),
                )
            })
            .collect()
    }

    /// The ids of all domains, in order.
    pub fn domains(&self) -> Vec<u64> {
        let status = self.status();
        let list = status["domains"].as_array().expect("domains");
        let mut ids: Vec<u64> = list.iter().map(|domain| number(&domain["id"])).collect();
        ids.sort_unstable();
        ids
    }

    /// The endpoint's entry in the status document.
    pub fn endpoint(&self, id: u32) -> Value {
        let status = self.status();
        let list = status["endpoints"].as_array().expect("endpoints");
        list.iter()
            .find(|entry| number(&entry["id"]) == u64::from(id))
            .unwrap_or_else(|| panic!("endpoint {id:#x} in {status}"))
            .clone()
    }

    /// The daemon's resident memory in KiB. The files of its program do not count, nor does guest memory, which
    /// the guest fills.
    pub fn rss_kib(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.pid)).expect("proc");
        let mut own = true;
        let mut total = 0;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("Rss:") if own => {
                    let kib = words.next().and_then(|word| word.parse::<u64>().ok());
                    total += kib.expect("a number");
                }
                Some(word) if !word.ends_with(':') => {
                    // The head of a mapping: range, rights, offset, device, inode, and perhaps a path.
                    let path = words.nth(4).unwrap_or("");
                    own = !path.starts_with('/')
                        || path.starts_with("/memfd:") && path != GUEST_MEMORY;
                }
                _ => {}
            }
        }
        total
    }

    /// The number of open file descriptors.
    pub fn fd_count(&self) -> usize {
        let list = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("proc");
        list.count()
    }

    /// The number of threads.
    pub fn thread_count(&self) -> usize {
        let list = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("proc");
        list.count()
    }

    /// The number of bytes that the daemon has written to standard error so far.
    pub fn log_len(&self) -> u64 {
        let path = self.directory.path().join("stderr");
        fs::metadata(path).expect("stderr file").len()
    }

    /// The text that the daemon has written to standard error so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.directory.path().join("stderr")).expect("stderr file");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(4000);
            let from = (from..log.len()).find(|&at| log.is_char_boundary(at));
            eprintln!("--- daemon {}, end of its standard error:", self.pid);
            eprintln!("{}", &log[from.unwrap_or(0)..]);
        }
        if let Ok(mut child) = self.child.lock() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // A panic ends the daemon, which is not to be taken for an end that the test expects.
        if !thread::panicking() {
            let log = self.log();
            assert!(
                !log.contains("panicked"),
                "a thread of the daemon panicked: {log}"
            );
        }
    }
}

/// A number in JSON: a number, or hexadecimal text such as `"0x1000"`.
pub fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .or_else(|| u64::from_str_radix(value.as_str()?.strip_prefix("0x")?, 16).ok())
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// Sends a request to a control socket. Returns the text of the answer.
pub fn ask(control_socket: &Path, request: &str) -> String {
    let mut stream = connect(control_socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("time limit");
    writeln!(stream, "{request}").expect("control request");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("control answer");
    text
}

/// Connects. Tries up to [`PATIENCE`], since the daemon may not listen yet.
pub fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("{}: {error}", path.display()),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}
