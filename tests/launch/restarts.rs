//! The daemon ends while the VM runs. The daemon is a stub, which leaves files for the next one: this test program, started
//! with another test. So is `launch`, since the program itself starts no other daemon.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::thread::sleep;
use std::time::Duration;

use vhost_device_iommu::host::sysfs::HostRoot;
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::supervisor::Supervisor;
use vhost_device_iommu::vmms::launch::Launch;

use super::stopped_thread::StoppedThread;
use super::{ARRIVE, LaunchDir, Launched, Run, is_alive, send, wait_for};

/// The VMM runs until the test ends it.
const UNTIL_END: &str = "while [ ! -e end ]; do sleep 0.02; done; exit 5";
/// The files that a stub leaves right before it fails.
const BURST: usize = 50;
/// As many as wait in a socket, whatever its limit.
const LATE: usize = 3;
const AGAIN: &str = ", started again in ";

/// Makes `launch` start stubs. A stub does what the line of its life says in the file `plan`; without one it stays.
fn start(plan: &[&str], vmm: &str) -> (LaunchDir, Launched) {
    let dir = LaunchDir::new();
    dir.write("plan", &plan.join("\n"));
    let tests = env::current_exe()
        .expect("this program")
        .display()
        .to_string();
    let script = format!(
        "#!/bin/sh\nSTUB_ARGS=\"$*\" exec {tests} --exact restarts::stub_daemon --ignored --nocapture\n"
    );
    dir.write("daemon", &script);
    fs::set_permissions(dir.path("daemon"), fs::Permissions::from_mode(0o755)).expect("set");
    let mut command = Command::new(tests);
    command
        .args([
            "--exact",
            "restarts::stub_launch",
            "--ignored",
            "--nocapture",
        ])
        .env("STUB_VMM", vmm)
        .current_dir(dir.path(""));
    let launched = Launched::start(&mut command);
    (dir, launched)
}

/// The stubs so far: the process ID of each, and the files that it got, as NAME=TEXT.
fn lives(dir: &LaunchDir) -> Vec<(u32, String)> {
    let text = fs::read_to_string(dir.path("lives")).unwrap_or_default();
    let life = |line: &str| {
        let (pid, files) = line.split_once(':').expect("two parts");
        (pid.parse().expect("a number"), files.to_owned())
    };
    text.lines().map(life).collect()
}

/// Waits until the VMM runs. Returns its process ID, and that of the stub.
fn arrived(dir: &LaunchDir) -> (u32, u32) {
    wait_for("the VMM", || dir.path("vmm.pid").exists());
    let vmm = dir.read("vmm.pid").trim().parse().expect("a number");
    (vmm, lives(dir)[0].0)
}

fn wait_until_again(launched: &Launched, times: usize) {
    wait_for("the next daemon", || {
        launched.printed().matches(AGAIN).count() == times
    });
}

/// Ends the VMM, which must have run all the time.
fn end(dir: &LaunchDir, launched: &mut Launched) -> Run {
    dir.write("end", "");
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(5), "{}", run.stderr);
    for (pid, _) in lives(dir) {
        assert!(!is_alive(pid));
    }
    dir.assert_clean();
    run
}

#[test]
fn a_killed_daemon_is_started_again_with_all_that_it_has_left() {
    let (dir, mut launched) = start(&[], &format!("{ARRIVE} {UNTIL_END}"));
    let (vmm, first) = arrived(&dir);
    send("KILL", first);
    wait_until_again(&launched, 1);
    send("KILL", lives(&dir)[1].0);
    wait_until_again(&launched, 2);
    assert!(is_alive(vmm));
    let run = end(&dir, &mut launched);
    let files: Vec<_> = lives(&dir).into_iter().map(|(_, files)| files).collect();
    assert_eq!(files, ["", "life-0=0", "life-0=0 life-1=1"]);
    let line = "vhost-device-iommu: the daemon ended (signal: 9 (SIGKILL)), started again in ";
    assert_eq!(run.stderr.matches(line).count(), 2, "{}", run.stderr);
}

/// The thread that receives descriptors may be behind when the daemon ends.
#[test]
fn the_last_descriptors_of_a_daemon_are_waited_for() {
    let (dir, mut launched) = start(&["late"], &format!("{ARRIVE} {UNTIL_END}"));
    arrived(&dir);
    let receiver = StoppedThread::new(launched.pid(), "keeper");
    dir.write("late", "");
    wait_for("the next daemon", || lives(&dir).len() == 2);
    receiver.resume();
    wait_until_again(&launched, 1);
    end(&dir, &mut launched);
    assert_eq!(lives(&dir)[1].1, format!("life-0=0 and {LATE}"));
}

