//! Garbage from either end: the connection is closed, and the next one works.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, DEADLINE, accept, eventually};
use crate::connection::{
    COMMAND, Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, ERROR, GET_INFO, REGION_INFO,
    REGION_READ, REGION_WRITE, REPLY, RESET, SET_IRQS, VERSION, bytes, dma, dma_map, irqs, region,
    version_body,
};

/// A message whose header declares another size.
fn sized(size: u32, cmd: u16, flags: u32) -> Vec<u8> {
    let mut all = bytes(1, cmd, flags, 0, &[0; 32]);
    all[4..8].copy_from_slice(&size.to_ne_bytes());
    all
}

/// What is wrong from either end: bytes and descriptors.
fn garbage() -> Vec<(&'static str, Vec<u8>, usize)> {
    vec![
        ("no size", sized(0, GET_INFO, COMMAND), 0),
        ("less than a header", sized(15, GET_INFO, COMMAND), 0),
        (
            "oversized",
            sized((1 << 20) + 4097, REGION_WRITE, COMMAND),
            0,
        ),
        (
            "as large as can be",
            sized(u32::MAX, REGION_WRITE, COMMAND),
            0,
        ),
        ("no type", sized(48, GET_INFO, 2), 0),
        ("a refusal with data", sized(48, RESET, ERROR), 0),
        (
            "random",
            (0..200u8).map(|n| n.wrapping_mul(89)).collect(),
            0,
        ),
    ]
}

pub fn garbage_of_clients() -> Vec<(&'static str, Vec<u8>, usize)> {
    let command = |cmd, body: &[u8]| bytes(1, cmd, COMMAND, 0, body);
    let mut all = garbage();
    all.extend([
        ("a reply", bytes(1, RESET, REPLY, 0, &[]), 0),
        (
            "VERSION once more",
            command(VERSION, &version_body("{}")),
            0,
        ),
        ("too short", command(REGION_READ, &[0; 15]), 0),
        ("a server's command", command(DMA_READ, &dma(0, 1, &[])), 0),
        (
            "more counted than there",
            command(REGION_WRITE, &region(0, 0, 9, b"x")),
            0,
        ),
        ("descriptors for nothing", command(RESET, &[]), 1),
        (
            "two for a window",
            command(DMA_MAP, &dma_map(3, 0, 0, 0x1000)),
            2,
        ),
        (
            "more than interrupts",
            command(SET_IRQS, &irqs(0x24, 2, 0, 1)),
            2,
        ),
        (
            "for interrupts that want none",
            command(SET_IRQS, &irqs(0x21, 2, 0, 1)),
            1,
        ),
        ("a short window", command(DMA_UNMAP, &[0; 8]), 0),
    ]);
    all
}

pub fn garbage_of_servers() -> Vec<(&'static str, Vec<u8>, usize)> {
    let mut all = garbage();
    all.extend([
        ("a reply to nothing", bytes(77, RESET, REPLY, 0, &[]), 0),
        ("too short", bytes(1, DMA_READ, COMMAND, 0, &[0; 15]), 0),
        (
            "more counted than there",
            bytes(1, DMA_WRITE, COMMAND, 0, &dma(0, 9, b"x")),
            0,
        ),
        (
            "all there is",
            bytes(1, DMA_WRITE, COMMAND, 0, &dma(0, u64::MAX, b"x")),
            0,
        ),
        (
            "descriptors for nothing",
            bytes(1, DMA_READ, COMMAND, 0, &dma(0, 1, &[])),
            1,
        ),
    ]);
    all
}

pub fn send(connection: &mut Connection, bytes: &[u8], descriptors: usize) {
    let null = File::open("/dev/null").expect("open");
    connection.send_raw(bytes, &vec![null.as_fd(); descriptors]);
}

