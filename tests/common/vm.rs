//! Real guests: QEMU and the daemon as child processes, driven step by step.
//!
//! Everything has a time limit, everything started here ends with its owner, and the logs of a test
//! that fails stay where its message says.

#![allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Until the guest's /init is ready for commands.
pub const BOOT: Duration = Duration::from_secs(120);
/// Until a guest's command has an answer.
pub const ANSWER: Duration = Duration::from_secs(120);
/// Until the guest has done 10^5 rounds, on a machine that does much else.
pub const LONG_ANSWER: Duration = Duration::from_secs(400);
/// Until a guest that is silent is told its command once more, then twice as long each time. Its serial
/// port loses characters, or the interrupt for them, where interrupts are off for long.
const NUDGE: Duration = Duration::from_secs(15);
/// Until QEMU or the daemon has answered.
const REPLY: Duration = Duration::from_secs(60);
/// Lines of each log that are shown when a test fails.
const TAIL: usize = 15;

const HOW_TO_RUN: &str = "run the suite with `qemu-scripts/test.sh`, which sets it up";

/// A stock kernel and the initramfs that goes with it.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub version: String,
    pub image: PathBuf,
    pub initramfs: PathBuf,
}

/// What qemu-scripts/setup.sh has laid ready, as the environment tells it.
#[derive(Clone, Debug)]
pub struct Setup {
    pub qemu: PathBuf,
    /// Oldest first; at least two.
    pub kernels: Vec<Kernel>,
}

impl Setup {
    pub fn from_environment() -> Self {
        Self::with_kernels("VIOMMU_KERNELS")
    }

    /// With guests that have the drivers of an NVMe disk and ext4, and what makes one.
    pub fn with_storage() -> Self {
        Self::with_kernels("VIOMMU_STORAGE_KERNELS")
    }

    fn with_kernels(name: &str) -> Self {
        let variable = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; {HOW_TO_RUN}"))
        };
        let kernels: Vec<_> = variable(name)
            .split_whitespace()
            .map(|entry| match entry.split(':').collect::<Vec<_>>()[..] {
                [_, version, image, initramfs] => Kernel {
                    version: version.into(),
                    image: image.into(),
                    initramfs: initramfs.into(),
                },
                _ => panic!("{name} has `{entry}`, not NAME:VERSION:VMLINUZ:INITRAMFS"),
            })
            .collect();
        assert!(
            kernels.len() >= 2,
            "{name} names fewer than two kernels; {HOW_TO_RUN}"
        );
        Self {
            qemu: variable("VIOMMU_QEMU").into(),
            kernels,
        }
    }

    pub fn oldest(&self) -> &Kernel {
        &self.kernels[0]
    }

    pub fn newest(&self) -> &Kernel {
        &self.kernels[self.kernels.len() - 1]
    }
}

/// A test's directory: sockets and logs. Kept, and named, where the test fails.
pub struct Workplace {
    dir: Option<tempfile::TempDir>,
    name: String,
    started: Instant,
}

impl Workplace {
    pub fn new(name: &str) -> Self {
        // Not below target/: a socket's path has 107 bytes at most.
        let dir = tempfile::Builder::new()
            .prefix("viommu-guest-")
            .tempdir()
            .expect("a temporary directory");
        Self {
            dir: Some(dir),
            name: name.into(),
            started: Instant::now(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir
            .as_ref()
            .expect("held until drop")
            .path()
            .join(name)
    }

    /// Says what was reached, for whoever reads the output of a slow or failed run.
    pub fn note(&self, text: &str) {
        let seconds = self.started.elapsed().as_secs_f32();
        println!("[{} {seconds:6.1} s] {text}", self.name);
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let kept = self.dir.take().expect("held until drop").keep();
        let mut report = format!("\n{} failed; logs: {}\n", self.name, kept.display());
        let mut logs: Vec<_> = fs::read_dir(&kept)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "log"))
            .collect();
        logs.sort();
        for log in logs {
            let bytes = fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<_> = text.lines().collect();
            let _ = writeln!(report, "--- the end of {}", log.display());
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                let _ = writeln!(report, "{line}");
            }
        }
        eprint!("{report}");
    }
}

