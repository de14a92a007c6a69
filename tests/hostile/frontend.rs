//! A hostile VMM: vhost-user messages, descriptors, memory regions and connections.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bed::{assert_serves, cpu_ticks};
use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, LOW_LEN, LOW_RAM, Layout, RING_LEN, RING_RAM, Setup};
use crate::common::memory::{USER_BASE, memfd};
use crate::common::ring::{Desc, NEXT, WRITE};
use crate::common::rng::Rng;
use crate::common::wire::{self, OK, RW, TAIL};

/// The bytes of a vhost-user message.
fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, flags, body.len() as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(body);
    bytes
}

#[test]
fn garbage_on_the_vhost_user_socket() {
    let daemon = Daemon::start();
    let mut rng = Rng::new(0xfeed);
    for round in 0..200 {
        let mut stream = daemon.stream();
        let bytes = match round % 4 {
            0 => {
                let len = 1 + rng.below(300) as usize;
                rng.bytes(len)
            }
            1 => {
                let len = rng.below(64) as usize;
                let body = rng.bytes(len);
                message(rng.below(50) as u32, 1, &body)
            }
            2 => {
                // A header that declares a body that does not follow, or a body that is far too
                // long.
                let mut bytes = message(rng.below(50) as u32, 9, &[]);
                bytes[8..12].copy_from_slice(&rng.u32().to_ne_bytes());
                bytes
            }
            _ => {
                let mut bytes = message(3, 1, &[]);
                for _ in 0..5 {
                    let body = rng.bytes(8);
                    bytes.extend(message(1 + rng.below(45) as u32, 1, &body));
                }
                bytes
            }
        };
        // The daemon may close the connection in the middle.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        drop(stream);
        daemon.assert_alive();
    }
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
    assert!(daemon.log_len() < 256 << 10, "{} bytes", daemon.log_len());
}

#[test]
fn a_disconnect_in_the_middle_of_a_message() {
    let daemon = Daemon::start();
    let whole = message(8, 1, &[0; 8]);
    for len in 1..whole.len() {
        let mut stream = daemon.stream();
        stream.write_all(&message(3, 1, &[])).unwrap();
        stream.write_all(&whole[..len]).unwrap();
        drop(stream);
        daemon.assert_alive();
    }
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
    // The frontend also disconnects in the middle of traffic, with running rings.
    for _ in 0..20 {
        drop(guest);
        guest = Guest::boot(&daemon);
        assert_eq!(guest.attach(1, EP), OK);
        let layout = Layout::plain(36, TAIL);
        for page in 1..100 {
            let first = page << 12;
            guest.submit(&wire::map(1, first, first + 0xfff, 0, RW), &layout);
        }
        guest.kick();
    }
    drop(guest);
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn unexpected_file_descriptors() {
    let daemon = Daemon::start();
    let file = memfd(0x1000);
    for request in 1..45 {
        for count in [1, 8, 32] {
            let stream = daemon.stream();
            let body = message(request, 1, &[0; 8]);
            let fds = vec![file.as_raw_fd(); count];
            let _ = stream.send_with_fds(&[&body[..]], &fds);
            drop(stream);
        }
    }
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
    let fds = daemon.fd_count();
    assert!(fds < 200, "{fds} descriptors open");
}

/// The description of one region; each argument can be wrong.
fn region(gpa: u64, len: u64, user: u64, offset: u64, fd: i32) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: len,
        userspace_addr: user,
        mmap_offset: offset,
        mmap_handle: fd,
    }
}

/// A VMM whose RAM is its own sends the place of the RAM without a descriptor.
#[test]
fn memory_that_is_not_shared_is_answered_with_the_cure() {
    const SET_FEATURES: u32 = 2;
    const SET_MEM_TABLE: u32 = 5;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    const ADD_MEM_REG: u32 = 37;
    let number = |n: u64| n.to_ne_bytes().to_vec();
    let region = [number(0), number(1 << 20), number(1 << 32), number(0)].concat();
    let table = [number(1), region.clone()].concat();
    let one = [number(0), region].concat();
    let negotiate = [
        message(SET_FEATURES, 1, &number(1 << 30 | 1 << 32)),
        message(SET_PROTOCOL_FEATURES, 1, &number(1 << 15)),
    ]
    .concat();
    for (name, sent) in [
        ("SET_MEM_TABLE", message(SET_MEM_TABLE, 1, &table)),
        (
            "ADD_MEM_REG",
            [negotiate, message(ADD_MEM_REG, 1, &one)].concat(),
        ),
    ] {
        let daemon = Daemon::start();
        let mut stream = daemon.stream();
        stream.write_all(&sent).expect("sent");
        let deadline = Instant::now() + Duration::from_secs(30);
        let closed = loop {
            let log = daemon.log();
            if let Some(line) = log.lines().find(|line| line.contains("was closed: ")) {
                break line.to_owned();
            }
            assert!(Instant::now() < deadline, "{name}: {log}");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(closed.contains("share=on"), "{name}: {closed}");
        drop(stream);
        assert_serves(&daemon, &mut Guest::boot(&daemon));
    }
}

/// Nothing can be served without the memory. The message names the cure.
#[test]
fn memory_that_shrinks_ends_the_daemon_with_a_message() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    guest.memory.shrink();
    guest.requests.kick_always();
    assert_eq!(daemon.wait_for_end().code(), Some(1));
    let log = daemon.log();
    assert!(log.contains("a file of guest memory shorter"), "{log}");
}

