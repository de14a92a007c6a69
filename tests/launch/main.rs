//! `launch` starts and ends the daemon and a VMM together. The VMM here is a shell script in place of QEMU, and in
//! [`cloud_hypervisor`] in place of that VMM. In [`restarts`] a stub stands in place of the daemon.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and numbers are small"
)]

mod cloud_hypervisor;
mod restarts;
#[path = "../common/stopped_thread.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod stopped_thread;
mod upgrade;
mod virt;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_iommu::host::sysfs::HostRoot;
use vhost_device_iommu::vmms::launch::Launch;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");

/// The VMM's own arguments; `launch` adds others after them.
const OWN: [&str; 2] = ["-nodefaults", "own argument"];

/// The VMM reports that it runs, and its process ID.
const ARRIVE: &str = "echo $$ >vmm.new; mv vmm.new vmm.pid;";
/// The VMM stays until the test ends.
const STAY: &str = "while [ -e vm.toml ]; do sleep 0.05; done";

#[test]
fn the_daemon_serves_before_the_vmm_starts() {
    let launch_dir = LaunchDir::new();
    let run = launch_dir.run(
        &format!(
            "printf '%s\\n' \"$@\" >args
             for last; do :; done
             cat \"${{last#file=}}\" >table
             {PROGRAM} ctl control.sock status >status || exit 99
             exit 7"
        ),
        &[],
    );
    assert_eq!(run.status.code(), Some(7), "{}", run.stderr);
    let args = launch_dir.read("args");
    let args: Vec<_> = args.lines().collect();
    let printed = Command::new(PROGRAM)
        .args(["qemu-args", "vm.toml"])
        .current_dir(launch_dir.path(""))
        .output()
        .expect("it runs");
    let printed = String::from_utf8(printed.stdout).expect("text");
    let printed: Vec<_> = printed.lines().collect();
    let (table, rest) = args.split_last().expect("arguments");
    let added = [&OWN[..], &printed[..printed.len() - 1]].concat();
    assert_eq!(rest, added);
    assert!(table.starts_with("file=/proc/self/fd/"), "{table}");

    let expected = Command::new(PROGRAM)
        .args(["viot", "vm.toml"])
        .current_dir(launch_dir.path(""))
        .output()
        .expect("it runs");
    let table = fs::read(launch_dir.path("table")).expect("a table");
    assert!(table.starts_with(b"VIOT"));
    assert_eq!(table, expected.stdout);
    assert!(launch_dir.read("status").contains("no VM is connected"));
    launch_dir.assert_clean();
}

#[test]
fn the_exit_status_is_the_vmms() {
    let launch_dir = LaunchDir::new();
    for (script, status) in [
        ("exit 0", 0),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ] {
        let run = launch_dir.run(script, &[]);
        assert_eq!(run.status.code(), Some(status), "{script}: {}", run.stderr);
        launch_dir.assert_clean();
    }
}

#[test]
fn launch_keeps_the_vmms_own_machine_and_ram() {
    let launch_dir = LaunchDir::new();
    let script = "printf '%s\\n' \"$@\" >args";
    let run = launch_dir.run(script, &["-M", "q35", "-m", "1G"]);
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    let args = launch_dir.read("args").replace('\n', " ");
    let memory =
        "-m 1G -machine memory-backend=viommu-ram -object memory-backend-memfd,id=viommu-ram";
    assert!(args.contains(memory), "{args}");
    let sleep = "-global ICH9-LPC.disable_s3=1 -global ICH9-LPC.disable_s4=1";
    assert!(args.contains(sleep), "{args}");
}

#[test]
fn the_table_can_be_written_to_a_path() {
    let launch_dir = LaunchDir::new();
    let script = "for last; do :; done; [ \"$last\" = file=kept.viot ] && [ -s kept.viot ]";
    let mut command = launch_dir.command();
    command.args(["--viot", "kept.viot"]);
    let run = finish(&mut launch_dir.with_vmm(command, script, &[]));
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    assert!(launch_dir.path("kept.viot").exists());
}

#[test]
fn signals_go_to_the_vmm_and_the_daemon_stays() {
    for name in ["TERM", "INT", "HUP"] {
        let launch_dir = LaunchDir::new();
        let mut launched = launch_dir.launch(&format!(
            "trap '{PROGRAM} ctl control.sock status >status; echo {name} >told; exit 9' {name}
             {ARRIVE} {STAY}"
        ));
        let (vmm, daemon) = launched.children(&launch_dir);
        assert_ne!(
            group(vmm),
            group(daemon),
            "the daemon must not receive a terminal's signals"
        );
        send(name, launched.pid());
        let run = launched.finish();
        assert_eq!(run.status.code(), Some(9), "{name}: {}", run.stderr);
        assert_eq!(launch_dir.read("told"), format!("{name}\n"));
        assert!(launch_dir.read("status").contains("no VM is connected"));
        assert!(!is_alive(daemon));
        launch_dir.assert_clean();
    }
}