/// A child that ends with its owner.
pub struct Process {
    child: Child,
    what: &'static str,
}

impl Process {
    pub fn start(what: &'static str, command: &mut Command, log: &Path) -> Self {
        let log = File::create(log).expect("a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {what}: {e}; {HOW_TO_RUN}"));
        Self { child, what }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child of ours") {
            panic!("{} has ended: {status}", self.what);
        }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command that ends with the thread that starts it, even one that is killed. It is still known by
/// the number of the child.
pub fn bound_command(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Calls `done` until it gives something.
pub fn wait_for<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: not within {} s",
            limit.as_secs()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Lines over a stream, each waited for no longer than told.
struct Lines {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Lines {
    /// Takes the one connection that `child` makes to `listener`.
    fn accept(listener: &UnixListener, child: &mut Process) -> Self {
        listener.set_nonblocking(true).expect("a socket");
        let stream = wait_for("QEMU's connection to us", REPLY, || {
            child.assert_alive();
            match listener.accept() {
                Ok((stream, _)) => Some(stream),
                Err(e) if e.kind() == ErrorKind::WouldBlock => None,
                Err(e) => panic!("cannot accept QEMU's connection: {e}"),
            }
        });
        stream.set_nonblocking(false).expect("a socket");
        stream.set_write_timeout(Some(REPLY)).expect("a socket");
        Self {
            stream,
            pending: Vec::new(),
        }
    }

    fn send(&mut self, line: &str) {
        self.stream
            .write_all(format!("{line}\n").as_bytes())
            .unwrap_or_else(|e| panic!("cannot send `{line}`: {e}"));
    }

    /// The next line, or `None` after `limit`.
    fn next(&mut self, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line: Vec<_> = self.pending.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim_end().into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.stream.set_read_timeout(Some(left)).expect("a socket");
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) => panic!("QEMU has closed the connection"),
                Ok(count) => self.pending.extend(&bytes[..count]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => panic!("cannot read from QEMU: {e}"),
            }
        }
    }
}

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct VmOptions<'a> {
    pub kernel: &'a Kernel,
    /// Added to the kernel's command line.
    pub append: String,
    /// Arguments that connect the VM to its IOMMU; they bring machine and memory along.
    pub iommu: Vec<String>,
    /// More arguments: devices.
    pub extra: Vec<String>,
}

/// A program that starts QEMU and gives it further arguments: `launch`.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The program and its arguments, before those of QEMU.
    pub words: Vec<String>,
    /// QEMU's `-accel` and `-cpu`.
    pub accel: Vec<String>,
}

/// A running VM and its guest.
pub struct Vm {
    qmp: Lines,
    guest: Lines,
    /// Of the last command; see qemu-scripts/guest/init.
    number: u32,
    /// The line that the guest was sent last, until it has answered.
    sent: Option<String>,
    /// What has come of the answer that is waited for.
    answer: Vec<String>,
    // Ends after the connections are closed.
    qemu: Process,
}

impl Vm {
    /// Starts QEMU; the guest is waited for with [`Vm::wait_until_up`]. Logs and sockets are named
    /// after `name`.
    pub fn start(setup: &Setup, place: &Workplace, name: &str, options: &VmOptions<'_>) -> Self {
        Self::start_with(&["-accel", "tcg"], setup, place, name, options)
    }

    /// With other arguments for what runs the guest.
    pub fn start_with(
        accel: &[&str],
        setup: &Setup,
        place: &Workplace,
        name: &str,
        options: &VmOptions<'_>,
    ) -> Self {
        let mut command = bound_command(&setup.qemu);
        command.args(accel);
        Self::run_qemu(command, place, name, options)
    }

