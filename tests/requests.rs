//! Every request over the real socket. Statuses, used lengths and effects must be those of the
//! IOMMU chapter of the virtio specification.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use common::daemon::{Daemon, EP, EP2, EP3, NO_EP};
use common::guest::{Guest, Layout, STOCK, Setup, Table};
use common::wire::{
    self, BYPASS, CONFIG_BYPASS, F_BYPASS_CONFIG, F_DOMAIN_RANGE, F_EVENT_IDX, F_INPUT_RANGE,
    F_MAP_UNMAP, F_MMIO, F_PROBE, INVAL, IOERR, MMIO, NOENT, OK, RANGE, READ, RW, Resv, T_ATTACH,
    T_PROBE, TAIL, UNSUPP, WRITE,
};

/// Boots a stock guest on a new daemon.
fn boot() -> (Daemon, Guest) {
    let daemon = Daemon::start();
    let guest = Guest::boot(&daemon);
    (daemon, guest)
}

/// Boots a guest that refuses the features in `without`.
fn boot_without(without: u64) -> (Daemon, Guest) {
    let daemon = Daemon::start();
    let setup = Setup {
        features: STOCK & !without,
        ..Setup::default()
    };
    let guest = Guest::boot_with(&daemon, setup);
    (daemon, guest)
}

/// All layouts in which a driver may put a request of these lengths into a ring of 256 entries.
fn layouts(readable: usize, writable: usize) -> Vec<Layout> {
    let mut layouts = vec![Layout::plain(readable, writable)];
    for size in [1, 2, 3, 4, 7, 8, 16, 33] {
        if readable.div_ceil(size) + writable.div_ceil(size) > 256 {
            continue;
        }
        for table in [
            Table::Direct,
            Table::Indirect,
            Table::Mixed(1),
            Table::Mixed(2),
            Table::Mixed(5),
        ] {
            layouts.push(Layout::split(readable, writable, size, table));
        }
    }
    // Each part cut in two at every offset.
    for at in 1..readable {
        layouts.push(Layout {
            readable: vec![at, readable - at],
            writable: vec![writable],
            table: Table::Direct,
        });
    }
    for at in 1..writable.min(40) {
        for table in [Table::Direct, Table::Indirect] {
            layouts.push(Layout {
                readable: vec![readable],
                writable: vec![at, writable - at],
                table,
            });
        }
        // The tail may span two descriptors.
        let at = writable - at;
        layouts.push(Layout {
            readable: vec![readable],
            writable: vec![at, writable - at],
            table: Table::Direct,
        });
    }
    layouts
}

#[test]
fn the_layout_over_descriptors_makes_no_difference() {
    for queue_size in [256, 512] {
        for features in [STOCK, STOCK & !F_EVENT_IDX] {
            let daemon = Daemon::start();
            let setup = Setup {
                features,
                queue_size,
                ..Setup::default()
            };
            let mut guest = Guest::boot_with(&daemon, setup);
            let attach = wire::attach(1, EP, 0);
            for layout in layouts(attach.len(), TAIL) {
                assert_eq!(
                    guest.request_in(&attach, &layout).status(),
                    OK,
                    "{layout:?}"
                );
                assert_eq!(detach_in(&mut guest, &layout), OK, "{layout:?}");
            }
            assert_eq!(guest.attach(1, EP), OK);
            let map = wire::map(1, 0x10_0000, 0x10_2fff, 0x20_0000, RW);
            let unmap = wire::unmap(1, 0x10_0000, 0x10_2fff);
            let clash = wire::map(1, 0x10_1000, 0x10_1fff, 0x20_0000, RW);
            for writable in [TAIL, 5, 24] {
                for layout in layouts(map.len(), writable) {
                    assert_eq!(guest.request_in(&map, &layout).status(), OK, "{layout:?}");
                    let refused = guest.request_in(&clash, &layout).status();
                    assert_eq!(refused, INVAL, "{layout:?}");
                    assert_eq!(guest.request(&unmap, writable).status(), OK);
                }
            }
            for layout in layouts(unmap.len(), TAIL) {
                assert_eq!(guest.call(&map), OK);
                assert_eq!(guest.request_in(&unmap, &layout).status(), OK, "{layout:?}");
                assert!(daemon.mappings(1).is_empty());
            }
            let size = guest.config().probe_size as usize;
            let probe = wire::probe(EP);
            let want = guest.request(&probe, size + TAIL);
            for layout in layouts(probe.len(), size + TAIL) {
                assert_eq!(guest.request_in(&probe, &layout), want, "{layout:?}");
            }
        }
    }
}

/// Sends the DETACH of the test above in the layout of its ATTACH (both readable parts have 20
/// bytes).
fn detach_in(guest: &mut Guest, layout: &Layout) -> u8 {
    guest.request_in(&wire::detach(1, EP), layout).status()
}

