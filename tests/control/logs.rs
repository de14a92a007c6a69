//! The content of the log, and its limits.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::bed::{Bed, ctl};
use crate::common::daemon::{Daemon, EP, EP2, NO_EP};
use crate::common::guest::{Guest, LOW_RAM, Layout};
use crate::common::rng::Rng;
use crate::common::wire::{self, INVAL, NOENT, OK, RW, TAIL};

#[test]
fn each_message_names_the_vm_the_endpoint_and_the_domain() {
    let bed = Bed::new("", "");
    let mut guest = Guest::boot(&bed.daemon);
    assert_eq!(guest.attach(5, NO_EP + 0x100), NOENT);
    assert_eq!(guest.attach(5, EP), OK);
    assert_eq!(guest.detach(6, EP), INVAL);
    assert_eq!(guest.map(5, 0, 1, 0, RW), wire::RANGE);
    assert_eq!(guest.call(&wire::attach(7, EP2, 0x80)), INVAL);
    let size = guest.config().probe_size as usize;
    assert_eq!(guest.probe_sized(0x77, size).status(), NOENT);
    let log = bed.daemon.log();
    for line in log.lines() {
        let (head, message) = line.split_once("] ").expect("a head");
        assert!(head.starts_with('['), "{line}");
        assert!(message.starts_with("web-1: "), "{line}");
    }
    for part in [
        "ATTACH",
        "(endpoint 0000:01:09.0, domain 5)",
        "(endpoint 0000:00:06.0, domain 6)",
        "(domain 5)",
        "(endpoint 0000:00:07.0, domain 7)",
        "(endpoint 0000:00:0e.7)",
    ] {
        let log = log.to_lowercase();
        assert!(log.contains(&part.to_lowercase()), "{part} in {log}");
    }
}

#[test]
fn the_name_of_a_vm_defaults_to_that_of_its_file() {
    let daemon = Daemon::with_config("address = '00:05.0'");
    assert_eq!(daemon.status()["name"], "vm");
    daemon.wait_for("its name in the log", || {
        daemon.log().contains("] vm: waiting for a VMM")
    });
}

/// Malformed requests of every kind, resets, and connections without end.
#[test]
fn no_guest_can_fill_the_disk_with_messages() {
    let bed = Bed::new("", "");
    let mut rng = Rng::new(77);
    let mut requests = 0;
    for round in 0..30 {
        let mut guest = Guest::boot(&bed.daemon);
        for _ in 0..30 {
            flood(&mut guest, &mut rng);
            requests += 100;
        }
        if round % 2 == 0 {
            guest.reboot();
        }
    }
    let length = bed.daemon.log_len();
    println!("{requests} requests that are refused, {length} bytes of log");
    assert!(length < 64 << 10, "{length} bytes");
    let refused: u64 = bed.daemon.status()["requests"]
        .as_object()
        .into_iter()
        .flatten()
        .flat_map(|(_, statuses)| statuses.as_object().cloned().unwrap_or_default())
        .filter(|(status, _)| status != "ok")
        .filter_map(|(_, count)| count.as_u64())
        .sum();
    assert!(refused > 10_000, "{refused} refusals");
}

/// An operator who asks for debug messages gets them, but they must not fill the disk.
#[test]
fn debug_messages_are_limited_too() {
    let bed = Bed::new("", "");
    let mut guest = Guest::boot(&bed.daemon);
    bed.text(&["log-level", "trace"]);
    let layout = Layout::plain(20, TAIL);
    let moves = [wire::attach(1, EP, 0), wire::detach(1, EP)];
    let mut length = 0;
    for round in 0..800 {
        for _ in 0..50 {
            for request in &moves {
                guest.submit(request, &layout);
            }
        }
        guest.kick();
        for _ in 0..100 {
            assert_eq!(guest.complete().1.status(), OK);
        }
        if round == 700 {
            length = bed.daemon.log_len();
        }
    }
    assert!(
        length > 1 << 20,
        "{length} bytes are fewer than debug messages should give"
    );
    let stats = bed.daemon.control("stats");
    let suppressed = stats["log"]["suppressed"].as_u64();
    assert!(suppressed > Some(1000), "{suppressed:?}");
    let more = bed.daemon.log_len() - length;
    assert!(more < 256 << 10, "{more} bytes more");
    // Important messages still appear.
    assert_eq!(guest.detach(9, EP), INVAL);
}

