//! Hostile clients of the control socket, and users without access to it.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;

use crate::bed::{Bed, ctl};
use crate::common::daemon::{EP, connect};
use crate::common::guest::{Guest, LOW_RAM, Layout};
use crate::common::wire::{self, OK, RW, TAIL};

#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let bed = Bed::new("", "");
    let mut guest = Guest::boot(&bed.daemon);
    assert_eq!(guest.attach(1, EP), OK);
    // An answer longer than a socket buffer.
    let layout = Layout::plain(36, TAIL);
    for batch in 0..200_u64 {
        for n in 0..100 {
            let first = (batch * 100 + n) << 13;
            guest.submit(&wire::map(1, first, first + 0xfff, LOW_RAM, RW), &layout);
        }
        guest.kick();
        for _ in 0..100 {
            assert_eq!(guest.complete().1.status(), OK);
        }
    }
    let mut lazy = connect(&bed.daemon.control_socket());
    writeln!(lazy, "mappings").expect("asked");
    // The daemon has begun to answer.
    lazy.read_exact(&mut [0]).expect("an answer");
    // The guest must not notice: the daemon serves it until the client is cut off.
    let is_cut_off = || bed.daemon.log().contains("a control client got no answer");
    let mut served = 0;
    bed.daemon.wait_for("the client's end", || {
        assert_eq!(guest.map_page(1, 0x1000, LOW_RAM), OK);
        assert_eq!(guest.unmap(1, 0x1000, 0x1fff), OK);
        served += 1;
        is_cut_off()
    });
    // If the daemon waited for the client, the guest would wait until the end.
    assert!(served > 5, "{served}");
    let stats = bed.daemon.control("stats");
    assert_eq!(stats["clients"]["cut_off"], 1);
    drop(lazy);
}

#[test]
fn the_control_socket_is_private_unless_configured() {
    let bed = Bed::new("", "");
    let found = std::fs::metadata(bed.daemon.control_socket()).expect("a socket");
    assert_eq!(found.mode() & 0o7777, 0o600);
}

/// Mode and group of the socket decide who can connect. Only root can run a process of another
/// user.
#[test]
fn a_group_can_be_given_access() {
    let own = std::fs::metadata("/proc/self").expect("a process");
    let group = if own.uid() == 0 { 4321 } else { own.gid() };
    let bed = Bed::new(
        &format!("control-mode = '0660'\ncontrol-group = {group}"),
        "",
    );
    // The daemon answers only once it has given the socket its rights.
    bed.daemon.control("status");
    let socket = bed.daemon.control_socket();
    let found = std::fs::metadata(&socket).expect("a socket");
    assert_eq!((found.mode() & 0o7777, found.gid()), (0o660, group));
    if own.uid() != 0 {
        return;
    }
    let folder = socket.parent().expect("a folder");
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).expect("opened");
    let as_group = |gid| {
        let mut command = ctl(&socket, &["status"]);
        command.uid(65534).gid(gid).output().expect("it runs")
    };
    assert!(as_group(group).status.success());
    let refused = as_group(65534);
    assert!(!refused.status.success());
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("Permission denied"), "{why}");
}
