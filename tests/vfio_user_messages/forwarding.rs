//! Messages that the interposer forwards, and messages that it answers itself.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, CLIENT_TEXT, accept, answer, event, eventually};
use crate::connection::{
    Connection, DIRTY_PAGES, DMA_MAP, DMA_UNMAP, FEATURE, GET_INFO, NO_REPLY, REGION_INFO,
    REGION_READ, REGION_WRITE, RESET, SET_IRQS, VERSION, dma_map, dma_unmap, irqs, region,
    version_body,
};

#[test]
fn each_end_gets_the_capabilities_of_the_other_and_the_interposer() {
    let bed = Bed::new(Isolation::Messages);
    let listener = bed.listen();
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    let mut server = accept(&listener);
    let request = server.recv().expect("VERSION");
    let offered = &request.text()["capabilities"];
    assert_eq!(offered["max_msg_fds"], 16, "the client's limit");
    assert_eq!(offered["twin_socket"]["supported"], true);
    assert_eq!(offered["write_multiple"], true);
    let text = r#"{"capabilities":{"max_msg_fds":3,"max_data_xfer_size":4096}}"#;
    server.reply(&request, &version_body(text), &[]);
    let reply = client.recv().expect("an answer");
    let agreed = &reply.text()["capabilities"];
    assert_eq!(agreed["max_msg_fds"], 3);
    assert_eq!(agreed["max_data_xfer_size"], 4096);
    assert_eq!(agreed["write_multiple"], serde_json::Value::Null);
    assert_eq!(agreed["twin_socket"], serde_json::Value::Null);
    // Messages beyond the server's limits do not reach it.
    let reply = client.call(REGION_READ, &region(0, 0, 4097, &[]), &[]);
    assert_eq!(reply.errno(), libc::E2BIG);
    let event = event();
    let four = [event.as_fd(); 4];
    let reply = client.call(SET_IRQS, &irqs(0x24, 2, 0, 4), &four);
    assert_eq!(reply.errno(), libc::E2BIG);
}

#[test]
fn descriptors_pass_both_ways_with_their_message() {
    let bed = Bed::new(Isolation::Messages);
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let mut kept = Vec::new();
    let (mut client, _scripted) = bed.pair(move |server, msg| match msg.cmd {
        SET_IRQS => {
            for (fd, n) in msg.fds.drain(..).zip(1u64..) {
                let mut event = File::from(fd);
                event.write_all(&n.to_ne_bytes()).expect("written");
                kept.push(event);
            }
            false
        }
        REGION_INFO => {
            server.reply(msg, &msg.body, &[ours.as_fd()]);
            true
        }
        _ => false,
    });
    let events = [event(), event(), event()];
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let reply = client.call(SET_IRQS, &irqs(0x24, 2, 0, 3), &fds);
    assert_eq!(reply.errno(), 0);
    for (event, expected) in events.into_iter().zip(1u64..) {
        let mut count = [0; 8];
        File::from(event).read_exact(&mut count).expect("a count");
        assert_eq!(u64::from_ne_bytes(count), expected);
    }
    let mut reply = client.call(REGION_INFO, &[7; 32], &[]);
    assert_eq!(reply.body, [7; 32]);
    let mut region = UnixStream::from(reply.fds.pop().expect("a descriptor"));
    region.write_all(b"x").expect("written");
    let mut byte = [0];
    theirs.read_exact(&mut byte).expect("a byte");
    assert!(client.call(RESET, &[], &[]).fds.is_empty());
}

/// The server writes to the descriptors of interrupts: one that is no eventfd could make it wait, or reach a file.
#[test]
fn interrupts_that_are_no_eventfds_are_refused_and_do_not_reach_the_server() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, scripted) = bed.pair(|_, _| false);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let (socket, _peer) = UnixStream::pair().expect("sockets");
    let null = File::open("/dev/null").expect("open");
    let event = event();
    let others = [reader.as_fd(), writer.as_fd(), socket.as_fd(), null.as_fd()];
    for (n, other) in others.into_iter().enumerate() {
        for fds in [&[other][..], &[event.as_fd(), other]] {
            let count = u32::try_from(fds.len()).expect("few");
            let reply = client.call(SET_IRQS, &irqs(0x24, 2, 0, count), fds);
            assert_eq!(reply.errno(), libc::EINVAL, "descriptor {n} of {count}");
        }
    }
    let reply = client.call(SET_IRQS, &irqs(0x24, 2, 0, 1), &[event.as_fd()]);
    assert_eq!(reply.errno(), 0, "the client is served as before");
    let received = scripted.each(SET_IRQS, |m| m.fds.len());
    assert_eq!(received, [1], "the server has the eventfd alone");
}

#[test]
fn replies_may_come_in_another_order_than_the_commands() {
    let bed = Bed::new(Isolation::Messages);
    let mut held = Vec::new();
    let (mut client, _scripted) = bed.pair(move |server, msg| {
        if msg.cmd != REGION_READ {
            return false;
        }
        let id = msg.id;
        held.push((id, msg.body.clone()));
        if held.len() == 40 {
            for (id, body) in held.drain(..).rev() {
                let data = [&body[..], &body[..8]].concat();
                server.send(id, REGION_READ, 1, &data, &[]);
            }
        }
        true
    });
    // The client chooses its message ids; they may all be the same.
    for n in 0..40u64 {
        client.send(7, REGION_READ, 0, &region(n, 0, 8, &[]), &[]);
    }
    for n in (0..40u64).rev() {
        let reply = client.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno()), (7, 0));
        assert_eq!((reply.u64_at(0), reply.u64_at(16)), (n, n));
    }
}

