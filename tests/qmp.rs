//! RESET events that the VMM sends over QMP, and other input at the same socket.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP};
use common::guest::{Guest, Setup};
use common::wire::{CONFIG_BYPASS, DEVERR, OK};
use serde_json::{Value, json};
use tempfile::TempDir;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 11}}, "capabilities": ["oob"]}}"#;
const RESET: &str = r#"{"timestamp": {"seconds": 1}, "event": "RESET", "data": {"guest": false}}"#;
const IOVA: u64 = 0x7000_0000;
const PAGE: u64 = 0xa0_0000;

/// A daemon whose VMM listens for QMP.
struct Bed {
    daemon: Daemon,
    listener: UnixListener,
    _folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self::with("")
    }

    /// With more endpoints or ports.
    fn with(more: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        let daemon = Daemon::with_config(&format!(
            "address = '00:05.0'\nqmp = {path:?}\n[[endpoint]]\naddress = '00:06.0'\n{more}"
        ));
        Self {
            daemon,
            listener,
            _folder: folder,
        }
    }

    /// Accepts the next connection, within `limit`.
    fn accept(&self, limit: Duration) -> Option<UnixStream> {
        self.listener.set_nonblocking(true).expect("a socket");
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(false).expect("a socket");
                return Some(stream);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Accepts a connection and negotiates, so that events can be sent.
    fn negotiate(&self) -> UnixStream {
        let mut stream = self.accept(Duration::from_secs(20)).expect("it connects");
        writeln!(stream, "{GREETING}\r").expect("taken");
        let mut line = String::new();
        BufReader::new(&stream)
            .read_line(&mut line)
            .expect("a command");
        assert_eq!(line.trim(), r#"{"execute":"qmp_capabilities"}"#);
        writeln!(stream, "{{\"return\": {{}}}}\r").expect("taken");
        stream
    }

    fn guest(&self) -> Guest {
        let mut guest = Guest::boot_with(&self.daemon, Setup::default());
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map_page(1, IOVA, PAGE), OK);
        guest
    }
}

#[test]
fn a_reset_ends_all_domains_before_a_driver_starts() {
    let bed = Bed::new();
    let mut guest = bed.guest();
    let mut qmp = bed.negotiate();
    guest.set_config(CONFIG_BYPASS, &[0]);
    guest.stop_rings();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(bed.daemon.domains(), [1], "a stopped ring may be a pause");
    writeln!(qmp, "{}", RESET.replace("RESET", "STOP")).expect("taken");
    writeln!(qmp, "{RESET}").expect("taken");
    bed.daemon
        .wait_for("no domain", || bed.daemon.domains().is_empty());
    // The reset also discards the bypass field that the guest has written, and all its mappings.
    assert_eq!(bed.daemon.endpoint(EP)["dma"], "bypass");
    assert_eq!(guest.config_bytes(CONFIG_BYPASS, 1), [1]);
    guest.reboot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(bed.daemon.mappings(1), []);
}

#[test]
fn a_late_reset_event_does_not_affect_the_next_driver() {
    let bed = Bed::new();
    let mut guest = bed.guest();
    let mut qmp = bed.negotiate();
    guest.stop_rings();
    guest.reboot();
    assert_eq!(guest.attach(2, EP), OK);
    for _ in 0..20 {
        writeln!(qmp, "{RESET}").expect("taken");
    }
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(bed.daemon.domains(), [2]);
    assert_eq!(guest.map_page(2, IOVA, PAGE), OK);
}

#[test]
fn unread_events_of_one_vm_do_not_affect_the_next() {
    let bed = Bed::new();
    let mut guest = bed.guest();
    let mut qmp = bed.negotiate();
    guest.stop_rings();
    // More events than the daemon handles before the next VM pauses.
    qmp.write_all(format!("{RESET}\n").repeat(100).as_bytes())
        .expect("taken");
    bed.daemon
        .wait_for("no domain", || bed.daemon.domains().is_empty());
    drop(guest);
    let mut guest = bed.guest();
    guest.stop_rings();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(bed.daemon.domains(), [1]);
    guest.driver_ok();
    assert_eq!(guest.map_page(1, IOVA + 0x1000, PAGE), OK);
}

/// An endpoint behind the only port.
const BEHIND: u32 = 0x100;
const PORT: &str = "[[endpoint]]\nport = '00:02.0'\n";

/// The next question for the places, with its name.
fn question(reader: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    while reader.read_line(&mut line).unwrap_or(0) > 0 {
        let command: Value = serde_json::from_str(&line).expect("JSON");
        if command["execute"] == "query-pci" {
            return Some(command["id"].as_str().expect("a name").to_owned());
        }
        line.clear();
    }
    None
}

