//! Real guests: QEMU and the daemon as child processes, which a test drives step by step.
//!
//! Each step has a time limit. Each process ends when its owner is dropped. A test that fails keeps its logs and
//! prints their directory.

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

pub mod machine;
pub mod stuck;

use machine::Machine;
use stuck::{CODE, SAMPLES, Sample, WaitsForItself, bytes_of, in_ram, waits_for_itself};

/// Time limit until the guest's /init is ready for commands. A nested guest needs 30 s on two processors, 100 s if 16
/// processes share them.
pub const BOOT: Duration = Duration::from_secs(300);
/// The silence during the boot after which the test looks at the guest's processor.
const LOOK_AFTER: Duration = Duration::from_secs(30);
/// Time limit of a command in the guest.
pub const ANSWER: Duration = Duration::from_secs(120);
/// Time limit of a command that does 10^5 rounds in the guest, on a busy machine.
pub const LONG_ANSWER: Duration = Duration::from_secs(400);
/// The silence after which the test sends the guest its command again; the time doubles with each repetition. The
/// guest's serial port loses characters, or their interrupt, when interrupts are off for long.
const RESEND_AFTER: Duration = Duration::from_secs(15);
/// Time limit of an answer from QEMU or the daemon.
const REPLY: Duration = Duration::from_secs(60);
/// Lines of each log that a failed test prints.
const TAIL: usize = 15;

const HOW_TO_RUN: &str = "run the suite with `qemu-scripts/test.sh`, which sets it up";

/// A kernel and its initramfs.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub version: String,
    /// Bytes in a page of the guest.
    pub page: u64,
    pub image: PathBuf,
    pub initramfs: PathBuf,
}

/// The programs and kernels that qemu-scripts/setup.sh made, taken from the environment.
#[derive(Clone, Debug)]
pub struct Setup {
    pub machine: Machine,
    pub qemu: PathBuf,
    /// At least one kernel with pages of 4 KiB, and others; the oldest of each kind first.
    pub kernels: Vec<Kernel>,
}

impl Setup {
    pub fn from_environment() -> Self {
        Self::with_kernels("VIOMMU_KERNELS")
    }

    /// With guests that have the drivers of NVMe and ext4, and `mkfs.ext4`.
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
                [name, version, image, initramfs] => Kernel {
                    version: version.into(),
                    page: match name.split_once('-') {
                        Some((_, "16k")) => 16 << 10,
                        Some((_, "64k")) => 64 << 10,
                        _ => PAGE,
                    },
                    image: image.into(),
                    initramfs: initramfs.into(),
                },
                _ => panic!("{name} has `{entry}`, not NAME:VERSION:VMLINUZ:INITRAMFS"),
            })
            .collect();
        assert!(!kernels.is_empty(), "{name} names no kernel; {HOW_TO_RUN}");
        Self {
            machine: Machine::from_environment(),
            qemu: variable("VIOMMU_QEMU").into(),
            kernels,
        }
    }

    /// A UEFI firmware and a boot loader for it.
    pub fn firmware(&self) -> Firmware {
        let variable = |name: &str| {
            let value = std::env::var(name);
            PathBuf::from(value.unwrap_or_else(|_| panic!("{name} is not set; {HOW_TO_RUN}")))
        };
        let grub = variable("VIOMMU_GRUB");
        match self.machine {
            Machine::Q35 => Firmware {
                code: variable("VIOMMU_OVMF_CODE"),
                variables: Some(variable("VIOMMU_OVMF_VARS")),
                grub,
            },
            Machine::Virt => Firmware {
                code: variable("VIOMMU_UEFI"),
                variables: None,
                grub,
            },
        }
    }

    pub fn oldest(&self) -> &Kernel {
        self.with_pages(PAGE).next().expect("a kernel")
    }

    pub fn newest(&self) -> &Kernel {
        self.with_pages(PAGE).last().expect("a kernel")
    }

    pub fn oldest_16k(&self) -> &Kernel {
        self.with_pages(16 << 10).next().expect("a 16 KiB kernel")
    }

    pub fn newest_16k(&self) -> &Kernel {
        self.with_pages(16 << 10).last().expect("a 16 KiB kernel")
    }

    pub fn own_64k(&self) -> &Kernel {
        self.with_pages(64 << 10).last().expect("a 64 KiB kernel")
    }

    fn with_pages(&self, page: u64) -> impl Iterator<Item = &Kernel> {
        self.kernels
            .iter()
            .filter(move |kernel| kernel.page == page)
    }
}