/// Nobody has asked the VM to end.
#[test]
fn a_daemon_that_ends_by_itself_is_started_again() {
    for (plan, line) in [
        ("exit 0", "(exit status: 0), started again"),
        ("exit 1", "(exit status: 1), started again"),
        ("abort", "(signal: 6 (SIGABRT)"),
    ] {
        let (dir, mut launched) = start(&[plan], &format!("{ARRIVE} {UNTIL_END}"));
        arrived(&dir);
        wait_until_again(&launched, 1);
        let run = end(&dir, &mut launched);
        assert!(run.stderr.contains(line), "{}", run.stderr);
        assert_eq!(lives(&dir).len(), 2);
    }
}

#[test]
fn a_daemon_that_ends_again_and_again_is_given_up() {
    let plan = ["stay", "fail", "fail", "fail", "fail", "fail", "fail"];
    let vmm = format!("trap 'echo told >told; exit 0' TERM; {ARRIVE} {UNTIL_END}");
    let (dir, mut launched) = start(&plan, &vmm);
    let (vmm, first) = arrived(&dir);
    send("KILL", first);
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    for part in [
        "the daemon ended (signal: 9 (SIGKILL)), started again, and ended before it listened\n",
        "the daemon ended (exit status: 1), after it was started again 5 times within 60 s",
    ] {
        assert!(run.stderr.contains(part), "{part} in {}", run.stderr);
    }
    let lives = lives(&dir);
    assert_eq!(lives.len(), 6);
    // Those four have left the last messages of their lives, too.
    let files = &lives[5].1;
    assert_eq!(files.matches("life-").count(), 5, "{files}");
    assert!(files.ends_with(&format!(" and {}", 4 * BURST)), "{files}");
    assert_eq!(dir.read("told"), "told\n");
    assert!(!is_alive(vmm));
    dir.assert_clean();
}

#[test]
fn a_daemon_that_does_not_listen_is_ended_and_started_again() {
    let (dir, mut launched) = start(&["stay", "mute"], &format!("{ARRIVE} {UNTIL_END}"));
    let (_, first) = arrived(&dir);
    send("KILL", first);
    wait_until_again(&launched, 1);
    let run = end(&dir, &mut launched);
    assert!(
        run.stderr.contains("did not listen within 10 s"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr
            .contains("(signal: 15 (SIGTERM)), started again in"),
        "{}",
        run.stderr
    );
    assert_eq!(lives(&dir).len(), 3);
}

#[test]
fn a_daemon_that_has_left_nothing_takes_the_vmm_with_it() {
    let vmm = format!("trap 'echo told >told; exit 0' TERM; {ARRIVE} {UNTIL_END}");
    let (dir, mut launched) = start(&["nothing"], &vmm);
    let (vmm, first) = arrived(&dir);
    send("KILL", first);
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    let line = "the daemon ended (signal: 9 (SIGKILL)) before the VMM";
    assert!(run.stderr.contains(line), "{}", run.stderr);
    assert_eq!(dir.read("told"), "told\n");
    assert!(!is_alive(vmm));
    assert_eq!(lives(&dir).len(), 1);
    dir.assert_clean();
}

/// It may be waiting for its IOMMU.
#[test]
fn a_vmm_that_does_not_end_is_killed() {
    let (dir, mut launched) = start(&["quit"], &format!("trap '' TERM; {ARRIVE} {UNTIL_END}"));
    let (vmm, _) = arrived(&dir);
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    let line = "the daemon ended (exit status: 0) before the VMM";
    assert!(run.stderr.contains(line), "{}", run.stderr);
    assert!(!is_alive(vmm));
}

#[test]
fn a_daemon_is_not_started_again_when_the_vm_is_to_end() {
    let vmm = format!("trap 'sleep 0.3; exit 4' TERM; {ARRIVE} {UNTIL_END}");
    let (dir, mut launched) = start(&[], &vmm);
    let (_, first) = arrived(&dir);
    send("TERM", launched.pid());
    send("TERM", first);
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(4), "{}", run.stderr);
    assert_eq!(lives(&dir).len(), 1, "{}", run.stderr);
    dir.assert_clean();
}

#[test]
fn a_daemon_that_fails_before_the_vmm_starts_ends_launch() {
    let (dir, mut launched) = start(&["fail"], &format!("{ARRIVE} {UNTIL_END}"));
    let run = launched.finish();
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    assert!(!dir.path("vmm.pid").exists());
    assert_eq!(lives(&dir).len(), 1);
}