#[test]
fn ignored_signals_stay_ignored() {
    let launch_dir = LaunchDir::new();
    let script = "kill -HUP $PPID; kill -HUP $$; exit 5";
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh", PROGRAM]);
    command.args(["launch", "--config", "vm.toml"]);
    command.current_dir(launch_dir.path(""));
    let run = finish(&mut launch_dir.with_vmm(command, script, &[]));
    assert_eq!(run.status.code(), Some(5), "{}", run.stderr);
}

#[test]
fn the_vmm_does_not_outlive_the_daemon() {
    let launch_dir = LaunchDir::new();
    // Sockets of every kind that the daemon can make without a passthrough device.
    let config = launch_dir.read("vm.toml")
        + "[[endpoint]]\naddress = '00:06.0'\nshadow = 'shadow.sock'\n\
           [[endpoint]]\naddress = '00:07.0'\n\
           vfio-user = { listen = 'client.sock', connect = 'server.sock' }\n";
    launch_dir.write("vm.toml", &config);
    let mut launched = launch_dir.launch(&format!(
        "trap 'echo told >told; exit 0' TERM; {ARRIVE} {STAY}"
    ));
    let (vmm, _) = launched.children(&launch_dir);
    assert!(launch_dir.path("shadow.sock").exists() && launch_dir.path("client.sock").exists());
    // A daemon that has left descriptors is started again, five times at most.
    let mut killed = BTreeSet::new();
    wait_for("the end", || {
        for daemon in launched.child_processes() {
            if daemon != vmm && killed.insert(daemon) {
                send("KILL", daemon);
            }
        }
        launched.child.try_wait().expect("a child").is_some()
    });
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    assert!(
        run.stderr.contains("the daemon ended (signal: 9"),
        "{}",
        run.stderr
    );
    assert_eq!(launch_dir.read("told"), "told\n");
    assert!(!is_alive(vmm));
    launch_dir.assert_clean();
}

#[test]
fn a_sigterm_to_launch_and_to_the_daemon_is_no_error() {
    let launch_dir = LaunchDir::new();
    let mut launched =
        launch_dir.launch(&format!("trap 'sleep 0.3; exit 4' TERM; {ARRIVE} {STAY}"));
    let (_, daemon) = launched.children(&launch_dir);
    send("TERM", launched.pid());
    send("TERM", daemon);
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(4), "{}", run.stderr);
    launch_dir.assert_clean();
}

#[test]
fn no_child_outlives_the_launcher() {
    let launch_dir = LaunchDir::new();
    let mut launched = launch_dir.launch(&format!("trap '' TERM; {ARRIVE} {STAY}"));
    let (vmm, daemon) = launched.children(&launch_dir);
    send("KILL", launched.pid());
    launched.finish();
    wait_for("the VMM and the daemon to end", || {
        !is_alive(vmm) && !is_alive(daemon)
    });
    launch_dir.assert_clean();
}

#[test]
fn the_message_of_a_daemon_that_refuses_to_start_is_kept() {
    let launch_dir = LaunchDir::new();
    launch_dir.write("control.sock", "no socket");
    let run = launch_dir.run("echo started >started", &[]);
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    assert!(
        run.stderr.contains("exists and is not a socket"),
        "{}",
        run.stderr
    );
    let messages = run.stderr.matches("vhost-device-iommu: ").count();
    assert_eq!(messages, 1, "{}", run.stderr);
    assert!(!launch_dir.path("started").exists());
    assert!(!launch_dir.path("vm.sock").exists());
}

/// Neither the daemon nor the VMM starts with an option that undoes the IOMMU.
#[test]
fn options_that_undo_the_iommu_start_nothing() {
    let launch_dir = LaunchDir::new();
    for (options, cure) in [
        (&["-nodefaults", "-daemonize"][..], "leave the option out"),
        (&["-mem-path", "/dev/shm"], "share=on"),
        (&["-device", "intel-iommu"], "leave it out"),
        (&["-chardev", "null,id=viommu-socket"], "give another ID"),
        (
            &[
                "-numa",
                "node,memdev=r",
                "-object",
                "memory-backend-ram,id=r",
            ],
            "add share=on",
        ),
    ] {
        let run = launch_dir.run("echo started >started", options);
        assert_eq!(run.status.code(), Some(1), "{options:?}: {}", run.stderr);
        assert!(run.stderr.contains(cure), "{cure} in {}", run.stderr);
        assert!(!launch_dir.path("started").exists());
        launch_dir.assert_clean();
    }
}

