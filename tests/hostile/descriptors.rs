//! Descriptors of a hostile VMM: the daemon neither waits for one nor loses a kick.

use std::io::Write;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bed::{assert_serves, boot};
use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, Layout, Setup};
use crate::common::memory::memfd;
use crate::common::wire::{self, TAIL};

#[test]
fn a_second_kick_descriptor_of_a_running_ring_replaces_the_first() {
    let (daemon, mut guest) = boot();
    let mut old = Vec::new();
    for _ in 0..20 {
        assert_serves(&daemon, &mut guest);
        let new = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        guest
            .frontend
            .set_vring_kick(0, &new)
            .expect("SET_VRING_KICK");
        // The old descriptor stays open, and may be signalled.
        old.push(std::mem::replace(&mut guest.requests.kick, new));
        for kick in &old {
            kick.write(1).expect("an old kick");
        }
    }
    assert_serves(&daemon, &mut guest);
    // A ring that is stopped and started again has the last descriptor only.
    guest.reboot();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_kick_before_the_descriptor_is_replaced_is_not_lost() {
    let (daemon, mut guest) = boot();
    for _ in 0..50 {
        assert_serves(&daemon, &mut guest);
        let new = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let request = wire::detach(1, EP);
        let layout = Layout::plain(20, TAIL);
        guest.submit(&request, &layout);
        guest.kick();
        guest
            .frontend
            .set_vring_kick(0, &new)
            .expect("SET_VRING_KICK");
        guest.requests.kick = new;
        guest.complete();
    }
}

/// Descriptors that are no eventfds, by their kind.
fn others() -> Vec<(&'static str, OwnedFd)> {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    // An event has 8 bytes. With fewer in the pipe, a read of the descriptor blocks.
    writer.write_all(&[0; 3]).expect("three bytes");
    let (socket, _) = UnixStream::pair().expect("sockets");
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set");
    vec![
        ("the end of a pipe that reads", reader.into()),
        ("the end of a pipe that writes", writer.into()),
        ("a socket", socket.into()),
        ("a file", memfd(0x1000).into()),
        ("an epoll set", epoll),
    ]
}

#[test]
#[expect(unsafe_code, reason = "passes other files off as event descriptors")]
fn a_descriptor_that_is_no_eventfd_ends_the_connection() {
    let daemon = Daemon::start();
    for round in 0..others().len() {
        for message in ["call", "kick", "error"] {
            let (kind, other) = others().swap_remove(round);
            let guest = Guest::boot(&daemon);
            // SAFETY: `into_raw_fd` has just given up ownership of the descriptor.
            let other = unsafe { EventFd::from_raw_fd(other.into_raw_fd()) };
            let outcome = match message {
                "call" => guest.frontend.set_vring_call(1, &other),
                "kick" => guest.frontend.set_vring_kick(1, &other),
                _ => guest.frontend.set_vring_err(1, &other),
            };
            assert!(outcome.is_err(), "{kind} as {message} descriptor");
            let told =
                format!("a ring's {message} descriptor cannot be used: it is not an eventfd");
            daemon.wait_for("the log", || daemon.log().contains(&told));
        }
    }
    assert_serves(&daemon, &mut Guest::boot(&daemon));
}

/// An eventfd in blocking mode with a full counter: a `write` to it blocks.
fn full_eventfd() -> EventFd {
    let full = EventFd::new(EFD_CLOEXEC).expect("an eventfd");
    full.write(u64::MAX - 1).expect("the counter is full");
    full
}

#[test]
fn a_full_call_descriptor_keeps_nobody_waiting() {
    let daemon = Daemon::start();
    for _ in 0..3 {
        let mut guest = Guest::connect(&daemon, Setup::default());
        guest.requests.call = full_eventfd();
        guest.events.call = full_eventfd();
        guest.driver_ok();
        // The driver wants an interrupt for each request.
        for _ in 0..20 {
            assert_serves(&daemon, &mut guest);
        }
        // Also a descriptor that fills up while it is in use.
        let call = EventFd::new(EFD_CLOEXEC).expect("an eventfd");
        let copy = call.try_clone().expect("a duplicate");
        guest.frontend.set_vring_call(0, &copy).expect("call");
        assert_serves(&daemon, &mut guest);
        assert!(call.read().is_ok_and(|count| count > 0), "interrupts come");
        // Not quite full: the last interrupt may still come.
        call.write(u64::MAX - 20).expect("room");
        for _ in 0..20 {
            assert_serves(&daemon, &mut guest);
        }
        // The VMM goes with interrupts outstanding; the next one is served.
    }
    daemon.terminate();
    assert!(daemon.wait_for_end().success(), "an orderly end");
}

#[test]
fn the_daemon_reads_no_kick_descriptor() {
    let (daemon, mut guest) = boot();
    let kick = EventFd::new(EFD_CLOEXEC).expect("an eventfd");
    guest.requests.kick = kick.try_clone().expect("a duplicate");
    guest.frontend.set_vring_kick(0, &kick).expect("kick");
    let mut kicks = 0;
    for _ in 0..10 {
        assert_serves(&daemon, &mut guest);
        guest.requests.kick_always();
        // The VMM takes its own kicks away, so that a blocking read would wait.
        kicks += kick.read().expect("kicks that nobody has read");
    }
    assert!(kicks > 0);
    assert_serves(&daemon, &mut guest);
}
