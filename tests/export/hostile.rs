//! Garbage: the server closes the connection, releases the device, and serves the next client.

use std::fs::File;
use std::os::fd::AsFd;

use crate::bed::{Bed, CONFIG, REGIONS, TRAPPED, eventually};
use crate::common::rng::Rng;
use crate::connection::{
    COMMAND, Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, ERROR, GET_INFO, NO_REPLY,
    REGION_INFO, REGION_READ, REGION_WRITE, REPLY, RESET, SET_IRQS, VERSION, bytes, dma, dma_map,
    irqs, region, version_body,
};

/// A message whose header declares another size.
fn sized(size: u32, flags: u32) -> Vec<u8> {
    let mut all = bytes(1, RESET, flags, 0, &[0; 32]);
    all[4..8].copy_from_slice(&size.to_ne_bytes());
    all
}

/// Sends bytes with that many descriptors of `/dev/null`.
fn send(connection: &mut Connection, bytes: &[u8], descriptors: usize) {
    let null = File::open("/dev/null").expect("open");
    connection.send_raw(bytes, &vec![null.as_fd(); descriptors]);
}

#[test]
fn malformed_messages_end_the_connection_and_nothing_else() {
    let command = |cmd, body: &[u8]| bytes(1, cmd, COMMAND, 0, body);
    let bed = Bed::new();
    for (what, sent, descriptors) in [
        ("a size of 0", sized(0, COMMAND), 0),
        ("less than a header", sized(15, COMMAND), 0),
        ("oversized", sized((1 << 20) + 4097, COMMAND), 0),
        ("the largest size", sized(u32::MAX, COMMAND), 0),
        ("an unknown message type", sized(48, 2), 0),
        ("an error reply with data", sized(48, ERROR), 0),
        ("a reply", bytes(1, RESET, REPLY, 0, &[]), 0),
        ("a second VERSION", command(VERSION, &version_body("{}")), 0),
        (
            "a body that is too short",
            command(REGION_READ, &[0; 15]),
            0,
        ),
        ("a server's command", command(DMA_READ, &dma(0, 1, &[])), 0),
        (
            "another command of a server",
            command(DMA_WRITE, &dma(0, 1, b"x")),
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
        (
            "fewer bytes than interrupts",
            command(SET_IRQS, &irqs(0x22, 2, 0, 9)),
            0,
        ),
    ] {
        let resets = bed.device.state().resets;
        let mut client = bed.client();
        send(&mut client, &sent, descriptors);
        assert!(client.is_closed(), "{what}");
        assert_eq!(bed.device.state().resets, resets + 1, "{what}");
    }
    for (what, first) in [
        ("no VERSION", command(GET_INFO, &[0; 16])),
        (
            "a version that does not exist",
            command(VERSION, &[1, 0, 0, 0]),
        ),
        ("no JSON", command(VERSION, &version_body("{"))),
        ("an unknown command", command(99, &[])),
    ] {
        let mut client = bed.connect();
        send(&mut client, &first, 0);
        assert!(client.is_closed(), "{what}");
    }
    // The client dies within a header, and within a body.
    for len in [7, 20] {
        let resets = bed.device.state().resets;
        let mut client = bed.client();
        send(
            &mut client,
            &command(REGION_WRITE, &region(0, 0, 4, b"abcd"))[..len],
            0,
        );
        drop(client);
        eventually("the server releases the device", || {
            bed.device.state().resets > resets
        });
    }
    assert_eq!(bed.client().call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn random_commands_are_answered_or_refused() {
    let bed = Bed::new();
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let mut client = bed.client();
        for _ in 0..100 {
            let words = |rng: &mut Rng, n: usize| -> Vec<u8> {
                let word = |rng: &mut Rng| match rng.below(6) {
                    0 => rng.u32(),
                    1 => u32::MAX,
                    2 => 0x24,
                    3 => rng.u32() & 0x3f,
                    _ => rng.u32() % (REGIONS + 2),
                };
                (0..n).flat_map(|_| word(rng).to_ne_bytes()).collect()
            };
            let (command, body) = match rng.below(6) {
                0 => (REGION_INFO, words(&mut rng, 8)),
                1 => (SET_IRQS, words(&mut rng, 5)),
                2 => (REGION_READ, words(&mut rng, 4)),
                3 => (REGION_WRITE, {
                    let data = rng.bytes(8);
                    let (at, index) = (rng.below(0x5000), rng.u32() % REGIONS);
                    region(at, index, 8, &data)
                }),
                4 => (DMA_MAP, words(&mut rng, 8)),
                _ => (DMA_UNMAP, words(&mut rng, 6)),
            };
            let id = client.ask(command, &body, &[]);
            // The server closes the connection if the count exceeds the data. All other commands get a reply.
            match client.recv() {
                Some(reply) => assert_eq!((reply.id, reply.cmd), (id, command)),
                None => client = bed.client(),
            }
        }
    }
}

#[test]
fn a_client_that_does_not_read_fills_no_memory() {
    let bed = Bed::new();
    let mut client = bed.client();
    // Each asks for 1 MiB, and the client reads no reply.
    let ask = bytes(
        1,
        REGION_READ,
        COMMAND,
        0,
        &region(0, TRAPPED, 1 << 20, &[]),
    );
    // The socket buffers all of them.
    for _ in 0..100 {
        client.send_raw(&ask, &[]);
    }
    eventually("the server answers the first", || {
        bed.device.state().accesses > 0
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(
        bed.device.state().accesses < 5,
        "the server must not read the others"
    );
    drop(client);
    assert_eq!(bed.client().call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn a_device_that_fails_is_released_too() {
    let bed = Bed::new();
    let mut client = bed.client();
    let write = |n: u8| bytes(1, REGION_WRITE, NO_REPLY, 0, &region(4, CONFIG, 1, &[n]));
    client.send_raw(&write(7), &[]);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    bed.device.state().error = Some(libc::EIO);
    drop(client);
    let mut client = bed.client();
    assert_eq!(client.call(RESET, &[], &[]).errno(), libc::EIO);
    bed.device.state().error = None;
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

/// Takes ten seconds.
#[test]
fn a_silent_client_does_not_block_the_next_for_ever() {
    let bed = Bed::new();
    let mut silent = bed.connect();
    let mut next = bed.connect();
    next.ask(VERSION, &version_body("{}"), &[]);
    assert_eq!(next.recv().expect("an answer").errno(), 0);
    assert!(silent.is_closed());
}
