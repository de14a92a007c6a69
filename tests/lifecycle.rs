//! Connections, pauses, resets and memory slots, and the domains, requests and settings that outlive them. Also
//! features and the configuration space.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP, EP2};
use common::guest::{Guest, HIGH_LEN, HIGH_RAM, LOW_LEN, Layout, RING_RAM, STOCK, Setup};
use common::memory::{Region, memfd};
use common::wire::{
    self, CONFIG_BYPASS, CONFIG_LEN, F_BYPASS, F_BYPASS_CONFIG, F_EVENT_IDX, F_PROTOCOL,
    F_VERSION_1, OK, RW, TAIL,
};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// The `connected` field of the status.
fn connected(daemon: &Daemon) -> bool {
    daemon.status()["connected"].as_bool().expect("connected")
}

/// Whether there is RAM behind the mapping at `iova`.
fn backed(daemon: &Daemon, iova: u64) -> bool {
    let answer = daemon.translate(EP, iova);
    assert_eq!(answer["result"], "ok", "{answer}");
    answer["backed"].as_bool().expect("backed")
}

#[test]
fn exactly_the_implemented_features_are_offered() {
    let daemon = Daemon::start();
    let mut guest = Guest::connect(&daemon, Setup::default());
    assert_eq!(
        guest.offered & STOCK,
        STOCK,
        "missing {:#x}",
        STOCK & !guest.offered
    );
    assert_eq!(guest.offered & F_BYPASS, 0, "BYPASS is superseded");
    let extra = guest.offered & !(STOCK | F_PROTOCOL);
    assert_eq!(extra, 0, "no other feature may be offered");
    for wanted in [
        Protocol::MQ,
        Protocol::CONFIG,
        Protocol::REPLY_ACK,
        Protocol::CONFIGURE_MEM_SLOTS,
        Protocol::RESET_DEVICE,
    ] {
        assert!(guest.protocol.contains(wanted), "{wanted:?}");
    }
    for unwanted in [
        Protocol::STATUS,
        Protocol::INFLIGHT_SHMFD,
        Protocol::LOG_SHMFD,
        Protocol::PAGEFAULT,
    ] {
        assert!(!guest.protocol.contains(unwanted), "{unwanted:?}");
    }
    assert_eq!(guest.frontend.get_queue_num().unwrap(), 2);
    assert!(guest.frontend.get_max_mem_slots().unwrap() >= 32);
}

#[test]
fn every_mix_of_ring_features_works() {
    let daemon = Daemon::start();
    for refused in [
        0,
        F_EVENT_IDX,
        F_BYPASS_CONFIG,
        F_EVENT_IDX | F_BYPASS_CONFIG,
    ] {
        for queue_size in [2, 4, 64, 256, 1024] {
            let setup = Setup {
                features: STOCK & !refused,
                queue_size,
                slots_one_by_one: queue_size == 64,
            };
            let mut guest = Guest::boot_with(&daemon, setup);
            assert_eq!(guest.features & F_VERSION_1, F_VERSION_1);
            assert_eq!(guest.attach(1, EP), OK, "{setup:x?}");
            // Two rounds through the ring, with as many requests at a time as fit.
            let pages: Vec<u64> = (1..=u64::from(queue_size).max(20)).collect();
            for batch in pages.chunks(usize::from(queue_size / 2)) {
                for page in batch {
                    let first = page << 12;
                    let map = wire::map(1, first, first + 0xfff, first, RW);
                    guest.submit(&map, &Layout::plain(map.len(), TAIL));
                }
                guest.kick();
                for _ in batch {
                    assert_eq!(guest.complete().1.status(), OK, "{setup:x?}");
                }
            }
            assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
            drop(guest);
        }
    }
}