#[test]
fn many_requests_in_flight_come_back_once_each_and_in_order() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    let layout = Layout::plain(36, TAIL);
    let mut page = 0x100;
    for round in 0..200_u64 {
        let count = 1 + round % 120;
        let heads: Vec<u16> = (0..count)
            .map(|_| {
                page += 1;
                let first = page << 12;
                let map = wire::map(1, first, first + 0xfff, first & 0xff_f000, RW);
                guest.submit(&map, &layout)
            })
            .collect();
        guest.kick();
        for head in heads {
            let (back, reply) = guest.complete();
            assert_eq!(back, head);
            assert_eq!(reply.status(), OK);
        }
    }
    let count = page - 0x100;
    assert_eq!(daemon.mappings(1).len() as u64, count);
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    assert!(daemon.mappings(1).is_empty());
}

#[test]
fn the_used_length_is_the_writable_part_and_the_tail_its_end() {
    let (_daemon, mut guest) = boot();
    for writable in [4, 5, 8, 63, 4096, 0xffff, 0x1_0000] {
        let reply = guest.request(&wire::attach(1, EP, 0), writable);
        assert_eq!(reply.status(), OK);
        assert!(reply.bytes.iter().all(|&byte| byte == 0), "zero padded");
        let reply = guest.request(&wire::attach(1, EP, 8), writable);
        assert_eq!(reply.status(), INVAL);
        let (padding, tail) = reply.bytes.split_last_chunk::<TAIL>().unwrap();
        assert_eq!(tail, &[INVAL, 0, 0, 0]);
        assert!(padding.iter().all(|&byte| byte == 0), "zero padded");
        let reply = guest.request(&wire::detach(1, EP), writable);
        assert_eq!(reply.status(), OK);
    }
}

#[test]
fn a_writable_part_above_the_limit_comes_back_untouched() {
    let (daemon, mut guest) = boot();
    for writable in [0x1_0001, 0x2_0000] {
        let reply = guest.request(&wire::attach(1, EP, 0), writable);
        assert!(reply.is_untouched());
        assert!(daemon.domains().is_empty());
    }
}

#[test]
fn without_room_for_a_tail_nothing_is_written_or_done() {
    let (daemon, mut guest) = boot();
    for request in [wire::attach(1, EP, 0), wire::detach(1, EP), wire::probe(EP)] {
        for writable in 0..TAIL {
            let layout = Layout {
                readable: vec![request.len()],
                writable: vec![1; writable],
                table: Table::Direct,
            };
            assert!(guest.request_in(&request, &layout).is_untouched());
        }
    }
    assert!(daemon.domains().is_empty());
}

#[test]
fn an_unknown_type_comes_back_untouched() {
    let (daemon, mut guest) = boot();
    for kind in (0..=255_u8).filter(|kind| !(T_ATTACH..=T_PROBE).contains(kind)) {
        for len in [4, 20, 36, 72, 200] {
            let mut request = vec![0; len];
            request[0] = kind;
            assert!(guest.request(&request, 64).is_untouched(), "type {kind}");
        }
    }
    assert!(daemon.domains().is_empty());
}

#[test]
fn a_request_too_short_for_its_type_is_an_io_error() {
    let (daemon, mut guest) = boot();
    let probe_size = guest.config().probe_size as usize;
    for (request, writable) in [
        (wire::attach(1, EP, 0), TAIL),
        (wire::detach(1, EP), TAIL),
        (wire::map(1, 0x1000, 0x1fff, 0, RW), TAIL),
        (wire::unmap(1, 0x1000, 0x1fff), TAIL),
        (wire::probe(EP), probe_size + TAIL),
    ] {
        for len in 1..request.len() {
            let reply = guest.request(&request[..len], writable);
            assert_eq!(reply.status(), IOERR, "type {} of {len} bytes", request[0]);
        }
    }
    assert!(daemon.domains().is_empty());
}

#[test]
fn bytes_after_a_request_are_ignored() {
    let (daemon, mut guest) = boot();
    let long = |mut request: Vec<u8>, more: usize| {
        request.resize(request.len() + more, 0xff);
        request
    };
    for more in [1, 16, 4096] {
        assert_eq!(guest.call(&long(wire::attach(1, EP, 0), more)), OK);
        let map = wire::map(1, 0x1000, 0x1fff, 0x3000, RW);
        assert_eq!(guest.call(&long(map, more)), OK);
        assert_eq!(daemon.gpa_of(EP, 0x1234), Some(0x3234));
        assert_eq!(guest.call(&long(wire::unmap(1, 0x1000, 0x1fff), more)), OK);
        assert_eq!(guest.call(&long(wire::detach(1, EP), more)), OK);
    }
}

#[test]
fn the_reserved_bytes_of_the_head_are_ignored() {
    let (daemon, mut guest) = boot();
    for mut request in [
        wire::attach(1, EP, 0),
        wire::map(1, 0x1000, 0x1fff, 0x3000, RW),
        wire::unmap(1, 0x1000, 0x1fff),
        wire::detach(1, EP),
    ] {
        request[1..4].fill(0xff);
        assert_eq!(guest.call(&request), OK, "type {}", request[0]);
    }
    assert!(daemon.domains().is_empty());
}

