//! Windows, DMA accesses, and the waits of UNMAP for the server.

use std::collections::VecDeque;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::faults::FaultReason;

use crate::bed::{
    Bed, DOMAIN, RAM, RAM_LEN, RAM_OFFSET, accept, eventually, range, start_scripted_server,
};
use crate::connection::{
    COMMAND, Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, NO_REPLY, RESET, VERSION, dma,
    version_body,
};

const IOVA: u64 = 0x4000_0000;

#[test]
fn windows_have_descriptors_only_with_isolation_mappings() {
    for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
        let bed = Bed::new(isolation);
        // The guest maps one range before the server connects, and others after.
        bed.attach();
        bed.map(IOVA, 0x1000, 0x2000, Access::READ_WRITE)
            .expect("mapped");
        let files = Arc::new(Mutex::new(Vec::new()));
        let log = files.clone();
        let (_client, scripted) = bed.pair(move |_, msg| {
            if msg.cmd == DMA_MAP {
                log.lock()
                    .unwrap()
                    .extend(msg.fds.drain(..).map(std::fs::File::from));
            }
            false
        });
        eventually("the server has the first window", || {
            scripted.windows() == [IOVA]
        });
        bed.map(IOVA + 0x2000, 0x8000, 0x1000, Access::READ)
            .expect("mapped");
        bed.map(IOVA + 0x4000, 0, 0x1000, Access::WRITE)
            .expect("mapped");
        bed.map(IOVA + 0x6000, 0, 0x1000, Access::NONE)
            .expect("mapped");
        // Beyond the end of guest RAM: no window.
        bed.map(IOVA + 0x8000, RAM_LEN, 0x1000, Access::READ_WRITE)
            .expect("mapped");
        let file_at = |at| match isolation {
            Isolation::Messages | Isolation::ExactMessages => 0,
            Isolation::Mappings => RAM_OFFSET + at,
        };
        let received = || {
            scripted.each(DMA_MAP, |m| {
                (m.u32_at(4), m.u64_at(8), m.u64_at(16), m.u64_at(24))
            })
        };
        let expected = [
            (3, file_at(0x1000), IOVA, 0x2000),
            (1, file_at(0x8000), IOVA + 0x2000, 0x1000),
            (2, file_at(0), IOVA + 0x4000, 0x1000),
        ];
        eventually("the server has all windows", || received() == expected);
        let files = files.lock().unwrap();
        match isolation {
            Isolation::Messages | Isolation::ExactMessages => assert!(files.is_empty()),
            Isolation::Mappings => {
                assert_eq!(files.len(), 3);
                let inode = files[0].metadata().expect("known").ino();
                assert_eq!(inode, bed.slot.identity.1);
                bed.poke(0x1000, b"seen");
                let mut bytes = [0; 4];
                files[0]
                    .read_exact_at(&mut bytes, file_at(0x1000))
                    .expect("read");
                assert_eq!(&bytes, b"seen");
            }
        }
        bed.unmap(IOVA, 0x8000).expect("unmapped");
        eventually("the server has lost all windows", || {
            scripted.windows().is_empty()
        });
        let unmapped = scripted.each(DMA_UNMAP, |m| (m.u64_at(8), m.u64_at(16)));
        assert_eq!(
            unmapped,
            [
                (IOVA, 0x2000),
                (IOVA + 0x2000, 0x1000),
                (IOVA + 0x4000, 0x1000)
            ]
        );
    }
}

/// A range of a batch may cover windows that an earlier range removed, since UNMAP may cover holes.
#[test]
fn unmaps_that_overlap_take_each_window_away_once() {
    const PAGE: u64 = 0x1000;
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    for page in [0, 1, 2] {
        bed.map(IOVA + page * PAGE, page * PAGE, PAGE, Access::READ_WRITE)
            .expect("mapped");
    }
    // Like real servers, this one refuses to remove a window that it does not have.
    let mut present = vec![];
    let (mut client, scripted) = bed.pair(move |server, msg| {
        match msg.cmd {
            DMA_MAP => present.push(msg.u64_at(16)),
            DMA_UNMAP => match present.iter().position(|w| *w == msg.u64_at(8)) {
                Some(at) => drop(present.swap_remove(at)),
                None => {
                    server.refuse(msg, libc::ENOENT.unsigned_abs());
                    return true;
                }
            },
            _ => {}
        }
        false
    });
    // It has answered all windows then.
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(scripted.windows().len(), 3);
    let ranges = [(0, 1), (0, 2), (1, 2)].map(|(at, pages)| range(IOVA + at * PAGE, pages * PAGE));
    let mut outcomes = VecDeque::new();
    bed.iommu().unmap_all(DOMAIN, ranges, &mut outcomes);
    assert_eq!(outcomes, [Ok(()), Ok(()), Ok(())]);
    let unmapped = scripted.each(DMA_UNMAP, |m| m.u64_at(8));
    assert_eq!(unmapped, [IOVA, IOVA + PAGE, IOVA + 2 * PAGE]);
    let state = bed.iommu().endpoint(bed.endpoint()).expect("an endpoint");
    assert!(!state.quarantined);
}

