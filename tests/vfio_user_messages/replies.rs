//! Replies that libvfio-user sends: each passes as it is, and none costs the device its server. docs/vfio-user-servers.md
//! lists them.

use std::os::fd::AsFd;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;

use crate::bed::{Bed, CLIENT_TEXT, accept, event};
use crate::connection::{
    DMA_UNMAP, FEATURE, GET_INFO, IO_FDS, IRQ_INFO, MIG_READ, MIG_WRITE, REGION_INFO, REGION_READ,
    REGION_WRITE, RESET, SET_IRQS, VERSION, irqs, region, version_body,
};

/// A body of 32-bit words, and zeros up to `len` bytes.
fn words(words: &[u32], len: usize) -> Vec<u8> {
    let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    body.resize(len, 0);
    body
}

/// A command of the client, its body, and a reply of the library: its body and its number of descriptors.
type Exchange = (&'static str, u16, Vec<u8>, Vec<u8>, usize);

fn exchanges() -> Vec<Exchange> {
    let info = |argsz: u32, len: usize| words(&[argsz], len);
    let no_access = region(0x10, 0, 0, &[]);
    vec![
        ("device info", GET_INFO, info(16, 16), info(16, 16), 0),
        ("a region", REGION_INFO, info(32, 32), info(32, 32), 0),
        (
            "a region whose areas do not fit into the client's reply",
            REGION_INFO,
            info(32, 32),
            words(&[80, 7], 32),
            0,
        ),
        (
            "a region with areas and a descriptor",
            REGION_INFO,
            info(80, 32),
            words(&[80, 15, 0, 32], 80),
            1,
        ),
        ("no eventfds", IO_FDS, info(16, 16), words(&[16], 16), 0),
        (
            "eventfds that do not fit into the client's reply",
            IO_FDS,
            info(16, 16),
            words(&[16 + 3 * 40, 0, 0, 3], 16),
            0,
        ),
        (
            "eventfds, two of which share a descriptor",
            IO_FDS,
            info(4096, 16),
            words(&[16 + 3 * 40, 0, 0, 3], 16 + 3 * 40),
            2,
        ),
        ("interrupts", IRQ_INFO, info(16, 16), info(16, 16), 0),
        ("set interrupts", SET_IRQS, irqs(0x21, 2, 0, 0), vec![], 0),
        ("a reset", RESET, vec![], vec![], 0),
        (
            "a read",
            REGION_READ,
            region(0, 0, 4, &[]),
            region(0, 0, 4, b"data"),
            0,
        ),
        (
            "a write",
            REGION_WRITE,
            region(0, 0, 4, b"data"),
            region(0, 0, 4, &[]),
            0,
        ),
        (
            "a read of no bytes",
            REGION_READ,
            no_access.clone(),
            vec![],
            0,
        ),
        ("a write of no bytes", REGION_WRITE, no_access, vec![], 0),
        (
            "a feature",
            FEATURE,
            words(&[16, 1 | 1 << 16], 8),
            words(&[16, 1 | 1 << 16, 6], 16),
            0,
        ),
        (
            "a probe for a feature",
            FEATURE,
            words(&[8, 1 | 1 << 18], 8),
            words(&[8, 1 | 1 << 18], 8),
            0,
        ),
        (
            "less state than asked for, in a body of the full size",
            MIG_READ,
            words(&[8 + 100, 100], 8),
            words(&[8 + 3, 3], 8 + 100),
            0,
        ),
        (
            "the end of the state",
            MIG_READ,
            words(&[8 + 100, 100], 8),
            words(&[8, 0], 8 + 100),
            0,
        ),
        (
            "state that is written",
            MIG_WRITE,
            words(&[8 + 4, 4, 0], 12),
            vec![],
            0,
        ),
    ]
}

#[test]
fn each_reply_of_the_library_reaches_the_client_as_it_is() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, mut server) = bed.raw_pair();
    let event = event();
    for (what, cmd, asked, replied, descriptors) in exchanges() {
        client.ask(cmd, &asked, &[]);
        let msg = server.recv().expect("forwarded");
        assert_eq!((msg.cmd, &msg.body), (cmd, &asked), "{what}");
        let fds = vec![event.as_fd(); descriptors];
        server.reply(&msg, &replied, &fds);
        let reply = client.recv().expect(what);
        assert_eq!(
            (reply.errno(), reply.cmd, &reply.body),
            (0, cmd, &replied),
            "{what}"
        );
        assert_eq!(reply.fds.len(), descriptors, "{what}");

        // The library sends a refusal with the body that it had prepared, or with none.
        for body in [&replied[..], &[]] {
            client.ask(cmd, &asked, &[]);
            let msg = server.recv().expect("forwarded");
            server.refuse_with(&msg, libc::EINVAL.unsigned_abs(), body);
            let refused = client.recv().expect(what);
            assert_eq!(
                (refused.errno(), refused.body.len()),
                (libc::EINVAL, 0),
                "{what}"
            );
        }
    }
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// The library sends all eventfds of a region at once, whatever the client can receive.
#[test]
fn a_reply_with_more_descriptors_than_the_client_takes_costs_the_client_this_reply() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, mut server) = bed.raw_pair();
    let event = event();
    for (cmd, body) in [
        (IO_FDS, words(&[16 + 17 * 40, 0, 0, 17], 16 + 17 * 40)),
        (REGION_INFO, words(&[32], 32)),
    ] {
        client.ask(cmd, &words(&[4096], 32), &[]);
        let msg = server.recv().expect("forwarded");
        server.reply(&msg, &body, &[event.as_fd(); 17]);
        let refused = client.recv().expect("an answer");
        assert_eq!((refused.errno(), refused.fds.len()), (libc::E2BIG, 0));
    }
    client.ask(RESET, &[], &[]);
    let msg = server.recv().expect("forwarded");
    server.reply(&msg, &[], &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// The library refuses VERSION, for example for a page size of the client that it does not support, and hangs up.
#[test]
fn a_refused_version_reaches_the_client_with_its_errno() {
    let bed = Bed::new(Isolation::Messages);
    let listener = bed.listen();
    for hangs_up_first in [false, true] {
        let mut client = bed.connect();
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&listener);
        let request = server.recv().expect("VERSION");
        server.refuse(&request, libc::EINVAL.unsigned_abs());
        let server = (!hangs_up_first).then_some(server);
        let refused = client.recv().expect("an answer");
        assert_eq!((refused.cmd, refused.errno()), (VERSION, libc::EINVAL));
        assert!(client.is_closed());
        if let Some(mut server) = server {
            assert!(server.is_closed());
        }
    }
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// A device that cannot pause refuses DMA_UNMAP. Without memory of the guest, its server gains nothing by that.
#[test]
fn a_server_without_memory_may_refuse_to_give_a_window_up() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let (mut client, scripted) = bed.pair(|server, msg| {
        if msg.cmd == DMA_UNMAP {
            server.refuse(msg, libc::EIO.unsigned_abs());
        }
        msg.cmd == DMA_UNMAP
    });
    for _ in 0..2 {
        bed.map(0x1000, 0, 0x1000, Access::READ).expect("mapped");
        bed.unmap(0x1000, 0x1000).expect("unmapped");
    }
    assert_eq!(scripted.each(DMA_UNMAP, |m| m.u64_at(8)), [0x1000, 0x1000]);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// A process that ends closes its sockets one after the other. UNMAP must not fail in between.
#[test]
fn a_server_that_closes_the_socket_for_its_commands_is_not_cut_off() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let (mut client, mut server, twin) = bed.raw_pair_with_twin();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(0x1000, 0, 0x1000, Access::READ));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
        let unmapped = scope.spawn(|| bed.unmap(0x1000, 0x1000));
        let window = server.recv().expect("the window's removal");
        drop(twin);
        // When the client has this reply, the interposer knows that the socket is closed.
        client.ask(RESET, &[], &[]);
        let reset = server.recv().expect("forwarded");
        server.reply(&reset, &[], &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        client.ask(RESET, &[], &[]);
        let reset = server.recv().expect("forwarded");
        server.reply(&reset, &[], &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        server.reply(&window, &window.body, &[]);
        unmapped.join().expect("no panic").expect("unmapped");
    });
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}