#[test]
fn the_driver_is_notified_when_it_asks() {
    let daemon = Daemon::start();
    for refused in [0, F_EVENT_IDX] {
        let setup = Setup {
            features: STOCK & !refused,
            ..Setup::default()
        };
        let mut guest = Guest::boot_with(&daemon, setup);
        let attach = wire::attach(1, EP, 0);
        let layout = Layout::plain(attach.len(), TAIL);
        for round in 0..300 {
            while guest.requests.call.read().is_ok() {}
            // Before the request: a worker that polls may serve it without a kick.
            guest.requests.enable_notification(&guest.memory);
            guest.submit(&attach, &layout);
            guest.kick();
            let deadline = Instant::now() + Duration::from_secs(30);
            while guest.requests.call.read().is_err() {
                assert!(Instant::now() < deadline, "round {round}: no call");
                thread::yield_now();
            }
            assert_eq!(guest.complete().1.status(), OK);
        }
        if guest.requests.event_idx {
            // Like a stock driver, the guest polls the used ring and never moves used_event.
            while guest.requests.call.read().is_ok() {}
            for _ in 0..300 {
                guest.submit(&attach, &layout);
                guest.requests.kick(&guest.memory);
                assert_eq!(guest.complete().1.status(), OK);
            }
            assert!(
                guest.requests.call.read().is_err(),
                "the device must not send calls that the driver has not asked for"
            );
        }
        drop(guest);
    }
}

#[test]
fn the_configuration_space_is_read_at_any_offset_and_length() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    let whole = guest.config_bytes(0, CONFIG_LEN);
    for offset in 0..CONFIG_LEN + 8 {
        for len in 1..=CONFIG_LEN + 8 {
            let got = guest.config_bytes(offset, len);
            let want: Vec<u8> = (offset..offset + len)
                .map(|at| whole.get(at as usize).copied().unwrap_or(0))
                .collect();
            assert_eq!(got, want, "offset {offset} length {len}");
        }
    }
    for (offset, len) in [(0, 256), (255, 1), (200, 56), (39, 217)] {
        assert_eq!(guest.config_bytes(offset, len).len(), len as usize);
    }
    let config = guest.config();
    assert_ne!(config.page_size_mask, 0);
    assert_ne!(config.page_size_mask & 0x1000, 0, "4 KiB pages");
    assert!(config.input.0 < config.input.1);
    assert!(config.domains.0 < config.domains.1);
    assert!(config.bypass <= 1);
    assert_eq!(config.reserved, [0; 3]);
}

#[test]
fn only_the_bypass_byte_can_be_written_and_only_0_or_1() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    guest.set_config(CONFIG_BYPASS, &[0]);
    let before = guest.config();
    assert_eq!(before.bypass, 0);
    for offset in (0..CONFIG_LEN).filter(|&offset| offset != CONFIG_BYPASS) {
        for value in [0, 1, 0xff] {
            guest.set_config(offset, &[value]);
            assert_eq!(guest.config(), before, "offset {offset}");
        }
    }
    for value in 2..=255 {
        guest.set_config(CONFIG_BYPASS, &[value]);
        assert_eq!(guest.config(), before, "value {value}");
    }
    guest.set_config(0, &[0xff; CONFIG_BYPASS as usize]);
    guest.set_config(CONFIG_BYPASS + 1, &[1; 3]);
    guest.set_config(CONFIG_LEN, &[1; 64]);
    guest.set_config(255, &[1]);
    assert_eq!(guest.config(), before);
    // A VMM writes one byte as the whole image with that byte changed.
    let mut image = guest.config_bytes(0, CONFIG_LEN);
    image[CONFIG_BYPASS as usize] = 1;
    guest.set_config(0, &image);
    assert_eq!(guest.config().bypass, 1);
    assert_eq!(daemon.status()["bypass"], true);
    assert_eq!(daemon.gpa_of(EP, 0x1234), Some(0x1234));
    image[..36].fill(0xff);
    image[CONFIG_BYPASS as usize] = 0;
    guest.set_config(0, &image);
    assert_eq!(guest.config(), before);
    assert_eq!(daemon.gpa_of(EP, 0x1234), None);
    guest.set_config(CONFIG_BYPASS - 4, &[0, 0, 0, 0, 1]);
    assert_eq!(guest.config().bypass, 1, "a write that ends with the byte");
}