    /// Has it started by another program, which ends when QEMU does.
    pub fn launch(
        setup: &Setup,
        place: &Workplace,
        name: &str,
        launcher: &Launcher,
        options: &VmOptions<'_>,
    ) -> Self {
        let (program, arguments) = launcher.words.split_first().expect("a program");
        let mut command = bound_command(program.as_ref());
        command
            .args(arguments)
            .arg(&setup.qemu)
            .args(&launcher.accel);
        Self::run_qemu(command, place, name, options)
    }

    fn run_qemu(
        mut command: Command,
        place: &Workplace,
        name: &str,
        options: &VmOptions<'_>,
    ) -> Self {
        let listen = |kind: &str| {
            let path = place.path(&format!("{name}.{kind}"));
            let listener = UnixListener::bind(&path).expect("a socket for QEMU");
            (listener, path.display().to_string())
        };
        let (qmp_listener, qmp) = listen("qmp");
        let (guest_listener, agent) = listen("agent");
        let console = place.path(&format!("{name}-console.log"));
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-smp", "1"])
            .args(&options.iommu)
            .args(&options.extra)
            .args(["-qmp", &format!("unix:{qmp}")])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", console.display()))
            .args(["-serial", "chardev:console"])
            .arg("-chardev")
            .arg(format!("socket,id=agent,path={agent}"))
            .args(["-serial", "chardev:agent"])
            .arg("-kernel")
            .arg(&options.kernel.image)
            .arg("-initrd")
            .arg(&options.kernel.initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 panic=-1 {}", options.append));
        let log = place.path(&format!("{name}-qemu.log"));
        let mut qemu = Process::start("QEMU", &mut command, &log);
        let guest = Lines::accept(&guest_listener, &mut qemu);
        let mut qmp = Lines::accept(&qmp_listener, &mut qemu);
        qmp.next(REPLY).expect("QMP's greeting");
        let mut vm = Self {
            qmp,
            guest,
            number: 0,
            sent: None,
            answer: Vec::new(),
            qemu,
        };
        vm.qmp("qmp_capabilities", json!({}));
        vm
    }

    /// Waits for the guest's /init, skipping whatever the guest said before.
    pub fn wait_until_up(&mut self) {
        let deadline = Instant::now() + BOOT;
        loop {
            // What was to make it start anew must not do so twice.
            match self.hear(deadline, false) {
                Some(line) if line == "= ready" => {
                    self.sent = None;
                    return;
                }
                Some(_) => {}
                None => self.give_up(&format!("the guest is not up after {} s", BOOT.as_secs())),
            }
        }
    }

    /// Ends the test, and shows what the processor of a guest that says nothing is at.
    fn give_up(&mut self, why: &str) -> ! {
        // Before anything else, for QEMU may be silent too.
        eprintln!("{why}");
        for look in 0..2 {
            for command in ["info registers", "info lapic", "info pic"] {
                let arguments = json!({ "command-line": command });
                let answer = self.qmp("human-monitor-command", arguments);
                eprintln!("look {look}, {command}: {}", answer.as_str().unwrap_or(""));
            }
            thread::sleep(Duration::from_secs(1));
        }
        panic!("{why}")
    }

    /// Runs a shell command in the guest: its output lines and exit status.
    pub fn try_run(&mut self, command: &str, limit: Duration) -> (Vec<String>, i32) {
        self.begin(command);
        self.finish(limit).unwrap_or_else(|| {
            self.give_up(&format!("`{command}`: no answer in {} s", limit.as_secs()))
        })
    }

    /// Runs a shell command that must succeed.
    pub fn run(&mut self, command: &str) -> Vec<String> {
        self.run_within(command, ANSWER)
    }

    /// The same with another time limit.
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Vec<String> {
        let (lines, status) = self.try_run(command, limit);
        assert_eq!(
            status,
            0,
            "`{command}` has failed in the guest:\n{}",
            lines.join("\n")
        );
        lines
    }

    /// Sends a shell command without waiting.
    pub fn begin(&mut self, command: &str) {
        self.qemu.assert_alive();
        self.number += 1;
        let numbered = format!("{} {command}", self.number);
        let line = format!("{} {numbered}", numbered.len());
        self.guest.send(&line);
        self.sent = Some(line);
    }

    /// The guest's next line, with what it takes that it has heard the command before: the end of its
    /// line, and all of it where it is the same one that the guest may be carrying out.
    fn hear(&mut self, deadline: Instant, again: bool) -> Option<String> {
        let mut patience = NUDGE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match (self.guest.next(left.min(patience)), &self.sent) {
                (Some(line), Some(sent)) if line == "= garbled" => {
                    eprintln!("the guest has not heard all of `{sent}`: it is told again");
                    self.guest.send(sent);
                }
                (None, Some(sent)) if left > patience => {
                    eprintln!("the guest is silent after `{sent}`: it may not have heard it");
                    self.guest.send("");
                    if again {
                        self.guest.send(sent);
                    }
                    patience *= 2;
                }
                (None, None) if left > patience => {}
                (line, _) => return line,
            }
        }
    }

