//! The client or the server dies, and connects again.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use vhost_device_iommu::address::{Access, Gpa, GpaRange, Mapping};
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::faults::FaultReason;
use vhost_device_iommu::ids::DomainId;

use crate::bed::{
    Bed, CLIENT_TEXT, DOMAIN, RAM, SERVER_TEXT, accept, event, eventually, range,
    start_scripted_server,
};
use crate::connection::{
    Connection, DMA_MAP, REGION_INFO, REGION_READ, RESET, SET_IRQS, VERSION, irqs, region,
    version_body,
};

const IOVA: u64 = 0x4000_0000;

#[test]
fn a_server_that_reconnects_gets_windows_and_interrupts_again() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let (mut client, mut server) = bed.raw_pair();
    let event = event();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    let id = client.ask(
        SET_IRQS,
        &irqs(0x24, 2, 4, 2),
        &[event.as_fd(), event.as_fd()],
    );
    let forwarded = server.recv().expect("forwarded");
    server.reply(&forwarded, &[], &[]);
    assert_eq!(client.recv().expect("a reply").id, id);

    // The server dies with a command of the client and one of the interposer unanswered.
    let lost = client.ask(REGION_READ, &region(0, 0, 4, &[]), &[]);
    assert_eq!(server.recv().expect("forwarded").cmd, REGION_READ);
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        server.recv().expect("DMA_UNMAP");
        drop(server);
        unmapped
            .join()
            .expect("no panic")
            .expect("no server has the window");
    });
    let reply = client.recv().expect("a reply");
    assert_eq!((reply.id, reply.errno()), (lost, libc::EIO));
    assert_eq!(client.call(RESET, &[], &[]).errno(), libc::EIO);
    // The guest maps while there is no server.
    bed.map(IOVA + 0x5000, 0, 0x1000, Access::READ)
        .expect("mapped");

    let scripted = start_scripted_server(bed.listen(), |_, _| false);
    eventually("the server has the window and the interrupts", || {
        scripted.windows() == [IOVA + 0x5000] && !scripted.each(SET_IRQS, |_| ()).is_empty()
    });
    let interrupts = scripted.each(SET_IRQS, |m| {
        (
            m.u32_at(4),
            m.u32_at(8),
            m.u32_at(12),
            m.u32_at(16),
            m.fds.len(),
        )
    });
    assert_eq!(interrupts, [(0x24, 2, 4, 2, 2)]);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn a_client_with_descriptors_of_a_dead_server_is_disconnected() {
    let bed = Bed::new(Isolation::ExactMessages);
    let (mut client, mut server) = bed.raw_pair();
    client.ask(REGION_INFO, &[0; 32], &[]);
    let request = server.recv().expect("forwarded");
    let null = File::open("/dev/null").expect("open");
    server.reply(&request, &request.body, &[null.as_fd()]);
    assert_eq!(client.recv().expect("a reply").fds.len(), 1);
    drop(server);
    assert!(client.is_closed());
    let (mut client, _scripted) = bed.pair(|_, _| false);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
}

#[test]
fn a_client_that_dies_takes_the_server_s_connection_with_it() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let listener = bed.listen();
    for round in 0..3u64 {
        let scripted = start_scripted_server(listener.try_clone().expect("cloned"), |_, _| false);
        let mut client = bed.client();
        bed.map(IOVA + round * 0x1000, 0, 0x1000, Access::READ)
            .expect("mapped");
        client.ask(RESET, &[], &[]);
        drop(client);
        let received = scripted.received.clone();
        scripted.thread.join().expect("the connection has ended");
        let maps = received
            .lock()
            .unwrap()
            .iter()
            .filter(|m| m.cmd == DMA_MAP)
            .count();
        assert_eq!(maps as u64, round + 1);
    }
}

/// A server that has guest memory and has lost its client, while the guest runs on.
fn abandoned(isolation: Isolation) -> (Bed, Connection) {
    let bed = Bed::with_deadline(isolation, Duration::from_secs(1));
    bed.attach();
    let (client, mut server) = bed.raw_pair();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    drop(client);
    assert!(
        server.recv().is_none(),
        "the end of the stream tells the server"
    );
    (bed, server)
}