#[test]
fn endpoints_without_a_device_are_noted() {
    let launch_dir = LaunchDir::new();
    let config = launch_dir.read("vm.toml")
        + "[[endpoint]]\naddress = '00:06.0'\nshadow = 'shadow.sock'\n\
           [[endpoint]]\nrange = '00:10.0-00:11.7'\n";
    launch_dir.write("vm.toml", &config);
    let note = "note: no argument gives this endpoint a device; endpoint ";
    let run = launch_dir.run("exit 0", &["-nodefaults"]);
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    for place in [
        "0000:00:06.0: give its device addr=06.0",
        "0000:00:10.0-0000:00:11.7: give",
    ] {
        assert!(
            run.stderr.contains(&format!("{note}{place}")),
            "{}",
            run.stderr
        );
    }
    let devices = ["-device", "x,addr=06.0", "-device", "x,addr=10.0"];
    let run = launch_dir.run("exit 0", &devices);
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    assert!(!run.stderr.contains("note:"), "{}", run.stderr);
}

#[test]
fn failures_to_start_are_reported_with_the_cure() {
    let launch_dir = LaunchDir::new();
    let address = "address = '00:05.0'\n";
    let device = "[[endpoint]]\naddress = '00:10.0'\nvfio = '7f:1f.7'\n";
    let whole = format!("socket = 'vm.sock'\nmemory = '64M'\n{address}");
    for (text, cure) in [
        (address.to_owned(), "give `socket ="),
        (format!("socket = 'vm.sock'\n{address}"), "give `memory ="),
        (format!("{whole}granule = 5"), "vm.toml:4: granule: "),
        (
            format!("{whole}host-iommu = 'type1'\n{device}"),
            "set `host-iommu =",
        ),
        // The test cannot know whether this machine has an iommufd.
        (format!("{whole}{device}"), "vhost-device-iommu: "),
    ] {
        launch_dir.write("vm.toml", &text);
        let run = launch_dir.run("echo started >started", &[]);
        assert_eq!(run.status.code(), Some(1), "{text}: {}", run.stderr);
        assert!(run.stderr.contains(cure), "{cure} in {}", run.stderr);
        assert!(!launch_dir.path("started").exists());
        launch_dir.assert_clean();
    }

    let launch_dir = LaunchDir::new();
    let mut command = launch_dir.command();
    command.args(["--", "/nonexistent/vmm", "-nodefaults"]);
    let run = finish(&mut command);
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    assert!(
        run.stderr.contains("cannot start /nonexistent/vmm"),
        "{}",
        run.stderr
    );
    launch_dir.assert_clean();

    let mut command = launch_dir.command();
    command.args(["--viot", "absent/vm.viot"]);
    let run = finish(&mut launch_dir.with_vmm(command, "", &[]));
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    assert!(
        run.stderr.contains("cannot write absent/vm.viot"),
        "{}",
        run.stderr
    );

    let run = finish(&mut launch_dir.command());
    assert_eq!(run.status.code(), Some(2), "no VMM: {}", run.stderr);
}