    /// The answer to [`Vm::begin`], if it is complete within `limit`.
    pub fn finish(&mut self, limit: Duration) -> Option<(Vec<String>, i32)> {
        let deadline = Instant::now() + limit;
        loop {
            let line = self.hear(deadline, true)?;
            if let Some(text) = line.strip_prefix('|') {
                self.answer.push(text.to_owned());
            } else if let Some(end) = line.strip_prefix("= ") {
                let (number, status): (u32, i32) = end
                    .split_once(' ')
                    .and_then(|(number, status)| Some((number.parse().ok()?, status.parse().ok()?)))
                    .unwrap_or_else(|| panic!("the guest's shell has started again: {line}"));
                let answer = std::mem::take(&mut self.answer);
                if self.number == number {
                    self.sent = None;
                    return Some((answer, status));
                }
                // To a command that was answered before.
            } else {
                panic!("the guest said `{line}` where an answer was due");
            }
        }
    }

    /// Carries out a QMP command.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp
            .send(&json!({ "execute": command, "arguments": arguments }).to_string());
        let deadline = Instant::now() + REPLY;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .qmp
                .next(left)
                .unwrap_or_else(|| panic!("no answer to QMP {command}"));
            let mut message: Value = serde_json::from_str(&line).expect("JSON from QMP");
            if let Some(error) = message.get("error") {
                panic!("QMP {command}: {error}");
            }
            if let Some(value) = message.get_mut("return") {
                return value.take();
            }
        }
    }

    /// Waits until the guest has gone, and QEMU and what has started it with it.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut told = Instant::now();
        wait_for("the end of QEMU", REPLY, || {
            if let Some(sent) = &self.sent
                && told.elapsed() > NUDGE
            {
                told = Instant::now();
                // Once more, for it does no harm. It may be gone this moment.
                let _ = write!(self.guest.stream, "\n{sent}\n");
            }
            self.qemu.child.try_wait().expect("a child of ours")
        })
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Ends QEMU as a crash would.
    pub fn kill(mut self) {
        self.qemu.assert_alive();
        self.qemu.kill();
    }
}

/// The control socket of a daemon.
pub struct Control(pub PathBuf);