#[test]
fn unmap_waits_for_a_server_without_client_that_has_memory() {
    let (bed, server) = abandoned(Isolation::Mappings);
    // MAP takes nothing from the server, so it does not wait.
    bed.map(IOVA + 0x1000, 0, 0x1000, Access::READ)
        .expect("mapped");
    // The next client waits, too.
    let listener = bed.listen();
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!unmapped.is_finished(), "the server may still reach it");
        listener.set_nonblocking(true).expect("set");
        assert!(
            listener.accept().is_err(),
            "there is one connection at a time"
        );
        listener.set_nonblocking(false).expect("set");
        drop(server);
        unmapped.join().expect("no panic").expect("unmapped");
    });
    let mut server = accept(&listener);
    let request = server.recv().expect("VERSION");
    server.reply(&request, &version_body(SERVER_TEXT), &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
    assert_eq!(server.recv().expect("a window").u64_at(16), IOVA + 0x1000);
}

#[test]
fn a_server_that_keeps_memory_without_client_has_its_endpoint_blocked() {
    let (bed, server) = abandoned(Isolation::Mappings);
    let refused = bed
        .unmap(IOVA, 0x1000)
        .expect_err("the server keeps the memory");
    assert!(
        refused.to_string().contains("has not hung up within"),
        "{refused}"
    );
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(endpoint.quarantined);
    drop(server);
}

/// A client and its server, which has a window.
fn with_window(isolation: Isolation) -> (Bed, Connection, Connection) {
    let bed = Bed::with_deadline(isolation, Duration::from_secs(1));
    bed.attach();
    let (client, mut server) = bed.raw_pair();
    std::thread::scope(|scope| {
        let mapped = scope.spawn(|| bed.map(IOVA, 0, 0x1000, Access::READ));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        mapped.join().expect("no panic").expect("mapped");
    });
    (bed, client, server)
}

/// The same, after the interposer has cut the server off for garbage.
fn cut_off(isolation: Isolation) -> (Bed, Connection, Connection) {
    let (bed, client, mut server) = with_window(isolation);
    server.send_raw(&[0xff; 40], &[]);
    eventually("it is cut off", || bed.watch.state().ends.cut_offs == 1);
    assert!(!is_quarantined(&bed));
    (bed, client, server)
}

fn is_quarantined(bed: &Bed) -> bool {
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    endpoint.quarantined
}

#[test]
fn a_server_that_was_cut_off_has_its_memory_until_it_hangs_up() {
    let (bed, _client, mut server) = cut_off(Isolation::Mappings);
    let listener = bed.listen();
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!unmapped.is_finished(), "the server may still reach it");
        assert!(
            server.recv().is_none(),
            "the end of the stream tells the server"
        );
        drop(server);
        unmapped.join().expect("no panic").expect("unmapped");
    });
    let mut server = accept(&listener);
    assert_eq!(server.recv().expect("it may connect again").cmd, VERSION);

    let (bed, _client, server) = cut_off(Isolation::Mappings);
    bed.unmap(IOVA, 0x1000)
        .expect_err("the server keeps the memory");
    assert!(is_quarantined(&bed));
    drop(server);

    let (bed, _client, server) = cut_off(Isolation::ExactMessages);
    bed.unmap(IOVA, 0x1000)
        .expect("the server never had memory");
    drop(server);
}

/// The server has one window, refuses to remove it, and does not hang up.
#[test]
fn a_server_that_refuses_to_remove_its_last_window_has_it_until_it_hangs_up() {
    let (bed, _client, mut server) = with_window(Isolation::Mappings);
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 0x1000));
        let removal = server.recv().expect("DMA_UNMAP");
        server.refuse(&removal, libc::EBUSY.unsigned_abs());
        let unmapped = unmapped.join().expect("no panic");
        unmapped.expect_err("the server keeps the memory");
    });
    assert!(is_quarantined(&bed));
    // The budget for hang-ups is whole again after ten deadlines.
    std::thread::sleep(Duration::from_secs(10));
    let attach = || bed.iommu().attach(bed.endpoint(), DomainId(2), false);
    let refused = attach().expect_err("the server keeps the memory");
    assert!(refused.to_string().contains("has not hung up"), "{refused}");
    assert!(is_quarantined(&bed));
    drop(server);
    eventually("the hang-up", || attach().is_ok());
}