#[test]
fn bypass_written_before_the_driver_is_ready_counts() {
    let daemon = Daemon::start();
    for value in [0, 1] {
        let mut guest = Guest::connect(&daemon, Setup::default());
        guest.set_config(CONFIG_BYPASS, &[value]);
        assert_eq!(guest.config().bypass, value);
        assert_eq!(daemon.gpa_of(EP, 0x1234), None, "no driver yet");
        guest.driver_ok();
        daemon.wait_for_driver();
        assert_eq!(guest.config().bypass, value);
        let want = (value == 1).then_some(0x1234);
        assert_eq!(daemon.gpa_of(EP, 0x1234), want);
        drop(guest);
    }
}

#[test]
fn a_driver_without_bypass_config_does_not_write_bypass() {
    let daemon = Daemon::start();
    let setup = Setup {
        features: STOCK & !F_BYPASS_CONFIG,
        ..Setup::default()
    };
    let mut guest = Guest::connect(&daemon, setup);
    guest.set_config(CONFIG_BYPASS, &[0]);
    assert_eq!(guest.config().bypass, 0, "before the negotiation");
    for round in ["the first driver", "a new driver"] {
        guest.driver_ok();
        guest.set_config(CONFIG_BYPASS, &[1]);
        assert_eq!(guest.config().bypass, 0, "{round}");
        assert_eq!(daemon.gpa_of(EP, 0x1234), None, "{round}");
        assert_eq!(guest.attach(1, EP), OK);
        guest.set_config(CONFIG_BYPASS, &[1]);
        assert_eq!(guest.detach(1, EP), OK);
        assert_eq!(daemon.gpa_of(EP, 0x1234), None, "{round}");
        guest.stop_rings();
        guest.clear_rings();
    }
    // Between two drivers firmware may write it.
    guest.set_config(CONFIG_BYPASS, &[1]);
    assert_eq!(guest.config().bypass, 1);
    guest.driver_ok();
    guest.set_config(CONFIG_BYPASS, &[0]);
    assert_eq!(guest.config().bypass, 1);
}

#[test]
fn a_pause_keeps_every_domain() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach_bypass(2, EP2), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    for round in 1..20_u64 {
        let done = guest.requests.used_idx;
        let bases = guest.stop_rings();
        assert_eq!(bases[0], done, "the base is the next chain to take");
        assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000), "while paused");
        guest.driver_ok();
        assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
        assert_eq!(daemon.gpa_of(EP2, 0x1000), Some(0x1000));
        assert_eq!(guest.map_page(1, 0x1000 + (round << 12), 0), OK);
    }
    assert_eq!(daemon.mappings(1).len(), 20);
}

#[test]
fn requests_submitted_while_paused_are_served_on_resume() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    guest.stop_rings();
    let map = wire::map(1, 0x1000, 0x1fff, 0x5000, RW);
    guest.submit(&map, &Layout::plain(map.len(), TAIL));
    guest.kick();
    thread::sleep(Duration::from_millis(50));
    assert!(guest.requests.take_used(&guest.memory).is_none());
    assert!(daemon.mappings(1).is_empty());
    guest.driver_ok();
    assert_eq!(guest.complete().1.status(), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
}

#[test]
fn a_pause_in_the_middle_of_traffic_loses_nothing() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let layout = Layout::plain(36, TAIL);
    let mut page = 0;
    for round in 0..50 {
        let count = 100;
        for _ in 0..count {
            page += 1;
            let first = page << 12;
            guest.submit(&wire::map(1, first, first + 0xfff, 0, RW), &layout);
        }
        guest.kick();
        thread::sleep(Duration::from_micros(round % 7 * 20));
        guest.stop_rings();
        let used = guest.memory.load_u16(guest.requests.used + 2);
        thread::sleep(Duration::from_millis(2));
        assert_eq!(
            guest.memory.load_u16(guest.requests.used + 2),
            used,
            "the device must not write after the ring has stopped"
        );
        guest.driver_ok();
        for _ in 0..count {
            assert_eq!(guest.complete().1.status(), OK);
        }
    }
    assert_eq!(daemon.mappings(1).len() as u64, page);
}