/// Tells the daemon that the guest has given the bus behind the port the number `bus`.
fn tell(stream: &mut UnixStream, id: &str, bus: u8) {
    let port = json!({ "bus": 0, "slot": 2, "function": 0, "qdev_id": "p",
        "pci_bridge": { "bus": { "number": 0, "secondary": bus, "subordinate": bus } } });
    let answer = json!({ "id": id, "return": [{ "bus": 0, "devices": [port] }] });
    writeln!(stream, "{answer}\r").expect("taken");
}

/// Answers all questions for the places in a thread.
fn answer_all(mut stream: UnixStream, bus: &Arc<AtomicU8>) {
    let bus = bus.clone();
    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    std::thread::spawn(move || {
        while let Some(id) = question(&mut reader) {
            tell(&mut stream, &id, bus.load(Ordering::Relaxed));
        }
    });
}

fn connected(bed: &Bed) -> Guest {
    let mut guest = Guest::connect(&bed.daemon, Setup::default());
    guest.driver_ok();
    guest
}

/// The daemon asks before it answers the driver's first request, and at each start of a driver.
#[test]
fn a_port_with_another_number_is_blocked() {
    let bed = Bed::with(PORT);
    let bus = Arc::new(AtomicU8::new(2));
    let mut guest = connected(&bed);
    answer_all(bed.negotiate(), &bus);
    assert_eq!(guest.attach(1, BEHIND), DEVERR);
    assert_eq!(guest.attach(1, EP), OK);
    let places = || bed.daemon.status()["places"].clone();
    bed.daemon
        .wait_for("the comparison", || places()["state"] == "differ");
    let ports = json!([{ "port": "00:02.0", "bus": 1, "guest_bus": 2 }]);
    assert_eq!(places()["ports"], ports);
    let endpoint = bed.daemon.endpoint(BEHIND);
    assert_eq!(
        (&endpoint["state"], &endpoint["dma"]),
        (&json!("misplaced"), &json!("blocked"))
    );
    assert_eq!(bed.daemon.endpoint(EP)["dma"], "translated");
    let log = bed.daemon.log();
    assert!(
        log.contains("the bus behind port 00:02.0 has the number 01"),
        "{log}"
    );

    bus.store(1, Ordering::Relaxed);
    guest.reboot();
    // On a busy machine the answer may come after the deadline.
    bed.daemon
        .wait_for("the other number", || guest.attach(1, BEHIND) == OK);
    assert_eq!(places()["state"], "agree");
    assert_eq!(bed.daemon.endpoint(BEHIND)["dma"], "translated");
}

/// A VMM that does not answer holds nothing up for ever, and what it may have done stays blocked.
#[test]
fn places_that_are_not_known_are_blocked_until_they_are() {
    let bed = Bed::with(PORT);
    let mut guest = connected(&bed);
    let mut qmp = bed.negotiate();
    // Submitted before anybody answers.
    assert_eq!(guest.attach(1, BEHIND), DEVERR);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(bed.daemon.status()["places"]["state"], "unknown");
    assert_eq!(bed.daemon.endpoint(BEHIND)["dma"], "blocked");
    let mut reader = BufReader::new(qmp.try_clone().expect("a descriptor"));
    let id = question(&mut reader).expect("a question");
    for wrong in ["places-0", "other"] {
        tell(&mut qmp, wrong, 1);
    }
    tell(&mut qmp, &id, 2);
    bed.daemon.wait_for("the late answer", || {
        bed.daemon.status()["places"]["state"] == "differ"
    });
    assert_eq!(bed.daemon.endpoint(BEHIND)["dma"], "blocked");
    drop((reader, qmp));
    // The next driver's start asks the next connection.
    let bus = Arc::new(AtomicU8::new(1));
    answer_all(bed.negotiate(), &bus);
    guest.reboot();
    bed.daemon
        .wait_for("the right number", || guest.attach(1, BEHIND) == OK);
    assert_eq!(bed.daemon.endpoint(BEHIND)["dma"], "translated");
}

