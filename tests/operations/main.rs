//! The package in a clean Debian that boots systemd, as root: `qemu-scripts/test.sh operations`.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failure here is a failed test wherever it happens"
)]

mod adopt;
mod apparmor;
#[path = "../common/mod.rs"]
mod common;
#[path = "../vfio_user_messages/connection.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod connection;
mod devices;
#[path = "../passthrough/edu_driver.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod edu_driver;
mod keeper;
mod machine;
mod upgrade;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use common::guest::{Guest, Setup};
use common::stopped_thread::StoppedThread;
use common::wire::{OK, RW};

use machine::{Vm, install_once, run, run_ok};

/// Endpoint 00:10.0, the first endpoint of the example.
const EP: u32 = 0x80;
const EP_ADDRESS: &str = "0000:00:10.0";
/// The highest exposure level of `systemd-analyze security` that passes.
const WORST_EXPOSURE: f64 = 2.0;

/// A frontend in place of a VMM and its guest; the first endpoint is attached to a domain.
fn guest(vm: &Vm) -> Guest {
    let mut guest = Guest::connect_to(vm.socket(), Setup::default());
    guest.driver_ok();
    assert_eq!(guest.attach(1, EP), OK);
    guest
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn the_package_installs_cleanly() {
    install_once();
    assert_eq!(run_ok(&["dpkg", "--audit"]), "");
    assert_eq!(run_ok(&["dpkg", "--verify", "vhost-device-iommu"]), "");
    assert!(run_ok(&["vhost-device-iommu", "--version"]).starts_with("vhost-device-iommu "));
    let user = run_ok(&["id", "vhost-device-iommu"]);
    assert!(user.contains("(vfio)"), "{user}");
    let folder = fs::metadata("/etc/vhost-device-iommu").expect("its folder");
    assert_eq!(folder.permissions().mode() & 0o7777, 0o750);
    assert_ne!(folder.gid(), 0, "the folder must belong to the group");
    for unit in [
        "vhost-device-iommu@vm1.service",
        "vhost-device-iommu@vm1.socket",
    ] {
        let result = run(&["systemd-analyze", "verify", "--man=no", unit]);
        assert!(
            result.success && result.text.is_empty(),
            "{unit}: {}",
            result.text
        );
    }
    run_ok(&[
        "udevadm",
        "verify",
        "/usr/lib/udev/rules.d/70-vhost-device-iommu.rules",
    ]);
    for page in [
        "/usr/share/man/man1/vhost-device-iommu.1.gz",
        "/usr/share/man/man5/vhost-device-iommu.toml.5.gz",
        "/usr/share/bash-completion/completions/vhost-device-iommu",
    ] {
        assert!(Path::new(page).exists(), "{page}");
    }
    let listed = run_ok(&["dpkg", "-L", "vhost-device-iommu"]);
    assert!(!listed.contains("/usr/share/qemu"), "{listed}");
    assert_eq!(run_ok(&["systemctl", "is-system-running"]), "running\n");
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn two_vms_run_side_by_side() {
    let (one, two) = (
        Vm::new("one", ""),
        Vm::new("two", "arena-limit-is-not-a-key = 1\n"),
    );
    // A mistake in the file: the service does not start, and the journal names the line.
    assert!(!run(&["systemctl", "start", &two.service()]).success);
    let errors = two.journal_from("err");
    for part in [
        "vhost-device-iommu@two[",
        "/etc/vhost-device-iommu/two.toml:",
        "is-not-a-key",
    ] {
        assert!(errors.contains(part), "{part} in {errors}");
    }
    drop(two);
    let two = Vm::new("two", "");
    // One of the control sockets also admits the group.
    let group = run_ok(&["id", "-g", "vhost-device-iommu"])
        .trim()
        .to_owned();
    let text = fs::read_to_string(two.file()).expect("its file");
    let keys = format!("control-mode = \"0660\"\ncontrol-group = {group}\n");
    fs::write(two.file(), keys + &text).expect("its file");
    one.start();
    two.start();
    for vm in [&one, &two] {
        assert_eq!(vm.property("ActiveState"), "active");
        assert_eq!(vm.property("Slice"), "viommu.slice");
        assert_eq!(vm.property("User"), "vhost-device-iommu");
        // From the generator: 2G / 256 + 64M of arena, as much for a copy, an eighth for records, and 44M.
        assert_eq!(vm.property("MemoryMax"), (197 << 20).to_string());
        let control = fs::metadata(vm.socket().with_file_name("control.sock")).expect("a socket");
        assert!(control.file_type().is_socket());
        assert_eq!(
            control.permissions().mode() & 0o007,
            0,
            "other users must have no access"
        );
    }
    let mode = |vm: &Vm| {
        let control = fs::metadata(vm.socket().with_file_name("control.sock"));
        control.expect("a socket").permissions().mode() & 0o777
    };
    assert_eq!((mode(&one), mode(&two)), (0o600, 0o660));
    let first = guest(&one);
    let mut second = guest(&two);
    assert_eq!(one.endpoint(EP_ADDRESS), "attached");
    assert_eq!(two.endpoint(EP_ADDRESS), "attached");
    let journal = one.journal();
    let pid = one.property("MainPID");
    let line = format!(" vhost-device-iommu@one[{pid}]: a VMM has connected\n");
    assert!(journal.contains(&line), "{journal}");
    let warnings = one.journal_from("warning");
    assert!(!warnings.contains(&format!("[{pid}]")), "{warnings}");

    run_ok(&["systemctl", "stop", &one.service()]);
    assert_eq!(one.property("ActiveState"), "inactive");
    assert_eq!(one.property("Result"), "success");
    assert_eq!(second.detach(1, EP), OK, "the other VM continues");
    drop(first);
    one.start();
    assert_eq!(one.endpoint(EP_ADDRESS), "unattached");
    let mut again = guest(&one);
    let before = one.property("MainPID");
    run_ok(&["systemctl", "restart", &one.service()]);
    assert_ne!(one.property("MainPID"), before);
    assert_eq!(again.detach(1, EP), OK, "the next daemon goes on");
    assert_eq!(second.attach(1, EP), OK);
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn the_socket_starts_the_daemon() {
    let vm = Vm::new("lazy", "");
    run_ok(&["systemctl", "start", &vm.socket_unit()]);
    assert_eq!(vm.property("ActiveState"), "inactive");
    let socket = fs::metadata(vm.socket()).expect("the socket");
    assert_eq!(socket.permissions().mode() & 0o777, 0o660);
    for _ in 0..2 {
        // A connection made before the daemon runs waits for it.
        assert_eq!(guest(&vm).detach(1, EP), OK);
        vm.wait_for("ActiveState", "active");
        assert_eq!(vm.status()["connections"], 1);
        let result = run(&["systemctl", "stop", &vm.service()]);
        assert!(result.success, "{}", result.text);
        assert!(vm.socket().exists(), "the socket is not the daemon's");
    }
    run_ok(&["systemctl", "stop", &vm.socket_unit()]);
    assert!(!vm.socket().exists());
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn only_the_killed_daemon_is_restarted() {
    let (one, two) = (Vm::new("one", ""), Vm::new("two", ""));
    one.start();
    two.start();
    let mut first = guest(&one);
    assert_eq!(first.map(1, 0, 0xfff, 0x1000, RW), OK);
    let mut second = guest(&two);
    let pids = [one.property("MainPID"), two.property("MainPID")];
    run_ok(&["sh", "-c", &format!("kill -9 {}", pids[0])]);
    one.wait_for("NRestarts", "1");
    one.wait_for("ActiveState", "active");
    assert_ne!(one.property("MainPID"), pids[0]);
    // Its guest goes on, and again after a planned restart.
    assert_eq!(first.map(1, 0x1000, 0x1fff, 0x1000, RW), OK);
    assert_eq!(one.status()["life"]["number"], 2);
    run_ok(&["systemctl", "restart", &one.service()]);
    assert_eq!(first.map(1, 0x2000, 0x2fff, 0x1000, RW), OK);
    let status = one.status();
    assert_eq!(status["life"]["state"], "taken-over", "{}", status["life"]);
    assert_eq!(status["mappings"], 3);
    println!("answered after {} ms", status["life"]["resumed_after_ms"]);
    assert_eq!(first.detach(1, EP), OK);
    assert_eq!(two.property("MainPID"), pids[1]);
    assert_eq!(two.property("NRestarts"), "0");
    assert_eq!(second.detach(1, EP), OK, "the other VM is not affected");
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn a_daemon_with_a_hanging_worker_is_restarted() {
    let vm = Vm::new("hung", "");
    vm.set("WatchdogSec=4");
    vm.start();
    let mut guest = guest(&vm);
    let pid = vm.property("MainPID").parse().expect("a process ID");
    StoppedThread::new(pid, "vring_worker").reap_when_killed();
    vm.wait_for("NRestarts", "1");
    vm.wait_for("ActiveState", "active");
    let journal = vm.journal();
    for part in [
        "no answer to the watchdog from: the worker;",
        "Watchdog timeout",
    ] {
        assert!(journal.contains(part), "{part} in {journal}");
    }
    assert_eq!(guest.detach(1, EP), OK, "the next daemon goes on");
    // Longer than the watchdog's limit: a healthy daemon is not restarted.
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(vm.property("NRestarts"), "1");
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn the_service_is_locked_down() {
    let vm = Vm::new("one", "");
    let result = run_ok(&["systemd-analyze", "security", "--no-pager", &vm.service()]);
    let last = result.lines().last().expect("a figure");
    println!("{last}");
    let figure = last
        .split_whitespace()
        .find_map(|word| word.parse::<f64>().ok())
        .expect("a figure");
    let bad: Vec<_> = result
        .lines()
        .filter(|line| line.starts_with('✗'))
        .collect();
    assert!(figure <= WORST_EXPOSURE, "{last}\n{}", bad.join("\n"));
    vm.start();
    let pid = vm.property("MainPID");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its state");
    for line in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn zz_the_package_is_removed_cleanly() {
    let vm = Vm::new("last", "");
    vm.start();
    run_ok(&["dpkg", "-r", "vhost-device-iommu"]);
    assert_eq!(vm.property("ActiveState"), "inactive");
    assert!(vm.file().exists(), "the operator's file stays");
    drop(vm);
    run_ok(&["dpkg", "-P", "vhost-device-iommu"]);
    assert!(!Path::new("/etc/vhost-device-iommu").exists());
    assert!(!Path::new("/run/vhost-device-iommu").exists());
    assert_eq!(run_ok(&["systemctl", "is-system-running"]), "running\n");
}
