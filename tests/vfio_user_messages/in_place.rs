//! Long DMA_READs, whose data the kernel takes from guest memory itself.

use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::faults::FaultReason;

use crate::bed::{Bed, RAM_LEN};
use crate::connection::{COMMAND, Connection, DMA_READ, NO_REPLY, dma};

const IOVA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
/// The most data that a message has.
const MOST: u64 = 1 << 20;
/// The shortest data that is sent from guest memory.
const LONG: u64 = 32 << 10;

/// Guest RAM with a number in each eight bytes. Each page is a mapping of its own, in the reverse order of the memory
/// behind it.
fn bed() -> Bed {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    for at in (0..RAM_LEN).step_by(PAGE as usize) {
        bed.map(IOVA + RAM_LEN - PAGE - at, at, PAGE, Access::READ_WRITE)
            .expect("mapped");
    }
    fill(&bed, 0);
    bed
}

/// Writes guest RAM anew. `salt` makes it differ from what was there.
fn fill(bed: &Bed, salt: u64) {
    let numbers = (0..RAM_LEN / 8).map(|n| (n ^ salt << 32).to_ne_bytes());
    bed.poke(0, &numbers.flatten().collect::<Vec<_>>());
}

/// The bytes of guest RAM behind an access.
fn behind(bed: &Bed, address: u64, count: u64) -> Vec<u8> {
    let mut all = Vec::new();
    let mut at = address - IOVA;
    while at < address - IOVA + count {
        let len = (PAGE - at % PAGE).min(address - IOVA + count - at);
        let page = RAM_LEN - PAGE - at / PAGE * PAGE;
        all.extend(bed.peek(page + at % PAGE, len as usize));
        at += len;
    }
    all
}

/// Sends reads of several lengths at once, longer than the socket holds, and receives their replies afterwards.
fn read_many(bed: &Bed, server: &mut Connection) {
    let reads = [
        (IOVA, 8),
        (IOVA + 4, LONG - 1),
        (IOVA + PAGE - 4, LONG),
        (IOVA + 100, 16),
        (IOVA + 3 * PAGE, MOST),
        (IOVA + RAM_LEN - MOST, MOST),
        (IOVA + 1, MOST),
        (IOVA + 5 * PAGE, PAGE),
    ];
    for (id, &(address, count)) in (0..).zip(&reads) {
        let body = dma(address, count, &[]);
        server.send(id, DMA_READ, COMMAND, &body, &[]);
        // It has no answer, and changes nothing.
        server.send(id, DMA_READ, NO_REPLY, &body, &[]);
    }
    for (id, &(address, count)) in (0..).zip(&reads) {
        let reply = server.recv().expect("a reply");
        assert_eq!((reply.id, reply.cmd, reply.errno()), (id, DMA_READ, 0));
        assert_eq!((reply.u64_at(0), reply.u64_at(8)), (address, count));
        assert!(reply.body[16..] == behind(bed, address, count), "read {id}");
    }
    assert!(bed.faults.take().is_empty());
}

#[test]
fn long_reads_are_answered_in_order_with_the_bytes_of_all_mappings() {
    let bed = bed();
    let (client, mut server) = bed.raw_pair();
    let region = server.recv().expect("a region");
    server.reply(&region, &[], &[]);
    read_many(&bed, &mut server);
    drop((client, server));
    let (_client, _server, mut twin) = bed.raw_pair_with_twin();
    read_many(&bed, &mut twin);
}

/// The socket takes a part of the reply. The rest is what the guest's memory was when the read was served.
#[test]
fn after_an_unmap_no_reply_has_later_bytes_of_its_memory() {
    let bed = bed();
    let (_client, _server, mut twin) = bed.raw_pair_with_twin();
    let before = behind(&bed, IOVA, MOST);
    twin.send(1, DMA_READ, COMMAND, &dma(IOVA, MOST, &[]), &[]);
    let seen = recv(&twin.stream, &mut [0], RecvFlags::PEEK).expect("the reply has begun");
    assert_eq!(seen.0, 1);
    bed.unmap(IOVA, RAM_LEN).expect("unmapped");
    fill(&bed, 1);
    std::thread::sleep(Duration::from_millis(20));
    let reply = twin.recv().expect("a reply");
    assert_eq!((reply.id, reply.errno()), (1, 0));
    assert!(reply.body[16..] == before);
}

#[test]
fn a_long_read_is_refused_if_any_byte_of_it_is() {
    let bed = bed();
    let hole = IOVA + 9 * PAGE;
    bed.unmap(hole, PAGE).expect("unmapped");
    let (_client, mut server) = bed.raw_pair();
    let region = server.recv().expect("a region");
    server.reply(&region, &[], &[]);
    for address in [hole - LONG, hole - PAGE, hole] {
        // A reply before and one after it, which may be sent together.
        server.send(1, DMA_READ, COMMAND, &dma(IOVA, 8, &[]), &[]);
        let body = dma(address, LONG + 1, &[]);
        server.send(2, DMA_READ, COMMAND, &body, &[]);
        server.send(3, DMA_READ, COMMAND, &dma(IOVA, 8, &[]), &[]);
        for (id, errno, len) in [(1, 0, 24), (2, libc::EFAULT, 0), (3, 0, 24)] {
            let reply = server.recv().expect("a reply");
            assert_eq!((reply.id, reply.errno()), (id, errno), "{address:#x}");
            assert_eq!(reply.body.len(), len);
        }
        let faults = bed.faults.take();
        assert_eq!(faults, [(FaultReason::Mapping, hole)]);
    }
}
