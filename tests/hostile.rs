//! A driver and a VMM that mean harm. Whatever they do, the daemon lives, stays within its
//! memory, logs within reason, and serves the next legal request.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP, EP2, EP3, NO_EP};
use common::guest::{
    Guest, HIGH_LEN, HIGH_RAM, LOW_LEN, LOW_RAM, Layout, POISON, RING_LEN, RING_RAM, STOCK, Setup,
    Table,
};
use common::memory::{Region, USER_BASE, memfd};
use common::ring::{Desc, INDIRECT, NEXT, WRITE};
use common::rng::Rng;
use common::wire::{self, INVAL, IOERR, NOENT, NOMEM, OK, RANGE, RW, TAIL};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Where hand-made requests are put.
const REQUEST: u64 = 0x1_0000;
/// Where hand-made tails are put.
const TAIL_AT: u64 = 0x2_0000;
/// Where hand-made indirect tables are put.
const TABLE: u64 = 0x3_0000;
/// No memory from here to the rings' slot.
const HOLE: u64 = LOW_LEN;

fn boot() -> (Daemon, Guest) {
    let daemon = Daemon::start();
    let guest = Guest::boot(&daemon);
    (daemon, guest)
}

/// The daemon is alive and a full round of legal requests gives what it should.
fn assert_serves(daemon: &Daemon, guest: &mut Guest) {
    daemon.assert_alive();
    let domain = 0x77;
    assert_eq!(guest.attach(domain, EP3), OK);
    assert_eq!(guest.map_page(domain, 0x5000, 0x9000), OK);
    assert_eq!(daemon.gpa_of(EP3, 0x5123), Some(0x9123));
    assert_eq!(guest.unmap(domain, 0x5000, 0x5fff), OK);
    assert_eq!(guest.detach(domain, EP3), OK);
}

/// Puts an ATTACH at [`REQUEST`] and poison at [`TAIL_AT`].
fn put_attach(guest: &Guest) {
    guest.memory.write(REQUEST, &wire::attach(1, EP, 0));
    guest.memory.write(TAIL_AT, &[POISON; 64]);
}

/// A readable descriptor over the request at [`REQUEST`].
fn request_desc(flags: u16, next: u16) -> Desc {
    Desc::new(REQUEST, 20, flags, next)
}

/// A writable descriptor over the tail at [`TAIL_AT`].
fn tail_desc(flags: u16, next: u16) -> Desc {
    Desc::new(TAIL_AT, 4, WRITE | flags, next)
}

/// The chain comes back with length 0, no byte written and no domain made.
fn assert_dropped(daemon: &Daemon, guest: &mut Guest, name: &str, descs: &[(u16, Desc)]) {
    put_attach(guest);
    assert_eq!(guest.raw_back(0, descs), 0, "{name}");
    assert_eq!(guest.memory.read(TAIL_AT, 64), [POISON; 64], "{name}");
    assert!(daemon.domains().is_empty(), "{name}");
}

/// The chain comes back with IOERR in the tail at [`TAIL_AT`] and no domain made.
fn assert_io_error(daemon: &Daemon, guest: &mut Guest, name: &str, descs: &[(u16, Desc)]) {
    put_attach(guest);
    assert_eq!(guest.raw_back(0, descs), 4, "{name}");
    assert_eq!(guest.memory.read(TAIL_AT, 4), [IOERR, 0, 0, 0], "{name}");
    assert!(daemon.domains().is_empty(), "{name}");
}

