//! A seeded storm of malformed requests and random chains.

use std::time::Duration;

use crate::bed::{HOLE, TABLE, assert_serves};
use crate::common::daemon::{Daemon, EP, EP2, NO_EP};
use crate::common::guest::{
    Guest, HIGH_LEN, HIGH_RAM, LOW_LEN, LOW_RAM, RING_LEN, RING_RAM, STOCK, Setup,
};
use crate::common::ring::{Desc, INDIRECT, NEXT, WRITE};
use crate::common::rng::Rng;
use crate::common::wire::{self};
use crate::requests::EDGES_64;

/// Makes one random descriptor. Its buffer never lies in the slot of the rings.
pub fn random_desc(rng: &mut Rng, size: u16) -> Desc {
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
    // A buffer that begins below the rings must not extend into them.
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

/// Makes a request with a known type and the right length. Its fields are often legal.
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

/// Sends `total` requests: some well formed with wrong fields, some chains of random bytes.
fn storm(daemon: &Daemon, guest: &mut Guest, seed: u64, total: usize) {
    let mut rng = Rng::new(seed);
    let size = guest.requests.size;
    let mut sent = 0;
    while sent < total {
        // A batch of chains with heads 0, 8, 16, .... At first, each chain has descriptors of its
        // own.
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
                panic!("seed {seed:#x}: chain {chain} of the batch at {sent} was not returned")
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
            "no request of the storm got {status}: {requests}"
        );
    }
    // The storm may have used any domain and endpoint; a reset clears them.
    guest.reboot();
    assert_serves(&daemon, &mut guest);
    let used = daemon.status()["arena"]["used_bytes"].as_u64().unwrap();
    assert!(used < 1 << 20, "{used} bytes of tables without a domain");
}