/// Both children inherit the same open files, under the numbers in their arguments, and no others.
#[test]
fn passthrough_devices_are_opened_once_for_both() {
    let launch_dir = LaunchDir::new();
    let device =
        |number, name| format!("[[endpoint]]\naddress = '00:{number}.0'\nvfio = '{name}:00.0'\n");
    let text = launch_dir.read("vm.toml") + &device("10", "65") + &device("11", "66");
    launch_dir.write("vm.toml", &text);
    launch_dir.write("host/dev/iommu", "");
    for (host, node) in [("65", "vfio3"), ("66", "vfio1")] {
        launch_dir.write(&format!("host/dev/vfio/devices/{node}"), "");
        let sys = format!("host/sys/bus/pci/devices/0000:{host}:00.0/vfio-dev/{node}/dev");
        launch_dir.write(&sys, "511:0");
    }
    let folder = launch_dir.0.path().display().to_string();
    let list = |out: &str| {
        format!(
            "ls -l /proc/$$/fd >{folder}/{out}.files
             printf '%s\\n' \"$@\" >{folder}/{out}.args\n"
        )
    };
    // The process that runs the tests may have left pipes open, which the children inherit.
    let pipes: Vec<_> = fs::read_dir("/proc/self/fd")
        .expect("proc")
        .filter_map(|entry| {
            fs::read_link(entry.ok()?.path())
                .ok()?
                .into_os_string()
                .into_string()
                .ok()
        })
        .collect();
    // This daemon starts slowly, reports that it is ready, and waits for a signal.
    let daemon = launch_dir.path("daemon");
    let script = format!(
        "#!/bin/sh\n{}sleep 0.3\n>{folder}/served\necho >/proc/$$/fd/$4\nexec sleep 100\n",
        list("daemon")
    );
    launch_dir.write("daemon", &script);
    fs::set_permissions(&daemon, fs::Permissions::from_mode(0o755)).expect("executable");

    let launch = |viot: Option<&Path>| {
        let script = format!("{}[ -e {folder}/served ]", list("vmm"));
        let vmm: Vec<OsString> = ["sh", "-c", &script, "vmm"].map(OsString::from).into();
        let launch = Launch {
            config: &launch_dir.path("vm.toml"),
            table: viot,
            vmm: &vmm,
            kind: None,
            max_restarts: 5,
            daemon: &daemon,
            host: &HostRoot::new(launch_dir.path("host")),
        };
        launch.run()
    };
    let status = launch(None).expect("both start and end");
    assert_eq!(status, 0, "the daemon was ready when the VMM started");

    let args = launch_dir.read("daemon.args");
    let args: Vec<_> = args.lines().collect();
    let config = launch_dir.path("vm.toml").display().to_string();
    let options: Vec<_> = args.iter().copied().step_by(2).collect();
    assert_eq!(
        options,
        [
            "--config",
            "--ready-fd",
            "--iommufd-fd",
            "--vfio-fd",
            "--vfio-fd",
            "--keeper-fd"
        ]
    );
    assert_eq!(args[1], config);
    let iommufd = args[5];
    let first = args[7].strip_prefix("0000:00:10.0=").expect("an endpoint");
    let second = args[9].strip_prefix("0000:00:11.0=").expect("an endpoint");

    let mut expected = vec![
        format!("{iommufd}=/host/dev/iommu"),
        format!("{first}=/host/dev/vfio/devices/vfio3"),
        format!("{second}=/host/dev/vfio/devices/vfio1"),
    ];
    expected.sort();
    for (child, ready) in [("daemon", args[3]), ("vmm", "")] {
        let files = launch_dir.read(&format!("{child}.files"));
        let files = files.lines().filter_map(|line| {
            let (start, target) = line.split_once(" -> ")?;
            let fd = start.rsplit(' ').next()?;
            match target.strip_prefix(&folder) {
                Some(inside) if inside.starts_with("/host/") => Some(format!("{fd}={inside}")),
                Some(_) => None,
                None => {
                    let known = pipes.iter().any(|pipe| pipe == target);
                    let other = target.starts_with("pipe:") && !known
                        || target.starts_with("/memfd:") && child == "daemon";
                    (other && fd != ready).then(|| line.to_owned())
                }
            }
        });
        let mut files: Vec<_> = files.collect();
        files.sort_unstable();
        assert_eq!(files, expected, "{child}");
    }
    let args = launch_dir.read("vmm.args");
    let args: Vec<_> = args.lines().collect();
    let expected = [
        "-object".to_owned(),
        format!("iommufd,id=viommu-iommufd,fd={iommufd}"),
        "-device".to_owned(),
        format!("vfio-pci,id=viommu-vfio-00-10-0,fd={first},iommufd=viommu-iommufd,addr=10.0"),
        "-device".to_owned(),
        format!("vfio-pci,id=viommu-vfio-00-11-0,fd={second},iommufd=viommu-iommufd,addr=11.0"),
        "-global".to_owned(),
    ];
    assert_eq!(args[6..13], expected);

    fs::remove_file(launch_dir.path("host/dev/vfio/devices/vfio1")).expect("removed");
    fs::remove_file(launch_dir.path("vmm.args")).expect("removed");
    let error = launch(None).expect_err("a node is missing").to_string();
    assert!(
        error.contains("0000:66:00.0") && error.contains("check"),
        "{error}"
    );
    assert!(!launch_dir.path("vmm.args").exists());
}

/// A directory with a configuration; all programs run in it.
struct LaunchDir(TempDir);