#[test]
fn a_disabled_ring_is_not_served() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    guest.frontend.set_vring_enable(0, false).unwrap();
    let map = wire::map(1, 0x1000, 0x1fff, 0x5000, RW);
    guest.submit(&map, &Layout::plain(map.len(), TAIL));
    guest.requests.kick_always();
    thread::sleep(Duration::from_millis(100));
    assert!(guest.requests.take_used(&guest.memory).is_none());
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.complete().1.status(), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
}

#[test]
fn a_reset_drops_every_domain_and_keeps_the_bypass_field() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    for bypass in [0, 1, 0] {
        guest.set_config(CONFIG_BYPASS, &[bypass]);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.attach_bypass(2, EP2), OK);
        assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
        guest.reboot();
        daemon.wait_for("the reset", || daemon.domains().is_empty());
        assert_eq!(guest.config().bypass, bypass);
        let want = (bypass == 1).then_some(0x1000);
        assert_eq!(daemon.gpa_of(EP, 0x1000), want);
        assert_eq!(daemon.gpa_of(EP2, 0x1000), want);
        assert_eq!(guest.map_page(1, 0x1000, 0x5000), wire::NOENT);
        assert_eq!(guest.attach(1, EP), OK);
        assert!(daemon.mappings(1).is_empty());
    }
}

#[test]
fn a_reset_in_the_middle_of_traffic_is_not_taken_for_a_pause() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    let layout = Layout::plain(36, TAIL);
    for round in 0..300_u64 {
        assert_eq!(guest.attach(1, EP), OK, "round {round}");
        for page in 0..round % 100 {
            let first = (1 + page) << 12;
            guest.submit(&wire::map(1, first, first + 0xfff, 0, RW), &layout);
        }
        // When the ring is stopped, the worker is reading it or about to.
        guest.requests.kick_always();
        for _ in 0..round % 5 {
            thread::yield_now();
        }
        guest.reboot();
        let status = guest.map_page(1, 0x1000, 0);
        assert_eq!(status, wire::NOENT, "round {round}");
    }
}

/// Every endpoint is blocked and stays so, whatever the driver asks for, and the operator is told.
fn assert_all_blocked(daemon: &Daemon, guest: &mut Guest) {
    let is_blocked = || daemon.status()["driver_unknown"] == true;
    daemon.wait_for("the blocking", is_blocked);
    let blocked = || [EP, EP2].map(|endpoint| daemon.gpa_of(endpoint, 0x1234)) == [None; 2];
    assert!(blocked());
    assert_eq!(guest.attach(1, EP), wire::DEVERR);
    assert_eq!(guest.attach_bypass(2, EP2), wire::DEVERR);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), wire::NOENT);
    assert!(!guest.probe(EP).is_empty());
    for bypass in [0, 1] {
        guest.set_config(CONFIG_BYPASS, &[bypass]);
        assert!(blocked());
    }
    // A pause does not make the driver's state known.
    guest.stop_rings();
    guest.driver_ok();
    assert_eq!(guest.attach(1, EP), wire::DEVERR);
    assert!(blocked() && is_blocked() && daemon.domains().is_empty());
    let log = daemon.log();
    assert!(log.contains("all endpoints are blocked"), "{log}");
    let socket = daemon.control_socket();
    let program = env!("CARGO_BIN_EXE_vhost-device-iommu");
    let mut ctl = Command::new(program);
    let output = ctl.arg("ctl").arg(socket).arg("status").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ALL ENDPOINTS ARE BLOCKED"), "{text}");
}

/// A driver starts anew, and has endpoints in bypass mode and in a domain.
fn assert_new_driver(daemon: &Daemon, guest: &mut Guest) {
    guest.reboot();
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
    assert_eq!(daemon.gpa_of(EP2, 0x1234), Some(0x1234));
    assert_eq!(daemon.status()["driver_unknown"], false);
}