/// A client and a server that has its windows. The test sends the server's accesses.
fn pair_with_windows(bed: &Bed) -> (Connection, Connection) {
    let (client, mut server) = bed.raw_pair();
    for _ in 0..bed.watch.state().windows {
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
    }
    // Until the interposer has the replies, an UNMAP does not wait. It answers this access of no bytes after them.
    assert_eq!(server.call(DMA_READ, &dma(0, 0, &[]), &[]).errno(), 0);
    (client, server)
}

fn read(server: &mut Connection, address: u64, count: u64) -> Result<Vec<u8>, i32> {
    let reply = server.call(DMA_READ, &dma(address, count, &[]), &[]);
    match reply.errno() {
        0 => {
            assert_eq!((reply.u64_at(0), reply.u64_at(8)), (address, count));
            Ok(reply.body[16..].to_vec())
        }
        error => Err(error),
    }
}

fn write(server: &mut Connection, address: u64, data: &[u8]) -> i32 {
    let body = dma(address, data.len() as u64, data);
    server.call(DMA_WRITE, &body, &[]).errno()
}

#[test]
fn messages_reach_mapped_memory_and_nothing_else() {
    for isolation in [Isolation::Messages, Isolation::ExactMessages] {
        messages_reach_mapped_memory(isolation);
    }
}

fn messages_reach_mapped_memory(isolation: Isolation) {
    let bed = Bed::new(isolation);
    bed.attach();
    bed.map(IOVA, 0x1000, 0x1000, Access::READ_WRITE)
        .expect("mapped");
    bed.map(IOVA + 0x1000, 0x20_0000, 0x1000, Access::READ_WRITE)
        .expect("mapped");
    bed.map(IOVA + 0x2000, 0x3000, 0x1000, Access::READ)
        .expect("mapped");
    let (_client, mut server) = pair_with_windows(&bed);
    bed.poke(0x1ffe, b"ab");
    bed.poke(0x20_0000, b"cd");
    assert_eq!(read(&mut server, IOVA + 0xffe, 4).expect("mapped"), b"abcd");
    assert_eq!(write(&mut server, IOVA + 0xffe, b"wxyz"), 0);
    assert_eq!(
        (bed.peek(0x1ffe, 2), bed.peek(0x20_0000, 2)),
        (b"wx".to_vec(), b"yz".to_vec())
    );
    assert_eq!(read(&mut server, IOVA, 0), Ok(Vec::new()));
    assert!(bed.faults.take().is_empty());

    let all = bed.peek(0, RAM_LEN as usize);
    for (address, len, fault) in [
        (IOVA - 1, 2, IOVA - 1),
        (IOVA + 0x1fff, 2, IOVA + 0x2000),
        (IOVA + 0x2000, 1, IOVA + 0x2000),
        (IOVA + 0x3000, 1, IOVA + 0x3000),
        (RAM, 1, RAM),
        (0, 1, 0),
        (u64::MAX, 1, u64::MAX),
    ] {
        assert_eq!(write(&mut server, address, &vec![0xee; len]), libc::EFAULT);
        assert_eq!(bed.faults.take(), [(FaultReason::Mapping, fault)]);
    }
    assert_eq!(read(&mut server, IOVA + 0x2fff, 2), Err(libc::EFAULT));
    assert_eq!(bed.faults.take(), [(FaultReason::Mapping, IOVA + 0x3000)]);
    assert_eq!(read(&mut server, u64::MAX, 2), Err(libc::EINVAL));
    assert_eq!(read(&mut server, IOVA, (1 << 20) + 1), Err(libc::E2BIG));
    assert_eq!(read(&mut server, 0, u64::MAX), Err(libc::E2BIG));
    assert!(
        bed.faults.take().is_empty(),
        "no faults for malformed requests"
    );
    assert!(all == bed.peek(0, RAM_LEN as usize), "nothing was written");

    // A write without reply reaches memory, too.
    server.send(1, DMA_WRITE, NO_REPLY, &dma(IOVA, 2, b"no"), &[]);
    assert_eq!(read(&mut server, IOVA, 2).expect("mapped"), b"no");
    // RESET is not a server's command.
    assert_eq!(server.call(RESET, &[], &[]).errno(), libc::ENOTSUP);
}

