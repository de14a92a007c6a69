//! Connections that are kept for a later process serve as those that end with the process.

use std::os::fd::AsFd;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, CLIENT_TEXT, accept, event, eventually};
use crate::connection::{
    DMA_READ, DMA_WRITE, REGION_READ, REGION_WRITE, SET_IRQS, VERSION, dma, irqs, region,
    version_body,
};

const MIB: u64 = 1 << 20;

fn bed() -> Bed {
    let bed = Bed::kept(Isolation::Messages);
    bed.attach();
    bed.map(0, 0, 4 * MIB, Access::READ_WRITE).expect("mapped");
    bed
}

/// Their bytes are more than the ring has, and go around in it.
#[test]
fn long_and_short_accesses_of_a_server_are_answered_for_a_long_time() {
    let bed = bed();
    let data: Vec<u8> = (0..4 * MIB).map(|at| (at / 5) as u8).collect();
    bed.poke(0, &data);
    let (_client, mut server) = bed.raw_pair();
    let window = server.recv().expect("a region");
    server.reply(&window, &[], &[]);
    for round in 0..12 {
        let mut asked = Vec::new();
        for n in 0..4 {
            let (at, len) = (
                n * 700_001 + round,
                if n % 2 == 0 { MIB } else { 5000 + round },
            );
            asked.push((
                server.ask(DMA_READ, &dma(at, len, &[]), &[]),
                at as usize,
                len as usize,
            ));
        }
        for (id, at, len) in asked {
            let reply = server.recv().expect("a reply");
            assert_eq!((reply.id, reply.errno()), (id, 0));
            assert!(reply.body[16..] == data[at..at + len]);
        }
        let refused = server.call(DMA_READ, &dma(4 * MIB, 40_000, &[]), &[]);
        assert_eq!(refused.errno(), libc::EFAULT);
    }
    let written = server.call(DMA_WRITE, &dma(77, 3, b"abc"), &[]);
    assert_eq!(written.errno(), 0);
    assert_eq!(bed.peek(77, 3), b"abc");
}

#[test]
fn a_server_that_connects_again_and_clients_that_follow_each_other_are_served() {
    let bed = bed();
    for _ in 0..3 {
        let (mut client, mut server) = bed.raw_pair();
        let window = server.recv().expect("a region");
        server.reply(&window, &[], &[]);
        let interrupt = event();
        client.ask(SET_IRQS, &irqs(0x24, 2, 0, 1), &[interrupt.as_fd()]);
        let set = server.recv().expect("interrupts");
        assert_eq!((set.cmd, set.fds.len()), (SET_IRQS, 1));
        server.reply(&set, &[], &[]);
        assert_eq!(client.recv().expect("a reply").errno(), 0);
        // Two commands without a reply when the server dies.
        client.ask(REGION_READ, &region(0, 1, 4, &[]), &[]);
        client.ask(REGION_WRITE, &region(0, 1, 4, b"abcd"), &[]);
        server.recv().expect("a read");
        let listener = bed.listen();
        drop(server);
        for _ in 0..2 {
            assert_eq!(client.recv().expect("a refusal").errno(), libc::EIO);
        }
        let mut server = accept(&listener);
        let version = server.recv().expect("VERSION");
        server.reply(&version, &version_body(crate::bed::SERVER_TEXT), &[]);
        let (mut windows, mut interrupts) = (0, 0);
        while windows + interrupts < 2 {
            let msg = server.recv().expect("the state");
            match msg.cmd {
                SET_IRQS => interrupts += msg.fds.len(),
                _ => windows += 1,
            }
            server.reply(&msg, &[], &[]);
        }
        assert_eq!((windows, interrupts), (1, 1));
        let id = client.ask(REGION_READ, &region(8, 1, 4, &[]), &[]);
        let read = server.recv().expect("a read");
        server.reply(&read, &[&read.body[..], b"data"].concat(), &[]);
        let reply = client.recv().expect("a reply");
        assert_eq!((reply.id, &reply.body[16..]), (id, &b"data"[..]));
        drop(client);
        assert!(server.is_closed());
        eventually("the client's end", || !bed.watch.state().ends.client);
    }
    // One that negotiates with nobody.
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
}