/// The VMM shares memory before it starts the ring, and only the index of the ring tells whether its driver has domains
/// that the daemon does not have.
#[test]
fn endpoints_are_blocked_until_a_driver_has_started_on_a_connection() {
    let daemon = Daemon::start();
    let is_awaited = |daemon: &Daemon| daemon.status()["driver_awaited"] == true;
    assert!(!is_awaited(&daemon), "no VMM");
    for visit in 0..3 {
        let mut guest = Guest::connect(&daemon, Setup::default());
        daemon.wait_for("the VMM", || is_awaited(&daemon));
        guest.set_config(CONFIG_BYPASS, &[1]);
        let reached = [EP, EP2].map(|endpoint| daemon.gpa_of(endpoint, 0x1234));
        assert_eq!(reached, [None; 2], "visit {visit}");
        // Without a kick: a driver may never send a request. The worker finds the ring disabled first.
        guest.accept_features();
        guest.start_ring(1);
        guest.set_up_ring(0);
        thread::sleep(Duration::from_millis(50));
        assert!(is_awaited(&daemon), "visit {visit}");
        let enabled = guest.frontend.set_vring_enable(0, true);
        enabled.expect("enabled");
        daemon.wait_for_driver();
        assert_eq!(daemon.gpa_of(EP, 0x1234), Some(0x1234));
        // Between two drivers of a connection there is no doubt.
        guest.stop_rings();
        assert_eq!(daemon.gpa_of(EP, 0x1234), Some(0x1234));
        drop(guest);
        daemon.wait_for("the disconnection", || !connected(&daemon));
    }
}

#[test]
fn a_driver_of_another_daemon_is_blocked_until_it_starts_anew() {
    let daemon = Daemon::start();
    for index in [1, 7, u16::MAX] {
        let mut guest = Guest::connect(&daemon, Setup::default());
        assert_eq!(daemon.status()["driver_unknown"], false);
        guest.move_requests_to(index);
        guest.driver_ok();
        assert_all_blocked(&daemon, &mut guest);
        assert_new_driver(&daemon, &mut guest);
    }
    // The next VMM has a driver of its own.
    let mut guest = Guest::connect(&daemon, Setup::default());
    guest.move_requests_to(3);
    guest.driver_ok();
    assert_eq!(guest.attach(1, EP), wire::DEVERR);
    drop(guest);
    daemon.wait_for("the disconnection", || !connected(&daemon));
    assert_eq!(daemon.status()["driver_unknown"], false);
    let mut guest = Guest::boot(&daemon);
    assert_new_driver(&daemon, &mut guest);
}

#[test]
fn a_driver_of_a_restored_snapshot_is_blocked_until_it_starts_anew() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    let now = guest.stop_rings()[0];
    // The snapshot is of the same driver at another time.
    guest.move_requests_to(now + 5);
    guest.driver_ok();
    assert_all_blocked(&daemon, &mut guest);
    assert_new_driver(&daemon, &mut guest);
}

#[test]
fn a_new_driver_with_other_features_starts_anew() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    guest.features &= !F_EVENT_IDX;
    guest.stop_rings();
    guest.clear_rings();
    guest.requests.event_idx = false;
    guest.events.event_idx = false;
    guest.driver_ok();
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), wire::NOENT);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
}

#[test]
fn a_pause_at_the_wrap_of_the_index_is_no_reset() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let layout = Layout::plain(36, TAIL);
    assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
    // Sends up to a multiple of 65536 requests, in batches; all but two are refused as overlaps.
    let map = wire::map(1, 0x1000, 0x1fff, 0x5000, RW);
    let mut left = 0x1_0000 - 2;
    while left > 0 {
        let count = left.min(100);
        for _ in 0..count {
            guest.submit(&map, &layout);
        }
        guest.kick();
        for _ in 0..count {
            assert_eq!(guest.complete().1.status(), wire::INVAL);
        }
        left -= count;
    }
    assert_eq!(guest.requests.used_idx, 0);
    assert_eq!(guest.stop_rings()[0], 0);
    guest.driver_ok();
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x5000));
    assert_eq!(guest.unmap(1, 0x1000, 0x1fff), OK);
}