#[test]
fn more_commands_than_may_be_pending_are_all_answered() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, _scripted) = bed.pair(|_, _| false);
    let mut writer = Connection::new(client.stream.try_clone().expect("cloned"));
    let sender = std::thread::spawn(move || {
        for n in 0..2000u64 {
            writer.send(n as u16, REGION_READ, 0, &region(n, 0, 4, &[]), &[]);
        }
    });
    for n in 0..2000u64 {
        let reply = client.recv().expect("a reply");
        assert_eq!((u64::from(reply.id), reply.u64_at(0)), (n, n));
    }
    sender.join().expect("sent");
}

#[test]
fn commands_without_reply_keep_their_order() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, scripted) = bed.pair(|server, msg| {
        // A reply to a command without reply does no harm.
        if msg.cmd == REGION_WRITE && msg.flags & NO_REPLY != 0 && msg.u64_at(0) == 1 {
            server.reply(msg, &msg.body[..16], &[]);
        }
        answer(server, msg);
        true
    });
    for n in 0..3 {
        client.send(5, REGION_WRITE, NO_REPLY, &region(n, 0, 1, b"x"), &[]);
    }
    let reply = client.call(REGION_WRITE, &region(3, 0, 1, b"x"), &[]);
    assert_eq!((reply.errno(), reply.u64_at(0)), (0, 3));
    eventually("the server has received the last", || {
        scripted.each(REGION_WRITE, |m| m.u64_at(0)) == [0, 1, 2, 3]
    });
}

#[test]
fn a_client_s_windows_stay_with_the_interposer() {
    let bed = Bed::new(Isolation::Mappings);
    let (mut client, scripted) = bed.pair(|_, _| false);
    let file = File::open("/dev/zero").expect("open");
    let mut map = |address, size, with_file: bool| {
        let fds = [file.as_fd()];
        let fds = if with_file { &fds[..] } else { &[] };
        client
            .call(DMA_MAP, &dma_map(3, 0, address, size), fds)
            .errno()
    };
    assert_eq!(map(0, 0x8_0000, true), 0);
    assert_eq!(map(0xf_0000, 0x1000, false), 0);
    assert_eq!(map(0x7_f000, 0x2000, true), libc::EEXIST);
    let mut unmap = |address, size| {
        let reply = client.call(DMA_UNMAP, &dma_unmap(address, size), &[]);
        (reply.errno(), reply.body.len())
    };
    assert_eq!(unmap(0, 0x1000), (libc::ENOENT, 0));
    assert_eq!(unmap(0, 0x8_0000), (0, 24));
    // The server has received the RESET alone.
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    eventually("the server has received the last", || {
        !scripted.each(RESET, |_| ()).is_empty()
    });
    assert!(scripted.windows().is_empty());
    assert!(scripted.each(DMA_UNMAP, |_| ()).is_empty());
}

#[test]
fn features_that_fail_behind_an_iommu_are_refused() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, scripted) = bed.pair(|_, _| false);
    for (cmd, body) in [
        (DIRTY_PAGES, [8, 1]),
        (FEATURE, [8, 6 | 1 << 17]),
        (FEATURE, [8, 7 | 1 << 17]),
        (FEATURE, [8, 8 | 1 << 16]),
        (99, [0, 0]),
    ] {
        let body: Vec<u8> = body.into_iter().flat_map(u32::to_ne_bytes).collect();
        assert_eq!(client.call(cmd, &body, &[]).errno(), libc::ENOTSUP);
    }
    assert!(scripted.each(FEATURE, |_| ()).is_empty());
    // The server refuses this one itself.
    assert_eq!(client.call(GET_INFO, &[0; 16], &[]).errno(), libc::ENOTSUP);
    assert_eq!(scripted.each(GET_INFO, |m| m.body.len()), [16]);
}

#[test]
fn large_messages_pass_whole() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, _scripted) = bed.pair(|_, _| false);
    let data = vec![9; 1 << 20];
    let written = client.call(REGION_WRITE, &region(4, 0, 1 << 20, &data), &[]);
    assert_eq!(written.errno(), 0);
    let read = client.call(REGION_READ, &region(4, 0, 1 << 20, &[]), &[]);
    assert_eq!(read.body.len(), 16 + (1 << 20));
    assert!(read.body[16..].iter().all(|b| *b == 4));
}

/// libvfio-user sends a refusal with the body of the reply that it had prepared: the head of the access, and data.
#[test]
fn a_refusal_with_a_body_costs_the_client_one_access_and_not_the_device() {
    const UNSERVED: u64 = 0xffc;
    let bed = Bed::new(Isolation::Messages);
    let (mut client, played) = bed.pair(|server, msg| {
        let refused = [REGION_READ, REGION_WRITE].contains(&msg.cmd) && msg.u64_at(0) == UNSERVED;
        if refused {
            let body = [&msg.body[..16], &[0; 4]].concat();
            server.refuse_with(msg, libc::EINVAL.unsigned_abs(), &body);
        }
        refused
    });
    for _ in 0..2 {
        let read = client.call(REGION_READ, &region(UNSERVED, 7, 4, &[]), &[]);
        assert_eq!((read.errno(), read.body.len()), (libc::EINVAL, 0));
        let written = client.call(REGION_WRITE, &region(UNSERVED, 7, 4, &[1; 4]), &[]);
        assert_eq!((written.errno(), written.body.len()), (libc::EINVAL, 0));
        let read = client.call(REGION_READ, &region(0, 7, 4, &[]), &[]);
        assert_eq!((read.errno(), read.body.len()), (0, 16 + 4));
    }
    assert_eq!(
        played.each(VERSION, |_| ()).len(),
        1,
        "the first connection"
    );
}
