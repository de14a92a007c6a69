//! Servers that are told regions of 8 TiB instead of mappings: MAP and UNMAP need nothing of them, and each access is
//! looked up in the page table.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::faults::FaultReason;
use vhost_device_iommu::ids::DomainId;

use crate::bed::{Bed, RAM, RAM_LEN, eventually};
use crate::connection::{Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, RESET, dma};

const IOVA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
/// The length of a region.
const REGION: u64 = 1 << 43;

fn read(server: &mut Connection, address: u64) -> Result<u8, i32> {
    let reply = server.call(DMA_READ, &dma(address, 1, &[]), &[]);
    match reply.errno() {
        0 => Ok(reply.body[16]),
        errno => Err(errno),
    }
}

fn map(bed: &Bed, iova: u64) {
    bed.map(iova, 0, PAGE, Access::READ_WRITE).expect("mapped");
}

/// The regions that the server was told, and the number of those it has lost.
fn regions(received: &crate::bed::ScriptedServer) -> (Vec<(u64, u64)>, usize) {
    let told = received.each(DMA_MAP, |m| {
        assert_eq!((m.u32_at(4), m.u64_at(8)), (3, 0), "all rights, no offset");
        assert!(m.fds.is_empty());
        (m.u64_at(16), m.u64_at(24))
    });
    (told, received.each(DMA_UNMAP, |_| ()).len())
}

#[test]
fn a_server_is_told_each_region_once() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    map(&bed, IOVA);
    assert_eq!(bed.watch.state().windows, 1);
    let (mut client, scripted) = bed.pair(|_, _| false);
    eventually("the first region", || regions(&scripted).0 == [(0, REGION)]);
    for n in 1..1000 {
        map(&bed, IOVA + 2 * n * PAGE);
    }
    // Both ends of a mapping across a border, and a mapping far away.
    let border = 4 * REGION;
    bed.map(border - PAGE, 0, 2 * PAGE, Access::READ)
        .expect("mapped");
    map(&bed, 9 * REGION + 5 * PAGE);
    // Nothing behind it is guest RAM.
    bed.map(20 * REGION, RAM_LEN, PAGE, Access::READ)
        .expect("mapped");
    bed.unmap(0, 1 << 47).expect("unmapped");
    let other = DomainId(2);
    let attach = |domain| {
        let attached = bed.iommu().attach(bed.endpoint(), domain, false);
        attached.expect("attached");
    };
    attach(other);
    attach(crate::bed::DOMAIN);
    map(&bed, IOVA);
    bed.iommu().set_memory(Vec::new());
    bed.iommu().set_memory(vec![bed.slot.clone()]);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let told = [0, 3, 4, 9].map(|n| (n * REGION, REGION));
    assert_eq!(regions(&scripted), (told.to_vec(), 0));
    assert_eq!(bed.watch.state().windows, 4);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// A server that takes no message keeps no request waiting.
#[test]
fn maps_and_unmaps_do_not_wait_for_the_server() {
    let bed = Bed::with_deadline(Isolation::Messages, Duration::from_secs(600));
    bed.attach();
    let (_client, mut server) = bed.raw_pair();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| map(&bed, IOVA));
        let told = server.recv().expect("a region");
        assert_eq!(told.cmd, DMA_MAP);
        server.reply(&told, &[], &[]);
        first.join().expect("mapped");
    });
    for n in 1..5000 {
        map(&bed, IOVA + n * PAGE);
    }
    assert_eq!(read(&mut server, IOVA + 4999 * PAGE), Ok(0));
    bed.unmap(IOVA, 5000 * PAGE).expect("unmapped");
    assert_eq!(read(&mut server, IOVA + 4999 * PAGE), Err(libc::EFAULT));
    let fault = (FaultReason::Mapping, IOVA + 4999 * PAGE);
    assert_eq!(bed.faults.take(), [fault]);
}

