//! The description of the device, and its registers.

use std::os::fd::AsFd;

use rustix::fs::fstat;

use crate::bed::{
    BAR, BAR_LEN, Bed, CAPS, CLIENT_TEXT, CONFIG, MMAP, OWN, READ, REGIONS, ROM, TRAPPED, WRITE,
    eventually,
};
use crate::connection::{
    Connection, DIRTY_PAGES, DMA_MAP, DMA_UNMAP, FEATURE, GET_INFO, Msg, NO_REPLY, REGION_INFO,
    REGION_READ, REGION_WRITE, RESET, VERSION, dma_map, dma_unmap, region, version_body,
};

const IRQ_INFO: u16 = 7;
const REGION_IO_FDS: u16 = 6;
const WRITE_MULTI: u16 = 15;

pub fn region_info(client: &mut Connection, index: u32, argsz: u32) -> Msg {
    let words = [argsz, 0, index, 0, 0, 0, 0, 0];
    let body: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    client.call(REGION_INFO, &body, &[])
}

fn read(client: &mut Connection, index: u32, at: u64, count: u32) -> Result<Vec<u8>, i32> {
    let reply = client.call(REGION_READ, &region(at, index, count, &[]), &[]);
    match reply.errno() {
        0 => {
            assert_eq!(reply.body[..12], region(at, index, count, &[])[..12]);
            assert_eq!(reply.u32_at(12) as usize, reply.body.len() - 16);
            Ok(reply.body[16..].to_vec())
        }
        errno => Err(errno),
    }
}

fn write(client: &mut Connection, index: u32, at: u64, data: &[u8]) -> Result<u32, i32> {
    let count = data.len() as u32;
    let reply = client.call(REGION_WRITE, &region(at, index, count, data), &[]);
    match reply.errno() {
        0 => Ok(reply.u32_at(12)),
        errno => Err(errno),
    }
}

#[test]
fn a_client_gets_the_description_of_the_device() {
    let bed = Bed::new();
    let mut client = bed.connect();
    let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
    let capabilities = &answer.text()["capabilities"];
    assert_eq!(capabilities["max_msg_fds"], 16);
    assert_eq!(capabilities["max_data_xfer_size"], 1 << 20);
    assert_eq!(capabilities["write_multiple"], true);
    assert!(capabilities["migration"].is_null() && capabilities["twin_socket"].is_null());

    let info = client.call(GET_INFO, &[0; 16], &[]);
    let words: Vec<_> = (0..4).map(|n| info.u32_at(4 * n)).collect();
    assert_eq!(words, [16, 3, REGIONS, 4], "a PCI device that can be reset");
    for (index, flags, size) in [
        (TRAPPED, READ | WRITE, 2 << 20),
        (ROM, READ, 0x1000),
        (CONFIG, READ | WRITE, 0x1000),
        (8, 0, 0),
    ] {
        let info = region_info(&mut client, index, 32);
        let words: Vec<_> = (0..4).map(|n| info.u32_at(4 * n)).collect();
        assert_eq!(words, [32, flags, index, 0]);
        assert_eq!((info.u64_at(16), info.u64_at(24)), (size, 0));
        assert!(info.fds.is_empty());
    }
    assert_eq!(region_info(&mut client, REGIONS, 32).errno(), libc::EINVAL);
    for (index, expected) in [(0, [16, 7, 0, 1]), (2, [16, 1, 2, 64])] {
        let words = [16, 0, index, 0].map(u32::to_ne_bytes).concat();
        let info = client.call(IRQ_INFO, &words, &[]);
        let words: Vec<_> = (0..4).map(|n| info.u32_at(4 * n)).collect();
        assert_eq!(words, expected);
    }
    let words = [16u32, 0, 4, 0].map(u32::to_ne_bytes).concat();
    assert_eq!(client.call(IRQ_INFO, &words, &[]).errno(), libc::EINVAL);
}