#[test]
fn attach_makes_a_domain_and_detach_of_the_last_endpoint_ends_it() {
    let (daemon, mut guest) = boot();
    assert!(daemon.domains().is_empty());
    assert_eq!(guest.attach(7, EP), OK);
    assert_eq!(guest.attach(7, EP2), OK);
    assert_eq!(daemon.domains(), [7]);
    assert_eq!(guest.map_page(7, 0x1000, 0x5000), OK);
    assert_eq!(guest.detach(7, EP), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x1000), Some(0x5000));
    assert_eq!(daemon.domains(), [7]);
    assert_eq!(guest.detach(7, EP2), OK);
    assert!(daemon.domains().is_empty());
    assert_eq!(guest.map_page(7, 0x1000, 0x5000), NOENT);
    // The same ID now names a new, empty domain.
    assert_eq!(guest.attach(7, EP), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), None);
    assert!(daemon.mappings(7).is_empty());
}

#[test]
fn attach_again_to_the_same_domain_keeps_its_mappings() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    assert_eq!(guest.attach(1, EP), OK);
    // The specification treats only an ATTACH to *another* domain as DETACH and ATTACH.
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
}

#[test]
fn attach_moves_an_endpoint() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(1, EP2), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    assert_eq!(guest.attach(2, EP), OK);
    assert_eq!(guest.map_page(2, 0x1000, 0x9000), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x9000));
    assert_eq!(daemon.gpa_of(EP2, 0x1000), Some(0x5000));
    // The last endpoint leaves domain 1, which ends it.
    assert_eq!(guest.attach(2, EP2), OK);
    assert_eq!(daemon.domains(), [2]);
    assert_eq!(daemon.gpa_of(EP2, 0x1000), Some(0x9000));
    assert_eq!(guest.unmap(1, 0x1000, 0x1fff), NOENT);
}

#[test]
fn a_refused_attach_changes_nothing() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach_bypass(2, EP2), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    for (request, status) in [
        (wire::attach(1, NO_EP, 0), NOENT),
        (wire::attach(1, u32::MAX, 0), NOENT),
        (wire::attach(3, EP, 2), INVAL),
        (wire::attach(3, EP, 1 << 31), INVAL),
        (wire::attach(3, EP, u32::MAX), INVAL),
        (wire::attach(1, EP, BYPASS), INVAL),
        (wire::attach(2, EP, 0), INVAL),
        (wire::attach(1, EP2, BYPASS), INVAL),
    ] {
        assert_eq!(guest.call(&request), status, "{request:?}");
    }
    for at in 16..20 {
        let mut request = wire::attach(3, EP, 0);
        request[at] = 0x80;
        assert_eq!(guest.call(&request), INVAL, "reserved byte {at}");
    }
    assert_eq!(daemon.domains(), [1, 2]);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
    assert_eq!(daemon.gpa_of(EP2, 0x1000), Some(0x1000));
}

#[test]
fn a_bypass_domain_is_the_identity_and_takes_no_mappings() {
    let (daemon, mut guest) = boot();
    guest.set_config(CONFIG_BYPASS, &[0]);
    assert_eq!(guest.attach_bypass(4, EP), OK);
    for iova in [0, 0x1234, 0xf_ffff_f000] {
        assert_eq!(daemon.gpa_of(EP, iova), Some(iova));
    }
    assert_eq!(daemon.gpa_of(EP2, 0x1234), None);
    assert_eq!(guest.map_page(4, 0x1000, 0x5000), INVAL);
    assert_eq!(guest.unmap(4, 0x1000, 0x1fff), INVAL);
    assert_eq!(guest.attach_bypass(4, EP2), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x1234), Some(0x1234));
    assert_eq!(daemon.endpoint(EP2)["dma"], "bypass");
    // From bypass into translation and back.
    assert_eq!(guest.attach(5, EP), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1234), None);
    assert_eq!(daemon.endpoint(EP)["dma"], "translated");
    assert_eq!(guest.attach_bypass(4, EP), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1234), Some(0x1234));
    assert_eq!(guest.detach(4, EP), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1234), None);
}

#[test]
fn the_bypass_flag_needs_its_feature() {
    let (daemon, mut guest) = boot_without(F_BYPASS_CONFIG);
    assert_eq!(guest.attach_bypass(1, EP), INVAL);
    assert!(daemon.domains().is_empty());
    assert_eq!(guest.attach(1, EP), OK);
}