/// A quarantined endpoint, whose server was cut off and still has its memory. The budget for hang-ups is whole.
fn quarantined() -> (Bed, Connection, Connection) {
    let (bed, client, server) = cut_off(Isolation::Mappings);
    bed.unmap(IOVA, 0x1000)
        .expect_err("the server keeps the memory");
    assert!(is_quarantined(&bed));
    std::thread::sleep(Duration::from_secs(10));
    (bed, client, server)
}

fn keeps_memory(bed: &Bed) -> (bool, u64) {
    let state = bed.watch.state();
    (state.ends.keeps_memory, state.kept_slots)
}

#[test]
fn the_removal_of_guest_ram_waits_for_a_server_that_was_cut_off() {
    let (bed, _client, server) = quarantined();
    assert_eq!(keeps_memory(&bed), (true, 0));
    std::thread::scope(|scope| {
        let removed = scope.spawn(|| bed.iommu().set_memory(Vec::new()));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!removed.is_finished(), "the server may still map it");
        drop(server);
        removed.join().expect("no panic");
    });
    assert_eq!(keeps_memory(&bed), (false, 0));
}

/// Nothing takes memory from another process: the removal ends, and the status says what is left.
#[test]
fn guest_ram_that_a_server_may_still_map_after_its_removal_is_counted() {
    let (bed, _client, server) = quarantined();
    let mut parts = [bed.slot.clone(), bed.slot.clone()];
    for (part, at) in parts.iter_mut().zip([RAM, RAM + 0x1000]) {
        part.range = GpaRange::from_len(Gpa(at), 0x1000).expect("one page");
    }
    bed.iommu().set_memory(parts.to_vec());
    assert_eq!(keeps_memory(&bed), (true, 1), "one slot was removed");
    bed.iommu().set_memory(Vec::new());
    assert_eq!(keeps_memory(&bed), (true, 3));
    drop(server);
    eventually("the hang-up", || !keeps_memory(&bed).0);
    bed.iommu().set_memory(parts.to_vec());
    bed.iommu().set_memory(Vec::new());
    assert_eq!(keeps_memory(&bed), (false, 3));
}

/// The server answers neither this MAP nor the removal of its window.
#[test]
fn a_window_that_cannot_be_taken_back_quarantines_the_endpoint() {
    for is_run in [false, true] {
        let (bed, _client, server) = with_window(Isolation::Mappings);
        let page = |n: u64| Mapping {
            range: range(IOVA + n * 0x1000, 0x1000),
            gpa: Gpa(RAM),
            access: Access::READ,
            mmio: false,
        };
        let refused = if is_run {
            let mut outcomes = VecDeque::new();
            let run = [page(1), page(2)];
            bed.iommu().map_all(DOMAIN, &run, &mut outcomes);
            outcomes.pop_front().expect("an outcome")
        } else {
            bed.iommu().map(DOMAIN, &page(1))
        };
        let refused = refused.expect_err("not in time").to_string();
        assert!(refused.contains("1 endpoints are quarantined"), "{refused}");
        assert!(is_quarantined(&bed), "the server may have the window");
        assert_eq!(bed.faults.take(), [(FaultReason::Unknown, IOVA + 0x1000)]);
        // It may have it until it hangs up, whatever the endpoint is attached to. The budget for that is whole again
        // after ten deadlines.
        std::thread::sleep(Duration::from_secs(10));
        let attach = || bed.iommu().attach(bed.endpoint(), DomainId(2), false);
        let refused = attach().expect_err("the server keeps the memory");
        assert!(refused.to_string().contains("has not hung up"), "{refused}");
        assert!(is_quarantined(&bed));
        drop(server);
        eventually("the hang-up", || attach().is_ok());
        assert!(!is_quarantined(&bed));
    }
}