/// An endpoint that names its device is blocked until the device is there.
#[test]
fn a_named_device_must_be_at_its_address() {
    const NAMED: u32 = 0x38;
    let bed = Bed::with("[[endpoint]]\naddress = '00:07.0'\ndevice = 'hostdev0'\n");
    assert_eq!(bed.daemon.endpoint(NAMED)["dma"], "blocked");
    let mut guest = connected(&bed);
    let mut qmp = bed.negotiate();
    for (slot, status) in [(8, DEVERR), (7, OK)] {
        let mut reader = BufReader::new(qmp.try_clone().expect("a descriptor"));
        let id = question(&mut reader).expect("a question");
        let device = json!({ "slot": slot, "function": 0, "qdev_id": "hostdev0" });
        let answer = json!({ "id": id, "return": [{ "bus": 0, "devices": [device] }] });
        writeln!(qmp, "{answer}").expect("taken");
        let state = if status == OK { "agree" } else { "differ" };
        bed.daemon.wait_for("the comparison", || {
            bed.daemon.status()["places"]["state"] == state
        });
        assert_eq!(guest.attach(1, NAMED), status);
        assert_eq!(guest.attach(1, EP), OK);
        if status != OK {
            let places = bed.daemon.status()["places"].clone();
            let device = json!({ "device": "hostdev0", "address": "0000:00:07.0", "guest_address": "00:08.0" });
            assert_eq!(places["devices"], json!([device]));
            guest.reboot();
        }
    }
    assert_eq!(bed.daemon.endpoint(NAMED)["dma"], "translated");
}

#[test]
fn answers_that_are_none_leave_the_endpoints_blocked() {
    let bed = Bed::with(PORT);
    let mut guest = connected(&bed);
    for answer in [
        json!({ "return": {} }),
        json!({ "return": [{ "bus": 0, "devices": [{ "slot": "2" }] }] }),
        json!({ "error": { "class": "GenericError" } }),
        json!({ "return": [] }),
    ] {
        let mut qmp = bed.negotiate();
        let mut reader = BufReader::new(qmp.try_clone().expect("a descriptor"));
        let id = question(&mut reader).expect("a question");
        let mut answer = answer;
        answer["id"] = id.into();
        writeln!(qmp, "{answer}").expect("taken");
        assert_eq!(guest.attach(1, BEHIND), DEVERR);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.detach(1, EP), OK);
        guest.stop_rings();
        guest.clear_rings();
        guest.driver_ok();
    }
}

#[test]
fn the_daemon_reconnects_after_any_garbage() {
    let bed = Bed::new();
    let mut guest = bed.guest();
    let long = vec![b'['; 1 << 20];
    let deep = "[".repeat(30_000);
    let pieces: [(bool, &[u8]); 7] = [
        (false, b"hello\n"),
        (false, b"{}\n"),
        (false, b"\xff\xfe\n"),
        (true, &long),
        (true, deep.as_bytes()),
        (true, b"{\"error\": {\"class\": \"GenericError\"}}\n"),
        (true, b"{\"event\": [\"RESET\"]}\n{\"event\": \"RESET\"\n"),
    ];
    for (greets, piece) in pieces {
        let mut stream = bed.accept(Duration::from_secs(20)).expect("it tries again");
        if greets {
            writeln!(stream, "{GREETING}").expect("taken");
        }
        // The daemon may close the connection in between.
        let _ = stream.write_all(piece);
        let _ = stream.write_all(b"\n");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a limit");
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut rest);
        assert!(
            rest.len() < 100,
            "the daemon sends no more than its command"
        );
        assert_eq!(guest.map_page(1, IOVA + 0x1000, PAGE), OK);
        assert_eq!(guest.unmap(1, IOVA + 0x1000, IOVA + 0x1fff), OK);
    }
    assert!(
        bed.daemon.log().contains("-qmp unix:"),
        "{}",
        bed.daemon.log()
    );
    assert_eq!(bed.daemon.domains(), [1]);
    // Now a correct conversation.
    let mut qmp = bed.negotiate();
    guest.stop_rings();
    writeln!(qmp, "{RESET}").expect("taken");
    bed.daemon
        .wait_for("no domain", || bed.daemon.domains().is_empty());
}

#[test]
fn reconnections_to_a_socket_that_closes_at_once_back_off() {
    let bed = Bed::new();
    let begun = Instant::now();
    let guest = bed.guest();
    for _ in 0..5 {
        bed.accept(Duration::from_secs(30)).expect("an attempt");
    }
    // The attempts come at once and after 0.1, 0.3, 0.7 and 1.5 seconds, and not earlier.
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(1), "{took:?}");
    // The daemon does not connect for a VM that is gone.
    drop(guest);
    bed.daemon
        .wait_for("the end", || bed.daemon.status()["connected"] == false);
    while bed.accept(Duration::from_millis(100)).is_some() {}
    assert!(bed.accept(Duration::from_secs(3)).is_none());
    // The attempts do not delay the end of the daemon.
    bed.daemon.terminate();
    assert!(bed.daemon.wait_for_end().success());
}

#[test]
fn listening_costs_nothing() {
    let bed = Bed::new();
    let _guest = bed.guest();
    let _qmp = bed.negotiate();
    std::thread::sleep(Duration::from_millis(300));
    let before = bed.daemon.context_switches();
    std::thread::sleep(Duration::from_secs(1));
    let switches = bed.daemon.context_switches() - before;
    assert!(switches <= 2, "{switches} wakeups in a second");
}