/// A UEFI firmware, and GRUB.
#[derive(Clone, Debug)]
pub struct Firmware {
    /// Its flash memory with the code.
    pub code: PathBuf,
    /// Its flash memory with the initial variables; without one the firmware begins with none.
    pub variables: Option<PathBuf>,
    /// Runs `EFI/BOOT/grub.cfg` of the disk that it is started from.
    pub grub: PathBuf,
}

/// A test's directory for sockets and logs. A test that fails keeps it and prints its path.
pub struct TestDir {
    dir: Option<tempfile::TempDir>,
    name: String,
    started: Instant,
}

impl TestDir {
    pub fn new(name: &str) -> Self {
        // Not below target/: the path of a socket must not be longer than 107 bytes.
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

    /// Prints a milestone with the time since the start, for readers of a slow or failed run.
    pub fn note(&self, text: &str) {
        let seconds = self.started.elapsed().as_secs_f32();
        println!("[{} {seconds:6.1} s] {text}", self.name);
    }
}

impl Drop for TestDir {
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
            let _ = writeln!(report, "--- last lines of {}", log.display());
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                let _ = writeln!(report, "{line}");
            }
        }
        eprint!("{report}");
    }
}

/// A child process that ends when this is dropped.
pub struct Process {
    child: Child,
    name: &'static str,
}

impl Process {
    pub fn start(name: &'static str, command: &mut Command, log: &Path) -> Self {
        let log = File::create(log).expect("a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {name}: {e}; {HOW_TO_RUN}"));
        Self { child, name }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child of ours") {
            panic!("{} has ended: {status}", self.name);
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

/// A command that starts `program`. The kernel kills the program when the thread that started it ends, even by
/// SIGKILL. `setpriv` executes the program in place, so the process number is the program's.
pub fn bound_command(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Calls `done` until it returns a value. Fails the test after `limit`.
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

/// Lines over a stream. Each call that waits has a time limit.
struct Lines {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Lines {
    /// Accepts the one connection that `child` makes to `listener`.
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

/// The parts of a VM.
#[derive(Clone, Debug)]
pub struct VmOptions<'a> {
    pub kernel: &'a Kernel,
    /// More words for the kernel's command line.
    pub append: String,
    /// QEMU's arguments for the IOMMU, which include the machine and its memory.
    pub iommu: Vec<String>,
    /// QEMU's arguments for devices.
    pub extra: Vec<String>,
}

impl VmOptions<'_> {
    /// The kernel's command line.
    pub fn command_line(&self) -> String {
        let console = Machine::from_environment().console();
        format!("console={console} panic=-1 {}", self.append)
    }

    /// QEMU's arguments without the kernel.
    pub fn devices(&self) -> Vec<String> {
        [&self.iommu[..], &self.extra[..]].concat()
    }

    fn arguments(&self) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let mut arguments = self.devices();
        arguments.extend(["-kernel".to_owned(), path(&self.kernel.image)]);
        arguments.extend(["-initrd".to_owned(), path(&self.kernel.initramfs)]);
        arguments.extend(["-append".to_owned(), self.command_line()]);
        arguments
    }
}

/// A program that starts QEMU with more arguments: `launch`.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The program and its arguments. QEMU and its arguments follow.
    pub words: Vec<String>,
    /// QEMU's arguments `-accel` and `-cpu`.
    pub accel: Vec<String>,
}

/// A running VM and its guest.
pub struct Vm {
    qmp: Lines,
    guest: Lines,
    /// The number of the last command; see qemu-scripts/guest/init.
    number: u32,
    /// The last line sent to the guest, until the guest answers it.
    sent: Option<String>,
    /// The lines received so far of the answer to the last command.
    answer: Vec<String>,
    // Dropped last, after the connections.
    qemu: Process,
}

impl Vm {
    /// Starts QEMU. [`Vm::wait_until_up`] waits for the guest. `name` begins the names of logs and sockets.
    pub fn start(setup: &Setup, test_dir: &TestDir, name: &str, options: &VmOptions<'_>) -> Self {
        Self::start_with(setup.machine.accel(), setup, test_dir, name, options)
    }