#[test]
fn reachable_memory_follows_the_state_of_the_endpoint() {
    let bed = Bed::new(Isolation::ExactMessages);
    let (_client, mut server) = bed.raw_pair();
    assert_eq!(read(&mut server, RAM, 1), Err(libc::EFAULT));
    assert_eq!(bed.faults.take(), [(FaultReason::Domain, RAM)]);

    // Bypass mode: one window for all of RAM.
    let window = std::thread::scope(|scope| {
        let switched = scope.spawn(|| bed.iommu().set_bypass(true));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        switched.join().expect("switched");
        window
    });
    assert_eq!((window.u64_at(16), window.u64_at(24)), (RAM, RAM_LEN));
    bed.poke(5, b"five");
    assert_eq!(read(&mut server, RAM + 5, 4).expect("reached"), b"five");
    assert_eq!(write(&mut server, RAM + RAM_LEN, b"x"), libc::EFAULT);
    assert!(bed.faults.take().is_empty(), "no faults in bypass mode");
    assert_eq!(write(&mut server, 0xfee0_0000, b"x"), libc::EFAULT);
    assert_eq!(bed.faults.take(), [(FaultReason::Mapping, 0xfee0_0000)]);

    // The VMM removes the RAM, and the daemon removes the window.
    std::thread::scope(|scope| {
        let removed = scope.spawn(|| bed.iommu().set_memory(Vec::new()));
        let unmap = server.recv().expect("DMA_UNMAP");
        assert_eq!((unmap.cmd, unmap.u64_at(8)), (DMA_UNMAP, RAM));
        assert!(!removed.is_finished());
        server.reply(&unmap, &[], &[]);
        removed.join().expect("removed");
    });
    assert_eq!(read(&mut server, RAM, 1), Err(libc::EFAULT));
}

#[test]
fn unmap_waits_for_the_server_and_serves_its_accesses_meanwhile() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    bed.map(IOVA, 0, 0x1000, Access::READ_WRITE)
        .expect("mapped");
    bed.map(IOVA + 0x1000, 0x1000, 0x1000, Access::READ_WRITE)
        .expect("mapped");
    let (_client, mut server) = pair_with_windows(&bed);
    std::thread::scope(|scope| {
        // UNMAP holds the core lock until the server has replied.
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        let unmap = server.recv().expect("DMA_UNMAP");
        assert_eq!((unmap.cmd, unmap.u64_at(8)), (DMA_UNMAP, IOVA));
        assert_eq!(write(&mut server, IOVA + 0x1000, b"still there"), 0);
        assert_eq!(write(&mut server, IOVA, b"gone"), libc::EFAULT);
        assert_eq!(bed.faults.take(), [(FaultReason::Mapping, IOVA)]);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!unmapped.is_finished());
        server.reply(&unmap, &unmap.body, &[]);
        unmapped.join().expect("no panic").expect("unmapped");
    });
    assert_eq!(bed.peek(0x1000, 11), b"still there");
    assert_eq!(bed.peek(0, 4), [0; 4]);
}

#[test]
fn a_server_that_is_late_is_cut_off_and_its_endpoint_blocked() {
    let deadline = Duration::from_millis(300);
    let bed = Bed::with_deadline(Isolation::ExactMessages, deadline);
    let listener = bed.listen();
    let (mut client, mut server) = std::thread::scope(|scope| {
        let client = scope.spawn(|| bed.client());
        let mut server = accept(&listener);
        let request = server.recv().expect("VERSION");
        server.reply(&request, &version_body(crate::bed::SERVER_TEXT), &[]);
        (client.join().expect("agreed"), server)
    });
    bed.attach();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ_WRITE));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    let failed = bed.unmap(IOVA, 0x1000).expect_err("the server is late");
    // Under load, MAP above may have taken a part of the budget.
    assert!(failed.to_string().contains("is cut off"), "{failed}");
    assert!(
        bed.iommu()
            .endpoint(bed.endpoint())
            .expect("known")
            .quarantined
    );
    assert_eq!(bed.faults.take(), [(FaultReason::Unknown, IOVA)]);
    assert_eq!(server.recv().expect("the command").cmd, DMA_UNMAP);
    assert!(server.is_closed());

    // The server may connect again. It reaches nothing before the guest attaches its endpoint again.
    let mut server = accept(&listener);
    let request = server.recv().expect("VERSION");
    server.reply(&request, &version_body(crate::bed::SERVER_TEXT), &[]);
    assert_eq!(read(&mut server, IOVA, 1), Err(libc::EFAULT));
    assert_eq!(bed.faults.take(), [(FaultReason::Unknown, IOVA)]);
    bed.attach();
    assert_eq!(read(&mut server, IOVA, 1), Err(libc::EFAULT));
    assert_eq!(bed.faults.take(), [(FaultReason::Mapping, IOVA)]);
    client.ask(RESET, &[], &[]);
    assert_eq!(server.recv().expect("forwarded").cmd, RESET);
}