#[test]
fn a_late_server_that_hangs_up_costs_the_guest_the_mapping_only() {
    for isolation in [Isolation::Mappings, Isolation::ExactMessages] {
        let (bed, _client, mut server) = with_window(isolation);
        std::thread::scope(|scope| {
            let server = scope.spawn(move || while server.recv().is_some() {});
            bed.map(IOVA + 0x1000, 0, 0x1000, Access::READ)
                .expect_err("not in time");
            server.join().expect("no panic");
        });
        assert!(!is_quarantined(&bed));
        assert!(bed.faults.take().is_empty());
        bed.unmap(0, u64::MAX).expect("nobody has a window");
    }
}

/// In bypass mode, guest RAM is the windows.
#[test]
fn guest_ram_that_cannot_be_taken_back_quarantines_the_endpoint() {
    let bed = Bed::with_deadline(Isolation::Mappings, Duration::from_secs(1));
    let mut parts = [bed.slot.clone(), bed.slot.clone()];
    for (part, at) in parts.iter_mut().zip([RAM, RAM + 0x1000]) {
        part.range = GpaRange::from_len(Gpa(at), 0x1000).expect("one page");
    }
    bed.iommu().set_memory(Vec::new());
    let attached = bed.iommu().attach(bed.endpoint(), DOMAIN, true);
    attached.expect("attached");
    let (_client, mut server) = bed.raw_pair();
    std::thread::scope(|scope| {
        let added = scope.spawn(|| bed.iommu().set_memory(parts[..1].to_vec()));
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        added.join().expect("no panic");
    });
    assert!(!is_quarantined(&bed));
    bed.iommu().set_memory(parts.to_vec());
    assert!(is_quarantined(&bed), "the server may have the slot");
    drop(server);
}

#[test]
fn a_server_that_never_had_memory_is_not_waited_for() {
    let (bed, server) = abandoned(Isolation::ExactMessages);
    bed.unmap(IOVA, 0x1000).expect("unmapped at once");
    let listener = bed.listen();
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    accept(&listener).recv().expect("VERSION");
    drop(server);
}

#[test]
fn a_client_waits_for_its_server() {
    let bed = Bed::new(Isolation::ExactMessages);
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    std::thread::sleep(Duration::from_millis(300));
    let listener = bed.listen();
    // A server that dies at once does no harm.
    drop(accept(&listener));
    let mut server = accept(&listener);
    let request = server.recv().expect("VERSION");
    server.reply(&request, &version_body(SERVER_TEXT), &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
}

#[test]
fn a_server_with_other_capabilities_does_not_get_the_old_client() {
    let bed = Bed::new(Isolation::ExactMessages);
    let (mut client, server) = bed.raw_pair();
    let listener = bed.listen();
    drop(server);
    let mut server = accept(&listener);
    let request = server.recv().expect("VERSION");
    let other = r#"{"capabilities":{"max_msg_fds":1}}"#;
    server.reply(&request, &version_body(other), &[]);
    assert!(client.is_closed());
}

#[test]
fn two_hundred_deaths_leave_nothing_behind() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    bed.map(IOVA, 0, 0x1000, Access::READ).expect("mapped");
    let listener = bed.listen();
    let round = |n: u64| {
        let mut client = bed.connect();
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&listener);
        if n.is_multiple_of(4) {
            // The client dies first, during the negotiation.
            drop(client);
            assert_eq!(server.recv().expect("VERSION").cmd, VERSION);
            assert!(server.is_closed());
            return;
        }
        let request = server.recv().expect("VERSION");
        server.reply(&request, &version_body(SERVER_TEXT), &[]);
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
    // Not an exact number: other tests of this process open descriptors meanwhile.
    eventually("no descriptor leaks", || open() < 200);
}