impl LaunchDir {
    fn new() -> Self {
        let launch_dir = Self(TempDir::new().expect("a directory"));
        launch_dir.write(
            "vm.toml",
            "socket = 'vm.sock'\ncontrol = 'control.sock'\nmemory = '64M'\naddress = '00:05.0'\n",
        );
        launch_dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    }

    /// The command `launch`, without a VMM.
    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["launch", "--config", "vm.toml"]);
        command.current_dir(self.0.path());
        command
    }

    /// Adds a VMM that runs `script`, with the arguments `more` before those that `launch` adds.
    fn with_vmm(&self, mut command: Command, script: &str, more: &[&str]) -> Command {
        command.args(["--", "sh", "-c", script, "vmm"]);
        command.args(if more.is_empty() { &OWN } else { more });
        command
    }

    fn run(&self, script: &str, more: &[&str]) -> Run {
        finish(&mut self.with_vmm(self.command(), script, more))
    }

    fn launch(&self, script: &str) -> Launched {
        Launched::start(&mut self.with_vmm(self.command(), script, &[]))
    }

    /// Asserts that no socket is left.
    fn assert_clean(&self) {
        for entry in fs::read_dir(self.0.path()).expect("entries") {
            let entry = entry.expect("an entry");
            let kind = entry.file_type().expect("a type");
            assert!(!kind.is_socket(), "{:?} is left", entry.path());
        }
    }
}

/// A running `launch`, and the standard error of it and its children. Standard error is a file: a
/// pipe would not end before the last child does.
struct Launched {
    child: Child,
    stderr: File,
}

impl Launched {
    fn start(command: &mut Command) -> Self {
        let stderr = tempfile::tempfile().expect("a file");
        default_signals(command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.try_clone().expect("a descriptor"))
            .spawn()
            .expect("it starts");
        Self { child, stderr }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process IDs of the VMM and the daemon, once the VMM has reported that it runs.
    fn children(&self, launch_dir: &LaunchDir) -> (u32, u32) {
        wait_for("the VMM", || launch_dir.path("vmm.pid").exists());
        let vmm: u32 = launch_dir.read("vmm.pid").trim().parse().expect("a number");
        let list = self.child_processes();
        assert_eq!(list.len(), 2, "{list:?}");
        assert!(list.contains(&vmm), "{list:?}");
        let daemon = list.into_iter().find(|&child| child != vmm);
        (vmm, daemon.expect("the daemon"))
    }

    /// What it and its children have printed so far. Their writes go to the offset of the file, so it must stay.
    fn printed(&self) -> String {
        let len = self.stderr.metadata().expect("a file").len();
        let mut text = vec![0; usize::try_from(len).expect("a length")];
        self.stderr.read_exact_at(&mut text, 0).expect("read");
        String::from_utf8(text).expect("text")
    }

    /// The process IDs of all its children; none if it has ended.
    fn child_processes(&self) -> Vec<u32> {
        let pid = self.pid();
        let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let list = list.unwrap_or_default();
        let numbers = list.split_whitespace();
        numbers
            .map(|text| text.parse().expect("a number"))
            .collect()
    }

    fn finish(&mut self) -> Run {
        let mut status = None;
        wait_for("the end", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        Run {
            status: status.expect("ended"),
            stderr: self.printed(),
        }
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        // The children of `launch` end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Run {
    status: ExitStatus,
    stderr: String,
}

fn finish(command: &mut Command) -> Run {
    Launched::start(command).finish()
}

/// Restores the default signal actions. A shell ignores SIGINT for background commands, and `nohup`
/// ignores SIGHUP.
#[expect(unsafe_code, reason = "the standard library cannot")]
fn default_signals(command: &mut Command) {
    let reset = || {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            // SAFETY:
            // - the default action is no function, so no code of ours runs in a handler
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY:
    // - between fork and exec, the closure makes one system call, which is async-signal-safe
    unsafe { command.pre_exec(reset) };
}

fn send(signal: &str, pid: u32) {
    let done = Command::new("sh")
        .args(["-c", &format!("kill -{signal} {pid}")])
        .status();
    assert!(done.expect("sh runs").success(), "{signal} to {pid}");
}

/// Whether the process exists and is not a zombie.
fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|fields| fields[0] != "Z" && fields[0] != "X")
}

fn group(pid: u32) -> u32 {
    stat(pid).expect("running")[2].parse().expect("a number")
}

/// The fields of the process's stat file after its name: state, parent, group.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        sleep(Duration::from_millis(5));
    }
}
