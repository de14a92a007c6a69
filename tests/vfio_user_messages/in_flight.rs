//! Commands of a server that come at once.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, eventually};
use crate::connection::{
    COMMAND, Connection, DMA_READ, DMA_WRITE, GET_INFO, NO_REPLY, REGION_INFO, REGION_WRITE, bytes,
    dma,
};

const IOVA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
/// More than the interposer handles before it turns to other peers.
const ROUNDS: u16 = 40;

fn bed() -> Bed {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    bed.map(IOVA, 0, PAGE, Access::READ_WRITE).expect("mapped");
    bed
}

/// Sends commands of each kind in one piece, and checks the replies.
fn burst(bed: &Bed, server: &mut Connection) {
    let mut all = Vec::new();
    for n in 0..ROUNDS {
        let at = IOVA + u64::from(n);
        let mut push = |cmd, flags, body: &[u8]| all.extend(bytes(n, cmd, flags, 0, body));
        push(DMA_WRITE, COMMAND, &dma(at, 1, &[n as u8]));
        push(DMA_WRITE, NO_REPLY, &dma(at + 0x100, 1, &[!n as u8]));
        push(DMA_READ, COMMAND, &dma(at, 1, &[]));
        push(DMA_READ, COMMAND, &dma(IOVA, PAGE + 1, &[]));
        push(GET_INFO, COMMAND, &[0; 16]);
        push(DMA_READ, COMMAND, &dma(at + 0x100, 1, &[]));
    }
    server.send_raw(&all, &[]);
    let mut expect = |n: u16, cmd, errno, data: Option<u8>| {
        let reply = server.recv().expect("a reply");
        let got = (reply.id, reply.cmd, reply.errno());
        assert_eq!(got, (n, cmd, errno));
        assert_eq!(reply.body.get(16).copied(), data);
    };
    for n in 0..ROUNDS {
        expect(n, DMA_WRITE, 0, None);
        expect(n, DMA_READ, 0, Some(n as u8));
        expect(n, DMA_READ, libc::EFAULT, None);
        expect(n, GET_INFO, libc::ENOTSUP, None);
        expect(n, DMA_READ, 0, Some(!n as u8));
    }
    let written: Vec<_> = (0..ROUNDS).map(|n| n as u8).collect();
    assert_eq!(bed.peek(0, ROUNDS.into()), written);
}

#[test]
fn commands_that_come_at_once_are_answered_in_order() {
    let bed = bed();
    let (_client, mut server) = bed.raw_pair();
    let window = server.recv().expect("a window");
    server.reply(&window, &[], &[]);
    burst(&bed, &mut server);
}

#[test]
fn commands_that_come_at_once_on_the_socket_for_commands_are_answered_in_order() {
    let bed = bed();
    let (_client, _server, mut twin) = bed.raw_pair_with_twin();
    burst(&bed, &mut twin);
}

#[test]
fn descriptors_of_a_reply_between_commands_go_to_its_client() {
    let bed = bed();
    let (mut client, mut server) = bed.raw_pair();
    let window = server.recv().expect("a window");
    server.reply(&window, &[], &[]);
    let file = File::open("/dev/null").expect("open");
    for n in 0..ROUNDS {
        let asked = client.ask(REGION_INFO, &[0; 32], &[]);
        let request = server.recv().expect("a request");
        server.send(n, DMA_READ, COMMAND, &dma(IOVA, PAGE, &[]), &[]);
        server.reply(&request, &[0; 32], &[file.as_fd()]);
        server.send(n, DMA_READ, COMMAND, &dma(IOVA, 1, &[]), &[]);
        let reply = client.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno(), reply.fds.len()), (asked, 0, 1));
        for len in [PAGE, 1] {
            let reply = server.recv().expect("a reply");
            assert_eq!((reply.id, reply.body.len() as u64), (n, 16 + len));
        }
    }
}

/// A server with one thread sends commands of its own while it does not read, and a client has filled the queue to it.
#[test]
fn commands_of_the_client_do_not_keep_those_of_the_server_waiting() {
    const DATA: usize = 256 << 10;
    /// More than the interposer queues.
    const COUNT: u64 = 40;
    /// More than the sockets hold.
    const OWN: u64 = 2000;
    let bed = bed();
    let (mut client, mut server) = bed.raw_pair();
    let window = server.recv().expect("a window");
    server.reply(&window, &[], &[]);
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    let client = std::thread::spawn(move || {
        let head = [&[0; 12][..], &(DATA as u32).to_le_bytes()].concat();
        let body = [head, vec![7; DATA]].concat();
        for _ in 0..COUNT {
            client.ask(REGION_WRITE, &body, &[]);
            counter.fetch_add(1, Ordering::Relaxed);
        }
        for _ in 0..COUNT {
            assert_eq!(client.recv().expect("a reply").errno(), 0);
        }
    });
    eventually("the queue is nearly full", || {
        sent.load(Ordering::Relaxed) >= (4 << 20) / DATA as u64
    });
    let own = Arc::new(AtomicU64::new(0));
    let counter = own.clone();
    let server = std::thread::spawn(move || {
        for n in 0..OWN {
            let data = vec![n as u8; PAGE as usize];
            server.send(0, DMA_WRITE, NO_REPLY, &dma(IOVA, PAGE, &data), &[]);
            counter.fetch_add(1, Ordering::Relaxed);
        }
        for _ in 0..COUNT {
            let command = server.recv().expect("a command");
            server.reply(&command, &command.body[..16], &[]);
        }
    });
    eventually("the server's commands", || {
        own.load(Ordering::Relaxed) == OWN
    });
    server.join().expect("all commands have come");
    client.join().expect("all replies have come");
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}
