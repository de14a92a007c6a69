//! Either end dies, and comes back.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, CLIENT_TEXT, SERVER_TEXT, accept, eventually, play};
use crate::connection::{
    Connection, DMA_MAP, REGION_INFO, REGION_READ, RESET, SET_IRQS, VERSION, irqs, region,
    version_body,
};

const IOVA: u64 = 0x4000_0000;

#[test]
fn a_server_that_comes_back_is_told_everything_again() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    let (mut client, mut server) = bed.raw_pair();
    let null = File::open("/dev/null").expect("open");
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ));
        let told = server.recv().expect("a window");
        server.reply(&told, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    let id = client.ask(
        SET_IRQS,
        &irqs(0x24, 2, 4, 2),
        &[null.as_fd(), null.as_fd()],
    );
    let told = server.recv().expect("forwarded");
    server.reply(&told, &[], &[]);
    assert_eq!(client.recv().expect("a reply").id, id);

    // It dies with a command and an order before it.
    let lost = client.ask(REGION_READ, &region(0, 0, 4, &[]), &[]);
    assert_eq!(server.recv().expect("forwarded").cmd, REGION_READ);
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        server.recv().expect("an order");
        drop(server);
        unmapped.join().expect("no panic").expect("nobody has it");
    });
    let reply = client.recv().expect("a reply");
    assert_eq!((reply.id, reply.errno()), (lost, libc::EIO));
    assert_eq!(client.call(RESET, &[], &[]).errno(), libc::EIO);
    // The guest goes on meanwhile.
    bed.map(IOVA + 0x5000, 0, 0x1000, Access::READ)
        .expect("mapped");

    let played = play(bed.listen(), |_, _| false);
    eventually("it is told", || {
        played.windows() == [IOVA + 0x5000] && !played.each(SET_IRQS, |_| ()).is_empty()
    });
    let told = played.each(SET_IRQS, |m| {
        (
            m.u32_at(4),
            m.u32_at(8),
            m.u32_at(12),
            m.u32_at(16),
            m.fds.len(),
        )
    });
    assert_eq!(told, [(0x24, 2, 4, 2, 2)]);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn a_client_that_has_a_dead_server_s_descriptors_is_let_go() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, mut server) = bed.raw_pair();
    client.ask(REGION_INFO, &[0; 32], &[]);
    let asked = server.recv().expect("forwarded");
    let null = File::open("/dev/null").expect("open");
    server.reply(&asked, &asked.body, &[null.as_fd()]);
    assert_eq!(client.recv().expect("a reply").fds.len(), 1);
    drop(server);
    assert!(client.is_closed());
    let (mut client, _played) = bed.pair(|_, _| false);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn a_client_that_dies_takes_the_server_s_connection_with_it() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let listener = bed.listen();
    for round in 0..3u64 {
        let played = play(listener.try_clone().expect("cloned"), |_, _| false);
        let mut client = bed.client();
        bed.map(IOVA + round * 0x1000, 0, 0x1000, Access::READ)
            .expect("mapped");
        client.ask(RESET, &[], &[]);
        drop(client);
        let seen = played.seen.clone();
        played.thread.join().expect("the connection has ended");
        let maps = seen
            .lock()
            .unwrap()
            .iter()
            .filter(|m| m.cmd == DMA_MAP)
            .count();
        assert_eq!(maps as u64, round + 1);
    }
}

/// A server with memory of the guest's, whose client is gone while the guest lives on.
fn abandoned(isolation: Isolation) -> (Bed, Connection) {
    let bed = Bed::with_deadline(isolation, Duration::from_secs(1));
    bed.attach();
    let (client, mut server) = bed.raw_pair();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ));
        let told = server.recv().expect("a window");
        server.reply(&told, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    drop(client);
    assert!(
        server.recv().is_none(),
        "it is told by the end of its stream"
    );
    (bed, server)
}

#[test]
fn unmap_waits_for_a_server_without_client_that_has_memory() {
    let (bed, server) = abandoned(Isolation::Mappings);
    // Nothing is taken away by this.
    bed.map(IOVA + 0x1000, 0, 0x1000, Access::READ)
        .expect("mapped");
    // The next client has to wait, too.
    let listener = bed.listen();
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!unmapped.is_finished(), "the server may still reach it");
        listener.set_nonblocking(true).expect("set");
        assert!(listener.accept().is_err(), "one at a time");
        listener.set_nonblocking(false).expect("set");
        drop(server);
        unmapped.join().expect("no panic").expect("unmapped");
    });
    let mut server = accept(&listener);
    let asked = server.recv().expect("VERSION");
    server.reply(&asked, &version_body(SERVER_TEXT), &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
    assert_eq!(server.recv().expect("a window").u64_at(16), IOVA + 0x1000);
}