/// A server that takes half the deadline for each reply.
#[test]
fn a_server_that_is_always_slow_is_cut_off_after_a_few_waits() {
    let deadline = Duration::from_secs(4);
    let bed = Bed::with_deadline(Isolation::ExactMessages, deadline);
    bed.attach();
    let (_client, _server) = bed.pair(move |_, msg| {
        if msg.cmd == DMA_UNMAP {
            std::thread::sleep(deadline / 2);
        }
        false
    });
    let mut waits = 0;
    let failed = loop {
        waits += 1;
        assert!(waits < 10, "it keeps every UNMAP waiting");
        bed.map(IOVA, 0, 0x1000, Access::READ).expect("mapped");
        if let Err(failed) = bed.unmap(IOVA, 0x1000) {
            break failed;
        }
    };
    assert!(waits <= 4, "{waits} requests waited");
    assert!(
        failed.to_string().contains("budget of 4s for late replies"),
        "{failed}"
    );
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(endpoint.quarantined);
    assert_eq!(bed.watch.state().ends.slow_cut_offs, 1);
}

#[test]
fn windows_a_server_refuses_do_not_exist() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let (_client, scripted) = bed.pair(|server, msg| {
        let refused = msg.cmd == DMA_MAP && msg.u64_at(16) == IOVA + 0x1000;
        if refused {
            server.refuse(msg, libc::ENOMEM.unsigned_abs());
        }
        refused
    });
    bed.map(IOVA, 0, 0x1000, Access::READ).expect("mapped");
    let refused = bed
        .map(IOVA + 0x1000, 0, 0x1000, Access::READ)
        .expect_err("refused");
    assert!(
        refused.to_string().contains("refuses a window"),
        "{refused}"
    );
    bed.unmap(0, 1 << 40).expect("unmapped");
    eventually("the server loses its only window", || {
        scripted.each(DMA_UNMAP, |m| m.u64_at(8)) == [IOVA]
    });
    assert!(
        !bed.iommu()
            .endpoint(bed.endpoint())
            .expect("known")
            .quarantined
    );
}

#[test]
fn a_refusal_that_arrives_during_unmap_does_not_affect_a_later_window() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    // Mapped before there is a server: DMA_MAP is sent when the server connects, and MAP does not wait for it.
    bed.map(IOVA, 0, 0x1000, Access::READ).expect("mapped");
    let mut maps = 0;
    let (mut client, scripted) = bed.pair(move |server, msg| {
        maps += u32::from(msg.cmd == DMA_MAP);
        let refused = msg.cmd == DMA_MAP && maps == 1;
        if refused {
            std::thread::sleep(Duration::from_millis(300));
            server.refuse(msg, libc::ENOMEM.unsigned_abs());
        }
        refused
    });
    bed.unmap(IOVA, 0x1000)
        .expect("the server never had the window");
    assert!(scripted.each(DMA_UNMAP, |_| ()).is_empty());
    bed.map(IOVA, 0x1000, 0x1000, Access::READ).expect("mapped");
    bed.unmap(IOVA, 0x1000).expect("unmapped");
    assert_eq!(scripted.each(DMA_UNMAP, |m| m.u64_at(8)), [IOVA]);
    bed.map(IOVA, 0, 0x1000, Access::READ)
        .expect("there is room");
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn memory_a_server_refuses_is_not_reached_in_bypass_mode_either() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.iommu().set_memory(Vec::new());
    bed.iommu().set_bypass(true);
    let (mut client, scripted) = bed.pair(|server, msg| match msg.cmd {
        DMA_MAP => {
            server.refuse(msg, libc::ENOMEM.unsigned_abs());
            true
        }
        RESET => {
            assert_eq!(write(server, RAM, b"x"), libc::EFAULT);
            false
        }
        _ => false,
    });
    bed.iommu().set_memory(vec![bed.slot.clone()]);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    bed.iommu().set_memory(Vec::new());
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(scripted.each(DMA_MAP, |m| m.u64_at(16)), [RAM]);
    assert!(
        scripted.each(DMA_UNMAP, |_| ()).is_empty(),
        "the server never had the window"
    );
}