fn works(bed: &Bed) {
    let (mut client, _played) = bed.pair(|_, _| false);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn clients_that_send_garbage_are_let_go() {
    let bed = Bed::new(Isolation::Messages);
    for (what, bytes, descriptors) in garbage_of_clients() {
        eprintln!("{what}");
        let (mut client, mut server) = bed.raw_pair();
        send(&mut client, &bytes, descriptors);
        assert!(client.is_closed(), "{what}");
        assert!(server.is_closed(), "{what}");
    }
    works(&bed);
}

#[test]
fn clients_whose_first_word_is_wrong_are_let_go() {
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
    let begun = Instant::now();
    let mut client = bed.connect();
    client.ask(RESET, &[], &[]);
    assert!(client.is_closed());
    assert!(begun.elapsed() < Duration::from_secs(5), "at once");
    for cut in [1, 15, 16, 20] {
        let mut client = bed.connect();
        let whole = bytes(1, VERSION, COMMAND, 0, &version_body("{}"));
        client.send_raw(&whole[..cut], &[]);
    }
    works(&bed);
}

#[test]
fn servers_that_send_garbage_are_cut_off() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    for (what, bytes, descriptors) in garbage_of_servers() {
        eprintln!("{what}");
        let (mut client, mut server) = bed.raw_pair();
        let asked = client.ask(REGION_READ, &region(0, 0, 4, &[]), &[]);
        assert_eq!(server.recv().expect("forwarded").cmd, REGION_READ);
        send(&mut server, &bytes, descriptors);
        assert!(server.is_closed(), "{what}");
        let reply = client.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno()), (asked, libc::EIO), "{what}");
    }
    works(&bed);
}

#[test]
fn servers_whose_replies_are_wrong_are_cut_off() {
    let bed = Bed::new(Isolation::Messages);
    let null = File::open("/dev/null").expect("open");
    type Wrong<'a> = (u16, &'a [u8], u16, &'a [u8], usize);
    let info = [0; 32];
    let wrong: [Wrong; 6] = [
        // Asked for, with; answered as, with, and with descriptors.
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
        (REGION_INFO, &info, REGION_INFO, &info, 17),
        (GET_INFO, &info[..16], GET_INFO, &[], 0),
    ];
    for (asked, with, cmd, body, descriptors) in wrong {
        let (mut client, mut server) = bed.raw_pair();
        client.ask(asked, with, &[]);
        let msg = server.recv().expect("forwarded");
        let fds = vec![null.as_fd(); descriptors];
        server.send(msg.id, cmd, REPLY, body, &fds);
        assert!(server.is_closed(), "{asked} answered as {cmd}");
    }
    works(&bed);
}

#[test]
fn servers_that_agree_to_nothing_get_no_client() {
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
        let asked = server.recv().expect("VERSION");
        server.reply(&asked, &version_body(text), &[]);
        assert!(server.is_closed(), "{text}");
        assert!(client.is_closed(), "{text}");
    }
    works(&bed);
}

#[test]
fn a_server_that_refuses_to_give_a_window_up_is_cut_off() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let (_client, played) = bed.pair(|server, msg| {
        if msg.cmd == DMA_UNMAP {
            server.refuse(msg, libc::EBUSY.unsigned_abs());
        }
        msg.cmd == DMA_UNMAP
    });
    bed.map(0x1000, 0, 0x1000, Access::READ).expect("mapped");
    let begun = Instant::now();
    let failed = bed.unmap(0x1000, 0x1000).expect_err("kept");
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
    assert!(failed.to_string().contains("refuses to remove"), "{failed}");
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(endpoint.quarantined);
    eventually("it is cut off", || played.thread.is_finished());
}

#[test]
fn a_client_that_says_nothing_keeps_no_server_busy() {
    let bed = Bed::new(Isolation::Messages);
    let listener = bed.listen();
    let _idle = bed.connect();
    listener.set_nonblocking(true).expect("set");
    std::thread::sleep(Duration::from_millis(300));
    assert!(listener.accept().is_err());
}