#[test]
fn detach_refuses_an_endpoint_of_another_domain() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(2, EP2), OK);
    for (domain, endpoint, status) in [
        (1, NO_EP, NOENT),
        (9, NO_EP, NOENT),
        (2, EP, INVAL),
        (9, EP, INVAL),
        (1, EP3, INVAL),
    ] {
        assert_eq!(
            guest.detach(domain, endpoint),
            status,
            "{domain} {endpoint}"
        );
    }
    assert_eq!(daemon.domains(), [1, 2]);
    let mut request = wire::detach(1, EP);
    request[12..20].fill(0xff);
    assert_eq!(guest.call(&request), OK, "reserved bytes are ignored");
    assert_eq!(guest.detach(1, EP), INVAL);
    assert_eq!(daemon.domains(), [2]);
}

#[test]
fn a_detached_endpoint_follows_the_bypass_field() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    assert_eq!(guest.detach(1, EP), OK);
    guest.set_config(CONFIG_BYPASS, &[1]);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x1000));
    guest.set_config(CONFIG_BYPASS, &[0]);
    assert_eq!(daemon.gpa_of(EP, 0x1000), None);
    assert_eq!(daemon.translate(EP, 0x1000)["reason"], "domain");
}

#[test]
fn domains_outside_the_range_are_refused() {
    let (daemon, mut guest) = boot();
    let (first, last) = guest.config().domains;
    assert!(first <= last);
    for domain in [first, last] {
        assert_eq!(guest.attach(domain, EP), OK);
        assert_eq!(guest.map_page(domain, 0x1000, 0x5000), OK);
        assert_eq!(guest.unmap(domain, 0x1000, 0x1fff), OK);
        assert_eq!(guest.detach(domain, EP), OK);
    }
    let outside = [first.checked_sub(1), last.checked_add(1)];
    for domain in outside.into_iter().flatten() {
        assert_eq!(guest.attach(domain, EP), RANGE);
        assert_eq!(guest.detach(domain, EP), RANGE);
        assert_eq!(guest.map_page(domain, 0x1000, 0x5000), RANGE);
        assert_eq!(guest.unmap(domain, 0x1000, 0x1fff), RANGE);
    }
    assert!(daemon.domains().is_empty());
}

#[test]
fn map_translates_with_its_rights() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    for (flags, access) in [(0, "--"), (READ, "r-"), (WRITE, "-w"), (RW, "rw")] {
        let first = 0x10_0000 * u64::from(flags + 1);
        assert_eq!(guest.map(1, first, first + 0x2fff, 0x7000, flags), OK);
        assert_eq!(
            daemon.mappings(1).last().unwrap(),
            &(first, first + 0x2fff, 0x7000, access.to_owned(), false)
        );
        if flags != 0 {
            let answer = daemon.translate(EP, first + 0x2345);
            assert_eq!(answer["result"], "ok", "{answer}");
            assert_eq!(answer["access"], access, "{answer}");
            assert_eq!(daemon.gpa_of(EP, first + 0x2345), Some(0x9345));
        }
        assert_eq!(daemon.gpa_of(EP, first + 0x3000), None);
        assert_eq!(daemon.gpa_of(EP, first - 1), None);
    }
    assert_eq!(guest.map(1, 0x8000, 0x8fff, 0xfec0_0000, WRITE | MMIO), OK);
    let answer = daemon.translate(EP, 0x8000);
    assert_eq!(
        (&answer["mmio"], &answer["access"]),
        (&true.into(), &"-w".into())
    );
    assert_eq!(guest.map(1, 0x9000, 0x9fff, 0xfec0_0000, RW | MMIO), OK);
}

#[test]
fn map_refuses_unknown_flags() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    for bit in 3..32 {
        let status = guest.map(1, 0x1000, 0x1fff, 0x5000, RW | 1 << bit);
        assert_eq!(status, INVAL, "bit {bit}");
    }
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0x5000, u32::MAX), INVAL);
    assert!(daemon.mappings(1).is_empty());
}

#[test]
fn the_mmio_flag_needs_its_feature() {
    let (daemon, mut guest) = boot_without(F_MMIO);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0x5000, RW | MMIO), INVAL);
    assert!(daemon.mappings(1).is_empty());
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0x5000, RW), OK);
}

#[test]
fn map_refuses_bad_ranges() {
    let (daemon, mut guest) = boot();
    let (start, end) = guest.config().input;
    let top = 1_u64 << 52;
    assert_eq!(guest.attach(1, EP), OK);
    for (first, last, gpa, status) in [
        // The end lies before the start, as in a length of zero.
        (0x2000, 0x1fff, 0, INVAL),
        (0x2000, 0, 0, INVAL),
        (u64::MAX, 0, 0, INVAL),
        // Granularity.
        (0x1001, 0x1fff, 0, RANGE),
        (0x1000, 0x1ffe, 0, RANGE),
        (0x1000, 0x2000, 0, RANGE),
        (0x1000, 0x1000, 0, RANGE),
        (0x1000, 0x1fff, 1, RANGE),
        (0x1000, 0x1fff, 0x5800, RANGE),
        // Guest-physical addresses.
        (0x1000, 0x1fff, top, RANGE),
        (0x1000, 0x2fff, top - 0x1000, RANGE),
        (0x1000, 0x1fff, !0xfff, RANGE),
        (0x1000, 0x2fff, !0xfff, RANGE),
        // The input range.
        (end - 0xfff, end + 0x1000, 0, RANGE),
        (end + 1, end + 0x1000, 0, RANGE),
        (!0xfff, u64::MAX, 0, RANGE),
        (0, u64::MAX, 0, RANGE),
    ] {
        assert_eq!(
            guest.map(1, first, last, gpa, RW),
            status,
            "{first:#x}..={last:#x} to {gpa:#x}"
        );
    }
    assert!(daemon.mappings(1).is_empty());
    assert_eq!(guest.map_page(1, start, 0), OK);
    assert_eq!(guest.map_page(1, end - 0xfff, top - 0x1000), OK);
    assert_eq!(daemon.gpa_of(EP, end), Some(top - 1));
}