/// Threads log while they hold locks. None may wait for whoever should read standard error.
#[test]
fn a_full_pipe_as_standard_error_delays_nobody() {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let writer = OwnedFd::from(writer);
    let filled = fill(&writer);
    let toml = "name = 'web-1'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\n";
    let daemon = Daemon::with_config_prepared(toml, |command| {
        command.stderr(writer);
    });
    let lost = || {
        daemon.control("stats")["log"]["lost"]
            .as_u64()
            .expect("a count")
    };
    // The daemon has its sockets before it logs its first message.
    daemon.wait_for("a message that the full pipe does not take", || lost() > 0);
    let at_start = lost();

    let mut guest = Guest::boot(&daemon);
    for domain in 0..20 {
        assert_eq!(guest.attach(domain, NO_EP), NOENT, "the daemon logs that");
    }
    assert_eq!(guest.attach(1, EP), OK);
    assert!(lost() > at_start);
    let socket = daemon.control_socket();
    let text = ctl(&socket, &["status"]).output().expect("it runs").stdout;
    let text = String::from_utf8(text).expect("text");
    assert!(text.contains(&format!("lost: {}", lost())), "{text}");

    // Somebody reads again.
    let mut read = vec![0; filled];
    reader.read_exact(&mut read).expect("the old content");
    let lost_before = lost();
    guest.reboot();
    assert_eq!(guest.attach(1, EP), OK);
    daemon.control("log-level debug");
    daemon.control("log-level info");
    assert_eq!(lost(), lost_before);

    daemon.terminate();
    assert!(daemon.wait_for_end().success());
    let mut log = String::new();
    let (done, waiting) = channel();
    std::thread::spawn(move || {
        reader.read_to_string(&mut log).expect("text");
        done.send(log)
    });
    let log = waiting.recv_timeout(Duration::from_secs(30));
    let log = log.expect("nobody else has the pipe");
    let first = log.lines().next().expect("a line");
    assert!(first.contains("web-1: "), "{first}");
    let notice = format!("{lost_before} messages before this one were lost");
    assert!(first.contains(&notice), "{notice} in {first}");
    assert!(log.contains("a signal ends the daemon"), "{log}");
}

/// SIGTERM ends a daemon whose standard error takes nothing.
#[test]
fn a_full_pipe_as_standard_error_does_not_delay_the_end() {
    let (_reader, writer) = std::io::pipe().expect("a pipe");
    let writer = OwnedFd::from(writer);
    fill(&writer);
    let daemon = Daemon::with_config_prepared("address = '00:05.0'", |command| {
        command.stderr(writer);
    });
    daemon.terminate();
    assert!(daemon.wait_for_end().success());
}

/// Fills a pipe, which blocks writers afterwards. Returns the number of bytes in it.
fn fill(writer: &OwnedFd) -> usize {
    let flags = fcntl_getfl(writer).expect("flags");
    fcntl_setfl(writer, flags | OFlags::NONBLOCK).expect("set");
    let mut filled = 0;
    while let Ok(count) = rustix::io::write(writer, &[b'x'; 4096]) {
        filled += count;
    }
    fcntl_setfl(writer, flags).expect("set");
    filled
}

/// A hundred requests of random kinds; nearly all of them are wrong.
fn flood(guest: &mut Guest, rng: &mut Rng) {
    for _ in 0..100 {
        let (domain, endpoint) = (rng.below(3) as u32, (rng.below(20) * 8) as u32);
        let (first, last) = (rng.below(1 << 20), rng.below(1 << 20));
        let mut request = match rng.below(6) {
            0 => wire::attach(domain, endpoint, rng.below(4) as u32),
            1 => wire::detach(domain, endpoint),
            2 => wire::map(domain, first, last, LOW_RAM + first, rng.below(16) as u32),
            3 => wire::unmap(domain, first, last),
            4 => wire::probe(endpoint),
            _ => vec![rng.below(256) as u8; 1 + rng.below(80) as usize],
        };
        request.truncate(1 + rng.below(100) as usize);
        let layout = Layout::plain(request.len(), TAIL);
        guest.submit(&request, &layout);
    }
    guest.kick();
    for _ in 0..100 {
        guest.complete();
    }
}