#[test]
fn a_disconnect_leaves_a_clean_slate_for_the_next_vmm() {
    let daemon = Daemon::start();
    let at_boot = Guest::connect(&daemon, Setup::default()).config().bypass;
    for round in 0..5 {
        let mut guest = Guest::boot(&daemon);
        assert!(connected(&daemon));
        assert_eq!(guest.config().bypass, at_boot, "round {round}");
        assert!(daemon.domains().is_empty(), "round {round}");
        guest.set_config(CONFIG_BYPASS, &[1 - at_boot]);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map_page(1, 0x1000, 0x5000), OK);
        assert_eq!(guest.config().bypass, 1 - at_boot);
        drop(guest);
        daemon.wait_for("the disconnect", || !connected(&daemon));
        assert!(daemon.domains().is_empty());
        assert_eq!(daemon.status()["bypass"], at_boot == 1);
        assert_eq!(daemon.endpoint(EP)["state"], "unattached");
    }
}

#[test]
fn memory_can_be_added_and_removed_under_a_mapping() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let new = 0x2_0000_0000;
    assert_eq!(guest.map_page(1, 0x1000, LOW_LEN - 0x1000), OK);
    assert_eq!(guest.map_page(1, 0x2000, HIGH_RAM), OK);
    assert_eq!(guest.map_page(1, 0x3000, new), OK);
    assert!(backed(&daemon, 0x1000) && backed(&daemon, 0x2000) && !backed(&daemon, 0x3000));
    guest.add_region(Region::new(new, 1 << 20));
    assert!(backed(&daemon, 0x3000));
    // A request in the memory that was just added.
    let at = new + 0x800;
    guest
        .memory
        .write(at, &wire::map(1, 0x4000, 0x4fff, new, RW));
    let descs = [
        (0, common::ring::Desc::new(at, 36, common::ring::NEXT, 1)),
        (
            1,
            common::ring::Desc::new(at + 64, 4, common::ring::WRITE, 0),
        ),
    ];
    assert_eq!(guest.raw_chain(0, &descs), 4);
    assert!(backed(&daemon, 0x4000));
    guest.remove_region(HIGH_RAM);
    assert!(!backed(&daemon, 0x2000) && backed(&daemon, 0x1000) && backed(&daemon, 0x3000));
    let region = guest.remove_region(new);
    assert!(!backed(&daemon, 0x3000));
    // The request and its tail now lie outside memory.
    for &(index, desc) in &descs {
        guest.requests.set_desc(&guest.memory, index, desc);
    }
    assert_eq!(guest.raw_chain(0, &[]), 0);
    guest.add_region(region);
    assert!(backed(&daemon, 0x3000));
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
}

#[test]
fn requests_are_served_once_the_memory_of_their_ring_is_back() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    // The driver still has the memory that the daemon has lost.
    let rings = guest.remove_region(RING_RAM);
    guest.memory.regions.push(rings);
    let layout = Layout::plain(36, TAIL);
    guest.submit(&wire::map(1, 0x1000, 0x1fff, 0x1000, RW), &layout);
    guest.requests.kick_always();
    thread::sleep(Duration::from_millis(50));
    assert!(daemon.mappings(1).is_empty());
    // The driver does not kick again: it has kicked already, and waits.
    let rings = guest.memory.regions.pop().expect("the rings");
    guest.add_region(rings);
    let (_, reply) = guest.complete();
    assert_eq!(reply.status(), OK);
    assert_eq!(daemon.mappings(1).len(), 1);
    // The device has not stopped the ring, either.
    let bases = guest.stop_rings();
    assert_eq!(bases[0], 2);
    guest.driver_ok();
    assert_eq!(guest.map_page(1, 0x2000, 0x2000), OK);
}