#[test]
fn chains_that_loop() {
    let (daemon, mut guest) = boot();
    assert_dropped(
        &daemon,
        &mut guest,
        "to itself",
        &[(0, request_desc(NEXT, 0))],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "back to the head",
        &[(0, request_desc(NEXT, 1)), (1, tail_desc(NEXT, 0))],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "the tail to itself",
        &[(0, request_desc(NEXT, 1)), (1, tail_desc(NEXT, 1))],
    );
    let ring: Vec<(u16, Desc)> = (0..256)
        .map(|index| {
            (
                index,
                Desc::new(TAIL_AT, 4, WRITE | NEXT, (index + 1) % 256),
            )
        })
        .collect();
    assert_dropped(&daemon, &mut guest, "through the whole table", &ring);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn next_indices_out_of_range() {
    let (daemon, mut guest) = boot();
    for next in [256, 257, 0x7fff, 0x8000, 0xffff] {
        let name = format!("next {next}");
        assert_dropped(&daemon, &mut guest, &name, &[(0, request_desc(NEXT, next))]);
        assert_dropped(
            &daemon,
            &mut guest,
            &name,
            &[(0, request_desc(NEXT, 1)), (1, tail_desc(NEXT, next))],
        );
    }
    // Without NEXT the field means nothing.
    put_attach(&guest);
    let descs = [(0, request_desc(NEXT, 1)), (1, tail_desc(0, 0xffff))];
    assert_eq!(guest.raw_back(0, &descs), 4);
    assert_eq!(guest.memory.read(TAIL_AT, 4), [OK, 0, 0, 0]);
    assert_eq!(guest.detach(1, EP), OK);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn readable_after_writable() {
    let (daemon, mut guest) = boot();
    assert_dropped(
        &daemon,
        &mut guest,
        "tail first",
        &[(0, tail_desc(NEXT, 1)), (1, request_desc(0, 0))],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "tail in the middle",
        &[
            (0, Desc::new(REQUEST, 10, NEXT, 1)),
            (1, tail_desc(NEXT, 2)),
            (2, Desc::new(REQUEST + 10, 10, 0, 0)),
        ],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "readable between two writable",
        &[
            (0, request_desc(NEXT, 1)),
            (1, Desc::new(TAIL_AT, 2, WRITE | NEXT, 2)),
            (2, Desc::new(REQUEST, 20, NEXT, 3)),
            (3, Desc::new(TAIL_AT + 2, 2, WRITE, 0)),
        ],
    );
    assert_serves(&daemon, &mut guest);
}

#[test]
fn everything_readable_or_everything_writable() {
    let (daemon, mut guest) = boot();
    assert_dropped(&daemon, &mut guest, "no tail", &[(0, request_desc(0, 0))]);
    assert_dropped(
        &daemon,
        &mut guest,
        "a readable tail",
        &[(0, request_desc(NEXT, 1)), (1, Desc::new(TAIL_AT, 4, 0, 0))],
    );
    // All writable: no request to parse, but a tail that can be found. Nothing may be done, and
    // what is written must be a failure.
    put_attach(&guest);
    let descs = [
        (0, Desc::new(REQUEST, 20, WRITE | NEXT, 1)),
        (1, tail_desc(0, 0)),
    ];
    let len = guest.raw_back(0, &descs);
    assert!(len == 0 || len == 24 && guest.memory.read(TAIL_AT, 1) == [IOERR]);
    assert!(daemon.domains().is_empty());
    assert_serves(&daemon, &mut guest);
}

#[test]
fn tails_outside_memory() {
    let (daemon, mut guest) = boot();
    for addr in [
        HOLE,
        HOLE - 1,
        HOLE - 3,
        RING_RAM - 4,
        RING_RAM + RING_LEN,
        HIGH_RAM + HIGH_LEN - 2,
        1 << 63,
        u64::MAX - 3,
        u64::MAX - 2,
        u64::MAX,
    ] {
        let name = format!("tail at {addr:#x}");
        assert_dropped(
            &daemon,
            &mut guest,
            &name,
            &[
                (0, request_desc(NEXT, 1)),
                (1, Desc::new(addr, 4, WRITE, 0)),
            ],
        );
    }
    // The padding before a good tail lies outside, the end of the tail does.
    for (first, last) in [
        (Desc::new(HOLE, 16, WRITE | NEXT, 2), tail_desc(0, 0)),
        (
            Desc::new(TAIL_AT, 2, WRITE | NEXT, 2),
            Desc::new(HOLE, 2, WRITE, 0),
        ),
        (
            Desc::new(u64::MAX - 1, 0x1000, WRITE | NEXT, 2),
            tail_desc(0, 0),
        ),
    ] {
        put_attach(&guest);
        let descs = [(0, request_desc(NEXT, 1)), (1, first), (2, last)];
        guest.raw_back(0, &descs);
        daemon.assert_alive();
        if daemon.domains() == [1] {
            assert_eq!(guest.detach(1, EP), OK);
        }
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn requests_outside_memory() {
    let (daemon, mut guest) = boot();
    for addr in [
        HOLE,
        HOLE - 1,
        HOLE - 19,
        RING_RAM - 20,
        HIGH_RAM + HIGH_LEN - 10,
        1 << 63,
        u64::MAX - 19,
        u64::MAX - 10,
        u64::MAX,
    ] {
        let name = format!("request at {addr:#x}");
        assert_io_error(
            &daemon,
            &mut guest,
            &name,
            &[(0, Desc::new(addr, 20, NEXT, 1)), (1, tail_desc(0, 0))],
        );
    }
    assert_io_error(
        &daemon,
        &mut guest,
        "the second half outside",
        &[
            (0, Desc::new(REQUEST, 10, NEXT, 1)),
            (1, Desc::new(HOLE, 10, NEXT, 2)),
            (2, tail_desc(0, 0)),
        ],
    );
    // A request may lie across two slots only where they touch.
    guest.add_region(Region::new(HOLE, 0x1000));
    let at = HOLE - 10;
    guest.memory.write(at, &wire::attach(1, EP, 0)[..10]);
    guest.memory.write(HOLE, &wire::attach(1, EP, 0)[10..]);
    guest.memory.write(TAIL_AT, &[POISON; 4]);
    let descs = [(0, Desc::new(at, 20, NEXT, 1)), (1, tail_desc(0, 0))];
    assert_eq!(guest.raw_back(0, &descs), 4);
    assert_eq!(guest.memory.read(TAIL_AT, 4), [OK, 0, 0, 0]);
    assert_eq!(guest.detach(1, EP), OK);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn descriptor_lengths_at_their_extremes() {
    let (daemon, mut guest) = boot();
    let lens = [
        0,
        1,
        2,
        3,
        4,
        5,
        0xffff,
        0x1_0000,
        0x1_0001,
        1 << 31,
        u32::MAX - 1,
        u32::MAX,
    ];
    for &readable in &lens {
        for &writable in &lens {
            put_attach(&guest);
            let descs = [
                (0, Desc::new(REQUEST, readable, NEXT, 1)),
                (1, Desc::new(TAIL_AT, writable, WRITE, 0)),
            ];
            let len = guest.raw_back(0, &descs);
            let full = writable;
            assert!(len == 0 || len == full, "{readable} {writable}: {len}");
            if !(4..=0x1_0000).contains(&writable) {
                assert_eq!(len, 0, "{readable} {writable}");
                assert!(daemon.domains().is_empty());
            }
            if daemon.domains() == [1] {
                assert_eq!(guest.detach(1, EP), OK);
            }
        }
    }
    // Descriptors of length 0 on the way.
    for table in [Table::Direct, Table::Indirect] {
        let layout = Layout {
            readable: vec![0, 4, 0, 16, 0],
            writable: vec![0, 2, 0, 2, 0],
            table,
        };
        let reply = guest.request_in(&wire::attach(1, EP, 0), &layout);
        assert!(reply.is_untouched() || reply.status() == OK, "{reply:?}");
        if daemon.domains() == [1] {
            assert_eq!(guest.detach(1, EP), OK);
        }
    }
    // Two gigabytes and four gigabytes of writable buffers.
    for count in [2, 3, 5, 255] {
        let mut descs = vec![(0, request_desc(NEXT, 1))];
        for index in 1..=count {
            let flags = if index < count { WRITE | NEXT } else { WRITE };
            descs.push((index, Desc::new(TAIL_AT, 1 << 30, flags, index + 1)));
        }
        assert_dropped(&daemon, &mut guest, "gigabytes", &descs);
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn chains_as_long_as_the_ring_and_longer() {
    let (daemon, mut guest) = boot();
    let table = |guest: &Guest, count: u64| {
        for index in 0..count {
            let flags = if index + 1 < count { NEXT } else { 0 };
            let desc = if index < 20 {
                Desc::new(REQUEST + index, 1, flags, index as u16 + 1)
            } else if index + 1 < count {
                Desc::new(REQUEST, 1, flags, index as u16 + 1)
            } else {
                Desc::new(TAIL_AT, 4, WRITE, 0)
            };
            guest.memory.write(TABLE + 16 * index, &desc.bytes());
        }
        [(0, Desc::new(TABLE, 16 * count as u32, INDIRECT, 0))]
    };
    put_attach(&guest);
    let descs = table(&guest, 256);
    assert_eq!(guest.raw_back(0, &descs), 4);
    assert_eq!(guest.memory.read(TAIL_AT, 4), [OK, 0, 0, 0]);
    assert_eq!(guest.detach(1, EP), OK);
    for count in [257, 300, 0x1000, 0xffff] {
        let descs = table(&guest, count);
        assert_dropped(
            &daemon,
            &mut guest,
            "an indirect chain longer than the ring",
            &descs,
        );
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn indirect_tables_of_every_wrong_kind() {
    let (daemon, mut guest) = boot();
    let good = [request_desc(NEXT, 1), tail_desc(0, 0)];
    let put = |guest: &Guest, at: u64, table: &[Desc]| {
        for (index, desc) in table.iter().enumerate() {
            guest.memory.write(at + 16 * index as u64, &desc.bytes());
        }
    };
    let indirect = |addr, len, flags| [(0, Desc::new(addr, len, INDIRECT | flags, 1))];
    put(&guest, TABLE, &good);
    for len in [0, 1, 8, 15, 17, 31, 33, 0x10_0001, u32::MAX] {
        let descs = indirect(TABLE, len, 0);
        assert_dropped(
            &daemon,
            &mut guest,
            &format!("table of {len} bytes"),
            &descs,
        );
    }
    assert_dropped(&daemon, &mut guest, "cut short", &indirect(TABLE, 16, 0));
    for addr in [HOLE, HOLE - 16, HOLE - 8, 1 << 63, u64::MAX - 15, u64::MAX] {
        let descs = indirect(addr, 32, 0);
        assert_dropped(&daemon, &mut guest, &format!("table at {addr:#x}"), &descs);
    }
    put(&guest, TABLE, &[Desc::new(TABLE, 32, INDIRECT, 0)]);
    assert_dropped(
        &daemon,
        &mut guest,
        "nested in itself",
        &indirect(TABLE, 32, 0),
    );
    put(&guest, TABLE + 0x100, &good);
    put(&guest, TABLE, &[Desc::new(TABLE + 0x100, 32, INDIRECT, 0)]);
    assert_dropped(
        &daemon,
        &mut guest,
        "nested in another",
        &indirect(TABLE, 16, 0),
    );
    put(
        &guest,
        TABLE,
        &[
            request_desc(NEXT, 1),
            Desc::new(TABLE + 0x100, 32, INDIRECT, 0),
        ],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "nested after data",
        &indirect(TABLE, 32, 0),
    );
    for next in [2, 3, 0x7fff, 0xffff] {
        put(&guest, TABLE, &[request_desc(NEXT, next), tail_desc(0, 0)]);
        let name = format!("next {next} in a table of 2");
        assert_dropped(&daemon, &mut guest, &name, &indirect(TABLE, 32, 0));
    }
    put(&guest, TABLE, &[request_desc(NEXT, 1), tail_desc(NEXT, 0)]);
    assert_dropped(&daemon, &mut guest, "a loop", &indirect(TABLE, 32, 0));
    put(&guest, TABLE, &[tail_desc(NEXT, 1), request_desc(0, 0)]);
    assert_dropped(&daemon, &mut guest, "tail first", &indirect(TABLE, 32, 0));
    // NEXT beside INDIRECT is forbidden to the driver; WRITE beside it means nothing. Whatever
    // comes of it is one answer, and none for what follows.
    for flags in [NEXT, WRITE, NEXT | WRITE] {
        put(&guest, TABLE, &good);
        put_attach(&guest);
        let mut descs = indirect(TABLE, 32, flags).to_vec();
        descs.push((1, tail_desc(0, 0)));
        let len = guest.raw_back(0, &descs);
        assert!(len == 0 || len == 4 || len == 8, "flags {flags}: {len}");
        if daemon.domains() == [1] {
            assert_eq!(guest.detach(1, EP), OK);
        }
    }
    // Two tables in one chain.
    put(&guest, TABLE, &good);
    let descs = [
        (0, Desc::new(TABLE, 32, INDIRECT | NEXT, 1)),
        (1, Desc::new(TABLE, 32, INDIRECT, 0)),
    ];
    put_attach(&guest);
    guest.raw_back(0, &descs);
    if daemon.domains() == [1] {
        assert_eq!(guest.detach(1, EP), OK);
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn requests_and_tails_at_odd_addresses() {
    let (daemon, mut guest) = boot();
    for odd in 1..16 {
        guest.memory.write(REQUEST + odd, &wire::attach(1, EP, 0));
        guest.memory.write(TAIL_AT, &[POISON; 64]);
        let descs = [
            (0, Desc::new(REQUEST + odd, 20, NEXT, 1)),
            (1, Desc::new(TAIL_AT + odd, 4, WRITE, 0)),
        ];
        assert_eq!(guest.raw_back(0, &descs), 4);
        let mut want = [POISON; 64];
        want[odd as usize..odd as usize + 4].fill(0);
        assert_eq!(
            guest.memory.read(TAIL_AT, 64),
            want,
            "no byte beside the tail"
        );
        assert_eq!(guest.detach(1, EP), OK);
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_tail_that_lies_over_its_own_request() {
    let (daemon, mut guest) = boot();
    put_attach(&guest);
    let descs = [
        (0, request_desc(NEXT, 1)),
        (1, Desc::new(REQUEST, 4, WRITE, 0)),
    ];
    assert_eq!(guest.raw_back(0, &descs), 4);
    assert_eq!(guest.memory.read(REQUEST, 4), [OK, 0, 0, 0]);
    assert_eq!(daemon.domains(), [1]);
    assert_eq!(guest.detach(1, EP), OK);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn heads_out_of_range() {
    let (daemon, mut guest) = boot();
    for head in [256, 257, 0x8000, 0xffff] {
        guest.requests.publish(&guest.memory, head);
    }
    put_attach(&guest);
    guest
        .requests
        .set_desc(&guest.memory, 0, request_desc(NEXT, 1));
    guest.requests.set_desc(&guest.memory, 1, tail_desc(0, 0));
    guest.requests.publish(&guest.memory, 0);
    guest.kick();
    // A wild head names no buffer to give back: the next good chain is what must come.
    let mut back = guest.wait_used(Duration::from_secs(10));
    while back.is_some_and(|(head, _)| head != 0) {
        back = guest.wait_used(Duration::from_secs(10));
    }
    assert_eq!(back, Some((0, 4)));
    assert_eq!(daemon.domains(), [1]);
    assert_eq!(guest.detach(1, EP), OK);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn wild_available_indices_stop_the_ring_until_it_is_set_up_again() {
    let (daemon, mut guest) = boot();
    for ahead in [257, 0x4000, 0x8000, 0xfffe] {
        assert_eq!(guest.attach(1, EP), OK);
        let wild = guest.requests.avail_idx.wrapping_add(ahead);
        guest.memory.store_u16(guest.requests.avail + 2, wild);
        guest.requests.kick_always();
        std::thread::sleep(Duration::from_millis(50));
        daemon.assert_alive();
        let before = cpu_ticks(&daemon);
        std::thread::sleep(Duration::from_millis(500));
        let spent = cpu_ticks(&daemon) - before;
        assert!(spent <= 10, "{spent} ticks spent on a broken ring");
        guest.reboot();
        assert_serves(&daemon, &mut guest);
    }
}

/// Processor time the daemon has used, in ticks of 10 ms.
fn cpu_ticks(daemon: &Daemon) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn an_available_index_that_moves_back() {
    let (daemon, mut guest) = boot();
    for _ in 0..10 {
        assert_eq!(guest.attach(1, EP), OK);
    }
    let back = guest.requests.avail_idx - 5;
    guest.memory.store_u16(guest.requests.avail + 2, back);
    guest.requests.kick_always();
    std::thread::sleep(Duration::from_millis(50));
    daemon.assert_alive();
    guest.reboot();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_flood_of_kicks_with_nothing_in_the_ring() {
    let (daemon, mut guest) = boot();
    for _ in 0..20_000 {
        guest.requests.kick_always();
        guest.events.kick_always();
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn readable_buffers_in_the_event_queue() {
    let (daemon, mut guest) = boot();
    let (memory, events) = (&guest.memory, &mut guest.events);
    let wild = [
        Desc::new(TAIL_AT, 64, 0, 0),
        Desc::new(TAIL_AT, 0, WRITE, 0),
        Desc::new(TAIL_AT, 1, WRITE, 0),
        Desc::new(HOLE, 64, WRITE, 0),
        Desc::new(TAIL_AT, u32::MAX, WRITE, 0),
        Desc::new(TAIL_AT, 64, WRITE | NEXT, 5),
        Desc::new(TABLE, 7, INDIRECT, 0),
    ];
    for (index, desc) in wild.into_iter().enumerate() {
        events.set_desc(memory, index as u16, desc);
        events.publish(memory, index as u16);
        events.kick_always();
    }
    events.publish(memory, 0xffff);
    events.kick_always();
    assert_serves(&daemon, &mut guest);
    let (memory, events) = (&guest.memory, &mut guest.events);
    memory.store_u16(events.avail + 2, 0x7000);
    events.kick_always();
    assert_serves(&daemon, &mut guest);
}

/// Values at the edges of a 64-bit field.
const EDGES_64: [u64; 22] = [
    0,
    1,
    0xfff,
    0x1000,
    0x1001,
    0x1fff,
    0x2000,
    0xfee0_0000,
    0xfeef_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    (1 << 47) - 1,
    1 << 47,
    (1 << 48) - 1,
    1 << 48,
    1 << 52,
    (1 << 57) - 1,
    i64::MAX as u64,
    1 << 63,
    !0xfff,
    u64::MAX - 1,
    u64::MAX,
];

/// Values at the edges of a 32-bit field.
const EDGES_32: [u32; 12] = [
    0,
    1,
    2,
    EP,
    NO_EP,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    u32::MAX,
    0x55,
];

/// Sends requests as fast as the ring takes them; the statuses, in order.
fn pipeline(guest: &mut Guest, requests: &[Vec<u8>], writable: usize) -> Vec<u8> {
    let mut statuses = Vec::with_capacity(requests.len());
    for batch in requests.chunks(100) {
        for request in batch {
            guest.submit(request, &Layout::plain(request.len(), writable));
        }
        guest.kick();
        for _ in batch {
            statuses.push(guest.complete().1.status());
        }
    }
    statuses
}

#[test]
fn every_field_at_its_extremes_in_combination() {
    let (daemon, mut guest) = boot();
    let config = guest.config();
    let in_range = |domain: u32| (config.domains.0..=config.domains.1).contains(&domain);
    // A reference of what may succeed, taken from the specification's order-free conditions: a
    // request may be OK only where none of its fields is wrong.
    let live = |daemon: &Daemon| daemon.domains();

    // ATTACH and DETACH.
    let mut requests = Vec::new();
    for &domain in &EDGES_32 {
        for &endpoint in &EDGES_32 {
            for flags in [0, 1, 2, 3, 0x8000_0000, u32::MAX] {
                for reserved in [0_u32, 1, u32::MAX] {
                    let mut request = wire::attach(domain, endpoint, flags);
                    request[16..20].copy_from_slice(&reserved.to_le_bytes());
                    requests.push(request);
                }
            }
            requests.push(wire::detach(domain, endpoint));
            let mut request = wire::detach(domain, endpoint);
            request[12..].fill(0xff);
            requests.push(request);
        }
    }
    let statuses = pipeline(&mut guest, &requests, TAIL);
    for (request, status) in requests.iter().zip(statuses) {
        let field = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        let (domain, endpoint) = (field(4), field(8));
        let known = endpoint == EP;
        let attach = request[0] == wire::T_ATTACH;
        let allowed = if attach && (field(12) > 1 || field(16) != 0) {
            vec![INVAL, RANGE, NOENT]
        } else if !known {
            vec![NOENT, RANGE]
        } else if !in_range(domain) {
            vec![RANGE]
        } else if attach {
            // INVAL where the flag is not the domain's.
            vec![OK, INVAL]
        } else {
            vec![OK, INVAL]
        };
        assert!(allowed.contains(&status), "{request:x?}: status {status}");
    }
    for domain in live(&daemon) {
        assert_eq!(guest.detach(domain as u32, EP), OK);
    }

    // MAP and UNMAP.
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach_bypass(2, EP2), OK);
    let mut requests = Vec::new();
    for &first in &EDGES_64 {
        for &last in &EDGES_64 {
            for &gpa in &EDGES_64 {
                requests.push(wire::map(1, first, last, gpa, RW));
                requests.push(wire::unmap(1, first, last));
            }
            for &domain in &EDGES_32 {
                requests.push(wire::map(domain, first, last, 0x1000, RW));
                requests.push(wire::unmap(domain, first, last));
            }
            for bit in 0..32 {
                requests.push(wire::map(1, first, last, 0x1000, 1 << bit));
            }
            requests.push(wire::map(1, first, last, 0x1000, u32::MAX));
            requests.push(wire::unmap(1, 0, u64::MAX));
        }
    }
    let statuses = pipeline(&mut guest, &requests, TAIL);
    let mut mapped = 0;
    for (request, status) in requests.iter().zip(statuses) {
        let u32_at = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
        let (domain, first, last) = (u32_at(4), u64_at(8), u64_at(16));
        if request[0] == wire::T_UNMAP {
            if domain == 1 && first == 0 && last == u64::MAX {
                assert_eq!(status, OK);
            }
            if domain != 1 || last < first {
                assert_ne!(status, OK, "{request:x?}");
            }
            continue;
        }
        let (gpa, flags) = (u64_at(24), u32_at(32));
        let legal = domain == 1
            && first <= last
            && first % 0x1000 == 0
            && last % 0x1000 == 0xfff
            && gpa % 0x1000 == 0
            && gpa
                .checked_add(last.wrapping_sub(first))
                .is_some_and(|end| end < 1 << 52)
            && first >= config.input.0
            && last <= config.input.1
            && flags <= 7;
        if !legal {
            assert_ne!(status, OK, "{request:x?}");
        } else if status == OK {
            mapped += 1;
        } else {
            // An overlap with what an earlier request mapped or with a reserved region, or more
            // small pages than there are tables for.
            assert!(status == INVAL || status == NOMEM, "{request:x?}");
        }
    }
    assert!(mapped > 30, "{mapped} requests of these are legal");
    assert!(daemon.mappings(1).is_empty());

    // PROBE.
    let size = guest.config().probe_size as usize;
    let requests: Vec<Vec<u8>> = EDGES_32
        .iter()
        .map(|&endpoint| {
            let mut request = wire::probe(endpoint);
            request[8..].fill(0xff);
            request
        })
        .collect();
    let statuses = pipeline(&mut guest, &requests, size + TAIL);
    for (&endpoint, status) in EDGES_32.iter().zip(statuses) {
        assert_eq!(status, if endpoint == EP { OK } else { NOENT });
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn one_request_takes_bounded_time() {
    let (daemon, mut guest) = boot();
    let end = guest.config().input.1;
    let start = 0x1_0000_0000;
    assert_eq!(guest.attach(1, EP), OK);
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        for (first, last, gpa) in [
            // Large pages throughout, then small ones only: more than the arena can hold.
            (start, end, 0),
            (start, end, 0x4000_0000),
            (start, end, 0x1000),
            (start + 0x1000, end - 0x1000, 0x3000),
            (start + 0x1000, end - 0x1000, 0x1000),
        ] {
            let before = Instant::now();
            let status = guest.map(1, first, last, gpa, RW);
            slowest = slowest.max(before.elapsed());
            assert!(status == OK || status == NOMEM, "{status}");
            let before = Instant::now();
            assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
            slowest = slowest.max(before.elapsed());
        }
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    // The most one request can fill: half an arena of leaves.
    let limit = daemon.status()["arena"]["limit_bytes"].as_u64().unwrap();
    let bytes = (limit / 16) << 12;
    let before = Instant::now();
    assert_eq!(guest.map(1, start, start + bytes - 1, 0x1000, RW), OK);
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    let spent = before.elapsed();
    assert!(spent < Duration::from_secs(10), "{spent:?}");
    assert_serves(&daemon, &mut guest);
}

#[test]
fn requests_that_take_long_keep_the_vmm_waiting_for_one_of_them_only() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    let start = 0x1_0000_0000;
    let limit = daemon.status()["arena"]["limit_bytes"].as_u64().unwrap();
    let bytes = (limit / 16) << 12;
    let rounds = 30;
    let (map, unmap) = (Layout::plain(36, TAIL), Layout::plain(28, TAIL));
    for _ in 0..rounds {
        let request = wire::map(1, start, start + bytes - 1, 0x1000, RW);
        guest.submit(&request, &map);
        guest.submit(&wire::unmap(1, 0, u64::MAX), &unmap);
    }
    guest.kick();
    guest.complete();
    // The rest is not waited for.
    let done = guest.stop_rings()[0];
    assert!(done < 1 + 2 * rounds, "all {done} requests were done first");
    guest.driver_ok();
    for _ in 1..2 * rounds {
        assert_eq!(guest.complete().1.status(), OK);
    }
    assert!(daemon.mappings(1).is_empty());
}

#[test]
fn a_group_moved_to_and_fro_and_resets_do_not_fill_the_log() {
    let daemon = Daemon::with_config(
        "address = \"00:05.0\"\n[[endpoint]]\nrange = \"00:08.0-00:0f.7\"\ngroup = \"g\"\n",
    );
    let mut guest = Guest::boot(&daemon);
    for endpoint in 0x40..0x80 {
        assert_eq!(guest.attach(1, endpoint), OK);
    }
    for round in 0..500 {
        assert_eq!(guest.attach(2 - round % 2, 0x40), OK);
    }
    for _ in 0..100 {
        guest.reboot();
        assert_eq!(guest.attach(1, 0x40), OK);
    }
    // Heads that are not in the ring: nothing comes back for them.
    for _ in 0..500 {
        guest.raw(0xfff0, &[], Duration::ZERO);
    }
    assert_eq!(guest.attach(1, 0x40), OK);
    assert!(daemon.log_len() < 20_000, "{} bytes", daemon.log_len());
}

#[test]
#[expect(unsafe_code, reason = "passes a pipe off as an event descriptor")]
fn a_kick_descriptor_that_blocks_does_not_outlive_sigterm() {
    let daemon = Daemon::start();
    let mut guest = Guest::connect(&daemon, Setup::default());
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    // Less than the 8 bytes of an event: whoever reads them waits for the rest.
    writer.write_all(&[0; 3]).expect("three bytes");
    // SAFETY: the descriptor was just given up by its owner.
    guest.requests.kick = unsafe { EventFd::from_raw_fd(reader.into_raw_fd()) };
    guest.driver_ok();
    daemon.terminate();
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = daemon.exit_status() {
            break status;
        }
        assert!(Instant::now() < deadline, "SIGTERM is ignored");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(1), "not an orderly end");
    assert!(!daemon.socket().exists() && !daemon.control_socket().exists());
    drop(writer);
}

/// One random descriptor. Its buffer is never in the rings' slot.
fn random_desc(rng: &mut Rng, size: u16) -> Desc {
    let addr = match rng.below(16) {
        0 => rng.u64(),
        1 => HOLE - rng.below(64),
        2 => u64::MAX - rng.below(0x1000),
        3 => HIGH_RAM + HIGH_LEN - rng.below(64),
        4 => TABLE + rng.below(0x1000),
        5 => HIGH_RAM + rng.below(HIGH_LEN),
        _ => LOW_RAM + rng.below(LOW_LEN),
    };
    let addr = if (RING_RAM..RING_RAM + RING_LEN).contains(&addr) {
        HOLE
    } else {
        addr
    };
    let len = match rng.below(12) {
        0 => rng.u32(),
        1 => u32::MAX - rng.below(16) as u32,
        2 => 0,
        3 => 16 * rng.below(300) as u32,
        4 => 0x1_0000 + rng.below(3) as u32 - 1,
        _ => rng.below(96) as u32,
    };
    // A buffer that begins below the rings must not reach them.
    let len = if addr < RING_RAM && addr + u64::from(len) > RING_RAM {
        96
    } else {
        len
    };
    let flags = match rng.below(8) {
        0 => rng.u16(),
        1 => INDIRECT,
        2 => WRITE,
        3 | 4 => NEXT | WRITE,
        _ => NEXT,
    };
    let next = if rng.one_in(16) {
        rng.u16()
    } else {
        rng.below(u64::from(size)) as u16
    };
    Desc::new(addr, len, flags, next)
}

/// A request with legal type and shape, and fields that are often right.
fn random_request(rng: &mut Rng) -> Vec<u8> {
    let domain = if rng.one_in(8) {
        rng.u32()
    } else {
        rng.below(4) as u32
    };
    let endpoint = if rng.one_in(8) {
        rng.u32()
    } else {
        rng.pick(&[EP, EP2, NO_EP])
    };
    let first = match rng.below(4) {
        0 => rng.u64(),
        1 => rng.pick(&EDGES_64),
        _ => rng.below(256) << 12,
    };
    let last = match rng.below(4) {
        0 => rng.u64(),
        1 => rng.pick(&EDGES_64),
        _ => first.wrapping_add((rng.below(16) << 12) + 0xfff),
    };
    let flags = if rng.one_in(8) {
        rng.u32()
    } else {
        rng.below(8) as u32
    };
    let mut request = match rng.below(8) {
        0 => wire::attach(domain, endpoint, flags & 1),
        1 if rng.one_in(8) => wire::detach(domain, endpoint),
        2 | 3 => wire::map(domain, first, last, rng.below(1 << 20) << 12, flags),
        4 | 5 => wire::unmap(domain, first, last),
        6 => wire::probe(endpoint),
        _ => {
            let len = rng.below(80) as usize;
            rng.bytes(len)
        }
    };
    if rng.one_in(16) && !request.is_empty() {
        let at = rng.below(request.len() as u64) as usize;
        request[at] = rng.u8();
    }
    if rng.one_in(16) {
        request.truncate(rng.below(request.len() as u64 + 1) as usize);
    }
    request
}

/// Sends `total` requests: some well formed and wrong, some chains of pure garbage.
fn storm(daemon: &Daemon, guest: &mut Guest, seed: u64, total: usize) {
    let mut rng = Rng::new(seed);
    let size = guest.requests.size;
    let mut sent = 0;
    while sent < total {
        // A batch of chains with heads 0, 8, 16, ..., each with its own descriptors at first.
        let batch = 1 + rng.below(32) as u16;
        if rng.one_in(4) {
            for slot in 0..256 {
                let desc = random_desc(&mut rng, size);
                guest.memory.write(TABLE + 16 * slot, &desc.bytes());
            }
        }
        for chain in 0..batch {
            let head = chain * 8;
            if rng.one_in(2) {
                for index in head..head + 8 {
                    let desc = random_desc(&mut rng, size);
                    guest.requests.set_desc(&guest.memory, index, desc);
                }
            } else {
                let request = random_request(&mut rng);
                let addr = guest.buffer(request.len() + 1);
                guest.memory.write(addr, &request);
                let writable = rng.pick(&[4, 4, 4, 8, 516, 600, 3, 0]);
                let tail = guest.buffer(writable as usize + 1);
                let first = Desc::new(addr, request.len() as u32, NEXT, head + 1);
                guest.requests.set_desc(&guest.memory, head, first);
                let second = Desc::new(tail, writable, WRITE, 0);
                guest.requests.set_desc(&guest.memory, head + 1, second);
            }
        }
        for chain in 0..batch {
            guest.requests.publish(&guest.memory, chain * 8);
        }
        guest.kick();
        for chain in 0..batch {
            let back = guest.wait_used(Duration::from_secs(20));
            let (head, _) = back.unwrap_or_else(|| {
                daemon.assert_alive();
                panic!("seed {seed:#x}: chain {chain} of the batch at {sent} came not back")
            });
            assert_eq!(head, u32::from(chain * 8), "seed {seed:#x} at {sent}");
        }
        sent += usize::from(batch);
    }
}

#[test]
fn a_storm_of_garbage() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_serves(&daemon, &mut guest);
    let rss = daemon.rss_kib();
    for (seed, queue_size, refused) in [
        (0x5eed, 256, 0),
        (0xc0_ffee, 1024, wire::F_EVENT_IDX),
        (3, 512, wire::F_BYPASS_CONFIG),
        (4, 256, wire::F_MMIO | wire::F_PROBE),
    ] {
        drop(guest);
        let setup = Setup {
            features: STOCK & !refused,
            queue_size,
            ..Setup::default()
        };
        guest = Guest::boot_with(&daemon, setup);
        storm(&daemon, &mut guest, seed, 60_000);
        daemon.assert_alive();
    }
    let log = daemon.log_len();
    assert!(log < 64 << 10, "{log} bytes of log");
    let grown = daemon.rss_kib().saturating_sub(rss);
    let arena = daemon.status()["arena"]["used_bytes"].as_u64().unwrap() / 1024;
    assert!(
        grown <= arena + 4096,
        "{grown} KiB more, {arena} KiB of tables"
    );
    let requests = daemon.status()["requests"].to_string();
    for status in ["ok", "ioerr", "inval", "range", "noent"] {
        assert!(
            requests.contains(status),
            "the storm never met {status}: {requests}"
        );
    }
    // The storm has used any domain and endpoint; a reset clears them.
    guest.reboot();
    assert_serves(&daemon, &mut guest);
    let used = daemon.status()["arena"]["used_bytes"].as_u64().unwrap();
    assert!(used < 1 << 20, "{used} bytes of tables with no domain");
}

#[test]
fn a_driver_that_writes_its_rings_while_they_are_read() {
    let (daemon, mut guest) = boot();
    let mut rng = Rng::new(0xdead);
    for round in 0..3000 {
        for _ in 0..8 {
            let desc = random_desc(&mut rng, 256);
            guest
                .requests
                .set_desc(&guest.memory, rng.below(256) as u16, desc);
        }
        let rings = guest.requests.used + 6 + 8 * 256 - RING_RAM;
        // Any bytes anywhere in the rings, indices included.
        let len = 1 + rng.below(16) as usize;
        let at = RING_RAM + rng.below(rings - 16);
        let bytes = rng.bytes(len);
        guest.memory.write(at, &bytes);
        guest.requests.kick_always();
        if round % 300 == 299 {
            guest.reboot();
            assert_serves(&daemon, &mut guest);
        }
    }
    assert!(daemon.log_len() < 1 << 20);
}

#[test]
fn a_device_told_to_write_into_the_rings() {
    let (daemon, mut guest) = boot();
    let mut rng = Rng::new(0xbeef);
    for _ in 0..300 {
        let rings = guest.requests.used + 6 + 8 * 256 - RING_RAM;
        guest.memory.write(REQUEST, &wire::attach(1, EP, 2));
        guest
            .requests
            .set_desc(&guest.memory, 0, request_desc(NEXT, 1));
        let at = RING_RAM + rng.below(rings);
        let len = rng.pick(&[4, 8, 64, 0x1000, 0x1_0000]);
        let desc = Desc::new(at, len, WRITE, 0);
        guest.requests.set_desc(&guest.memory, 1, desc);
        guest.requests.publish(&guest.memory, 0);
        guest.requests.kick_always();
        std::thread::sleep(Duration::from_micros(500));
        daemon.assert_alive();
        guest.reboot();
    }
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_flood_that_exhausts_the_arena_hurts_nobody_else() {
    let daemon = Daemon::with_args(&["--arena-limit", "1M"]);
    let mut guest = Guest::boot(&daemon);
    let rss = daemon.rss_kib();
    let layout = Layout::plain(36, TAIL);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(2, EP2), OK);
    // The other domain is at work.
    for page in 1..=8 {
        assert_eq!(guest.map_page(2, page << 12, page << 13), OK);
    }
    let limit = daemon.status()["arena"]["limit_bytes"].as_u64().unwrap();
    assert_eq!(limit, 1 << 20);
    // One page in each 2 MiB: a table for each mapping.
    let mut made = 0;
    let mut refused = 0;
    for round in 0..100_u64 {
        for slot in 0..100 {
            let first = ((1 + round * 100 + slot) << 21) + 0x10_0000;
            let map = wire::map(1, first, first + 0xfff, 0x1000, RW);
            guest.submit(&map, &layout);
        }
        guest.kick();
        for _ in 0..100 {
            match guest.complete().1.status() {
                OK => made += 1,
                NOMEM => refused += 1,
                status => panic!("status {status}"),
            }
        }
    }
    assert!(
        made > 50 && refused > 5000,
        "{made} made, {refused} refused"
    );
    assert_eq!(
        daemon.mappings(1).len(),
        made,
        "a refused MAP leaves nothing"
    );
    let used = daemon.status()["arena"]["used_bytes"].as_u64().unwrap();
    assert!(used <= limit, "{used} of {limit}");
    assert!(used > limit / 2, "{used} of {limit}");
    let grown = daemon.rss_kib().saturating_sub(rss);
    assert!(grown < 1024 + 4096, "{grown} KiB more than at the start");
    // The other domain: old mappings, small new ones in tables it has, unmap.
    for page in 1..=8 {
        assert_eq!(daemon.gpa_of(EP2, page << 12), Some(page << 13));
    }
    assert_eq!(guest.map_page(2, 0x10_0000, 0x5000), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x10_0000), Some(0x5000));
    assert_eq!(guest.unmap(2, 0x1000, 0x1fff), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x1000), None);
    assert_eq!(guest.map_page(2, 0x1000, 0x7000), OK);
    // Small domains may have new tables still, old ones and new ones.
    assert_eq!(guest.map_page(2, 0x4000_0000, 0x7000), OK);
    assert_eq!(guest.attach(3, EP3), OK);
    assert_eq!(guest.map_page(3, 0x4000_0000, 0x3000), OK);
    assert_eq!(daemon.gpa_of(EP3, 0x4000_0123), Some(0x3123));
    assert_eq!(guest.map_page(1, 0x7f_0000_0000, 0), NOMEM);
    assert_eq!(guest.detach(3, EP3), OK);
    assert_eq!(guest.detach(2, EP2), OK);
    // What the flood took comes back whole.
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    assert!(daemon.mappings(1).is_empty());
    assert_eq!(guest.attach(2, EP2), OK);
    for page in 1..=100_u64 {
        assert_eq!(guest.map_page(2, page << 21, 0x1000), OK);
    }
    assert!(
        daemon.log_len() < 64 << 10,
        "{} bytes of log",
        daemon.log_len()
    );
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_flood_of_domains_stays_within_the_arena() {
    let mut args = vec!["--iommu", "00:05.0", "--arena-limit", "1M"];
    let endpoints: Vec<String> = (6..32)
        .flat_map(|slot| (0..8).map(move |function| format!("00:{slot:02x}.{function}")))
        .collect();
    for endpoint in &endpoints {
        args.extend(["--endpoint", endpoint]);
    }
    let daemon = Daemon::spawn(&args);
    let mut guest = Guest::boot(&daemon);
    let mut made = 0;
    for slot in 6..32 {
        for function in 0..8 {
            let id = slot << 3 | function;
            let status = guest.attach(id, id);
            assert!(status == OK || status == NOMEM, "{status}");
            if status == OK {
                made += 1;
                let status = guest.map_page(id, 0x1000, 0x1000);
                assert!(status == OK || status == NOMEM, "{status}");
            }
        }
    }
    assert!(made > 10, "{made}");
    let arena = &daemon.status()["arena"];
    assert!(arena["used_bytes"].as_u64() <= arena["limit_bytes"].as_u64());
    for slot in 6..32 {
        for function in 0..8 {
            let id = slot << 3 | function;
            let status = guest.detach(id, id);
            assert!(status == OK || status == INVAL);
        }
    }
    assert!(daemon.domains().is_empty());
    assert_serves(&daemon, &mut guest);
}

/// A vhost-user message.
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
                // A length that is not there, or is far too much.
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
        // The daemon may hang up in the middle.
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
    // And in the middle of traffic, rings running.
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
fn file_descriptors_nobody_asked_for() {
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

/// What a frontend may get wrong about one region.
fn region(gpa: u64, len: u64, user: u64, offset: u64, fd: i32) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: len,
        userspace_addr: user,
        mmap_offset: offset,
        mmap_handle: fd,
    }
}

#[test]
fn memory_regions_that_are_not_there() {
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
            // Taken: then a request inside it must not bring the daemon down.
            for addr in [
                info.guest_phys_addr,
                info.guest_phys_addr.wrapping_add(0x1_0000),
            ] {
                let descs = [
                    (0, Desc::new(addr, 20, NEXT, 1)),
                    (1, Desc::new(addr.wrapping_add(64), 4, WRITE, 0)),
                ];
                guest.raw(0, &descs, Duration::from_millis(300));
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
    // The rings' own slot goes away under running rings.
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
    assert!(spent <= 10, "{spent} ticks spent on a ring that is gone");
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
        // Any of these may be refused, and the link closed with it.
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
    // Configuration writes that are too long or far outside.
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
    // Bare connections, and ones that stop half way.
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
