//! Descriptors of a hostile VMM: the daemon neither waits for one nor loses a kick.

use std::io::Write;
use std::os::fd::{FromRawFd, IntoRawFd};

use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bed::{assert_serves, boot};
use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, Layout, Setup};
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

#[test]
#[expect(unsafe_code, reason = "passes a pipe off as an event descriptor")]
fn a_kick_descriptor_that_blocks_keeps_nobody_waiting() {
    let daemon = Daemon::start();
    let mut guest = Guest::connect(&daemon, Setup::default());
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    // An event has 8 bytes. With fewer in the pipe, a read of the descriptor blocks.
    writer.write_all(&[0; 3]).expect("three bytes");
    // SAFETY: `into_raw_fd` has just given up ownership of the descriptor.
    guest.requests.kick = unsafe { EventFd::from_raw_fd(reader.into_raw_fd()) };
    guest.driver_ok();
    daemon.terminate();
    assert!(daemon.wait_for_end().success(), "an orderly end");
    assert!(!daemon.socket().exists() && !daemon.control_socket().exists());
    drop(writer);
}
