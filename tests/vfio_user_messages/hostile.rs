//! Garbage from the client and the server: the interposer closes the connection, and the next one works.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, accept, eventually};
use crate::connection::{
    COMMAND, Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, ERROR, GET_INFO, NO_REPLY,
    REGION_READ, REGION_WRITE, REPLY, RESET, SET_IRQS, VERSION, bytes, dma, dma_map, irqs, region,
    version_body,
};

/// A message whose header declares another size.
fn sized(size: u32, cmd: u16, flags: u32) -> Vec<u8> {
    let mut all = bytes(1, cmd, flags, 0, &[0; 32]);
    all[4..8].copy_from_slice(&size.to_ne_bytes());
    all
}

/// Garbage for either direction: description, bytes, number of descriptors.
fn garbage() -> Vec<(&'static str, Vec<u8>, usize)> {
    vec![
        ("a size of 0", sized(0, GET_INFO, COMMAND), 0),
        ("less than a header", sized(15, GET_INFO, COMMAND), 0),
        (
            "oversized",
            sized((1 << 20) + 4097, REGION_WRITE, COMMAND),
            0,
        ),
        (
            "the largest size",
            sized(u32::MAX, REGION_WRITE, COMMAND),
            0,
        ),
        ("an unknown message type", sized(48, GET_INFO, 2), 0),
        ("an error reply to no command", sized(48, RESET, ERROR), 0),
        (
            "random bytes",
            (0..200u8).map(|n| n.wrapping_mul(89)).collect(),
            0,
        ),
    ]
}

/// Garbage from clients, as in [`garbage`].
pub fn garbage_of_clients() -> Vec<(&'static str, Vec<u8>, usize)> {
    let command = |cmd, body: &[u8]| bytes(1, cmd, COMMAND, 0, body);
    let mut all = garbage();
    all.extend([
        ("a reply", bytes(1, RESET, REPLY, 0, &[]), 0),
        ("a second VERSION", command(VERSION, &version_body("{}")), 0),
        ("a server's command", command(DMA_READ, &dma(0, 1, &[])), 0),
    ]);
    all
}

/// Commands of clients that are refused: whole messages whose content is wrong.
fn malformed_commands() -> Vec<(&'static str, Vec<u8>, usize)> {
    let command = |cmd, body: &[u8]| bytes(1, cmd, COMMAND, 0, body);
    vec![
        (
            "a body that is too short",
            command(REGION_READ, &[0; 15]),
            0,
        ),
        (
            "a count beyond the data",
            command(REGION_WRITE, &region(0, 0, 9, b"x")),
            0,
        ),
        ("descriptors where none belong", command(RESET, &[]), 1),
        (
            "two descriptors for a window",
            command(DMA_MAP, &dma_map(3, 0, 0, 0x1000)),
            2,
        ),
        (
            "more descriptors than interrupts",
            command(SET_IRQS, &irqs(0x24, 2, 0, 1)),
            2,
        ),
        (
            "a descriptor for an interrupt without one",
            command(SET_IRQS, &irqs(0x21, 2, 0, 1)),
            1,
        ),
        (
            "a DMA_UNMAP that is too short",
            command(DMA_UNMAP, &[0; 8]),
            0,
        ),
    ]
}

/// Garbage from servers, as in [`garbage`].
pub fn garbage_of_servers() -> Vec<(&'static str, Vec<u8>, usize)> {
    let mut all = garbage();
    all.extend([
        ("a reply to nothing", bytes(77, RESET, REPLY, 0, &[]), 0),
        (
            "a body that is too short",
            bytes(1, DMA_READ, COMMAND, 0, &[0; 15]),
            0,
        ),
        (
            "a count beyond the data",
            bytes(1, DMA_WRITE, COMMAND, 0, &dma(0, 9, b"x")),
            0,
        ),
        (
            "the largest count",
            bytes(1, DMA_WRITE, COMMAND, 0, &dma(0, u64::MAX, b"x")),
            0,
        ),
        (
            "descriptors where none belong",
            bytes(1, DMA_READ, COMMAND, 0, &dma(0, 1, &[])),
            1,
        ),
    ]);
    all
}