#[test]
fn a_region_can_be_mapped_only_if_it_has_a_file_of_its_own() {
    let bed = Bed::new();
    let mut client = bed.client();
    let info = region_info(&mut client, BAR, 4096);
    assert_eq!(
        info.u32_at(4),
        READ | WRITE,
        "cannot be mapped without a file"
    );
    assert!(info.fds.is_empty() && info.body.len() == 32);

    let identity = bed.give_file();
    let short = region_info(&mut client, BAR, 32);
    assert_eq!((short.body.len(), short.u32_at(0)), (32, 72));
    assert_eq!(short.u32_at(4), READ | WRITE | MMAP | CAPS);
    assert!(
        short.fds.is_empty(),
        "no file before the client asks with enough room"
    );
    let info = region_info(&mut client, BAR, short.u32_at(0));
    assert_eq!((info.body.len(), info.u32_at(12)), (72, 32));
    assert_eq!((info.u64_at(16), info.u64_at(24)), (BAR_LEN, 0));
    // One area, and MSIX_MAPPABLE. The server leaves out the capability that it does not know.
    assert_eq!((info.u32_at(32), info.u32_at(36)), (1 | 1 << 16, 64));
    assert_eq!(info.u32_at(40), 1);
    assert_eq!((info.u64_at(48), info.u64_at(56)), (0x1000, 0x2000));
    assert_eq!((info.u32_at(64), info.u32_at(68)), (3 | 1 << 16, 0));
    let file = fstat(info.fds[0].as_fd()).expect("a file");
    assert_eq!((file.st_dev, file.st_ino), identity);
    assert_eq!(info.fds.len(), 1);

    let own = region_info(&mut client, OWN, 4096);
    assert_eq!(own.u32_at(4), READ | WRITE | CAPS);
    assert_eq!(
        own.u32_at(32),
        2 | 1 << 16,
        "the capability with the type of the region"
    );
    assert_eq!(own.u32_at(40), 0x8000_8086);
    assert_eq!(own.body.len(), 48);
}

#[test]
fn registers_are_read_and_written_within_their_regions() {
    let bed = Bed::new();
    let mut client = bed.client();
    assert_eq!(read(&mut client, BAR, 0x10, 4), Ok(vec![16, 17, 18, 19]));
    assert_eq!(write(&mut client, BAR, 0x3ffe, &[1, 2]), Ok(2));
    assert_eq!(read(&mut client, BAR, 0x3ffe, 2), Ok(vec![1, 2]));
    assert_eq!(read(&mut client, BAR, BAR_LEN, 0), Ok(vec![]));
    assert_eq!(
        read(&mut client, TRAPPED, 0, 1 << 20).map(|d| d.len()),
        Ok(1 << 20)
    );

    let before = bed.device.state().accesses;
    for (index, at, count, errno) in [
        (BAR, 0x3ffd, 4, libc::EINVAL),
        (BAR, BAR_LEN, 1, libc::EINVAL),
        (BAR, u64::MAX, 1, libc::EINVAL),
        (BAR, u64::MAX, u32::MAX, libc::E2BIG),
        (TRAPPED, 0, (1 << 20) + 1, libc::E2BIG),
        (1, 0, 1, libc::EINVAL),
        (8, 0, 0, libc::EINVAL),
        (REGIONS, 0, 1, libc::EINVAL),
        (u32::MAX, 0, 1, libc::EINVAL),
    ] {
        assert_eq!(
            read(&mut client, index, at, count),
            Err(errno),
            "{index} {at:#x}"
        );
    }
    assert_eq!(write(&mut client, BAR, 0x3ffd, &[0; 4]), Err(libc::EINVAL));
    assert_eq!(write(&mut client, ROM, 0, &[0; 4]), Err(libc::EPERM));
    assert_eq!(
        bed.device.state().accesses,
        before,
        "none of these reached the device"
    );

    bed.device.state().error = Some(libc::EIO);
    assert_eq!(read(&mut client, BAR, 0, 4), Err(libc::EIO));
    assert_eq!(write(&mut client, BAR, 0, &[0; 4]), Err(libc::EIO));
    assert_eq!(client.call(RESET, &[], &[]).errno(), libc::EIO);
    bed.device.state().error = None;
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(bed.device.state().resets, 1);
}