#[test]
fn map_refuses_overlap_with_any_part_of_a_mapping() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(2, EP2), OK);
    assert_eq!(guest.map(1, 0x20_0000, 0x5f_ffff, 0x40_0000, READ), OK);
    let before = daemon.mappings(1);
    for (first, last) in [
        (0x20_0000, 0x5f_ffff),
        (0x20_0000, 0x20_0fff),
        (0x5f_f000, 0x5f_ffff),
        (0x40_0000, 0x40_0fff),
        (0x1f_f000, 0x20_0fff),
        (0x5f_f000, 0x60_0fff),
        (0, 0xff_ffff),
    ] {
        assert_eq!(guest.map(1, first, last, 0, RW), INVAL, "{first:#x}");
    }
    assert_eq!(daemon.mappings(1), before);
    assert_eq!(guest.map_page(1, 0x1f_f000, 0), OK);
    assert_eq!(guest.map_page(1, 0x60_0000, 0), OK);
    // Another domain is another address space.
    assert_eq!(guest.map_page(2, 0x20_0000, 0), OK);
}

#[test]
fn map_and_unmap_need_a_live_domain() {
    let (_daemon, mut guest) = boot();
    assert_eq!(guest.map_page(3, 0x1000, 0), NOENT);
    assert_eq!(guest.unmap(3, 0x1000, 0x1fff), NOENT);
    assert_eq!(guest.attach(3, EP), OK);
    assert_eq!(guest.map_page(3, 0x1000, 0), OK);
    assert_eq!(guest.detach(3, EP), OK);
    assert_eq!(guest.unmap(3, 0x1000, 0x1fff), NOENT);
}

/// The specification's numbered examples of UNMAP; one address there is one page here.
#[test]
fn the_worked_examples_of_unmap() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    let pages = |first: u64, last: u64| (first << 12, (last << 12) + 0xfff);
    type Pages = (u64, u64);
    let cases: [(&[Pages], Pages, u8, &[Pages]); 7] = [
        (&[], (0, 4), OK, &[]),
        (&[(0, 9)], (0, 9), OK, &[]),
        (&[(0, 4), (5, 9)], (0, 9), OK, &[]),
        (&[(0, 9)], (0, 4), RANGE, &[(0, 9)]),
        (&[(0, 4), (5, 9)], (0, 4), OK, &[(5, 9)]),
        (&[(0, 4)], (0, 9), OK, &[]),
        (&[(0, 4), (10, 14)], (0, 14), OK, &[]),
    ];
    for (mapped, range, status, left) in cases {
        for &(first, last) in mapped {
            let (first, last) = pages(first, last);
            assert_eq!(guest.map(1, first, last, 0x10_0000 + first, RW), OK);
        }
        let (first, last) = pages(range.0, range.1);
        assert_eq!(guest.unmap(1, first, last), status, "{mapped:?} {range:?}");
        let now: Vec<Pages> = daemon
            .mappings(1)
            .iter()
            .map(|mapping| (mapping.0, mapping.1))
            .collect();
        let left: Vec<Pages> = left.iter().map(|&(a, b)| pages(a, b)).collect();
        assert_eq!(now, left, "{mapped:?} {range:?}");
        assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    }
}