#[test]
fn invalid_memory_regions() {
    let daemon = Daemon::start();
    let file = memfd(0x1_0000);
    let fd = file.as_raw_fd();
    let null = std::fs::File::open("/dev/null").unwrap();
    let event = EventFd::new(0).unwrap();
    let base = 0x3_0000_0000;
    for (name, info) in [
        ("past the end", region(base, 0x2_0000, base, 0, fd)),
        ("far past the end", region(base, 1 << 40, base, 0, fd)),
        (
            "offset past the end",
            region(base, 0x1000, base, 0x10_0000, fd),
        ),
        ("offset unaligned", region(base, 0x1000, base, 0x123, fd)),
        ("offset wraps", region(base, 0x1000, base, !0xfff, fd)),
        ("length of all", region(0, u64::MAX, 0, 0, fd)),
        ("address wraps", region(!0xfff, 0x1000, base, 0, fd)),
        ("address wraps far", region(!0xfff, 0x2000, base, 0, fd)),
        ("user address wraps", region(base, 0x1000, !0xfff, 0, fd)),
        (
            "user address wraps far",
            region(base, 0x8000, !0xfff, 0, fd),
        ),
        ("length odd", region(base, 0x1001, base, 0, fd)),
        ("address odd", region(base + 1, 0x1000, base, 0, fd)),
        ("overlap", region(0x1000, 0x1000, base, 0, fd)),
        ("no memory", region(base, 0x1000, base, 0, null.as_raw_fd())),
        (
            "an eventfd",
            region(base, 0x1000, base, 0, event.as_raw_fd()),
        ),
    ] {
        let mut guest = Guest::boot(&daemon);
        assert_eq!(guest.attach(1, EP), OK);
        let added = guest.frontend.add_mem_region(&info);
        if added.is_ok() {
            // The daemon accepted the region. A request inside it must not crash the daemon.
            for addr in [
                info.guest_phys_addr,
                info.guest_phys_addr.wrapping_add(0x1_0000),
            ] {
                let descs = [
                    (0, Desc::new(addr, 20, NEXT, 1)),
                    (1, Desc::new(addr.wrapping_add(64), 4, WRITE, 0)),
                ];
                guest.try_raw_chain(0, &descs, Duration::from_millis(300));
                daemon.assert_alive();
            }
        }
        drop(guest);
        let guest = Guest::connect(&daemon, Setup::default());
        let _ = guest.frontend.set_mem_table(&[info]);
        drop(guest);
        daemon.assert_alive();
        let mut guest = Guest::boot(&daemon);
        assert_serves(&daemon, &mut guest);
        eprintln!(
            "{name}: {}",
            if added.is_ok() { "taken" } else { "refused" }
        );
    }
}

