//! Descriptor chains that loop, point outside memory, overlap or have impossible lengths.

use crate::bed::{
    HOLE, REQUEST, TABLE, TAIL_AT, assert_dropped, assert_io_error, assert_serves, boot,
    put_attach, request_desc, tail_desc,
};
use crate::common::daemon::EP;
use crate::common::guest::{Guest, HIGH_LEN, HIGH_RAM, Layout, POISON, RING_LEN, RING_RAM, Table};
use crate::common::memory::Region;
use crate::common::ring::{Desc, INDIRECT, NEXT, WRITE};
use crate::common::wire::{self, IOERR, OK};

#[test]
fn chains_that_loop() {
    let (daemon, mut guest) = boot();
    assert_dropped(
        &daemon,
        &mut guest,
        "head links to itself",
        &[(0, request_desc(NEXT, 0))],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "tail links back to the head",
        &[(0, request_desc(NEXT, 1)), (1, tail_desc(NEXT, 0))],
    );
    assert_dropped(
        &daemon,
        &mut guest,
        "tail links to itself",
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
    assert_dropped(&daemon, &mut guest, "loop through the whole table", &ring);
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
    // Without NEXT, the device ignores the field.
    put_attach(&guest);
    let descs = [(0, request_desc(NEXT, 1)), (1, tail_desc(0, 0xffff))];
    assert_eq!(guest.raw_chain(0, &descs), 4);
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
    // All writable: the device finds a tail, but no request to decode. It must do nothing, and the
    // status that it writes must be a failure.
    put_attach(&guest);
    let descs = [
        (0, Desc::new(REQUEST, 20, WRITE | NEXT, 1)),
        (1, tail_desc(0, 0)),
    ];
    let len = guest.raw_chain(0, &descs);
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
    // The padding before the tail lies outside memory, the tail itself inside.
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
        guest.raw_chain(0, &descs);
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
    // A request may span two slots only if they are adjacent.
    guest.add_region(Region::new(HOLE, 0x1000));
    let at = HOLE - 10;
    guest.memory.write(at, &wire::attach(1, EP, 0)[..10]);
    guest.memory.write(HOLE, &wire::attach(1, EP, 0)[10..]);
    guest.memory.write(TAIL_AT, &[POISON; 4]);
    let descs = [(0, Desc::new(at, 20, NEXT, 1)), (1, tail_desc(0, 0))];
    assert_eq!(guest.raw_chain(0, &descs), 4);
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
            let len = guest.raw_chain(0, &descs);
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
    // Descriptors of length 0 between the others.
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
    assert_eq!(guest.raw_chain(0, &descs), 4);
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
fn invalid_indirect_tables() {
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
    // The driver must not set NEXT beside INDIRECT; WRITE beside it has no meaning. The device may
    // answer the chain in any way, but it must return it exactly once and serve the next one.
    for flags in [NEXT, WRITE, NEXT | WRITE] {
        put(&guest, TABLE, &good);
        put_attach(&guest);
        let mut descs = indirect(TABLE, 32, flags).to_vec();
        descs.push((1, tail_desc(0, 0)));
        let len = guest.raw_chain(0, &descs);
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
    guest.raw_chain(0, &descs);
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
        assert_eq!(guest.raw_chain(0, &descs), 4);
        let mut want = [POISON; 64];
        want[odd as usize..odd as usize + 4].fill(0);
        assert_eq!(
            guest.memory.read(TAIL_AT, 64),
            want,
            "no byte outside the tail is written"
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
    assert_eq!(guest.raw_chain(0, &descs), 4);
    assert_eq!(guest.memory.read(REQUEST, 4), [OK, 0, 0, 0]);
    assert_eq!(daemon.domains(), [1]);
    assert_eq!(guest.detach(1, EP), OK);
    assert_serves(&daemon, &mut guest);
}
