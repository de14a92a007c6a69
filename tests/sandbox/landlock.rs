//! A daemon on a host without Landlock: what its threads reach, and what it says about that.
#![expect(
    unsafe_code,
    reason = "installs a system call filter between fork and exec"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bed::threads;
use crate::common::daemon::Daemon;
use crate::intruder::{call, call_and_return};

/// A file that every user may read, and that no daemon needs.
const FILE: &str = "/etc/passwd";

/// Hides Landlock from a program and its children, as a kernel without it.
fn hide_landlock(command: &mut Command) {
    let hidden = BTreeMap::from([(libc::SYS_landlock_create_ruleset, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH).expect("a known one");
    let filter = SeccompFilter::new(hidden, SeccompAction::Allow, unknown, arch);
    let program = BpfProgram::try_from(filter.expect("a filter")).expect("a filter");
    let install =
        move || seccompiler::apply_filter(&program).map_err(|_| io::ErrorKind::Other.into());
    // SAFETY: the closure makes system calls and allocates nothing, whatever locks another thread has left.
    unsafe { command.pre_exec(install) };
}

struct Host {
    daemon: Daemon,
    folder: TempDir,
}

impl Host {
    fn new(keys: &str, with_landlock: bool) -> Self {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().to_str().expect("UTF-8");
        let keys = keys.replace("FOLDER", path);
        let toml = format!("name = 'web-1'\naddress = '00:05.0'\n{keys}\n");
        let daemon = Daemon::with_config_prepared(&toml, |command| {
            if !with_landlock {
                hide_landlock(command);
            }
        });
        daemon.wait_for("the sandbox", || daemon.log().contains("sandboxed: "));
        Self { daemon, folder }
    }

    fn thread(&self, name: &str) -> u32 {
        if name == "main" {
            return self.daemon.pid();
        }
        let found = threads(self.daemon.pid());
        let found = found.iter().find(|(_, found)| found == name);
        found.unwrap_or_else(|| panic!("no thread {name}")).0
    }

    /// Makes a thread open a file. Returns the descriptor, or an errno below 0.
    fn open(&self, thread: &str) -> i64 {
        let (number, arguments) = open();
        let tid = self.thread(thread);
        let result = call_and_return(tid, number, arguments, Some((1, FILE)));
        self.daemon.assert_alive();
        result
    }

    /// Makes a thread open a file, which must end the process.
    fn assert_killed_for_opening(&self, thread: &str) {
        let (number, arguments) = open();
        call(self.thread(thread), number, arguments, Some((1, FILE)));
        let status = self.daemon.wait_for_end();
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread}: {status}");
    }

    fn sandbox(&self) -> Value {
        self.daemon.status()["sandbox"].clone()
    }

    /// What `ctl status` prints for the operator.
    fn status_text(&self) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
            .arg("ctl")
            .arg(self.daemon.control_socket())
            .arg("status")
            .output();
        String::from_utf8(output.expect("it runs").stdout).expect("text")
    }
}

fn open() -> (libc::c_long, [u64; 6]) {
    let here = u64::from(libc::AT_FDCWD.cast_unsigned());
    (libc::SYS_openat, [here, 0, 0, 0, 0, 0])
}

const ALL_KEYS: &str =
    "hotplug = ['01:00.0-01:00.7']\n[metrics]\ntextfile = 'FOLDER/vm.prom'\ninterval-s = 1";

/// The statements of the section "Kernels without seccomp or Landlock" of docs/security.md.
#[test]
fn the_files_that_threads_reach_without_landlock_are_those_that_the_daemon_names() {
    let host = Host::new(ALL_KEYS, false);
    let log = host.daemon.log();
    assert!(
        log.contains("NOT protected from the thread `control`"),
        "{log}"
    );
    let sandbox = host.sandbox();
    assert_eq!(
        (&sandbox["filters"], &sandbox["landlock"]),
        (&json!(true), &json!("missing"))
    );
    let text = host.status_text();
    assert!(text.contains("NO LANDLOCK in this kernel"), "{text}");
    let file = host.folder.path().join("vm.prom");
    host.daemon.wait_for("the metrics", || file.exists());
    let metrics = fs::read_to_string(&file).expect("metrics");
    for line in [
        "vhost_device_iommu_sandbox_enforced{vm=\"web-1\",part=\"filters\"} 1",
        "vhost_device_iommu_sandbox_enforced{vm=\"web-1\",part=\"landlock\"} 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{metrics}");
    }
    for thread in ["control", "metrics-file"] {
        assert!(host.open(thread) >= 0, "{thread} opens a file");
        let named = format!("the thread `{thread}`");
        for said in [&log, &text, &sandbox["absent"].to_string()] {
            assert!(said.contains(&named), "{named} in {said}");
        }
    }
    assert!(
        host.daemon.status()["name"] == "web-1",
        "it serves as before"
    );
    host.assert_killed_for_opening("signals");
}

#[test]
fn without_landlock_the_filters_alone_keep_other_daemons_from_files() {
    let host = Host::new("", false);
    let log = host.daemon.log();
    assert!(log.contains("protected by the filters alone"), "{log}");
    let sandbox = host.sandbox();
    assert_eq!(sandbox["landlock"], "missing");
    let absent = sandbox["absent"].as_array().expect("a list");
    assert_eq!(absent.len(), 1, "{absent:?}");
    assert!(
        absent[0]
            .as_str()
            .is_some_and(|one| one.contains("remove files"))
    );
    host.assert_killed_for_opening("control");
    // With a metrics file the thread that reads what clients send still opens nothing.
    let host = Host::new("[metrics]\ntextfile = 'FOLDER/vm.prom'", false);
    assert!(
        host.daemon
            .log()
            .contains("except from the thread `metrics-file`")
    );
    assert!(host.open("metrics-file") >= 0);
    host.assert_killed_for_opening("control");
}

#[test]
fn with_landlock_the_same_threads_reach_no_other_files() {
    let host = Host::new(ALL_KEYS, true);
    let sandbox = host.sandbox();
    if sandbox["landlock"] == "missing" {
        eprintln!("this kernel has no Landlock");
        return;
    }
    assert_eq!(sandbox["absent"], json!([]));
    assert!(!host.status_text().contains("LANDLOCK"));
    for thread in ["control", "metrics-file"] {
        assert_eq!(host.open(thread), -i64::from(libc::EACCES), "{thread}");
    }
}