#[test]
fn removing_regions_that_were_never_added() {
    let daemon = Daemon::start();
    for (gpa, len) in [
        (0x9_0000_0000, 0x1000),
        (LOW_RAM, 0x1000),
        (LOW_RAM + 0x1000, LOW_LEN),
        (u64::MAX - 0xfff, 0x1000),
    ] {
        let mut guest = Guest::boot(&daemon);
        let info = region(gpa, len, USER_BASE.wrapping_add(gpa), 0, -1);
        let _ = guest.frontend.remove_mem_region(&info);
        drop(guest);
        daemon.assert_alive();
    }
    // The frontend removes the slot of the rings while they run.
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let info = guest
        .memory
        .regions
        .iter()
        .find(|slot| slot.gpa == RING_RAM)
        .unwrap()
        .info();
    guest.frontend.remove_mem_region(&info).unwrap();
    guest.requests.kick_always();
    std::thread::sleep(Duration::from_millis(100));
    daemon.assert_alive();
    let before = cpu_ticks(&daemon);
    std::thread::sleep(Duration::from_millis(500));
    let spent = cpu_ticks(&daemon) - before;
    assert!(spent <= 10, "{spent} ticks spent on a ring without memory");
    drop(guest);
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn wild_ring_addresses_and_sizes() {
    let daemon = Daemon::start();
    let ring = USER_BASE + RING_RAM;
    let end = ring + RING_LEN;
    let good = (ring, ring + 0x2000, ring + 0x1000);
    for (desc, used, avail) in [
        (0, 0, 0),
        (u64::MAX, u64::MAX, u64::MAX),
        (!0xf, !0x3, !0x1),
        (end - 16, good.1, good.2),
        (good.0, end - 4, good.2),
        (good.0, good.1, end - 2),
        (good.0, good.1, end - 4),
        (good.0 + 1, good.1, good.2),
        (good.0, good.1 + 1, good.2),
        (good.0, good.1, good.2 + 1),
        (good.0, good.0, good.0),
        (good.0, good.2, good.2),
    ] {
        let mut guest = Guest::connect(&daemon, Setup::default());
        let features = guest.features | wire::F_PROTOCOL;
        guest.frontend.set_features(features).unwrap();
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        // The daemon may refuse any of these and close the connection.
        let queue = &guest.requests;
        let _ = guest.frontend.set_vring_num(0, 256);
        let _ = guest.frontend.set_vring_base(0, 0);
        let _ = guest.frontend.set_vring_addr(0, &config);
        let _ = guest.frontend.set_vring_call(0, &queue.call);
        let _ = guest.frontend.set_vring_kick(0, &queue.kick);
        let _ = guest.frontend.set_vring_enable(0, true);
        for idx in [1_u16, 0x100] {
            guest.memory.store_u16(RING_RAM + 0x1002, idx);
            queue.kick.write(1).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon.assert_alive();
        drop(guest);
    }
    for num in [0, 1, 3, 100, 255, 257, 0x8000, 0xffff] {
        let mut guest = Guest::connect(&daemon, Setup::default());
        let features = guest.features | wire::F_PROTOCOL;
        guest.frontend.set_features(features).unwrap();
        if guest.frontend.set_vring_num(0, num).is_ok() {
            let _ = guest.frontend.set_vring_base(0, 0xffff);
            let _ = guest.frontend.set_vring_addr(0, &guest.requests.config());
            let _ = guest.frontend.set_vring_kick(0, &guest.requests.kick);
            let _ = guest.frontend.set_vring_enable(0, true);
            guest.requests.kick_always();
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon.assert_alive();
        drop(guest);
    }
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn rings_started_before_anything_else() {
    let daemon = Daemon::start();
    let guest = Guest::connect(&daemon, Setup::default());
    let mut front = guest.frontend.clone();
    let _ = front.set_vring_kick(0, &guest.requests.kick);
    let _ = front.set_vring_enable(0, true);
    guest.requests.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    daemon.assert_alive();
    drop(front);
    drop(guest);
    let guest = Guest::connect(&daemon, Setup::default());
    let _ = guest.frontend.set_features(u64::MAX);
    daemon.assert_alive();
    drop(guest);
    // Writes to the configuration space that are too long or far outside.
    let mut guest = Guest::boot(&daemon);
    for (offset, len) in [(0, 256), (36, 220), (255, 1), (0, 41)] {
        guest.set_config(offset, &vec![0xff; len]);
    }
    assert_eq!(guest.config().reserved, [0; 3]);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_hundred_connections_leave_nothing_behind() {
    let daemon = Daemon::start();
    let settle = |daemon: &Daemon| {
        daemon.wait_for("the disconnect", || daemon.status()["connected"] == false);
    };
    let round = |daemon: &Daemon| {
        let mut guest = Guest::boot(daemon);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map(1, 0x20_0000, 0x40_0fff, 0, RW), OK);
        guest.post_event_buffer(24);
        drop(guest);
        settle(daemon);
    };
    for _ in 0..10 {
        round(&daemon);
    }
    let (fds, rss, threads) = (daemon.fd_count(), daemon.rss_kib(), daemon.thread_count());
    for _ in 0..100 {
        round(&daemon);
    }
    let fds_now = daemon.fd_count();
    assert!(fds_now <= fds + 2, "{fds} descriptors became {fds_now}");
    let threads_now = daemon.thread_count();
    assert!(
        threads_now <= threads,
        "{threads} threads became {threads_now}"
    );
    let rss_now = daemon.rss_kib();
    assert!(rss_now <= rss + 1024, "{rss} KiB became {rss_now}");
    // Connections without any message, and connections that stop in the middle of one.
    for count in 0..100 {
        if count % 2 == 0 {
            drop(daemon.stream());
        } else {
            drop(Guest::connect(&daemon, Setup::default()));
        }
    }
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
    drop(guest);
    settle(&daemon);
    let fds_now = daemon.fd_count();
    assert!(fds_now <= fds + 2, "{fds} descriptors became {fds_now}");
}

#[test]
fn a_second_vmm_waits_for_the_first() {
    let daemon = Daemon::start();
    let mut first = Guest::boot(&daemon);
    assert_eq!(first.attach(1, EP), OK);
    let second = daemon.stream();
    assert_eq!(first.map_page(1, 0x1000, 0x1000), OK);
    drop(second);
    assert_eq!(first.map_page(1, 0x2000, 0x1000), OK);
    assert_serves(&daemon, &mut first);
    drop(first);
    let mut third = Guest::boot(&daemon);
    assert_serves(&daemon, &mut third);
}