    /// Starts QEMU with other arguments for the accelerator.
    pub fn start_with(
        accel: &[&str],
        setup: &Setup,
        test_dir: &TestDir,
        name: &str,
        options: &VmOptions<'_>,
    ) -> Self {
        let mut command = bound_command(&setup.qemu);
        command.args(accel);
        Self::run_qemu(command, test_dir, name, &options.arguments())
    }

    /// Starts QEMU without a kernel: its firmware looks for one among the devices of `arguments`.
    pub fn start_firmware(
        setup: &Setup,
        test_dir: &TestDir,
        name: &str,
        arguments: &[String],
    ) -> Self {
        let mut command = bound_command(&setup.qemu);
        command.args(setup.machine.accel());
        Self::run_qemu(command, test_dir, name, arguments)
    }

    /// Lets another program start QEMU. That program ends when QEMU does.
    pub fn launch(
        setup: &Setup,
        test_dir: &TestDir,
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
        Self::run_qemu(command, test_dir, name, &options.arguments())
    }

    fn run_qemu(mut command: Command, test_dir: &TestDir, name: &str, more: &[String]) -> Self {
        let listen = |kind: &str| {
            let path = test_dir.path(&format!("{name}.{kind}"));
            let listener = UnixListener::bind(&path).expect("a socket for QEMU");
            (listener, path.display().to_string())
        };
        let (qmp_listener, qmp) = listen("qmp");
        let (guest_listener, agent) = listen("agent");
        let console = test_dir.path(&format!("{name}-console.log"));
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-smp", "1"])
            .args(more)
            .args(["-qmp", &format!("unix:{qmp}")])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", console.display()))
            .args(["-serial", "chardev:console"])
            .arg("-chardev")
            .arg(format!("socket,id=agent,path={agent}"))
            .args(["-serial", "chardev:agent"]);
        let log = test_dir.path(&format!("{name}-qemu.log"));
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

    /// Waits for the guest's /init. Skips earlier output of the guest.
    pub fn wait_until_up(&mut self) {
        let deadline = Instant::now() + BOOT;
        loop {
            // The command must not be repeated: it may be the one that restarts the guest.
            match self.next_line(deadline.min(Instant::now() + LOOK_AFTER), false) {
                // Firmware may have written there before, without the end of a line.
                Some(line) if line.ends_with("= ready") => {
                    self.sent = None;
                    return;
                }
                Some(_) => {}
                None if Instant::now() < deadline => self.fail_if_stuck("the guest is not up"),
                None => self.give_up(&format!("the guest is not up after {} s", BOOT.as_secs())),
            }
        }
    }

    /// Fails the test and prints the state of the processor of a silent guest.
    fn give_up(&mut self, why: &str) -> ! {
        // Printed first: QEMU may not answer either.
        eprintln!("{why}");
        self.fail_if_stuck(why);
        for round in 0..2 {
            eprintln!("round {round}: {}", self.processor());
            thread::sleep(Duration::from_secs(1));
        }
        panic!("{why}")
    }

    /// Fails the test with a [`WaitsForItself`] if the guest's processor does.
    fn fail_if_stuck(&mut self, why: &str) {
        let mut samples = Vec::new();
        while samples.len() < SAMPLES {
            match self.sample() {
                Some(sample) if sample.waits_for_a_lock() => samples.push(sample),
                _ => return,
            }
            thread::sleep(Duration::from_secs(1));
        }
        if waits_for_itself(&samples) {
            let report = format!("{why}\n{samples:x?}\n{}", self.processor());
            std::panic::panic_any(WaitsForItself(report));
        }
    }

    fn sample(&mut self) -> Option<Sample> {
        let mut sample = Sample::new(&self.monitor("info registers"))?;
        let code = format!("x/{CODE}xb {:#x}", sample.rip.wrapping_sub(CODE / 2));
        sample.code = bytes_of(&self.monitor(&code));
        let rdi = sample.rdi();
        if in_ram(&self.monitor(&format!("gva2gpa {rdi:#x}"))) {
            let word = bytes_of(&self.monitor(&format!("x/4xb {rdi:#x}")));
            sample.word = word.try_into().ok().map(u32::from_le_bytes);
        }
        Some(sample)
    }

    /// The state of the guest's processor: its registers, its interrupts, its stack.
    fn processor(&mut self) -> String {
        let registers = self.monitor("info registers");
        let mut text = registers.clone();
        for command in ["info lapic", "info pic"] {
            text += &self.monitor(command);
        }
        if let Some(rsp) = Sample::new(&registers).map(|sample| sample.rsp()) {
            text += &self.monitor(&format!("x/128xg {rsp:#x}"));
        }
        text
    }

    /// The answer of QEMU's monitor for people.
    fn monitor(&mut self, command: &str) -> String {
        let arguments = json!({ "command-line": command });
        let answer = self.qmp("human-monitor-command", arguments);
        answer.as_str().unwrap_or_default().to_owned()
    }

    /// Runs a shell command in the guest. Returns its output lines and exit status.
    pub fn try_run(&mut self, command: &str, limit: Duration) -> (Vec<String>, i32) {
        self.begin(command);
        self.finish(limit).unwrap_or_else(|| {
            self.give_up(&format!(
                "`{command}`: no answer within {} s",
                limit.as_secs()
            ))
        })
    }

    /// Runs a shell command that must succeed.
    pub fn run(&mut self, command: &str) -> Vec<String> {
        self.run_within(command, ANSWER)
    }

    /// Runs a shell command that must succeed within `limit`.
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

    /// Sends a shell command and does not wait for its answer.
    pub fn begin(&mut self, command: &str) {
        self.qemu.assert_alive();
        self.number += 1;
        let numbered = format!("{} {command}", self.number);
        let line = format!("{} {numbered}", numbered.len());
        self.guest.send(&line);
        self.sent = Some(line);
    }

    /// The guest's next line, or `None` at the deadline. While the guest is silent, sends the end of a line, and with
    /// `repeat` the last command, too: the serial port may have lost either. The guest runs a command that it
    /// receives twice only once.
    fn next_line(&mut self, deadline: Instant, repeat: bool) -> Option<String> {
        let mut patience = RESEND_AFTER;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match (self.guest.next(left.min(patience)), &self.sent) {
                (Some(line), Some(sent)) if line == "= garbled" => {
                    eprintln!("the guest received `{sent}` garbled: sending it again");
                    self.guest.send(sent);
                }
                (None, Some(sent)) if left > patience => {
                    eprintln!("the guest is silent after `{sent}`: it may not have received it");
                    self.guest.send("");
                    if repeat {
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
            let line = self.next_line(deadline, true)?;
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
                // Another answer to an earlier command, which was sent twice.
            } else {
                panic!("the guest sent `{line}` instead of an answer");
            }
        }
    }

    /// Runs a QMP command that must succeed. Returns its result.
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

    /// Waits until the guest has shut down, and QEMU and its launcher have ended.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut sent_at = Instant::now();
        wait_for("the end of QEMU", REPLY, || {
            if let Some(sent) = &self.sent
                && sent_at.elapsed() > RESEND_AFTER
            {
                sent_at = Instant::now();
                // To send the command again does no harm. An error is ignored: the guest may be gone already.
                let _ = write!(self.guest.stream, "\n{sent}\n");
            }
            self.qemu.child.try_wait().expect("a child of ours")
        })
    }

    /// The number of QEMU's process.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Kills QEMU.
    pub fn kill(mut self) {
        self.qemu.assert_alive();
        self.qemu.kill();
    }
}

/// The path of a daemon's control socket.
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