#[test]
fn a_server_gets_no_more_windows_than_it_supports() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let (_client, scripted) = bed.pair(|server, msg| {
        if msg.cmd == VERSION {
            let text = r#"{"capabilities":{"max_dma_maps":2}}"#;
            server.reply(msg, &version_body(text), &[]);
        }
        msg.cmd == VERSION
    });
    let map = |n: u64| bed.map(IOVA + n * 0x1000, 0, 0x1000, Access::READ);
    assert!(map(0).is_ok() && map(1).is_ok());
    assert!(map(2).is_err());
    bed.unmap(IOVA, 0x1000).expect("unmapped");
    map(2).expect("room");
    eventually("two are left", || {
        scripted.windows() == [IOVA + 0x1000, IOVA + 0x2000]
    });
}

#[test]
fn a_server_may_have_a_socket_of_its_own_for_its_commands() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    bed.map(IOVA, 0, 0x1000, Access::READ_WRITE)
        .expect("mapped");
    let (_client, _server, mut twin) = bed.raw_pair_with_twin();
    assert_eq!(write(&mut twin, IOVA, b"twin"), 0);
    assert_eq!(bed.peek(0, 4), b"twin");
    assert_eq!(read(&mut twin, IOVA + 0x1000, 1), Err(libc::EFAULT));
    // A reply on the twin socket is an error.
    twin.send(3, DMA_READ, 1, &[], &[]);
    assert!(twin.is_closed());
}

#[test]
fn a_flood_of_accesses_is_served_as_fast_as_its_replies_are_taken() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    bed.map(IOVA, 0, RAM_LEN, Access::READ).expect("mapped");
    let (_client, mut server) = pair_with_windows(&bed);
    let mut writer = server.stream.try_clone().expect("cloned");
    let flood = std::thread::spawn(move || {
        for n in 0..300u16 {
            let body = dma(IOVA, 1 << 20, &[]);
            let bytes = crate::connection::bytes(n, DMA_READ, COMMAND, 0, &body);
            writer.write_all(&bytes).expect("taken in time");
        }
    });
    std::thread::sleep(Duration::from_millis(100));
    for n in 0..300u16 {
        let reply = server.recv().expect("a reply");
        assert_eq!((reply.id, reply.body.len()), (n, 16 + (1 << 20)));
    }
    flood.join().expect("sent");
}

#[test]
fn a_new_server_gets_many_windows_and_loses_them_in_one_unmap() {
    const COUNT: u64 = 20_000;
    // Only a hang takes as long.
    let bed = Bed::with_deadline(Isolation::ExactMessages, Duration::from_secs(300));
    bed.attach();
    for n in 0..COUNT {
        bed.map(IOVA + n * 0x2000, n % 1024 * 0x1000, 0x1000, Access::READ)
            .expect("mapped");
    }
    let listener = bed.listen();
    let scripted = start_scripted_server(listener, |_, _| false);
    let mut client = bed.client();
    // The interposer forwards RESET after the windows.
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(scripted.windows().len() as u64, COUNT);
    bed.unmap(IOVA, COUNT * 0x2000).expect("unmapped");
    assert!(scripted.each(DMA_UNMAP, |_| ()).len() as u64 >= COUNT - 1);
}

#[test]
fn a_server_that_keeps_answering_is_not_cut_off() {
    const DEADLINE: Duration = Duration::from_secs(5);
    const COUNT: u64 = 3 * 1024;
    let bed = Bed::with_deadline(Isolation::ExactMessages, DEADLINE);
    bed.attach();
    for n in 0..COUNT {
        bed.map(IOVA + n * 0x2000, n % 1024 * 0x1000, 0x1000, Access::READ)
            .expect("mapped");
    }
    // The server pauses twice, each time for less than its deadline.
    let mut unmaps = 0;
    let (mut client, scripted) = bed.pair(move |_, msg| {
        unmaps += u64::from(msg.cmd == DMA_UNMAP);
        if msg.cmd == DMA_UNMAP && (unmaps == 1 || unmaps == COUNT / 2) {
            std::thread::sleep(DEADLINE / 10 * 6);
        }
        false
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let begun = Instant::now();
    bed.unmap(IOVA, COUNT * 0x2000)
        .expect("the server keeps answering");
    assert!(begun.elapsed() >= DEADLINE, "UNMAP did not wait");
    eventually("the server has lost all windows", || {
        scripted.windows().is_empty()
    });
}