#[test]
fn a_server_that_keeps_memory_without_client_has_its_endpoint_blocked() {
    let (bed, server) = abandoned(Isolation::Mappings);
    let refused = bed.unmap(IOVA, 0x1000).expect_err("it keeps it");
    assert!(
        refused.to_string().contains("has not hung up within"),
        "{refused}"
    );
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(endpoint.quarantined);
    drop(server);
}

/// A client, and its server with memory of the guest's that was cut off for being late with another
/// window.
fn late(isolation: Isolation) -> (Bed, Connection, Connection) {
    let bed = Bed::with_deadline(isolation, Duration::from_secs(1));
    bed.attach();
    let (client, mut server) = bed.raw_pair();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ));
        let told = server.recv().expect("a window");
        server.reply(&told, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    bed.map(IOVA + 0x1000, 0, 0x1000, Access::READ)
        .expect_err("not in time");
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
    (bed, client, server)
}

#[test]
fn a_server_that_was_cut_off_has_its_memory_until_it_hangs_up() {
    let (bed, _client, mut server) = late(Isolation::Mappings);
    let listener = bed.listen();
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!unmapped.is_finished(), "the server may still reach it");
        assert_eq!(server.recv().expect("the order").cmd, DMA_MAP);
        assert!(
            server.recv().is_none(),
            "it is told by the end of its stream"
        );
        drop(server);
        unmapped.join().expect("no panic").expect("unmapped");
    });
    let mut server = accept(&listener);
    assert_eq!(server.recv().expect("it may come back").cmd, VERSION);

    let (bed, _client, server) = late(Isolation::Mappings);
    bed.unmap(IOVA, 0x1000).expect_err("it keeps it");
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(endpoint.quarantined);
    drop(server);

    let (bed, _client, server) = late(Isolation::Messages);
    bed.unmap(IOVA, 0x1000).expect("it never had memory");
    drop(server);
}

#[test]
fn a_server_that_never_had_memory_is_not_waited_for() {
    let (bed, server) = abandoned(Isolation::Messages);
    bed.unmap(IOVA, 0x1000).expect("unmapped at once");
    let listener = bed.listen();
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    accept(&listener).recv().expect("VERSION");
    drop(server);
}

#[test]
fn a_client_waits_for_its_server() {
    let bed = Bed::new(Isolation::Messages);
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    std::thread::sleep(Duration::from_millis(300));
    let listener = bed.listen();
    // One that dies at once is no harm.
    drop(accept(&listener));
    let mut server = accept(&listener);
    let asked = server.recv().expect("VERSION");
    server.reply(&asked, &version_body(SERVER_TEXT), &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
}

#[test]
fn a_server_that_is_another_one_now_gets_no_old_client() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, server) = bed.raw_pair();
    let listener = bed.listen();
    drop(server);
    let mut server = accept(&listener);
    let asked = server.recv().expect("VERSION");
    let other = r#"{"capabilities":{"max_msg_fds":1}}"#;
    server.reply(&asked, &version_body(other), &[]);
    assert!(client.is_closed());
}

#[test]
fn two_hundred_deaths_leave_nothing_behind() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    bed.map(IOVA, 0, 0x1000, Access::READ).expect("mapped");
    let listener = bed.listen();
    let round = |n: u64| {
        let mut client = bed.connect();
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&listener);
        if n.is_multiple_of(4) {
            // The client first, before anything is agreed on.
            drop(client);
            assert_eq!(server.recv().expect("VERSION").cmd, VERSION);
            assert!(server.is_closed());
            return;
        }
        let asked = server.recv().expect("VERSION");
        server.reply(&asked, &version_body(SERVER_TEXT), &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        if n % 4 == 1 {
            drop(client);
            while server.recv().is_some() {}
            return;
        }
        client.ask(REGION_READ, &region(n, 0, 4, &[]), &[]);
        drop(server);
        assert_eq!(client.recv().expect("a reply").errno(), libc::EIO);
    };
    for n in 0..8 {
        round(n);
    }
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .expect("readable")
            .count()
    };
    for n in 0..200 {
        round(n);
    }
    // Other tests open descriptors of their own meanwhile.
    eventually("no descriptor leaks", || open() < 200);
}