    /// Whether a daemon answers. The one before may have left its socket.
    pub fn answers(&self) -> bool {
        let answer = UnixStream::connect(&self.0).and_then(|mut stream| {
            stream.set_read_timeout(Some(REPLY))?;
            stream.write_all(b"status\n")?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())
        });
        answer.is_ok_and(|bytes| bytes > 0)
    }

    /// The mappings of each domain, page by page.
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
    /// QEMU's arguments for the IOMMU, as `qemu-args` prints them.
    pub qemu_args: Vec<String>,
}

impl Daemon {
    /// Starts the daemon with this configuration and sockets in `test_dir`.
    pub fn start(test_dir: &TestDir, text: &str) -> Self {
        Self::start_over("socket", test_dir, text)
    }

    /// The same with another key for the VMM's socket.
    pub fn start_over(key: &str, test_dir: &TestDir, text: &str) -> Self {
        let binary = env!("CARGO_BIN_EXE_vhost-device-iommu");
        let machine = Machine::from_environment();
        let config = test_dir.path("vm.toml");
        let (socket, control) = (test_dir.path("iommu.sock"), test_dir.path("control.sock"));
        let sockets = format!(
            "{key} = \"{}\"\ncontrol = \"{}\"\n{}",
            socket.display(),
            control.display(),
            machine.config()
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
        let table = match machine {
            Machine::Q35 => {
                let viot = test_dir.path("vm.viot");
                output_of(&["viot".as_ref(), &config, "-o".as_ref(), &viot]);
                viot
            }
            Machine::Virt => {
                let qemu = std::env::var("VIOMMU_QEMU").expect("VIOMMU_QEMU is set");
                let (base, tree) = (test_dir.path("base.dtb"), test_dir.path("vm.dtb"));
                machine.dump_tree(qemu.as_ref(), &base);
                let words: [&Path; 6] = [
                    "dtb".as_ref(),
                    &config,
                    "--base".as_ref(),
                    &base,
                    "-o".as_ref(),
                    &tree,
                ];
                output_of(&words);
                tree
            }
        };
        let qemu_args = output_of(&["qemu-args".as_ref(), &config, "--viot".as_ref(), &table])
            .lines()
            .map(str::to_owned)
            .collect();
        let mut process = Process::start(
            "the daemon",
            bound_command(binary.as_ref())
                .arg("--config")
                .arg(&config)
                .env("RUST_LOG", "info"),
            &test_dir.path("daemon.log"),
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

    /// Sends a request to the control socket. Returns the answer.
    pub fn ask(&mut self, line: &str) -> Value {
        self.process.assert_alive();
        self.control.ask(line)
    }

    pub fn status(&mut self) -> Status {
        self.process.assert_alive();
        self.control.status()
    }

    /// The mappings of each domain, page by page.
    pub fn tables(&mut self) -> BTreeMap<u64, Table> {
        self.process.assert_alive();
        self.control.tables()
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Sends SIGTERM. The daemon must end with success.
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
    /// The entry of the endpoint at this PCI address.
    pub fn endpoint(&self, address: &str) -> &Value {
        array(&self.0, "endpoints")
            .iter()
            .find(|endpoint| endpoint["address"] == address)
            .unwrap_or_else(|| panic!("{address} is not in {}", self.0))
    }

    /// The domain of the endpoint at this PCI address, which must be attached.
    pub fn domain_of(&self, address: &str) -> u64 {
        let endpoint = self.endpoint(address);
        assert_eq!(endpoint["state"], "attached", "{endpoint}");
        number(endpoint, "domain")
    }

    /// The state of DMA of the endpoint at this PCI address, such as `translated`.
    pub fn dma_of(&self, address: &str) -> &str {
        self.endpoint(address)["dma"].as_str().expect("text")
    }

    pub fn domains(&self) -> &[Value] {
        array(&self.0, "domains")
    }

    /// The number of requests of this kind with this status.
    pub fn requests(&self, kind: &str, status: &str) -> u64 {
        self.0["requests"][kind][status].as_u64().unwrap_or(0)
    }

    /// The refused requests, as `KIND STATUS: COUNT`.
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

/// Bytes in a page of a table: the daemon's smallest granule. A guest's page may consist of several.
pub const PAGE: u64 = 4096;

/// A domain's mappings as pages: the guest-physical address and access of each IOVA.
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

    /// Decodes the output of vfio-map's `dump`.
    pub fn from_dump(lines: &[String]) -> Self {
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal");
        let mut buffer = BTreeMap::new();
        let mut table = Self::default();
        // The number of our pages in one of the guest's.
        let mut part = 1;
        for line in lines {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["p", bytes] => part = bytes.parse::<u64>().expect("a number") / PAGE,
                ["b", index, gpa] => {
                    assert_ne!(gpa, "ffffffffffffffff", "page {index} is not in memory");
                    buffer.insert(index.parse::<u64>().expect("a number"), hex(gpa));
                }
                ["m", iova, pages, access, index] => {
                    let index: u64 = index.parse().expect("a number");
                    let pages: u64 = pages.parse().expect("a number");
                    table.add(hex(iova), pages * part, access, |i| {
                        buffer[&(index + i / part)] + i % part * PAGE
                    });
                }
                ["ok", ..] => {}
                _ => panic!("vfio-map printed `{line}`"),
            }
        }
        table
    }

    /// Fails the test if the tables differ. Prints the first differences.
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