#[test]
fn a_new_memory_table_replaces_the_old() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, 0x1000, HIGH_RAM + HIGH_LEN - 0x1000), OK);
    assert!(backed(&daemon, 0x1000));
    use vhost::VhostBackend;
    let high = guest.memory.regions.pop().unwrap();
    let infos: Vec<_> = guest.memory.regions.iter().map(Region::info).collect();
    guest.frontend.set_mem_table(&infos).unwrap();
    assert!(!backed(&daemon, 0x1000));
    assert_eq!(guest.map_page(1, 0x2000, 0), OK);
    guest.memory.regions.push(high);
    let infos: Vec<_> = guest.memory.regions.iter().map(Region::info).collect();
    guest.frontend.set_mem_table(&infos).unwrap();
    assert!(backed(&daemon, 0x1000));
    assert_eq!(guest.map_page(1, 0x3000, 0), OK);
}

#[test]
fn slots_change_in_the_middle_of_traffic() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let layout = Layout::plain(36, TAIL);
    let new = 0x2_0000_0000;
    for round in 0..200_u64 {
        for page in 0..100 {
            let first = (1 + page) << 12;
            let map = wire::map(1, first, first + 0xfff, new + first, RW);
            guest.submit(&map, &layout);
        }
        guest.kick();
        if round % 2 == 0 {
            guest.add_region(Region::new(new, 1 << 20));
        } else {
            guest.remove_region(new);
        }
        assert_eq!(guest.config().reserved, [0; 3]);
        for _ in 0..100 {
            assert_eq!(guest.complete().1.status(), OK);
        }
        assert_eq!(backed(&daemon, 0x1000), round % 2 == 0);
        assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    }
}

#[test]
fn many_slots_of_one_file() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let file = Arc::new(memfd(64 << 12));
    let base = 0x10_0000_0000;
    // Every other page of a range, so that no two slots are adjacent.
    for slot in 0..64 {
        let gpa = base + (slot << 13);
        guest.add_region(Region::of_file(gpa, 0x1000, Arc::clone(&file), slot << 12));
    }
    assert_eq!(guest.map(1, base, base + 0xf_ffff, base, RW), OK);
    for slot in 0..64 {
        assert!(backed(&daemon, base + (slot << 13)));
        assert!(!backed(&daemon, base + (slot << 13) + 0x1000));
    }
    for slot in (0..64).step_by(2) {
        guest.remove_region(base + (slot << 13));
    }
    for slot in 0..64 {
        assert_eq!(backed(&daemon, base + (slot << 13)), slot % 2 == 1);
    }
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
}

#[test]
fn the_control_socket_answers_while_requests_run() {
    let daemon = Daemon::start();
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let layout = Layout::plain(36, TAIL);
    for round in 0..40_u64 {
        for page in 0..100 {
            let first = (1 + round * 100 + page) << 12;
            guest.submit(&wire::map(1, first, first + 0xfff, 0, RW), &layout);
        }
        guest.kick();
        let seen = daemon.mappings(1).len() as u64;
        assert!(seen >= round * 100 && seen <= (round + 1) * 100);
        for _ in 0..100 {
            assert_eq!(guest.complete().1.status(), OK);
        }
    }
    let status = daemon.status();
    let domain = &status["domains"][0];
    assert_eq!(domain["mappings"], 4000, "{domain}");
    assert_eq!(domain["mapped_bytes"], 4000 * 4096, "{domain}");
    let used = status["arena"]["used_bytes"].as_u64().unwrap();
    assert!(used >= 4000 * 8, "{used}");
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    let used_after = daemon.status()["arena"]["used_bytes"].as_u64().unwrap();
    assert!(used_after < used, "{used_after}: the tables are freed");
}