#[test]
fn a_region_that_the_server_refuses_fails_each_map_there() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    let (mut client, scripted) = bed.pair(|server, msg| {
        let refused = msg.cmd == DMA_MAP && msg.u64_at(16) == REGION;
        if refused {
            server.refuse(msg, libc::ENOSPC.unsigned_abs());
        }
        refused
    });
    map(&bed, IOVA);
    for _ in 0..2 {
        let refused = bed.map(REGION, 0, PAGE, Access::READ).expect_err("refused");
        assert!(
            refused.to_string().contains("refuses a window"),
            "{refused}"
        );
    }
    // One of two regions is refused: the other one is taken back.
    let across = bed.map(2 * REGION - PAGE, 0, 2 * PAGE, Access::READ);
    across.expect_err("refused");
    assert_eq!(bed.watch.state().windows, 1);
    map(&bed, 2 * REGION);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let told = [0, 1, 1, 1, 2, 2].map(|n| (n * REGION, REGION));
    assert_eq!(regions(&scripted), (told.to_vec(), 1));
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
}

#[test]
fn reachable_memory_follows_the_endpoint_and_guest_ram() {
    let bed = Bed::new(Isolation::Messages);
    bed.iommu().set_bypass(true);
    let (_client, mut server) = bed.raw_pair();
    let told = server.recv().expect("a region");
    server.reply(&told, &[], &[]);
    bed.poke(0, &[7]);
    assert_eq!(read(&mut server, RAM), Ok(7));
    assert_eq!(read(&mut server, RAM + RAM_LEN), Err(libc::EFAULT));
    assert!(bed.faults.take().is_empty(), "no faults in bypass mode");
    assert_eq!(read(&mut server, 0xfee0_0000), Err(libc::EFAULT));
    assert_eq!(bed.faults.take(), [(FaultReason::Mapping, 0xfee0_0000)]);

    bed.attach();
    assert_eq!(read(&mut server, RAM), Err(libc::EFAULT));
    map(&bed, IOVA);
    assert_eq!(read(&mut server, IOVA), Ok(7));
    bed.iommu().set_memory(Vec::new());
    assert_eq!(read(&mut server, IOVA), Err(libc::EFAULT));
    bed.iommu().set_memory(vec![bed.slot.clone()]);
    assert_eq!(read(&mut server, IOVA), Ok(7));
    bed.iommu()
        .detach(bed.endpoint(), crate::bed::DOMAIN)
        .expect("detached");
    assert_eq!(read(&mut server, IOVA), Err(libc::EFAULT));
}

/// A device writes to a page all the time. Once UNMAP has succeeded, the page does not change any more, and the frames of
/// the table are free for others.
#[test]
fn after_an_unmap_no_access_reaches_the_page() {
    const ROUNDS: u64 = 2000;
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    map(&bed, IOVA);
    let (_client, mut server) = bed.raw_pair();
    let told = server.recv().expect("a region");
    server.reply(&told, &[], &[]);
    let mapped = AtomicU64::new(IOVA);
    let (mut written, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            for round in 0..ROUNDS {
                // Each UNMAP frees the table of the page, and the next MAP uses the frame for another address.
                let iova = IOVA + (round << 21);
                eventually("a write", || bed.peek(0, 8) == iova.to_le_bytes());
                bed.unmap(iova, PAGE).expect("unmapped");
                let zeros = vec![0; PAGE as usize];
                bed.poke(0, &zeros);
                std::thread::yield_now();
                assert!(bed.peek(0, PAGE as usize) == zeros, "round {round}");
                map(&bed, iova + (1 << 21));
                mapped.store(iova + (1 << 21), Ordering::Release);
            }
        });
        while !driver.is_finished() {
            let at = mapped.load(Ordering::Acquire);
            let data = at.to_le_bytes().repeat(512);
            let body = dma(at, data.len() as u64, &data);
            match server.call(DMA_WRITE, &body, &[]).errno() {
                0 => written += 1,
                libc::EFAULT => refused += 1,
                errno => panic!("errno {errno}"),
            }
        }
    });
    println!("{written} writes, {refused} refused");
}
