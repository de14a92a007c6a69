//! Requests with fields at their extremes, and requests that take long.

use std::time::{Duration, Instant};

use crate::bed::{assert_serves, boot};
use crate::common::daemon::{Daemon, EP, EP2, NO_EP};
use crate::common::guest::{Guest, Layout};
use crate::common::wire::{self, INVAL, NOENT, NOMEM, OK, RANGE, RW, TAIL};

/// Values at the edges of a 64-bit field.
pub const EDGES_64: [u64; 22] = [
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

/// Sends requests as fast as the ring accepts them. Returns their statuses, in order.
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
    // The test derives the allowed statuses from the conditions of the specification that do not
    // depend on the order of requests: a request may be OK only if none of its fields is wrong.
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
            // INVAL if the domain was made with the other flag.
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
            // The range overlaps an earlier mapping or a reserved region, or it needs more tables
            // than the arena has.
            assert!(status == INVAL || status == NOMEM, "{request:x?}");
        }
    }
    assert!(mapped > 30, "{mapped} of these requests succeeded");
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

/// A request that touches each page of such a range takes hours, any other one far less than this.
const HANG: Duration = Duration::from_secs(60);

#[test]
fn one_request_takes_bounded_time() {
    let (daemon, mut guest) = boot();
    let end = guest.config().input.1;
    let start = 0x1_0000_0000;
    assert_eq!(guest.attach(1, EP), OK);
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        for (first, last, gpa) in [
            // Large pages only, then small pages only: these need more tables than the arena holds.
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
    assert!(slowest < HANG, "{slowest:?}");
    // The largest mapping that one request can make: it fills half of the arena with leaves.
    let limit = daemon.status()["arena"]["limit_bytes"].as_u64().unwrap();
    let bytes = (limit / 16) << 12;
    let before = Instant::now();
    assert_eq!(guest.map(1, start, start + bytes - 1, 0x1000, RW), OK);
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    let spent = before.elapsed();
    assert!(spent < HANG, "{spent:?}");
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_ring_stop_waits_for_one_long_request_only() {
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
    // The stop of the ring does not wait for the remaining requests.
    let done = guest.stop_rings()[0];
    assert!(done < 1 + 2 * rounds, "the stop waited for {done} requests");
    guest.driver_ok();
    for _ in 1..2 * rounds {
        assert_eq!(guest.complete().1.status(), OK);
    }
    assert!(daemon.mappings(1).is_empty());
}