#[test]
fn unmap_never_splits_and_never_removes_half() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    // Leaves of all sizes, each mapped by one MAP.
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0, RW), OK);
    assert_eq!(guest.map(1, 0x20_0000, 0x3f_ffff, 0x20_0000, RW), OK);
    assert_eq!(guest.map(1, 0x4000_0000, 0x7fff_ffff, 0x4000_0000, RW), OK);
    assert_eq!(guest.map(1, 0x8000_0000, 0x8040_2fff, 0, RW), OK);
    let before = daemon.mappings(1);
    assert_eq!(before.len(), 4);
    for (first, last) in [
        (0x20_1000, 0x3f_ffff),
        (0x20_0000, 0x3f_efff),
        (0, 0x20_0fff),
        (0x4000_1000, 0x7fff_ffff),
        (0x1000, 0x4000_0fff),
        (0x7fff_f000, 0x8040_2fff),
        (0x8000_0000, 0x8040_1fff),
        (0x8020_0000, u64::MAX),
        (0, 0x803f_ffff),
        (0x1000, 0x1ffe),
        (0x1001, 0x1fff),
    ] {
        assert_eq!(guest.unmap(1, first, last), RANGE, "{first:#x}..={last:#x}");
        assert_eq!(daemon.mappings(1), before, "{first:#x}..={last:#x}");
    }
    assert_eq!(guest.unmap(1, 0x2000, 0x1fff), INVAL);
    assert_eq!(guest.unmap(1, 0x2000, 0x1f_ffff), OK, "a hole");
    assert_eq!(
        guest.unmap(1, 1 << 60, u64::MAX),
        OK,
        "beyond the input range"
    );
    assert_eq!(daemon.mappings(1), before);
    let mut request = wire::unmap(1, 0x1000, 0x1fff);
    request[24..28].fill(0xff);
    assert_eq!(guest.call(&request), OK, "the reserved field is ignored");
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    assert!(daemon.mappings(1).is_empty());
}

#[test]
fn requests_of_features_not_negotiated_come_back_untouched() {
    let (daemon, mut guest) = boot_without(F_MAP_UNMAP);
    assert_eq!(guest.attach(1, EP), OK);
    let map = wire::map(1, 0x1000, 0x1fff, 0x5000, RW);
    assert!(guest.request(&map, TAIL).is_untouched());
    let unmap = wire::unmap(1, 0x1000, 0x1fff);
    assert!(guest.request(&unmap, TAIL).is_untouched());
    assert!(daemon.mappings(1).is_empty());
    drop(guest);
    drop(daemon);
    let (_daemon, mut guest) = boot_without(F_PROBE);
    assert!(guest.probe_sized(EP, 512).is_untouched());
    assert_eq!(guest.attach(1, EP), OK);
}

#[test]
fn ranges_hold_even_if_the_driver_refuses_their_features() {
    let (_daemon, mut guest) = boot_without(F_INPUT_RANGE | F_DOMAIN_RANGE);
    let config = guest.config();
    assert_eq!(guest.attach(1, EP), OK);
    let beyond = config.input.1 + 1;
    assert_eq!(guest.map_page(1, beyond, 0), RANGE);
    if let Some(domain) = config.domains.1.checked_add(1) {
        assert_eq!(guest.attach(domain, EP), RANGE);
    }
}

#[test]
fn probe_fills_its_properties_with_zeros() {
    let (_daemon, mut guest) = boot();
    let size = guest.config().probe_size as usize;
    assert!(size > 0);
    for endpoint in [EP, EP2, EP3] {
        let regions = guest.probe(endpoint);
        let mut sorted: Vec<(u64, u64)> = regions.iter().map(|r| (r.start, r.end)).collect();
        sorted.sort_unstable();
        for region in &sorted {
            assert!(region.0 <= region.1);
        }
        for pair in sorted.windows(2) {
            assert!(pair[0].1 < pair[1].0, "regions overlap: {sorted:x?}");
        }
        assert!(regions.iter().filter(|region| region.subtype == 1).count() <= 1);
    }
    // A buffer longer than `probe_size` is no error.
    let reply = guest.probe_sized(EP, size + 100);
    assert_eq!(reply.status(), OK);
    wire::parse_properties(&reply.bytes[..size + 100]);
    let mut request = wire::probe(EP);
    request[8..].fill(0xff);
    assert_eq!(guest.request(&request, size + TAIL).status(), OK);
}