#[test]
fn writes_without_reply_and_multiple_writes_keep_their_order() {
    let bed = Bed::new();
    let mut client = bed.client();
    for n in 0..100u8 {
        client.send(7, REGION_WRITE, NO_REPLY, &region(0x20, BAR, 1, &[n]), &[]);
    }
    assert_eq!(read(&mut client, BAR, 0x20, 1), Ok(vec![99]));
    let multi = |entries: &[(u64, u32, &[u8])]| {
        let mut body = (entries.len() as u64).to_ne_bytes().to_vec();
        for (at, index, data) in entries {
            let mut eight = [0; 8];
            eight[..data.len()].copy_from_slice(data);
            body.extend(region(*at, *index, data.len() as u32, &eight));
        }
        body
    };
    let entries = multi(&[(0x30, BAR, &[1, 2, 3, 4, 5, 6, 7, 8]), (0x30, BAR, &[9])]);
    let reply = client.call(WRITE_MULTI, &entries, &[]);
    assert_eq!((reply.errno(), reply.u64_at(0)), (0, 2));
    assert_eq!(read(&mut client, BAR, 0x30, 2), Ok(vec![9, 2]));
    let entries = multi(&[(0x31, BAR, &[7]), (BAR_LEN, BAR, &[9]), (0x32, BAR, &[9])]);
    let reply = client.call(WRITE_MULTI, &entries, &[]);
    assert_eq!(
        (reply.errno(), reply.u64_at(0)),
        (0, 1),
        "writes up to the first that fails"
    );
    assert_eq!(read(&mut client, BAR, 0x31, 2), Ok(vec![7, 3]));
    let mut entries = multi(&[(0x31, BAR, &[7])]);
    entries[8 + 12..8 + 16].copy_from_slice(&9u32.to_ne_bytes());
    assert_eq!(
        client.call(WRITE_MULTI, &entries, &[]).errno(),
        libc::EINVAL
    );
}

#[test]
fn memory_commands_of_a_client_are_answered_and_have_no_effect() {
    let bed = Bed::new();
    let mut client = bed.client();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let map = dma_map(3, 0, 0x1000, 0x2000);
    assert_eq!(client.call(DMA_MAP, &map, &[theirs.as_fd()]).errno(), 0);
    drop(theirs);
    let mut other = Connection::new(ours);
    assert!(other.is_closed(), "the server keeps no descriptor");
    assert_eq!(client.call(DMA_MAP, &map, &[]).errno(), libc::EEXIST);
    let unmapped = client.call(DMA_UNMAP, &dma_unmap(0x1000, 0x1000), &[]);
    assert_eq!(unmapped.errno(), libc::ENOENT);
    let unmapped = client.call(DMA_UNMAP, &dma_unmap(0x1000, 0x2000), &[]);
    assert_eq!((unmapped.errno(), unmapped.body.len()), (0, 24));
    for (command, body) in [
        (DIRTY_PAGES, &[0; 8][..]),
        (FEATURE, &[0; 8]),
        (REGION_IO_FDS, &[0; 16]),
        (99, &[]),
    ] {
        assert_eq!(client.call(command, body, &[]).errno(), libc::ENOTSUP);
    }
    let state = bed.device.state();
    assert_eq!((state.accesses, state.changes.len()), (0, 0));
}

#[test]
fn a_device_without_a_client_is_reset_and_does_no_dma() {
    let bed = Bed::new();
    for end in ["client", "server"] {
        let mut client = bed.client();
        let command = 0x0507u16.to_le_bytes();
        assert_eq!(write(&mut client, CONFIG, 4, &command), Ok(2));
        assert_eq!(bed.device.state().bytes[CONFIG as usize][4], 7);
        let resets = bed.device.state().resets;
        let was_reset = || bed.device.state().resets == resets + 1;
        if end == "client" {
            drop(client);
            eventually("the server releases the device", was_reset);
        } else {
            // The server serves the next client when this one is gone, and not before.
            let mut next = bed.connect();
            next.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
            assert!(!was_reset());
            drop(client);
            assert_eq!(next.recv().expect("an answer").errno(), 0);
            assert!(was_reset());
        }
        let config = bed.device.state().bytes[CONFIG as usize][4..6].to_vec();
        assert_eq!(
            config,
            [0, 5],
            "I/O, memory and DMA are off, the other bits unchanged"
        );
    }
    let mut bed = bed;
    let mut client = bed.client();
    assert_eq!(write(&mut client, CONFIG, 4, &[7, 0]), Ok(2));
    let resets = bed.device.state().resets;
    bed.server = None;
    assert!(client.is_closed());
    assert_eq!(bed.device.state().bytes[CONFIG as usize][4], 0);
    assert_eq!(bed.device.state().resets, resets + 1);
}