#[test]
fn the_control_socket_survives_garbage() {
    let daemon = Daemon::start();
    for request in [
        "",
        "nonsense",
        "translate",
        "translate 48",
        "translate 48 zz",
        "translate 99999999999999999999 0x0",
        "mappings -1",
        "mappings 4294967296",
        "status status",
        "\0\0\0",
    ] {
        let text = daemon.control_text(request);
        assert!(text.len() < 4096, "{request:?}: {text}");
    }
    let long = "a".repeat(1 << 20);
    use std::io::Write;
    let mut stream = UnixStream::connect(daemon.control_socket()).unwrap();
    // The daemon may close the connection before it has read all of this.
    let _ = stream.write_all(long.as_bytes());
    drop(stream);
    let idle: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(daemon.control_socket()).unwrap())
        .collect();
    let mut guest = Guest::connect(&daemon, Setup::default());
    guest.driver_ok();
    assert_eq!(guest.attach(1, EP), OK);
    drop(idle);
    assert_eq!(daemon.status()["version"], 1);
}

#[test]
fn sigterm_ends_the_daemon_cleanly_and_removes_its_sockets() {
    for booted in [false, true] {
        let daemon = Daemon::start();
        let guest = booted.then(|| Guest::boot(&daemon));
        // Neither a connected VMM nor a silent control client delays the end.
        let _client = UnixStream::connect(daemon.control_socket()).unwrap();
        daemon.terminate();
        assert_eq!(daemon.wait_for_end().code(), Some(0));
        assert!(!daemon.socket().exists() && !daemon.control_socket().exists());
        drop(guest);
    }
}

/// SIGTERM comes at any moment: before the daemon makes its sockets, between the two, or while it starts its threads.
#[test]
#[expect(unsafe_code, reason = "the standard library sends SIGKILL only")]
fn a_sigterm_during_the_start_leaves_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    let sockets = ["vhost.sock", "control.sock"].map(|name| directory.path().join(name));
    let mut orderly = 0;
    for round in 0..60 {
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
            .arg("--socket-path")
            .arg(&sockets[0])
            .arg("--control-path")
            .arg(&sockets[1])
            .args(["--iommu", "00:05.0", "--endpoint", "00:06.0"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        match round % 3 {
            0 => thread::sleep(Duration::from_micros(200 * round)),
            which => {
                let deadline = Instant::now() + Duration::from_secs(30);
                let socket = &sockets[usize::try_from(which).unwrap() - 1];
                while !socket.exists() {
                    assert!(Instant::now() < deadline, "no socket");
                }
            }
        }
        let pid = libc::pid_t::try_from(daemon.id()).unwrap();
        // SAFETY: no pointer is passed, and the child is not reaped yet.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        let status = daemon.wait().unwrap();
        // Without an exit code, the signal came before its handler was installed, thus before the
        // sockets.
        assert!(matches!(status.code(), Some(0) | None), "{status}");
        assert!(sockets.iter().all(|socket| !socket.exists()), "{status}");
        orderly += u32::from(status.success());
    }
    assert!(orderly >= 40, "{orderly} of 60 ended in order");
}

#[test]
#[expect(unsafe_code, reason = "lets a child inherit a descriptor")]
fn an_inherited_listening_socket_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vhost.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // SAFETY: the descriptor is open; no pointer is passed.
    let kept_open = unsafe { libc::fcntl(listener.as_raw_fd(), libc::F_SETFD, 0) };
    assert_eq!(kept_open, 0);
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .args(["--fd", &listener.as_raw_fd().to_string()])
        .args(["--iommu", "00:05.0", "--endpoint", "00:06.0"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(listener);
    for _ in 0..2 {
        let mut guest = Guest::connect_to(&path, Setup::default());
        guest.driver_ok();
        assert_eq!(guest.attach(1, EP), OK);
    }
    let pid = libc::pid_t::try_from(daemon.id()).unwrap();
    // SAFETY: no pointer is passed, and the child is not reaped yet.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    assert!(
        path.exists(),
        "the daemon must not remove an inherited socket"
    );
}

#[test]
fn a_descriptor_that_does_not_listen_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .args(["--fd", "0", "--iommu", "00:05.0"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("descriptor 0 cannot be used"), "{text}");
    assert!(
        text.contains("pass a listening Unix stream socket"),
        "{text}"
    );
}
