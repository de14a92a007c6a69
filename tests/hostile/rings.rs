//! Ring indices out of range, and rings that the driver or the device overwrites.

use std::time::Duration;

use crate::bed::{
    HOLE, REQUEST, TABLE, TAIL_AT, assert_serves, boot, cpu_ticks, put_attach, request_desc,
    tail_desc,
};
use crate::common::daemon::EP;
use crate::common::guest::RING_RAM;
use crate::common::ring::{Desc, INDIRECT, NEXT, WRITE};
use crate::common::rng::Rng;
use crate::common::wire::{self, OK};
use crate::storm::random_desc;

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
    // A wild head names no buffer that the device could return: the first one returned is the next
    // good chain.
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
        // Overwrites any bytes of the rings, indices included.
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
fn writable_buffers_that_lie_in_the_rings() {
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
