//! `upgrade`: the running daemon leaves its VM to the next one, unless that one would refuse its state.

use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use serde_json::json;

use super::common::daemon::{Daemon, EP, EP2, NO_EP};
use super::common::guest::Guest;
use super::common::kept::Keeper;
use super::common::rng::Rng;
use super::common::wire::{NOENT, OK, RW};
use super::{Req, Spec, endpoints_agree, model_of, submit};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");
const MIN_AGE: Duration = Duration::from_secs(13);
const FILE: &str = "address = \"00:05.0\"\n\
    [[endpoint]]\naddress = \"00:06.0\"\n\
    [[endpoint]]\naddress = \"00:07.0\"\n\
    [[endpoint]]\naddress = \"00:08.0\"\n";

fn command(daemon: &Daemon) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg("upgrade")
        .arg(daemon.folder().join("vm.toml"))
        .arg("--control")
        .arg(daemon.control_socket())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The standard error of an upgrade that must fail.
fn refusal(daemon: &Daemon) -> String {
    let Output { status, stderr, .. } = command(daemon).output().expect("it runs");
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).expect("text")
}

fn succeeded(child: Child) -> String {
    let output = child.wait_with_output().expect("it ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).expect("text")
}

/// Makes random requests until `done`. Each must have the answer of the specification.
fn drive(guest: &mut Guest, spec: &mut Spec, done: &AtomicBool) {
    let mut rng = Rng::new(4);
    while !done.load(Ordering::Relaxed) {
        let request = Req::random(&mut rng);
        let head = submit(guest, request);
        guest.kick();
        let (answered, reply) = guest.complete();
        assert_eq!(
            (answered, reply.status()),
            (head, spec.execute(request)),
            "{request:x?}"
        );
    }
}

#[test]
fn a_driver_notices_no_upgrade() {
    let mut keeper = Keeper::empty();
    let mut daemon = Daemon::kept_with_config(&keeper, FILE, &[]);
    let mut guest = Guest::boot(&daemon);
    let mut spec = Spec::default();
    let done = AtomicBool::new(false);
    let printed = thread::scope(|scope| {
        scope.spawn(|| drive(&mut guest, &mut spec, &done));
        let upgrade = command(&daemon).spawn().expect("it runs");
        assert!(daemon.wait_for_end().success());
        daemon.start_again(&mut keeper);
        let printed = succeeded(upgrade);
        thread::sleep(Duration::from_millis(50));
        done.store(true, Ordering::Relaxed);
        printed
    });
    let line = format!(
        "a daemon of version {} goes on (life 2)",
        env!("CARGO_PKG_VERSION")
    );
    assert!(printed.contains(&line), "{printed}");
    assert_eq!(model_of(&daemon), spec.model());
    endpoints_agree(&daemon, &spec);
    let life = &daemon.status()["life"];
    assert_eq!(life["pid"], daemon.pid(), "{life}");
}

/// The keeper loses everything, so the next daemon begins as a first one.
#[test]
fn a_takeover_that_fails_is_reported() {
    let mut keeper = Keeper::empty();
    let mut daemon = Daemon::kept_with_config(&keeper, FILE, &[]);
    let _guest = Guest::boot(&daemon);
    let upgrade = command(&daemon).spawn().expect("it runs");
    assert!(daemon.wait_for_end().success());
    keeper = Keeper::empty();
    daemon.start_again(&mut keeper);
    let Output { status, stderr, .. } = upgrade.wait_with_output().expect("it ends");
    let errors = String::from_utf8(stderr).expect("text");
    assert_eq!(status.code(), Some(3), "{errors}");
    assert!(errors.contains("THE DAEMON HAS LEFT"), "{errors}");
    assert!(errors.contains("no state of life 1"), "{errors}");
}

#[test]
fn a_daemon_whose_successor_would_refuse_its_state_goes_on() {
    let keeper = Keeper::empty();
    let daemon = Daemon::kept_with_config(&keeper, FILE, &[]);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map(1, 0, 0xfff, 0x1000, RW), OK);
    let file = daemon.folder().join("vm.toml");
    for (text, expected) in [
        (
            FILE.replace("00:06", "00:16"),
            "the guest uses the endpoint 0000:00:06.0",
        ),
        (
            format!("granule = \"64k\"\n{FILE}"),
            "the guest was offered \"page sizes\"",
        ),
        (format!("domains = 7\n{FILE}"), "was offered \"domains\""),
        (format!("granul = 7\n{FILE}"), "vm.toml:1"),
    ] {
        fs::write(&file, text).expect("written");
        let refused = refusal(&daemon);
        assert!(refused.contains(expected), "{refused}");
        assert!(refused.contains("the running daemon goes on"), "{refused}");
        let warning = "its keeper starts the installed program";
        assert!(refused.contains(warning), "{refused}");
    }
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0x1000, RW), OK);
    assert_eq!(daemon.status()["life"]["number"], 1);
}