#[test]
fn probe_refuses_unknown_endpoints_and_short_buffers() {
    let (_daemon, mut guest) = boot();
    let size = guest.config().probe_size as usize;
    for endpoint in [NO_EP, 0, u32::MAX, 0x28] {
        let reply = guest.probe_sized(endpoint, size);
        assert_eq!(reply.status(), NOENT);
        assert!(reply.bytes[..size].iter().all(|&byte| byte == 0));
    }
    for short in [0, 1, 4, 24, size - 1] {
        let reply = guest.probe_sized(EP, short);
        assert_eq!(reply.status(), INVAL, "{short} bytes");
        assert!(reply.bytes[..short].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn the_daemon_counts_requests_by_outcome() {
    let (daemon, mut guest) = boot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(1, NO_EP), NOENT);
    assert_eq!(guest.map_page(1, 0x1000, 0), OK);
    assert_eq!(guest.map_page(1, 0x2000, 0), OK);
    assert_eq!(guest.map_page(1, 0x2000, 0), INVAL);
    assert_eq!(guest.map_page(1, 0x800, 0), RANGE);
    assert_eq!(guest.unmap(1, 0x1000, 0x1fff), OK);
    assert_eq!(guest.detach(2, EP), INVAL);
    let requests = &daemon.status()["requests"];
    assert_eq!(requests["attach"]["ok"], 1, "{requests}");
    assert_eq!(requests["attach"]["noent"], 1, "{requests}");
    assert_eq!(requests["map"]["ok"], 2, "{requests}");
    assert_eq!(requests["map"]["inval"], 1, "{requests}");
    assert_eq!(requests["map"]["range"], 1, "{requests}");
    assert_eq!(requests["unmap"]["ok"], 1, "{requests}");
    assert_eq!(requests["detach"]["inval"], 1, "{requests}");
}

/// Starts a daemon with three endpoints; the arguments are keys of the VM and of each endpoint.
fn config(vm: &str, endpoints: [&str; 3]) -> Daemon {
    let mut toml = format!("address = \"00:05.0\"\n{vm}\n");
    for (slot, keys) in (6..).zip(endpoints) {
        toml += &format!("[[endpoint]]\naddress = \"00:0{slot}.0\"\n{keys}\n");
    }
    Daemon::with_config(&toml)
}

#[test]
fn reserved_regions_are_reported_and_enforced() {
    let daemon = config(
        "",
        [
            "reserved = [{ first = 0x8000000, last = 0x80fffff }]",
            "",
            "",
        ],
    );
    let mut guest = Guest::boot(&daemon);
    let msi = Resv {
        subtype: 1,
        start: 0xfee0_0000,
        end: 0xfeef_ffff,
    };
    let own = Resv {
        subtype: 0,
        start: 0x800_0000,
        end: 0x80f_ffff,
    };
    let mut regions = guest.probe(EP);
    regions.sort_by_key(|region| region.start);
    assert_eq!(regions, [own, msi]);
    assert_eq!(guest.probe(EP2), [msi]);
    assert_eq!(guest.attach(1, EP), OK);
    for region in [own, msi] {
        for (first, last) in [
            (region.start, region.end),
            (region.start, region.start + 0xfff),
            (region.end - 0xfff, region.end),
            (region.start - 0x1000, region.start + 0xfff),
            (region.end - 0xfff, region.end + 0x1000),
            (0x1000, 0xffff_ffff),
        ] {
            let status = guest.map(1, first, last, 0, RW);
            assert_eq!(status, INVAL, "{first:#x}..={last:#x}");
            let status = guest.map(1, first, last, 0, RW | MMIO);
            assert_eq!(status, INVAL, "{first:#x}..={last:#x}");
        }
        assert_eq!(guest.map_page(1, region.start - 0x1000, 0), OK);
        assert_eq!(guest.map_page(1, region.end + 1, 0), OK);
        assert_eq!(
            guest.unmap(1, 0, u64::MAX),
            OK,
            "an UNMAP of everything skips regions"
        );
    }
    // A reserved region is not memory in bypass mode, either.
    assert_eq!(guest.attach_bypass(2, EP2), OK);
    assert_eq!(daemon.gpa_of(EP2, 0xfedf_ffff), Some(0xfedf_ffff));
    assert_eq!(daemon.gpa_of(EP2, 0xfee0_0000), None);
    assert_eq!(daemon.gpa_of(EP3, 0xfeef_ffff), None);
}

#[test]
fn an_endpoint_whose_regions_are_mapped_cannot_join() {
    let daemon = config(
        "",
        [
            "reserved = [{ first = 0x8000000, last = 0x80fffff }]",
            "",
            "",
        ],
    );
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP2), OK);
    assert_eq!(guest.map(1, 0x700_0000, 0x8ff_ffff, 0, RW), OK);
    assert_eq!(guest.attach(2, EP), OK);
    assert_eq!(guest.map_page(2, 0x1000, 0x5000), OK);
    assert_eq!(guest.attach(1, EP), UNSUPP);
    // The endpoint stays in its old domain.
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
    assert_eq!(guest.unmap(1, 0x700_0000, 0x8ff_ffff), OK);
    assert_eq!(guest.attach(1, EP), OK);
    // From now on the region counts for the whole domain, until the endpoint leaves.
    assert_eq!(guest.map(1, 0x700_0000, 0x8ff_ffff, 0, RW), INVAL);
    assert_eq!(guest.detach(1, EP), OK);
    assert_eq!(guest.map(1, 0x700_0000, 0x8ff_ffff, 0, RW), OK);
}

#[test]
fn the_maximum_number_of_regions_fits_the_answer_to_probe() {
    let regions: Vec<String> = (0..64_u64)
        .map(|index| {
            let first = (index + 1) << 20;
            format!("{{ first = {first}, last = {} }}", first + 0xfff)
        })
        .collect();
    let daemon = config(
        &format!("reserved = [{}]", regions.join(", ")),
        ["", "", ""],
    );
    let mut guest = Guest::boot(&daemon);
    let regions = guest.probe(EP);
    assert_eq!(regions.len(), 64);
    for (index, region) in regions.iter().enumerate() {
        let start = (index as u64 + 1) << 20;
        let want = Resv {
            subtype: 0,
            start,
            end: start + 0xfff,
        };
        assert_eq!(region, &want);
    }
}