#[test]
#[ignore = "the other tests start it as `launch`"]
fn stub_launch() {
    let Ok(script) = env::var("STUB_VMM") else {
        return;
    };
    let vmm = ["sh", "-c", &script, "vmm"].map(Into::into);
    let launch = Launch {
        config: Path::new("vm.toml"),
        table: None,
        vmm: &vmm,
        kind: None,
        max_restarts: 5,
        daemon: Path::new("./daemon"),
        host: &HostRoot::new(PathBuf::from("/nonexistent")),
    };
    match launch.run() {
        Ok(status) => exit(status.into()),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "vhost-device-iommu: {error}");
            exit(1);
        }
    }
}

#[test]
#[ignore = "the other tests start it as the daemon"]
fn stub_daemon() {
    let Ok(arguments) = env::var("STUB_ARGS") else {
        return;
    };
    let words: Vec<_> = arguments.split(' ').collect();
    let values = |option: &str| -> Vec<String> {
        let pairs = words.windows(2).filter(|pair| pair[0] == option);
        pairs.map(|pair| pair[1].to_owned()).collect()
    };
    let number = |option: &str| values(option)[0].parse::<i32>().expect("a number");
    let keeper = Supervisor::find(Some(number("--keeper-fd")), &values("--kept-fd"))
        .expect("a keeper")
        .keeper;

    let read = |name: &str| fs::read_to_string(name).unwrap_or_default();
    let life = read("lives").lines().count();
    let plan = read("plan").lines().nth(life).unwrap_or("stay").to_owned();
    let content = |name: String| {
        let file = File::from(
            keeper
                .claim(&name)
                .expect("kept")
                .try_clone()
                .expect("a copy"),
        );
        let mut text = [0; 16];
        let len = file.read_at(&mut text, 0).expect("read");
        format!("{name}={}", String::from_utf8_lossy(&text[..len]))
    };
    let names = keeper.names();
    let (lives_files, bursts): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|name| name.starts_with("life-"));
    let mut files: Vec<_> = lives_files.into_iter().map(content).collect();
    if !bursts.is_empty() {
        files.push(format!("and {}", bursts.len()));
    }
    let mut lives = OpenOptions::new()
        .create(true)
        .append(true)
        .open("lives")
        .expect("a file");
    let line = format!("{}:{}\n", std::process::id(), files.join(" "));
    lives.write_all(line.as_bytes()).expect("written");

    let _ = fs::remove_file("vm.sock");
    let _listener = UnixListener::bind("vm.sock").expect("a socket");
    if !["nothing", "quit"].contains(&plan.as_str()) {
        let name = format!("kept.{life}");
        fs::write(&name, life.to_string()).expect("written");
        let keep = |name: String, file: &File| keeper.keep_as(&name, file.as_fd()).expect("kept");
        keep(format!("life-{life}"), &File::open(name).expect("a file"));
        keep("released".into(), &File::open("plan").expect("a file"));
        keeper.release("released");
    }
    match plan.as_str() {
        "fail" => {
            leave(&keeper, life, BURST);
            exit(1);
        }
        "mute" => {}
        _ => ready(number("--ready-fd")),
    }
    let has_vmm = || Path::new("vmm.pid").exists();
    let waits = |plan: &str| ["stay", "mute", "nothing"].contains(&plan);
    while waits(&plan) || !has_vmm() {
        sleep(Duration::from_millis(5));
    }
    match (plan.as_str(), plan.strip_prefix("exit ")) {
        ("quit", _) => exit(0),
        ("late", _) => {
            wait_for("the test", || Path::new("late").exists());
            leave(&keeper, life, LATE);
            exit(0);
        }
        (_, Some(status)) => exit(status.parse().expect("a status")),
        (_, None) => std::process::abort(),
    }
}

/// Leaves files right before the end.
fn leave(keeper: &Keeper, life: usize, count: usize) {
    for n in 0..count {
        let file = File::open("plan").expect("a file");
        let name = format!("burst-{life}-{n}");
        keeper.keep_as(&name, file.as_fd()).expect("kept");
    }
}

#[expect(unsafe_code, reason = "takes over a descriptor by its number")]
fn ready(fd: i32) {
    // SAFETY: `launch` passes the descriptor to this process for this purpose alone.
    let pipe = unsafe { OwnedFd::from_raw_fd(fd) };
    File::from(pipe).write_all(b"\n").expect("written");
}