/// The command waits for a daemon that has just begun. The file that counts is the one after that.
#[test]
fn a_file_that_changes_meanwhile_is_compared_again() {
    let keeper = Keeper::empty();
    let daemon = Daemon::kept_with_config(&keeper, FILE, &[]);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let upgrade = command(&daemon).spawn().expect("it runs");
    thread::sleep(Duration::from_secs(2));
    let file = daemon.folder().join("vm.toml");
    fs::write(file, format!("domains = 7\n{FILE}")).expect("written");
    let Output { status, stderr, .. } = upgrade.wait_with_output().expect("it ends");
    let errors = String::from_utf8(stderr).expect("text");
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("was offered \"domains\""), "{errors}");
    assert_eq!(daemon.status()["life"]["number"], 1);
}

/// The next daemon has the endpoints that `ctl` has added, although the file has not, and not those that it has removed.
#[test]
fn endpoints_that_ctl_has_changed_are_no_obstacle() {
    let mut keeper = Keeper::empty();
    let file = format!("hotplug = [\"01:00.0\"]\n{FILE}");
    let mut daemon = Daemon::kept_with_config(&keeper, &file, &[]);
    let mut guest = Guest::boot(&daemon);
    let [listen, connect] = ["listen", "connect"].map(|name| daemon.folder().join(name));
    let keys = format!(
        "address = \"01:00.0\", vfio-user = {{ listen = {listen:?}, connect = {connect:?} }}"
    );
    for line in [
        format!("add-endpoint {keys}"),
        "add-endpoint address = \"00:09.0\", group = \"g\"".into(),
        "remove-endpoint 00:07.0".into(),
    ] {
        let done = daemon.control(&line);
        assert!(done["error"].is_null(), "{line}: {done}");
    }
    assert_eq!(guest.attach(1, NO_EP), OK);
    assert_eq!(guest.attach(2, 0x100), OK);
    assert_eq!(daemon.status()["handover"]["ends"], json!([]));
    // But the file must not have another endpoint there.
    let path = daemon.folder().join("vm.toml");
    fs::write(
        &path,
        format!("{file}[[endpoint]]\naddress = \"00:09.0\"\n"),
    )
    .expect("written");
    let refused = refusal(&daemon);
    assert!(refused.contains("contradicts the file"), "{refused}");
    fs::write(&path, &file).expect("written");
    let upgrade = command(&daemon).spawn().expect("it runs");
    assert!(daemon.wait_for_end().success());
    daemon.start_again(&mut keeper);
    succeeded(upgrade);
    for endpoint in [NO_EP, 0x100] {
        assert_eq!(daemon.endpoint(endpoint)["state"], "attached");
    }
    assert_eq!(guest.attach(1, EP2), NOENT);
    assert_eq!(daemon.status()["life"]["lost"], json!([]));
}

#[test]
fn another_program_than_the_next_daemons_asks_no_daemon_to_leave() {
    let keeper = Keeper::empty();
    let daemon = Daemon::kept_with_config(&keeper, FILE, &[]);
    let copy = daemon.folder().join("copy");
    fs::copy(PROGRAM, &copy).expect("copied");
    let mut command = Command::new(copy);
    command
        .arg("upgrade")
        .arg(daemon.folder().join("vm.toml"))
        .arg("--control")
        .arg(daemon.control_socket());
    let output = command.output().expect("it runs");
    let refused = String::from_utf8_lossy(&output.stderr);
    assert!(
        refused.contains(&format!("its next start runs {PROGRAM}")),
        "{refused}"
    );
}

#[test]
fn a_daemon_that_nobody_keeps_is_not_ended() {
    let daemon = Daemon::with_config(FILE);
    let mut guest = Guest::boot(&daemon);
    let refused = refusal(&daemon);
    assert!(refused.contains("nobody keeps its state"), "{refused}");
    // Nor by a client that asks without a comparison.
    let answer = daemon.control("leave 1 1");
    assert!(
        answer["error"].to_string().contains("nobody keeps it"),
        "{answer}"
    );
    assert_eq!(guest.attach(1, EP), OK);
}

#[test]
fn a_daemon_is_asked_for_the_life_that_was_looked_at() {
    let keeper = Keeper::empty();
    let daemon = Daemon::kept(&keeper, &super::ARGS);
    for (line, expected) in [
        ("leave 2 0", "another life"),
        ("leave 0 0", "another life"),
        ("leave x 0", "another life"),
        ("leave 1", "the request is one of"),
        ("leave 1 1", "a VMM has connected"),
        ("leave 1 0", "less than 13 s"),
    ] {
        let answer = daemon.control(line);
        assert!(answer["error"].to_string().contains(expected), "{answer}");
    }
    let _guest = Guest::boot(&daemon);
    thread::sleep(MIN_AGE);
    let answer = daemon.control("leave 1 0");
    assert!(answer["error"].to_string().contains("a VMM has connected"));
    assert_eq!(daemon.control("leave 1 1")["leaving"], 1);

    assert!(daemon.wait_for_end().success());
}