#[test]
fn endpoints_of_one_group_stay_in_one_domain() {
    let group = "group = \"card\"";
    let daemon = config("", [group, group, ""]);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    assert_eq!(guest.attach(2, EP2), UNSUPP);
    assert_eq!(guest.attach_bypass(2, EP2), UNSUPP);
    assert_eq!(daemon.domains(), [1]);
    assert_eq!(guest.attach(2, EP3), OK, "another group");
    assert_eq!(guest.attach(1, EP2), OK);
    // A driver moves a group one endpoint at a time; the endpoints that have not moved are blocked.
    assert_eq!(guest.attach(3, EP), OK);
    assert_eq!(guest.map_page(3, 0x1000, 0x9000), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x9000));
    assert_eq!(daemon.gpa_of(EP2, 0x1000), None);
    assert_eq!(daemon.endpoint(EP2)["dma"], "blocked");
    assert_eq!(guest.attach(3, EP2), OK);
    assert_eq!(daemon.gpa_of(EP2, 0x1000), Some(0x9000));
    assert_eq!(guest.detach(3, EP), OK);
    assert_eq!(guest.detach(3, EP2), OK);
    assert_eq!(guest.attach(1, EP2), OK);
}

#[test]
fn the_address_width_bounds_the_input_range() {
    for width in [32, 39, 48, 49, 57] {
        let width_arg = width.to_string();
        let daemon = Daemon::with_args(&["--address-width", &width_arg, "--no-reserved"]);
        let mut guest = Guest::boot(&daemon);
        let end = (1_u64 << width) - 1;
        assert_eq!(guest.config().input, (0, end), "width {width}");
        assert!(guest.probe(EP).is_empty());
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map_page(1, end - 0xfff, 0x5000), OK);
        assert_eq!(guest.map_page(1, end + 1, 0x5000), RANGE);
        assert_eq!(guest.map(1, end - 0x1fff, end + 0x1000, 0, RW), RANGE);
        assert_eq!(daemon.gpa_of(EP, end), Some(0x5fff));
        assert_eq!(daemon.gpa_of(EP, end + 1), None);
        assert_eq!(daemon.gpa_of(EP, u64::MAX), None);
        assert_eq!(guest.unmap(1, end - 0xfff, u64::MAX), OK);
        assert_eq!(daemon.gpa_of(EP, end), None);
        // One mapping of the whole address space, up to the highest guest-physical address.
        let last = end.min((1 << 52) - 1);
        assert_eq!(guest.map(1, 0, last, 0, RW), OK);
        assert_eq!(daemon.gpa_of(EP, last), Some(last));
        assert_eq!(guest.unmap(1, 0, last), OK);
    }
}

#[test]
fn the_granule_is_reported_and_enforced() {
    for (name, size) in [
        ("4k", 1 << 12),
        ("16k", 1 << 14),
        ("64k", 1 << 16),
        ("2m", 1_u64 << 21),
    ] {
        let daemon = Daemon::with_args(&["--granule", name]);
        let mut guest = Guest::boot(&daemon);
        let mask = guest.config().page_size_mask;
        assert_eq!(1 << mask.trailing_zeros(), size, "{name}: {mask:#x}");
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map(1, size, 2 * size - 1, 3 * size, RW), OK);
        assert_eq!(daemon.gpa_of(EP, size + 1), Some(3 * size + 1));
        assert_eq!(guest.unmap(1, size, 2 * size - 1), OK);
        let half = size / 2;
        for (first, last, gpa) in [
            (size + half, 2 * size - 1, 0),
            (size, 2 * size - 1 - half, 0),
            (size, 2 * size - 1, half),
        ] {
            assert_eq!(guest.map(1, first, last, gpa, RW), RANGE, "{name}");
        }
        // A mapping that shares one byte with the MSI window is refused, whatever the granule.
        let first = 0xfee0_0000 & !(size - 1);
        assert_eq!(
            guest.map(1, first, first + size - 1, 0, RW),
            INVAL,
            "{name}"
        );
    }
}

#[test]
fn the_number_of_domains_bounds_their_ids() {
    let daemon = config("domains = 4", ["", "", ""]);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.config().domains, (0, 3));
    assert_eq!(guest.attach(3, EP), OK);
    assert_eq!(guest.attach(4, EP2), RANGE);
    assert_eq!(guest.detach(4, EP), RANGE);
    assert_eq!(daemon.domains(), [3]);
}

#[test]
fn bypass_at_boot_has_its_configured_value() {
    for (value, bypass) in [("on", 1), ("off", 0)] {
        let daemon = Daemon::with_args(&["--bypass", value]);
        for _ in 0..2 {
            let mut guest = Guest::boot(&daemon);
            assert_eq!(guest.config().bypass, bypass);
            let want = (bypass == 1).then_some(0x1234);
            assert_eq!(daemon.gpa_of(EP, 0x1234), want);
            guest.set_config(CONFIG_BYPASS, &[1 - bypass]);
            assert_eq!(guest.config().bypass, 1 - bypass);
            drop(guest);
        }
    }
}
