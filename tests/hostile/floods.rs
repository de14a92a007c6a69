//! Floods of legal requests that would exhaust the arena or fill the log.

use std::time::Duration;

use crate::bed::assert_serves;
use crate::common::daemon::{Daemon, EP, EP2, EP3};
use crate::common::guest::{Guest, Layout};
use crate::common::wire::{self, INVAL, NOMEM, OK, RW, TAIL};

#[test]
fn group_moves_and_resets_do_not_fill_the_log() {
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
    // Heads that are not in the ring: the device returns nothing for them.
    for _ in 0..500 {
        guest.try_raw_chain(0xfff0, &[], Duration::ZERO);
    }
    assert_eq!(guest.attach(1, 0x40), OK);
    assert!(daemon.log_len() < 20_000, "{} bytes", daemon.log_len());
}

#[test]
fn a_flood_that_exhausts_the_arena_does_not_affect_other_domains() {
    let daemon = Daemon::with_args(&["--arena-limit", "1M"]);
    let mut guest = Guest::boot(&daemon);
    let rss = daemon.rss_kib();
    let layout = Layout::plain(36, TAIL);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(2, EP2), OK);
    // The endpoint of the other domain has mappings, too.
    for page in 1..=8 {
        assert_eq!(guest.map_page(2, page << 12, page << 13), OK);
    }
    let limit = daemon.status()["arena"]["limit_bytes"].as_u64().unwrap();
    assert_eq!(limit, 1 << 20);
    // One page in each 2 MiB, so that each mapping needs a table of its own.
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
    // The other domain keeps its mappings, can add small ones to tables that it has, and can unmap.
    for page in 1..=8 {
        assert_eq!(daemon.gpa_of(EP2, page << 12), Some(page << 13));
    }
    assert_eq!(guest.map_page(2, 0x10_0000, 0x5000), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x10_0000), Some(0x5000));
    assert_eq!(guest.unmap(2, 0x1000, 0x1fff), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x1000), None);
    assert_eq!(guest.map_page(2, 0x1000, 0x7000), OK);
    // Small domains, old and new, can still get new tables.
    assert_eq!(guest.map_page(2, 0x4000_0000, 0x7000), OK);
    assert_eq!(guest.attach(3, EP3), OK);
    assert_eq!(guest.map_page(3, 0x4000_0000, 0x3000), OK);
    assert_eq!(daemon.gpa_of(EP3, 0x4000_0123), Some(0x3123));
    assert_eq!(guest.map_page(1, 0x7f_0000_0000, 0), NOMEM);
    assert_eq!(guest.detach(3, EP3), OK);
    assert_eq!(guest.detach(2, EP2), OK);
    // The arena gets back all the memory that the flood took.
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

/// A bypass domain has no page table. Its record and those of its endpoints count all the same.
#[test]
fn a_flood_of_bypass_domains_stays_within_the_arena() {
    let daemon = Daemon::spawn(&[
        "--iommu",
        "00:05.0",
        "--arena-limit",
        "1M",
        "--endpoint",
        "00:06.0-3f:1f.7",
    ]);
    let mut guest = Guest::boot(&daemon);
    let used = || daemon.status()["arena"]["used_bytes"].as_u64().unwrap();
    let idle = used();
    let mut made = 0;
    let refused = (EP3 + 8..0x4000).find(|id| {
        let status = guest.attach_bypass(*id, *id);
        assert!(status == OK || status == NOMEM, "{status}");
        made += u64::from(status == OK);
        status == NOMEM
    });
    let refused = refused.expect("NOMEM");
    assert!(made > 500, "{made}");
    assert!(used() <= 1 << 20 && used() > 1 << 19, "{}", used());
    let limits = daemon.control("stats");
    let limits = limits["limits"].as_array().expect("limits");
    let arena = limits.iter().find(|limit| limit["name"] == "arena_bytes");
    assert_eq!(arena.expect("the arena's limit")["hits"], 1);
    // An endpoint that is attached already needs no more memory.
    assert_eq!(guest.attach_bypass(EP3 + 8, EP3 + 9), OK);
    assert_eq!(guest.detach(EP3 + 8, EP3 + 9), OK);
    for id in (EP3 + 8..refused).filter(|id| *id != EP3 + 9) {
        assert_eq!(guest.detach(id, id), OK);
    }
    assert_eq!(used(), idle);
    assert_serves(&daemon, &mut guest);
}