impl Control {
    pub fn ask(&self, line: &str) -> Value {
        let exchange = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(&self.0)?;
            stream.set_read_timeout(Some(REPLY))?;
            stream.write_all(format!("{line}\n").as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = exchange().unwrap_or_else(|e| panic!("the daemon's answer to `{line}`: {e}"));
        let value: Value = serde_json::from_str(&answer)
            .unwrap_or_else(|e| panic!("the daemon's answer to `{line}`: {e}: {answer}"));
        assert!(value.get("error").is_none(), "`{line}`: {value}");
        value
    }

    pub fn status(&self) -> Status {
        Status(self.ask("status"))
    }

    /// Every domain's mappings, page by page.
    pub fn tables(&self) -> BTreeMap<u64, Table> {
        let answer = self.ask("mappings");
        array(&answer, "domains")
            .iter()
            .map(|domain| {
                let mut table = Table::default();
                for mapping in array(domain, "mappings") {
                    assert_eq!(mapping["mmio"], false, "{mapping}");
                    let (first, last) = (hex_of(mapping, "first"), hex_of(mapping, "last"));
                    assert!(first % PAGE == 0 && last % PAGE == PAGE - 1, "{mapping}");
                    table.add(
                        first,
                        (last - first) / PAGE + 1,
                        mapping["access"].as_str().expect("text"),
                        |index| hex_of(mapping, "gpa") + index * PAGE,
                    );
                }
                (number(domain, "id"), table)
            })
            .collect()
    }
}

/// The daemon under test.
pub struct Daemon {
    process: Process,
    control: Control,
    /// What QEMU must be told, as the daemon itself says.
    pub qemu_args: Vec<String>,
}

impl Daemon {
    /// Starts it with this configuration, to which the sockets are added.
    pub fn start(place: &Workplace, text: &str) -> Self {
        let binary = env!("CARGO_BIN_EXE_vhost-device-iommu");
        let (config, viot) = (place.path("vm.toml"), place.path("vm.viot"));
        let (socket, control) = (place.path("iommu.sock"), place.path("control.sock"));
        let sockets = format!(
            "socket = \"{}\"\ncontrol = \"{}\"\n",
            socket.display(),
            control.display()
        );
        fs::write(&config, sockets + text).expect("the configuration written");
        let output_of = |arguments: &[&Path]| {
            let output = Command::new(binary)
                .args(arguments)
                .output()
                .expect("the daemon's program runs");
            assert!(
                output.status.success(),
                "{arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).expect("text")
        };
        output_of(&["viot".as_ref(), &config, "-o".as_ref(), &viot]);
        let qemu_args = output_of(&["qemu-args".as_ref(), &config, "--viot".as_ref(), &viot])
            .lines()
            .map(str::to_owned)
            .collect();
        let mut process = Process::start(
            "the daemon",
            bound_command(binary.as_ref())
                .arg("--config")
                .arg(&config)
                .env("RUST_LOG", "info"),
            &place.path("daemon.log"),
        );
        wait_for("the daemon's sockets", REPLY, || {
            process.assert_alive();
            (socket.exists() && control.exists()).then_some(())
        });
        Self {
            process,
            control: Control(control),
            qemu_args,
        }
    }

    /// Asks the control socket.
    pub fn ask(&mut self, line: &str) -> Value {
        self.process.assert_alive();
        self.control.ask(line)
    }

    pub fn status(&mut self) -> Status {
        self.process.assert_alive();
        self.control.status()
    }

    /// Every domain's mappings, page by page.
    pub fn tables(&mut self) -> BTreeMap<u64, Table> {
        self.process.assert_alive();
        self.control.tables()
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Asks it to end, which it must do cleanly.
    pub fn stop(mut self) {
        self.process.assert_alive();
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -TERM {}", self.pid())])
            .status()
            .expect("a shell");
        assert!(sent.success());
        let status = wait_for("the end of the daemon", REPLY, || {
            self.process.child.try_wait().expect("a child of ours")
        });
        assert!(status.success(), "the daemon ended with {status}");
    }
}

/// The answer to `status`.
pub struct Status(pub Value);

impl Status {
    /// What the daemon says of the endpoint at this PCI address.
    pub fn endpoint(&self, address: &str) -> &Value {
        array(&self.0, "endpoints")
            .iter()
            .find(|endpoint| endpoint["address"] == address)
            .unwrap_or_else(|| panic!("{address} is not in {}", self.0))
    }

    /// The domain it is attached to.
    pub fn domain_of(&self, address: &str) -> u64 {
        let endpoint = self.endpoint(address);
        assert_eq!(endpoint["state"], "attached", "{endpoint}");
        number(endpoint, "domain")
    }

    /// What its DMA meets.
    pub fn dma_of(&self, address: &str) -> &str {
        self.endpoint(address)["dma"].as_str().expect("text")
    }

    pub fn domains(&self) -> &[Value] {
        array(&self.0, "domains")
    }

    /// How many requests of this kind ended with this status.
    pub fn requests(&self, kind: &str, status: &str) -> u64 {
        self.0["requests"][kind][status].as_u64().unwrap_or(0)
    }

    /// Every request that was refused, as `KIND STATUS`.
    pub fn refusals(&self) -> Vec<String> {
        let kinds = self.0["requests"].as_object().expect("an object");
        kinds
            .iter()
            .flat_map(|(kind, statuses)| {
                let statuses = statuses.as_object().expect("an object");
                statuses
                    .iter()
                    .filter(|(status, _)| *status != "ok")
                    .map(move |(status, count)| format!("{kind} {status}: {count}"))
            })
            .collect()
    }
}

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// A domain's mappings, expanded to pages: IOVA to GPA and access.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(pub BTreeMap<u64, (u64, String)>);

impl Table {
    fn add(&mut self, iova: u64, pages: u64, access: &str, gpa: impl Fn(u64) -> u64) {
        for index in 0..pages {
            let at = iova + index * PAGE;
            let old = self.0.insert(at, (gpa(index), access.into()));
            assert!(old.is_none(), "{at:#x} is listed twice");
        }
    }

    /// Reads what vfio-map's `dump` has printed.
    pub fn from_dump(lines: &[String]) -> Self {
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal");
        let mut buffer = BTreeMap::new();
        let mut table = Self::default();
        for line in lines {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["b", index, gpa] => {
                    assert_ne!(gpa, "ffffffffffffffff", "page {index} is not in memory");
                    buffer.insert(index.parse::<u64>().expect("a number"), hex(gpa));
                }
                ["m", iova, pages, access, index] => {
                    let index: u64 = index.parse().expect("a number");
                    table.add(hex(iova), pages.parse().expect("a number"), access, |i| {
                        buffer[&(index + i)]
                    });
                }
                ["ok", ..] => {}
                _ => panic!("vfio-map said `{line}`"),
            }
        }
        table
    }

    /// Requires both to be equal, and names the first differences if they are not.
    #[track_caller]
    pub fn assert_same(guest: &Self, daemon: &Self, what: &str) {
        if guest == daemon {
            return;
        }
        let mut pages: Vec<_> = guest.0.keys().chain(daemon.0.keys()).collect();
        pages.sort();
        pages.dedup();
        pages.retain(|page| guest.0.get(page) != daemon.0.get(page));
        let mut report = format!(
            "{what}: {} of {} pages (guest) and {} pages (daemon) differ\n",
            pages.len(),
            guest.0.len(),
            daemon.0.len()
        );
        for page in pages.iter().take(10) {
            let side = |table: &Self| match table.0.get(page) {
                Some((gpa, access)) => format!("{gpa:#x} {access}"),
                None => "nothing".into(),
            };
            let _ = writeln!(
                report,
                "  {page:#x}: the guest has {}, the daemon {}",
                side(guest),
                side(daemon)
            );
        }
        panic!("{report}");
    }
}

fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key]
        .as_array()
        .unwrap_or_else(|| panic!("no list `{key}` in {value}"))
}

/// The number under `key`.
pub fn number(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number `{key}` in {value}"))
}

/// The address under `key`, a text such as `0x1000`.
pub fn hex_of(value: &Value, key: &str) -> u64 {
    value[key]
        .as_str()
        .and_then(|text| text.strip_prefix("0x"))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .unwrap_or_else(|| panic!("no address `{key}` in {value}"))
}