/// Sends bytes with that many descriptors of `/dev/null`.
pub fn send(connection: &mut Connection, bytes: &[u8], descriptors: usize) {
    let null = File::open("/dev/null").expect("open");
    connection.send_raw(bytes, &vec![null.as_fd(); descriptors]);
}

/// Checks that a new client and a new server can talk.
fn assert_works(bed: &Bed) {
    let (mut client, _scripted) = bed.pair(|_, _| false);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn clients_that_send_garbage_are_disconnected() {
    let bed = Bed::new(Isolation::Messages);
    for (what, bytes, descriptors) in garbage_of_clients() {
        eprintln!("{what}");
        let (mut client, mut server) = bed.raw_pair();
        send(&mut client, &bytes, descriptors);
        assert!(client.is_closed(), "{what}");
        assert!(server.is_closed(), "{what}");
    }
    assert_works(&bed);
}

#[test]
fn malformed_commands_are_refused_and_do_not_reach_the_server() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, scripted) = bed.pair(|_, _| false);
    for (what, bytes, descriptors) in malformed_commands() {
        send(&mut client, &bytes, descriptors);
        let refused = client.recv().expect(what);
        assert_eq!(
            (refused.errno(), refused.body.len()),
            (libc::EINVAL, 0),
            "{what}"
        );
        // Without an answer, and without a consequence.
        let mut posted = bytes;
        posted[8..12].copy_from_slice(&NO_REPLY.to_ne_bytes());
        send(&mut client, &posted, descriptors);
    }
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let others = scripted.received.lock().unwrap();
    assert!(others.iter().all(|m| m.cmd == VERSION || m.cmd == RESET));
}

#[test]
fn clients_with_a_wrong_first_message_are_disconnected() {
    let bed = Bed::new(Isolation::Messages);
    for body in [
        &[][..],
        &[0; 3],
        &[1, 0, 0, 0],
        &version_body("{"),
        &version_body("[[[[[["),
        &version_body(r#"{"capabilities":{"max_msg_fds":"many"}}"#),
        &version_body(&"[".repeat(5000)),
        &vec![b' '; 100_000],
    ] {
        let mut client = bed.connect();
        client.ask(VERSION, body, &[]);
        assert!(client.is_closed());
    }
    // The interposer closes a connection without VERSION after 10 s, and this one before that. Several attempts,
    // since a busy machine can delay one of them as long.
    let is_closed_at_once = || {
        let begun = Instant::now();
        let mut client = bed.connect();
        client.ask(RESET, &[], &[]);
        assert!(client.is_closed());
        begun.elapsed() < Duration::from_secs(5)
    };
    assert!((0..4).any(|_| is_closed_at_once()));
    for cut in [1, 15, 16, 20] {
        let mut client = bed.connect();
        let whole = bytes(1, VERSION, COMMAND, 0, &version_body("{}"));
        client.send_raw(&whole[..cut], &[]);
    }
    assert_works(&bed);
}

#[test]
fn servers_that_send_garbage_are_cut_off() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    for (what, bytes, descriptors) in garbage_of_servers() {
        eprintln!("{what}");
        let (mut client, mut server) = bed.raw_pair();
        let request = client.ask(REGION_READ, &region(0, 0, 4, &[]), &[]);
        assert_eq!(server.recv().expect("forwarded").cmd, REGION_READ);
        send(&mut server, &bytes, descriptors);
        assert!(server.is_closed(), "{what}");
        let reply = client.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno()), (request, libc::EIO), "{what}");
    }
    assert_works(&bed);
}

#[test]
fn servers_whose_replies_are_wrong_are_cut_off() {
    let bed = Bed::new(Isolation::Messages);
    let null = File::open("/dev/null").expect("open");
    /// Command and body from the client; command, body and number of descriptors of the reply.
    type Exchange<'a> = (u16, &'a [u8], u16, &'a [u8], usize);
    let info = [0; 32];
    let exchanges: [Exchange; 8] = [
        (
            REGION_READ,
            &region(0, 0, 4, &[]),
            REGION_WRITE,
            &[0; 16],
            0,
        ),
        (REGION_READ, &region(0, 0, 4, &[]), REGION_READ, &[0; 15], 0),
        (
            REGION_READ,
            &region(0, 0, 4, &[]),
            REGION_READ,
            &region(0, 0, 4, b"abc"),
            0,
        ),
        (
            REGION_READ,
            &region(0, 0, 4, &[]),
            REGION_READ,
            &region(0, 0, 1, b"a"),
            1,
        ),
        (REGION_READ, &region(0, 0, 4, &[]), REGION_READ, &[], 0),
        (REGION_WRITE, &region(0, 0, 1, b"x"), REGION_WRITE, &[], 0),
        (REGION_READ, &region(0, 0, 0, &[]), REGION_READ, &[], 1),
        (GET_INFO, &info[..16], GET_INFO, &[], 0),
    ];
    for (request, with, cmd, body, descriptors) in exchanges {
        let (mut client, mut server) = bed.raw_pair();
        let asked = client.ask(request, with, &[]);
        let msg = server.recv().expect("forwarded");
        let fds = vec![null.as_fd(); descriptors];
        server.send(msg.id, cmd, REPLY, body, &fds);
        assert!(server.is_closed(), "command {request}, reply to {cmd}");
        let reply = client.recv().expect("an answer");
        assert_eq!((reply.id, reply.errno()), (asked, libc::EIO));
    }
    {
        let (mut client, mut server) = bed.raw_pair();
        let asked = client.ask(RESET, &[], &[]);
        let msg = server.recv().expect("forwarded");
        let refusal = bytes(msg.id, RESET, ERROR, libc::EINVAL.unsigned_abs(), &[]);
        server.send_raw(&refusal, &[null.as_fd()]);
        assert!(server.is_closed(), "a refusal with a descriptor");
        let reply = client.recv().expect("an answer");
        assert_eq!((reply.id, reply.errno()), (asked, libc::EIO));
    }
    assert_works(&bed);
}

#[test]
fn a_twin_socket_that_is_another_file_cuts_the_server_off() {
    let bed = Bed::new(Isolation::Messages);
    let (reader, _writer) = std::io::pipe().expect("a pipe");
    let (datagrams, _other) = UnixDatagram::pair().expect("sockets");
    for twin in [reader.as_fd(), datagrams.as_fd()] {
        let listener = bed.listen();
        let mut client = bed.connect();
        client.ask(VERSION, &version_body("{}"), &[]);
        let mut server = accept(&listener);
        let request = server.recv().expect("VERSION");
        let text = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
        server.reply(&request, &version_body(text), &[twin]);
        assert!(server.is_closed());
        assert!(client.is_closed());
    }
    assert_works(&bed);
}

#[test]
fn servers_with_invalid_capabilities_get_no_client() {
    let bed = Bed::new(Isolation::Messages);
    for text in [
        "{",
        r#"{"capabilities":7}"#,
        r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#,
    ] {
        let listener = bed.listen();
        let mut client = bed.connect();
        client.ask(VERSION, &version_body("{}"), &[]);
        let mut server = accept(&listener);
        let request = server.recv().expect("VERSION");
        server.reply(&request, &version_body(text), &[]);
        assert!(server.is_closed(), "{text}");
        assert!(client.is_closed(), "{text}");
    }
    assert_works(&bed);
}

#[test]
fn a_server_that_refuses_to_give_a_window_up_is_cut_off() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let (_client, scripted) = bed.pair(|server, msg| {
        if msg.cmd == DMA_UNMAP {
            server.refuse(msg, libc::EBUSY.unsigned_abs());
        }
        msg.cmd == DMA_UNMAP
    });
    bed.map(0x1000, 0, 0x1000, Access::READ).expect("mapped");
    let failed = bed
        .unmap(0x1000, 0x1000)
        .expect_err("the server keeps the window");
    // The error of a server that does not answer within its deadline is another one.
    assert!(failed.to_string().contains("refuses to remove"), "{failed}");
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(endpoint.quarantined);
    eventually("the interposer cuts the server off", || {
        scripted.thread.is_finished()
    });
}

#[test]
fn a_silent_client_does_not_occupy_the_server() {
    let bed = Bed::new(Isolation::Messages);
    let listener = bed.listen();
    let _idle = bed.connect();
    listener.set_nonblocking(true).expect("set");
    std::thread::sleep(Duration::from_millis(300));
    assert!(listener.accept().is_err());
}
